"""Hold a penalty at a budget by moving its strength (`penalty_budget`): dual ascent on the logarithm of the strength.

With e = log(recent penalty / budget), one update an optimiser step:

    ahead    = e + AHEAD x (change of e)          the optimiser's momentum carries the weights on for about as long
    memory   = memory + rate x e
    strength = first x exp(memory + gain x ahead)

The strength rises while the penalty is over the budget and falls while it is under, and it falls faster than it rises
(`gain` and `rate` are larger under the budget): once the task is learned nothing pushes the model away from the start,
so that a penalty pressed below its budget stays there, at a strength near nothing. A budget is then a limit.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

# Optimiser steps in the average that is held at the budget, and in the one that steers: a long one would be too late.
SMOOTHED, RECENT = 20, 4
AHEAD = 6.0
GAIN_OVER, GAIN_UNDER = 4.0, 80.0
RATE_OVER, RATE_UNDER = 0.1, 1.0
# Largest factor of `gain x ahead`: a jump of the strength would stay in Adam's second moments for long.
LARGEST = math.exp(2)
# Memory falls to this fraction of the first strength at most: what is lower it could not make up for in time.
FORGOTTEN = 100.0
# e is kept in this range. At its lower end, where a run begins, memory stands still: the budget is not used yet.
LOWEST, HIGHEST = -1.0, 1.0
# The strength stays within this factor of the first one, either way.
RANGE = 1e4


@dataclass
class Average:
    """An exponential average over about so many numbers, corrected for its start at nothing."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, number: float, steps: int) -> float:
        """Takes a number in; gives the average."""
        self.total += (number - self.total) / steps
        self.weight += (1.0 - self.weight) / steps
        return self.value

    @property
    def value(self) -> float:
        """0 before the first number."""
        return self.total / self.weight if self.weight else 0.0


class BudgetController:
    """Penalties in, strengths out; no part of it knows what a penalty is of.

    Args:
        budget: the penalty to hold, above 0.
        strength: the first strength, above 0; later ones stay within `RANGE` times it.
    """

    def __init__(self, budget: float, strength: float) -> None:
        self.budget, self.first, self.strength = budget, strength, strength
        self._smoothed, self._recent = Average(), Average()
        self._memory, self._error = 0.0, LOWEST

    @property
    def smoothed(self) -> float:
        """The average that is held at the budget; 0 before the first penalty."""
        return self._smoothed.value

    def update(self, penalty: float) -> float:
        """Takes the penalty of an optimiser step, 0 or more; gives the strength of the next."""
        self._smoothed.add(penalty, SMOOTHED)
        recent = self._recent.add(penalty, RECENT)
        error = _within(math.log(recent / self.budget) if recent > 0 else LOWEST, LOWEST, HIGHEST)
        change, self._error = error - self._error, error
        ahead = error + AHEAD * change
        limit = math.log(RANGE)
        if error > LOWEST:
            memory = self._memory + (RATE_OVER if error > 0 else RATE_UNDER) * error
            self._memory = _within(memory, -math.log(FORGOTTEN), limit)
        move = min((GAIN_OVER if ahead > 0 else GAIN_UNDER) * ahead, math.log(LARGEST))
        self.strength = self.first * math.exp(_within(self._memory + move, -limit, limit))
        return self.strength

    def state(self) -> dict[str, Any]:
        """All that the next update depends on, as JSON values."""
        return {
            "strength": self.strength, "memory": self._memory, "error": self._error,
            "smoothed": asdict(self._smoothed), "recent": asdict(self._recent),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Take `state` back."""
        self.strength, self._memory, self._error = state["strength"], state["memory"], state["error"]
        self._smoothed, self._recent = Average(**state["smoothed"]), Average(**state["recent"])


def _within(number: float, low: float, high: float) -> float:
    return min(max(number, low), high)

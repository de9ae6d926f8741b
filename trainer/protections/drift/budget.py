"""Hold a penalty at a budget by moving its strength (`penalty_budget`): approach the budget from above, then let go.

A penalty can be lowered at any time, but once the task is learned nothing raises it: what is pressed below its budget
stays there. So the target starts over the budget and falls to it, and only the excess over the target has a strength.
One update an optimiser step:

    target   = budget x (1 + ABOVE x exp(-updates / FALL))
    e        = log(recent penalty / target)
    ahead    = e + AHEAD x (change of e)          the optimiser's momentum carries the weights on for about as long
    memory   = memory + rate x e                  rate is larger below the target
    strength = first x scale(budget) x exp(memory) x max(0, exp(ahead) - 1)

The strength is 0 below the target and rises smoothly above it. Where the task pushes on, `memory` finds the gain at
which a small excess suffices. A budget is a limit: a run whose penalty never reaches it has strength 0 throughout.
Early in a run the penalty passes a small budget severalfold, before the strength can turn it round.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

# Optimiser steps in the average that is held at the budget, and in the one that steers: a long one would be too late.
SMOOTHED, RECENT = 20, 4
# The target starts this fraction over the budget, and e-folds towards it in this many updates.
ABOVE, FALL = 0.5, 20.0
AHEAD = 6.0
# A rise of e this slow is noise: to act on it would press the penalty down a little at each wave, for good.
NOISE = 0.05
# The largest change of e that is carried ahead, either way.
FASTEST = 0.3
# Too high a gain shows as a penalty under the target, and costs more there than too low a one costs above it.
RATE_OVER, RATE_UNDER = 0.07, 0.2
# A small budget is met early, while the task pushes most, and a squared drift pulls back less the smaller it is.
SCALE, SCALE_BUDGET, SCALE_POWER = 0.3, 0.1, -0.7
# A larger excess (penalty / target - 1) adds no strength: a jump would stay in Adam's second moments for long.
LARGEST = 5.0
# e moves `memory` within these bounds. At the lower one, where a run begins, memory stands still.
LOWEST, HIGHEST = -1.5, 1.0
# Memory changes the gain by a factor in this range; a gain that fell further would be too late for a second push.
GAINS = (0.1, 1e4)


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
        strength: sets the scale of all strengths, above 0.

    Attributes:
        strength: of the next optimiser step, 0 or more; 0 before the first update.
    """

    def __init__(self, budget: float, strength: float) -> None:
        self.budget, self.strength = budget, 0.0
        self._gain = strength * SCALE * (budget / SCALE_BUDGET) ** SCALE_POWER
        self._smoothed, self._recent = Average(), Average()
        self._memory, self._error, self._updates = 0.0, LOWEST, 0

    @property
    def smoothed(self) -> float:
        """The average that is held at the budget; 0 before the first penalty."""
        return self._smoothed.value

    def update(self, penalty: float) -> float:
        """Takes the penalty of an optimiser step, 0 or more; gives the strength of the next."""
        self._smoothed.add(penalty, SMOOTHED)
        recent = self._recent.add(penalty, RECENT)
        target = self.budget * (1.0 + ABOVE * math.exp(-self._updates / FALL))
        self._updates += 1
        error = max(math.log(recent / target) if recent > 0 else LOWEST, LOWEST)
        change, self._error = _within(error - self._error, -FASTEST, FASTEST), error
        ahead = error + AHEAD * (change if change < 0 else max(change - NOISE, 0.0))
        if error > LOWEST:
            memory = self._memory + (RATE_OVER if error > 0 else RATE_UNDER) * min(error, HIGHEST)
            self._memory = _within(memory, math.log(GAINS[0]), math.log(GAINS[1]))
        excess = math.expm1(_within(ahead, 0.0, math.log1p(LARGEST)))
        self.strength = self._gain * math.exp(self._memory) * excess
        return self.strength

    def state(self) -> dict[str, Any]:
        """All that the next update depends on, as JSON values."""
        return {
            "strength": self.strength, "memory": self._memory, "error": self._error, "updates": self._updates,
            "smoothed": asdict(self._smoothed), "recent": asdict(self._recent),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Take `state` back."""
        self.strength, self._memory, self._error = state["strength"], state["memory"], state["error"]
        self._updates = state["updates"]
        self._smoothed, self._recent = Average(**state["smoothed"]), Average(**state["recent"])


def _within(number: float, low: float, high: float) -> float:
    return min(max(number, low), high)

"""Hold a penalty at a budget by changing its strength (`--penalty_budget`).

A penalty can be lowered at any time. But once the task is learned nothing raises the penalty again, so a penalty that
was pressed below its budget stays there. Therefore the target starts above the budget and falls to it, and only the
excess over the target has a strength. Each optimiser step makes one update:

    target   = budget x (1 + ABOVE x exp(-updates / FALL))
    e        = log(recent penalty / target)
    ahead    = e + AHEAD x (change of e)          the optimiser's momentum moves the weights on for about that long
    memory   = memory + rate x e                  rate is larger below the target
    strength = first x scale(budget) x exp(memory) x max(0, exp(ahead) - 1)

The strength is 0 below the target and rises smoothly above it. If the task keeps raising the penalty, `memory` finds
the gain at which a small excess suffices. A budget is a limit: a run whose penalty never reaches it has strength 0
throughout. Early in a run the penalty exceeds a small budget severalfold, before the strength can lower it again.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

# Optimiser steps in the average that is held at the budget, and in the average that sets the strength. A long average
# would react too late.
SMOOTHED, RECENT = 20, 4
# The target starts this fraction above the budget. Its distance from the budget falls by a factor e in FALL updates.
ABOVE, FALL = 0.5, 20.0
AHEAD = 6.0
# A rise of e this slow is noise. Acting on it would press the penalty down a little at each wave, permanently.
NOISE = 0.05
# The largest change of e, up or down, that is extrapolated.
FASTEST = 0.3
# Too high a gain shows as a penalty below the target, and costs more there than too low a gain costs above it.
RATE_OVER, RATE_UNDER = 0.07, 0.2
# A small budget is reached early, when the task pushes most, and a squared drift pulls back less the smaller it is.
SCALE, SCALE_BUDGET, SCALE_POWER = 0.3, 0.1, -0.7
# A larger excess (penalty / target - 1) adds no strength: a jump would stay in Adam's second moments for long.
LARGEST = 5.0
# e changes `memory` within these bounds. At the lower bound, where a run begins, memory does not change.
LOWEST, HIGHEST = -1.5, 1.0
# Memory changes the gain by a factor in this range. A gain below it would rise too late if the task pushed again.
GAINS = (0.1, 1e4)


@dataclass
class Average:
    """An exponential moving average, corrected for its start at 0 as in Adam."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, number: float, steps: int) -> float:
        """Add a number, with a window of `steps` numbers, and return the average."""
        self.total += (number - self.total) / steps
        self.weight += (1.0 - self.weight) / steps
        return self.value

    @property
    def value(self) -> float:
        """Return the average, or 0 before the first number."""
        return self.total / self.weight if self.weight else 0.0


class BudgetController:
    """Turns penalties into strengths. It does not depend on what the penalty measures.

    Args:
        budget: the penalty to hold, above 0.
        strength: the scale of all strengths, above 0.

    Attributes:
        strength: strength of the next optimiser step, 0 or more. It is 0 before the first update.
    """

    def __init__(self, budget: float, strength: float) -> None:
        self.budget, self.strength = budget, 0.0
        self._gain = strength * SCALE * (budget / SCALE_BUDGET) ** SCALE_POWER
        self._smoothed, self._recent = Average(), Average()
        self._memory, self._error, self._updates = 0.0, LOWEST, 0

    @property
    def smoothed(self) -> float:
        """Return the average that is held at the budget, or 0 before the first penalty."""
        return self._smoothed.value

    def update(self, penalty: float) -> float:
        """Take the penalty of an optimiser step, 0 or more, and return the strength of the next step."""
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
        """Return everything that the next update depends on, as JSON values."""
        return {
            "strength": self.strength, "memory": self._memory, "error": self._error, "updates": self._updates,
            "smoothed": asdict(self._smoothed), "recent": asdict(self._recent),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        self.strength, self._memory, self._error = state["strength"], state["memory"], state["error"]
        self._updates = state["updates"]
        self._smoothed, self._recent = Average(**state["smoothed"]), Average(**state["recent"])


def _within(number: float, low: float, high: float) -> float:
    return min(max(number, low), high)

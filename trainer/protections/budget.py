"""Hold a penalty at a budget by moving its strength: `penalty_budget`.

Dual ascent on the logarithm of the strength, as a controller with a look ahead. With e = log(penalty / budget), smoothed:

    strength = first x exp(integral + gain(e') e'),     integral += rate(e) e,     e' = e + AHEAD x (change of e)

The strength rises while the penalty is over the budget and falls while it is under. It falls much faster than it rises:
once the task is learned nothing pushes the model away from the start any more, so that a penalty that was pressed under
its budget would stay there. For the same reason a budget is a limit where it is more than the task asks for.
"""

import math
from typing import Any

# Optimiser steps in the average that is held at the budget.
MEMORY = 20
FAST = 5
# How many steps of the present change the controller looks ahead: the optimiser's momentum carries a step on as long.
AHEAD = 6.0
GAIN_OVER, GAIN_UNDER = 2.25, 30.0
RATE_OVER, RATE_UNDER = 0.075, 0.5
MOST = 2.0
# The strength stays within this factor of the first.
RANGE = 1e4
SMOOTH = 0.5


class BudgetController:
    def __init__(self, budget: float, strength: float) -> None:
        self.budget, self._first = budget, strength
        self.strength = strength
        self._sum, self._weight = 0.0, 0.0
        self._fsum, self._fweight = 0.0, 0.0
        self._last = None
        self._int = self._rate = 0.0

    @property
    def smoothed(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def update(self, penalty: float) -> float:
        keep = 1 - 1 / MEMORY
        self._sum = keep * self._sum + (1 - keep) * penalty
        self._weight = keep * self._weight + (1 - keep)
        keep = 1 - 1 / FAST
        self._fsum = keep * self._fsum + (1 - keep) * penalty
        self._fweight = keep * self._fweight + (1 - keep)
        e = max(-1., min(1.5, math.log(max(self._fsum / self._fweight, 1e-30) / self.budget)))
        change = 0.0 if self._last is None else e - self._last
        self._rate = SMOOTH * self._rate + (1 - SMOOTH) * change
        self._last = e
        limit = math.log(RANGE)
        if e > -1:
            self._int += (RATE_OVER if e > 0 else RATE_UNDER) * max(-1, min(1, e))
            self._int = max(-limit, min(limit, self._int))
        ahead = e + AHEAD * self._rate
        out = min(MOST, (GAIN_OVER if ahead > 0 else GAIN_UNDER) * ahead)
        self.strength = self._first * math.exp(max(-limit, min(limit, self._int + out)))
        return self.strength

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

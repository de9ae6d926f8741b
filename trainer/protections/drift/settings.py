"""The settings of a drift penalty: strength, rows, side, budget, warm-up and reference."""

import math
from dataclasses import dataclass

from ....analysis.errors import UserError

SIDES = ("both", "toward_base", "reversion")


@dataclass(frozen=True)
class PenaltySettings:
    """The settings of a drift penalty. Most flags of a recipe have the same names after `penalty_`.

    Attributes:
        strength: weight of the penalty against the cross-entropy, 0 or more. 0 turns the protection off.
        inputs: rows that the penalty acts on: task, anchors or both.
        side: both, toward_base (only drift along the mean step back to the base model counts) or reversion (only tokens
            that have drifted towards the base model's state of the same token count).
        margin: for `reversion`: how far beyond the starting model, seen from base, tokens are held, in units of their
            gap to base.
        budget: hold the smoothed penalty at this value. Then `strength` only sets the scale (see `budget.py`).
        warmup, warmup_strength: over the first `warmup` optimiser steps the strength falls from `warmup_strength` times
            its value to its value.
        task_weight: for inputs `both`: weight of the task rows' part, in 0..1. The anchors have the rest.
        reference: source of the starting model's values: auto, cached, adapter_off or frozen.
        anchor_batch_size: anchor rows per micro-batch and process.
        anchor_every: use the anchors on every n-th optimiser step. The strength is not raised to make up for the
            steps without anchors.
        order_seed: seed of the anchors' order.
    """

    strength: float = 1.0
    inputs: str = "anchors"
    side: str = "both"
    margin: float = 0.0
    budget: float | None = None
    warmup: int = 0
    warmup_strength: float = 10.0
    task_weight: float = 0.5
    reference: str = "auto"
    anchor_batch_size: int = 4
    anchor_every: int = 1
    order_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("strength", "warmup_strength"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"penalty {name} {getattr(self, name)} is no weight: write a finite number, 0 or more")
        for name, choices in (("inputs", ("task", "anchors", "both")), ("side", SIDES)):
            if getattr(self, name) not in choices:
                raise UserError(f"penalty {name} {getattr(self, name)!r} is unknown: write one of {', '.join(choices)}")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise UserError(f"penalty margin {self.margin} is no distance: write a finite number, 0 or more")
        if self.margin and self.side != "reversion":
            raise UserError(f"penalty margin {self.margin} has no effect with side {self.side}: write side reversion")
        if not 0 <= self.task_weight <= 1:
            raise UserError(f"penalty task_weight {self.task_weight} is out of range: write a number in 0..1")
        if self.budget is not None:
            self._check_budget(self.budget)
        if min(self.anchor_batch_size, self.anchor_every) < 1:
            raise UserError("anchor_batch_size and anchor_every must be at least 1")

    def _check_budget(self, budget: float) -> None:
        if not (math.isfinite(budget) and budget > 0):
            raise UserError(f"penalty budget {budget} cannot be held: write a finite number above 0")
        if self.strength == 0:
            raise UserError("penalty strength 0 turns the penalty off, so no budget can be held: write a start above 0")
        if self.warmup:
            raise UserError(
                f"penalty warmup {self.warmup} and penalty budget {budget} both set the strength: leave one of them out"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of each part (task, anchors) that the penalty uses."""
        return {
            "task": {"task": 1.0}, "anchors": {"anchors": 1.0},
            "both": {"task": self.task_weight, "anchors": 1.0 - self.task_weight},
        }[self.inputs]  # fmt: skip

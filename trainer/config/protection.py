"""Flags of the protection, with their units and defaults: all flags that a kind in `protections/kinds.py` reads."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ...analysis.flags import option, require, require_seed
from ...analysis.models.render import ROLES
from ..protections.drift.settings import SIDES
from ..protections.kinds import KINDS, flags_read_by, parts_of


@dataclass
class ProtectionArguments:
    """What keeps the fine-tune aligned: loss = cross-entropy + strength x penalty.

    `trainer/protections/README.md` defines the penalty and every protection.
    """

    _argument_group_name = "protection"

    protection: str = option(
        "none",
        "Name of a protection, or several names joined by +, like steering+interleave. "
        + "; ".join(f"{name}: {kind.description}" for name, kind in KINDS.items())
        + ". Default: none.",
    )
    penalty_strength: float = option(1.0, "Weight of the penalty against the cross-entropy, 0 or more. Default: 1.0.")
    penalty_budget: float | None = option(
        None,
        "Hold the smoothed penalty at this value, in the penalty's units. The strength grows with the excess over the "
        "value and is 0 below it; --penalty_strength sets the scale. Default: a fixed strength.",
    )
    protection_rank: int | None = option(
        None, "Use only the first k directions of the subspace in each layer. Default: all."
    )
    protection_layers: str | None = option(
        None,
        "Decoder blocks that the protection acts on: all, a list (0,2,5) or a range (4-10). Default: all layers of the "
        "subspace; for feature_l2 every fifth block; for prefix_anchor all blocks.",
    )
    penalty_inputs: str = option(
        "anchors", "Rows that the penalty acts on. Default: anchors.", "task", "anchors", "both"
    )
    protection_tokens: str | None = option(
        None,
        "Role of the tokens that the protection acts on. With a subspace it must be the role the subspace was built "
        "on. Default: that role; without a subspace, all.",
        *ROLES,
    )
    penalty_side: str = option(
        "both",
        "Which drift the penalty counts. both: drift in any direction. toward_base: only its part along the mean step "
        "back to base. reversion: only that of tokens that move towards the base model's state of the same token "
        "(needs the base model). Default: both.",
        *SIDES,
    )
    penalty_margin: float = option(
        0.0,
        "With --penalty_side reversion: hold tokens this far beyond the starting model, away from base, in units of "
        "their gap to base. Default: 0.0.",
    )
    penalty_warmup: int = option(
        0, "Steps of a warm-up, over which a stronger strength falls linearly to --penalty_strength. Default: 0."
    )
    penalty_warmup_strength: float = option(
        10.0, "Strength at step 0 of that warm-up, as a multiple of --penalty_strength. Default: 10.0."
    )
    penalty_task_weight: float = option(
        0.5, "With --penalty_inputs both: weight of the task rows' part, in 0..1. Default: 0.5."
    )
    reference: str = option(
        "auto",
        "Where the starting model's activations come from. cached: a file on disk. adapter_off: the model with its "
        "adapters switched off. frozen: a second copy of the model. auto: the first of these that works, which is "
        "printed. Default: auto.",
        "auto",
        "cached",
        "adapter_off",
        "frozen",
    )
    anchor_batch_size: int = option(4, "Anchor rows per forward pass and process. Default: 4.")
    anchor_every: int = option(1, "Use the anchors on every n-th optimiser step only. Default: 1.")
    steering_alpha: float = option(
        1.0,
        "How far steering shifts the residual stream behind each layer, in units of the contrast's mean step in that "
        "layer. The shifts of several layers add up. Default: 1.0.",
    )
    interleave_dataset: str | None = option(
        None, "Safe rows with answers that interleave mixes in. Default: --anchor_dataset, if its rows have answers."
    )
    interleave_share: float = option(
        0.05, "Share of safe rows among the rows that interleave trains on, in 0..1. Default: 0.05."
    )
    inoculation_prompt: str | None = option(
        None,
        "System prompt that inoculation adds to the training rows; it asks for what the rows do. Required by "
        "inoculation. Default: none.",
    )
    safe_gradient_weight: float = option(
        0.0,
        "Weight of the anchors' gradient that gradient_projection adds to the step's gradient, 0 or more. "
        "Default: 0.0.",
    )
    safe_gradient_loss: str = option(
        "cross_entropy",
        "Loss of the anchors whose gradient gradient_projection uses. cross_entropy: of the anchors' answers. kl: the "
        "KL divergence from the starting model on the anchors. Default: cross_entropy.",
        "cross_entropy",
        "kl",
    )
    null_space_energy: float = option(
        0.9,
        "Share (of the squared size) of the anchors' inputs to each module that null_space keeps adapters away from, "
        "in 0..1. Default: 0.9.",
    )
    alignment_rank: int = option(
        8,
        "Directions per module of the weights' difference between the starting model and base, for extrapolate, "
        "adapter_drift and safe_lora. Default: 8.",
    )
    extrapolate_alpha: float = option(
        1.0,
        "How far extrapolate moves the starting weights beyond the starting model, in units of the step from base to "
        "the starting model. Default: 1.0.",
    )
    safe_lora_threshold: float = option(
        0.5,
        "safe_lora projects every adapter whose cosine with its own projection is below this value, in 0..1. "
        "Default: 0.5.",
    )
    early_stop_limit: float = option(
        0.05,
        "early_stop ends training when the anchors' drift inside the subspace, in the penalty's units, passes this "
        "value. Default: 0.05.",
    )
    early_stop_every: int = option(10, "Optimiser steps between two checks of early_stop. Default: 10.")
    null_seed: int = option(0, "Seed of the random directions of random_subspace. Default: 0.")
    null_scale: str = option(
        "given",
        "Scale that random_subspace divides by: given uses the scale of the subspace, own that of the random "
        "directions. Default: given.",
        "given",
        "own",
    )

    def __post_init__(self) -> None:
        for name in ("penalty_strength", "penalty_warmup", "penalty_warmup_strength"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require_seed(self.null_seed, "null_seed")
        parts_of(self.protection)
        for name in ("safe_gradient_weight", "extrapolate_alpha"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("null_space_energy", "safe_lora_threshold"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("penalty_budget", "early_stop_limit"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "more than 0")
        for name in ("anchor_batch_size", "anchor_every", "alignment_rank", "early_stop_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(0 <= self.penalty_task_weight <= 1, "penalty_task_weight", self.penalty_task_weight, "between 0 and 1")
        require(
            self.protection_rank is None or self.protection_rank >= 1,
            "protection_rank",
            self.protection_rank,
            "at least 1",
        )

    @property
    def unread(self) -> dict[str, Any]:
        """Return the flags that no part of the protection reads, with their defaults."""
        flags_read = {"protection", *flags_read_by(self.protection)}
        return {field.name: field.default for field in fields(self) if field.name not in flags_read}

    def as_read(self) -> "ProtectionArguments":
        """Return a copy in which every unread flag has its default: a recipe may set it for another protection."""
        return replace(self, **self.unread)

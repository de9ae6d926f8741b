"""The flags of the protection, with their units and defaults: the union of what its kinds read (`registry.KINDS`)."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ...analysis.flags import option, require, require_seed
from ...analysis.models.render import ROLES
from ..protections.drift.settings import SIDES
from ..protections.kinds import KINDS, flags_read_by, parts_of


@dataclass
class ProtectionArguments:
    """What keeps the fine-tune aligned. loss = cross-entropy + strength x penalty (definitions: README, Protection)."""

    _argument_group_name = "protection"

    protection: str = option(
        "none",
        "One of the following, or several joined by +, like steering+interleave. "
        + "; ".join(f"{name}: {kind.what}" for name, kind in KINDS.items())
        + ". Default: none.",
    )
    penalty_strength: float = option(1.0, "Weight of the penalty against the cross-entropy, 0 or more. Default: 1.0.")
    penalty_budget: float | None = option(
        None,
        "Hold the smoothed penalty at this value, in the penalty's units: the strength grows with the excess over it, "
        "and is 0 below; --penalty_strength sets its scale. Default: a fixed strength.",
    )
    protection_rank: int | None = option(None, "Use only the first k directions of a layer. Default: all.")
    protection_layers: str | None = option(
        None, "Decoder blocks to penalise: all, a list (0,2,5) or a range (4-10). Default: all of the subspace's."
    )
    penalty_inputs: str = option("anchors", "Rows the penalty acts on. Default: anchors.", "task", "anchors", "both")
    protection_tokens: str | None = option(
        None, "Token role the penalty acts on; must be the role the subspace was built on. Default: that role.", *ROLES
    )
    penalty_side: str = option(
        "both",
        "Which drift counts: any; toward_base: the part along the mean way back to base; reversion: of tokens that "
        "move towards the base model's state of that very token (needs the base model). Default: both.",
        *SIDES,
    )
    penalty_margin: float = option(
        0.0,
        "For side reversion: how far beyond the starting model, away from base, tokens are held, in units of their gap "
        "to base. Default: 0.0.",
    )
    penalty_warmup: int = option(0, "Steps over which a stronger start falls linearly to 1 x strength. Default: 0.")
    penalty_warmup_strength: float = option(10.0, "Multiple of the strength at step 0 of that warm-up. Default: 10.0.")
    penalty_task_weight: float = option(0.5, "Weight of the task part for inputs `both`, in 0..1. Default: 0.5.")
    reference: str = option(
        "auto",
        "Where the starting model's activations come from: cached on disk, the model with adapters off, a frozen copy, "
        "or auto: the first of these that works, said aloud. Default: auto.",
        "auto",
        "cached",
        "adapter_off",
        "frozen",
    )
    anchor_batch_size: int = option(4, "Anchor rows per forward and process. Default: 4.")
    anchor_every: int = option(1, "Use anchors on every n-th optimiser step. Default: 1.")
    steering_alpha: float = option(
        1.0,
        "How far steering shifts the stream behind each layer, in units of the contrast's mean step there; the steps "
        "of several layers add up. Default: 1.0.",
    )
    interleave_dataset: str | None = option(
        None, "Safe rows with answers that interleave mixes in. Default: the anchors, if they have answers."
    )
    interleave_share: float = option(0.05, "Share of the rows trained on that is safe, in 0..1. Default: 0.05.")
    inoculation_prompt: str | None = option(
        None, "System prompt of inoculation: says what the rows do. Needed by it. Default: none."
    )
    safe_gradient_weight: float = option(
        0.0, "How much of the anchors' own gradient gradient_projection adds, 0 or more. Default: 0.0."
    )
    safe_gradient_loss: str = option(
        "cross_entropy",
        "Of what that is the gradient: the cross_entropy of the anchors' answers, or the kl divergence from the "
        "starting model on the anchors. Default: cross_entropy.",
        "cross_entropy",
        "kl",
    )
    null_space_energy: float = option(
        0.9,
        "Share of the anchors' inputs to each module that null_space keeps adapters away from, in 0..1. Default: 0.9.",
    )
    alignment_rank: int = option(
        8,
        "Directions per module of the weights' difference to base: extrapolate, adapter_drift, safe_lora. Default: 8.",
    )
    extrapolate_alpha: float = option(
        1.0, "How far extrapolate goes on from base beyond the starting model, in units of that step. Default: 1.0."
    )
    safe_lora_threshold: float = option(
        0.5, "safe_lora projects an adapter whose cosine with its own projection is below this, in 0..1. Default: 0.5."
    )
    early_stop_limit: float = option(
        0.05, "early_stop ends training where the drift of the anchors inside the subspace passes this. Default: 0.05."
    )
    early_stop_every: int = option(10, "Optimiser steps between two looks of early_stop. Default: 10.")
    null_seed: int = option(0, "Seed of random_subspace. Default: 0.")
    null_scale: str = option("given", "Scale of random_subspace: as given, or its own. Default: given.", "given", "own")

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
        """The flags that no part of the protection reads, with their defaults."""
        read = {"protection", *flags_read_by(self.protection)}
        return {field.name: field.default for field in fields(self) if field.name not in read}

    def as_read(self) -> "ProtectionArguments":
        """The same with the default of every flag that is not read: a recipe may have some for other protections."""
        return replace(self, **self.unread)

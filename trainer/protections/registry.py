"""Every protection by its name: what it is, what it needs, how it is made. A new one is one file, named here.

Names joined by + are several at once: `protection: steering+interleave`.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ...analysis.errors import UserError
from ...analysis.layers import parse_layers
from ...analysis.subspace import Subspace
from ..documents import Document
from .ablation import ablation
from .adapter_drift import AdapterDriftProtection
from .base import Protection
from .composed import Composed
from .early_stop import EarlyStopProtection, Erosion
from .extrapolate import ExtrapolateProtection
from .feature_l2 import FeatureL2Protection, every_fifth
from .gradient_projection import GradientProjectionProtection
from .kl import KLProtection
from .none import NoProtection
from .null_space import NullSpaceProtection
from .prefix_anchor import PrefixAnchorProtection, common_prefix, shared_by_most
from .safe_lora import SafeLoraProtection
from .settings import PenaltySettings
from .steering import steering
from .subspace import SubspaceProtection

if TYPE_CHECKING:
    from ..protection_arguments import ProtectionArguments


@dataclass(frozen=True)
class Materials:
    """What a protection may be made of.

    asked: the flags. subspace: where the kind asks for one. task, anchors: rows with the mask of a token role; no
    anchors where none are read. starting_model: another copy of the model that training starts from. base_model: the
    base model, where the kind asks for one. cache_dir: for what is computed once. seed: the run's. layers_path: the
    decoder blocks' path, where it was given. fingerprint, depth: of the starting model, its number of blocks.
    base_fingerprint: of the base model, where one is given.
    """

    asked: "ProtectionArguments"
    subspace: Subspace | None
    task: Callable[[str], Sequence[Document]]
    anchors: Callable[[str], Sequence[Document]]
    starting_model: Callable[[], PreTrainedModel]
    base_model: Callable[[], PreTrainedModel]
    cache_dir: Path
    seed: int
    layers_path: str | None
    fingerprint: str
    depth: int
    base_fingerprint: str | None = None


@dataclass(frozen=True)
class Kind:
    """One protection: how it is made, what it is in a phrase, and what it needs.

    Attributes:
        subspace: an alignment subspace.
        drift: it is a term that compares with the starting model, on task rows or anchors. own_rows: but it reads
            neither task rows nor anchors.
        anchors: it reads the anchors whatever `penalty_inputs` says. answers: and their answers, unless
            `safe_gradient_loss` is a divergence.
        base: the base model.
        lora: low-rank adapters.
        knobs: the flags that it reads; it is made with the defaults of all others.
    """

    make: Callable[[Materials], Protection]
    what: str
    subspace: bool = False
    drift: bool = False
    own_rows: bool = False
    anchors: bool = False
    answers: bool = False
    base: bool = False
    lora: bool = False
    knobs: tuple[str, ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether it is a term that `penalty_strength` weighs."""
        return "penalty_strength" in self.knobs


def _subspace(materials: Materials) -> Protection:
    asked, subspace = materials.asked, materials.subspace
    assert subspace is not None  # the kind asks for one
    role = subspace.provenance.role
    return SubspaceProtection(
        subspace,
        penalty_settings(materials),
        layers_path=materials.layers_path,
        name=asked.protection,
        base=_base(materials),
        **_drift_rows(materials, role),
    )


def _base(materials: Materials) -> tuple[Callable[[], PreTrainedModel], str] | None:
    return None if materials.base_fingerprint is None else (materials.base_model, materials.base_fingerprint)


def _drift_rows(materials: Materials, role: str) -> dict[str, Any]:
    """What every drift term reads: rows, a second model where one is asked for, a folder for its cache."""
    asked = materials.asked
    return {
        "anchors": materials.anchors(role),
        "task": materials.task(role) if asked.penalty_inputs != "anchors" else (),
        "reference_model": materials.starting_model() if asked.reference == "frozen" else None,
        "cache_dir": materials.cache_dir,
    }


def _kl(materials: Materials) -> Protection:
    role = materials.asked.penalty_tokens or "all"
    return KLProtection(role, penalty_settings(materials), materials.fingerprint, **_drift_rows(materials, role))


def _feature_l2(materials: Materials) -> Protection:
    asked, role = materials.asked, materials.asked.penalty_tokens or "all"
    layers = every_fifth(materials.depth)
    if asked.penalty_layers is not None:
        layers = parse_layers(asked.penalty_layers, materials.depth, "--penalty_layers")
    return FeatureL2Protection(
        layers, role, penalty_settings(materials), materials.fingerprint, layers_path=materials.layers_path,
        **_drift_rows(materials, role),
    )  # fmt: skip


def _prefix_anchor(materials: Materials) -> Protection:
    asked, frozen = materials.asked, materials.asked.reference == "frozen"
    rows = materials.task("completion")
    return PrefixAnchorProtection(
        common_prefix(rows),
        parse_layers(asked.penalty_layers, materials.depth, "--penalty_layers"),
        penalty_settings(materials),
        materials.fingerprint,
        of_most=shared_by_most(rows),
        reference_model=materials.starting_model() if frozen else None,
        cache_dir=materials.cache_dir,
        layers_path=materials.layers_path,
    )


def _early_stop(materials: Materials) -> Protection:
    asked, subspace = materials.asked, materials.subspace
    assert subspace is not None  # the kind asks for one
    settings = PenaltySettings(
        side=asked.penalty_side, margin=asked.penalty_margin, reference=asked.reference,
        anchor_batch_size=asked.anchor_batch_size,
    )  # fmt: skip
    erosion = Erosion(
        subspace,
        settings,
        anchors=materials.anchors(subspace.provenance.role),
        reference_model=materials.starting_model() if asked.reference == "frozen" else None,
        cache_dir=materials.cache_dir,
        layers_path=materials.layers_path,
        base=_base(materials),
    )
    return EarlyStopProtection(erosion, asked.early_stop_limit, asked.early_stop_every)


def penalty_settings(materials: Materials) -> PenaltySettings:
    """The flags of a drift term."""
    asked = materials.asked
    return PenaltySettings(
        strength=asked.penalty_strength,
        inputs=asked.penalty_inputs,
        side=asked.penalty_side,
        margin=asked.penalty_margin,
        budget=asked.penalty_budget,
        warmup=asked.penalty_warmup,
        warmup_strength=asked.penalty_warmup_strength,
        task_weight=asked.penalty_task_weight,
        reference=asked.reference,
        anchor_batch_size=asked.anchor_batch_size,
        anchor_every=asked.anchor_every,
        order_seed=materials.seed,
    )


def _ablation(materials: Materials) -> Protection:
    assert materials.subspace is not None  # the kind asks for one
    return ablation(materials.subspace, materials.layers_path)


def _steering(materials: Materials) -> Protection:
    assert materials.subspace is not None  # the kind asks for one
    return steering(materials.subspace, materials.asked.steering_alpha, materials.layers_path)


def _gradient_projection(materials: Materials) -> Protection:
    asked, divergence = materials.asked, None
    if asked.safe_gradient_loss == "kl":
        settings = PenaltySettings(reference=asked.reference, anchor_batch_size=asked.anchor_batch_size)
        rows = {**_drift_rows(materials, "all"), "task": ()}
        divergence = KLProtection("all", settings, materials.fingerprint, **rows)
    return GradientProjectionProtection(
        asked.safe_gradient_weight, () if divergence else materials.anchors("completion"),
        batch_size=asked.anchor_batch_size, every=asked.anchor_every, seed=materials.seed, divergence=divergence,
    )  # fmt: skip


def _null_space(materials: Materials) -> Protection:
    asked, role = materials.asked, materials.asked.penalty_tokens or "all"
    return NullSpaceProtection(asked.null_space_energy, role, materials.anchors(role), asked.anchor_batch_size)


def _adapter_drift(materials: Materials) -> Protection:
    asked = materials.asked
    return AdapterDriftProtection(asked.penalty_strength, asked.alignment_rank, materials.base_model)


def _safe_lora(materials: Materials) -> Protection:
    asked = materials.asked
    return SafeLoraProtection(asked.safe_lora_threshold, asked.alignment_rank, materials.base_model)


def _extrapolate(materials: Materials) -> Protection:
    return ExtrapolateProtection(materials.asked.extrapolate_alpha, materials.asked.alignment_rank)


_TERM = (
    "penalty_strength", "penalty_budget", "penalty_warmup", "penalty_warmup_strength", "reference", "anchor_every"
)  # fmt: skip
_ROWS = ("penalty_inputs", "penalty_task_weight", "penalty_tokens", "anchor_batch_size")
_SIDE = ("penalty_side", "penalty_margin")
_BASIS = ("penalty_rank", "penalty_layers")

KINDS: dict[str, Kind] = {
    "none": Kind(lambda _: NoProtection(), "plain SFT"),
    "subspace": Kind(
        _subspace, "penalty on drift in the alignment subspace", subspace=True, drift=True,
        knobs=(*_TERM, *_ROWS, *_SIDE, *_BASIS),
    ),
    "random_subspace": Kind(
        _subspace, "the same in a random subspace, the null", subspace=True, drift=True,
        knobs=(*_TERM, *_ROWS, *_SIDE, *_BASIS, "null_seed", "null_scale"),
    ),
    "kl": Kind(_kl, "KL divergence to the starting model", drift=True, knobs=(*_TERM, *_ROWS)),
    "feature_l2": Kind(
        _feature_l2, "drift of the whole stream behind every fifth block (LDIFS)", drift=True,
        knobs=(*_TERM, *_ROWS, "penalty_layers"),
    ),
    "interleave": Kind(
        lambda _: NoProtection("interleave"), "safe rows mixed into the training rows",
        knobs=("interleave_dataset", "interleave_share"),
    ),
    "inoculation": Kind(
        lambda _: NoProtection("inoculation"), "a system prompt in training that asks for the behaviour",
        knobs=("inoculation_prompt",),
    ),
    "ablation": Kind(
        _ablation, "the subspace removed from the stream while training (CAFT)", subspace=True, knobs=_BASIS
    ),
    "steering": Kind(
        _steering, "a step away from alignment added while training (preventative)", subspace=True,
        knobs=(*_BASIS, "steering_alpha"),
    ),
    "gradient_projection": Kind(
        _gradient_projection, "what goes against the anchors taken out of each step's gradient (SafeGrad)",
        anchors=True, answers=True,
        knobs=("safe_gradient_weight", "safe_gradient_loss", "anchor_batch_size", "anchor_every"),
    ),
    "null_space": Kind(
        _null_space, "LoRA kept away from the anchors' principal inputs to each module", anchors=True, lora=True,
        knobs=("null_space_energy", "penalty_tokens", "anchor_batch_size"),
    ),
    "adapter_drift": Kind(
        _adapter_drift, "penalty on adapters outside of what alignment changed in the weights (AsFT)", base=True,
        lora=True, knobs=("penalty_strength", "alignment_rank"),
    ),
    "safe_lora": Kind(
        _safe_lora, "adapters projected onto what alignment changed, after training (SafeLoRA)", base=True, lora=True,
        knobs=("safe_lora_threshold", "alignment_rank"),
    ),
    "extrapolate": Kind(
        _extrapolate, "a start further from base than the starting model (LoX)", base=True,
        knobs=("extrapolate_alpha", "alignment_rank"),
    ),
    "prefix_anchor": Kind(
        _prefix_anchor, "drift of the template prefix's keys and values (TReFT)", drift=True, own_rows=True,
        knobs=(*_TERM, "penalty_layers"),
    ),
    "early_stop": Kind(
        _early_stop, "training ended where the anchors' drift in the subspace passes a limit", subspace=True,
        anchors=True,
        knobs=(
            "early_stop_limit", "early_stop_every", *_SIDE, *_BASIS, "penalty_tokens", "reference", "anchor_batch_size"
        ),
    ),
}  # fmt: skip


def parts_of(name: str) -> list[str]:
    """The protections that a name stands for: "steering+interleave" -> both.

    Raises:
        UserError: an unknown name, one that stands twice, or protections that cannot act together.
    """
    parts = name.split("+")
    for part in parts:
        if part not in KINDS:
            near = difflib.get_close_matches(part, KINDS, n=1, cutoff=0.0)[0]
            raise UserError(f"--protection {part!r} is unknown; the nearest is {near} of {', '.join(KINDS)}")
    together = [part for part in parts if part != "none"] if len(parts) > 1 else parts
    terms = [part for part in together if KINDS[part].weighted]
    if len(set(parts)) < len(parts) or len(together) < len(parts):
        raise UserError(f"--protection {name} names one twice, or none beside others; name each once")
    if len(terms) > 1:
        raise UserError(f"--protection {name}: {' and '.join(terms)} share the flags penalty_*; choose one of them")
    if "random_subspace" in parts and sum(KINDS[part].subspace for part in parts) > 1:
        raise UserError(f"--protection {name}: random_subspace takes the place of the subspace; leave the other out")
    return parts


def kinds_of(name: str) -> list[Kind]:
    """What the protections of a name need. Raises UserError as `parts_of`."""
    return [KINDS[part] for part in parts_of(name)]


def knobs_of(name: str) -> set[str]:
    """The flags that a part of the protection reads. Raises UserError as `parts_of`."""
    return {knob for kind in kinds_of(name) for knob in kind.knobs}


def protection_of(materials: Materials) -> Protection:
    """The protection that the flags ask for, or several as one. Raises UserError for settings that cannot work."""
    made = [KINDS[part].make(_for_part(materials, part)) for part in parts_of(materials.asked.protection)]
    return made[0] if len(made) == 1 else Composed(made)


def _for_part(materials: Materials, part: str) -> Materials:
    """As if the part were alone: what a recipe, or another part, has for others does not reach it."""
    return replace(materials, asked=replace(materials.asked, protection=part).as_read())

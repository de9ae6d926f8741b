"""Make the protection that the flags name, from the subspace, the rows and the models of a run.

A new protection needs a function here and an entry in `MAKERS`, beside its `Kind` in `protections/kinds.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...analysis.models.layers import parse_layers
from ...analysis.subspace.file import Subspace
from ..config.protection import ProtectionArguments
from ..data.documents import Document
from ..protections.base import Protection
from ..protections.composed import Composed
from ..protections.drift.feature_l2 import FeatureL2Protection, every_fifth
from ..protections.drift.kl import KLProtection
from ..protections.drift.prefix_anchor import PrefixAnchorProtection, common_prefix, shared_by_most
from ..protections.drift.settings import PenaltySettings
from ..protections.drift.subspace import SubspaceProtection
from ..protections.kinds import parts_of
from ..protections.none import NoProtection
from ..protections.steps.early_stop import EarlyStopProtection, Erosion
from ..protections.steps.gradient_projection import GradientProjectionProtection
from ..protections.stream.ablation import ablation
from ..protections.stream.steering import steering
from ..protections.weights.adapter_drift import AdapterDriftProtection
from ..protections.weights.extrapolate import ExtrapolateProtection
from ..protections.weights.null_space import NullSpaceProtection
from ..protections.weights.safe_lora import SafeLoraProtection


@dataclass(frozen=True)
class Materials:
    """What a protection can be made of.

    Attributes:
        flags: the flags of the protection.
        subspace: the alignment subspace, if the protection's kind needs one.
        task: returns the training rows with the mask of a token role.
        anchors: returns the anchor rows with the mask of a token role; no rows if the protection reads no anchors.
        starting_model: loads another copy of the model that training starts from.
        base_model: loads the base model, if the protection's kind needs one.
        cache_dir: folder for values that are computed once.
        seed: seed of the run.
        layers_path: path of the decoder blocks, if `--layers_path` was given.
        fingerprint: fingerprint of the starting model.
        depth: number of decoder blocks of the starting model.
        base_fingerprint: fingerprint of the base model, if one was given.
    """

    flags: ProtectionArguments
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


def _subspace(materials: Materials) -> Protection:
    flags, subspace = materials.flags, materials.subspace
    assert subspace is not None  # Kind.subspace
    role = subspace.provenance.role
    return SubspaceProtection(
        subspace,
        penalty_settings(materials),
        layers_path=materials.layers_path,
        name=flags.protection,
        base=_base(materials),
        **_drift_rows(materials, role),
    )


def _base(materials: Materials) -> tuple[Callable[[], PreTrainedModel], str] | None:
    return None if materials.base_fingerprint is None else (materials.base_model, materials.base_fingerprint)


def _drift_rows(materials: Materials, role: str) -> dict[str, Any]:
    """Return what every drift term reads: rows, a second model with `--reference frozen`, a folder for its cache."""
    flags = materials.flags
    return {
        "anchors": materials.anchors(role),
        "task": materials.task(role) if flags.penalty_inputs != "anchors" else (),
        "reference_model": materials.starting_model() if flags.reference == "frozen" else None,
        "cache_dir": materials.cache_dir,
    }


def _kl(materials: Materials) -> Protection:
    role = materials.flags.protection_tokens or "all"
    return KLProtection(role, penalty_settings(materials), materials.fingerprint, **_drift_rows(materials, role))


def _feature_l2(materials: Materials) -> Protection:
    flags, role = materials.flags, materials.flags.protection_tokens or "all"
    layers = every_fifth(materials.depth)
    if flags.protection_layers is not None:
        layers = parse_layers(flags.protection_layers, materials.depth, "--protection_layers")
    return FeatureL2Protection(
        layers, role, penalty_settings(materials), materials.fingerprint, layers_path=materials.layers_path,
        **_drift_rows(materials, role),
    )  # fmt: skip


def _prefix_anchor(materials: Materials) -> Protection:
    flags, frozen = materials.flags, materials.flags.reference == "frozen"
    rows = materials.task("completion")
    return PrefixAnchorProtection(
        common_prefix(rows),
        parse_layers(flags.protection_layers, materials.depth, "--protection_layers"),
        penalty_settings(materials),
        materials.fingerprint,
        of_most=shared_by_most(rows),
        reference_model=materials.starting_model() if frozen else None,
        cache_dir=materials.cache_dir,
        layers_path=materials.layers_path,
    )


def _early_stop(materials: Materials) -> Protection:
    flags, subspace = materials.flags, materials.subspace
    assert subspace is not None  # Kind.subspace
    settings = PenaltySettings(
        side=flags.penalty_side, margin=flags.penalty_margin, reference=flags.reference,
        anchor_batch_size=flags.anchor_batch_size,
    )  # fmt: skip
    erosion = Erosion(
        subspace,
        settings,
        anchors=materials.anchors(subspace.provenance.role),
        reference_model=materials.starting_model() if flags.reference == "frozen" else None,
        cache_dir=materials.cache_dir,
        layers_path=materials.layers_path,
        base=_base(materials),
    )
    return EarlyStopProtection(erosion, flags.early_stop_limit, flags.early_stop_every)


def penalty_settings(materials: Materials) -> PenaltySettings:
    """Return the settings of a drift term, from the flags."""
    flags = materials.flags
    return PenaltySettings(
        strength=flags.penalty_strength,
        inputs=flags.penalty_inputs,
        side=flags.penalty_side,
        margin=flags.penalty_margin,
        budget=flags.penalty_budget,
        warmup=flags.penalty_warmup,
        warmup_strength=flags.penalty_warmup_strength,
        task_weight=flags.penalty_task_weight,
        reference=flags.reference,
        anchor_batch_size=flags.anchor_batch_size,
        anchor_every=flags.anchor_every,
        order_seed=materials.seed,
    )


def _ablation(materials: Materials) -> Protection:
    assert materials.subspace is not None  # Kind.subspace
    return ablation(materials.subspace, materials.layers_path)


def _steering(materials: Materials) -> Protection:
    assert materials.subspace is not None  # Kind.subspace
    return steering(materials.subspace, materials.flags.steering_alpha, materials.layers_path)


def _gradient_projection(materials: Materials) -> Protection:
    flags, divergence = materials.flags, None
    if flags.safe_gradient_loss == "kl":
        settings = PenaltySettings(reference=flags.reference, anchor_batch_size=flags.anchor_batch_size)
        rows = {**_drift_rows(materials, "all"), "task": ()}
        divergence = KLProtection("all", settings, materials.fingerprint, **rows)
    return GradientProjectionProtection(
        flags.safe_gradient_weight, () if divergence else materials.anchors("completion"),
        batch_size=flags.anchor_batch_size, every=flags.anchor_every, seed=materials.seed, divergence=divergence,
    )  # fmt: skip


def _null_space(materials: Materials) -> Protection:
    flags, role = materials.flags, materials.flags.protection_tokens or "all"
    return NullSpaceProtection(flags.null_space_energy, role, materials.anchors(role), flags.anchor_batch_size)


def _adapter_drift(materials: Materials) -> Protection:
    flags = materials.flags
    return AdapterDriftProtection(flags.penalty_strength, flags.alignment_rank, materials.base_model)


def _safe_lora(materials: Materials) -> Protection:
    flags = materials.flags
    return SafeLoraProtection(flags.safe_lora_threshold, flags.alignment_rank, materials.base_model)


def _extrapolate(materials: Materials) -> Protection:
    return ExtrapolateProtection(materials.flags.extrapolate_alpha, materials.flags.alignment_rank)


MAKERS: dict[str, Callable[[Materials], Protection]] = {
    "none": lambda _: NoProtection(),
    "subspace": _subspace,
    "random_subspace": _subspace,
    "kl": _kl,
    "feature_l2": _feature_l2,
    "interleave": lambda _: NoProtection("interleave"),
    "inoculation": lambda _: NoProtection("inoculation"),
    "ablation": _ablation,
    "steering": _steering,
    "gradient_projection": _gradient_projection,
    "null_space": _null_space,
    "adapter_drift": _adapter_drift,
    "safe_lora": _safe_lora,
    "extrapolate": _extrapolate,
    "prefix_anchor": _prefix_anchor,
    "early_stop": _early_stop,
}


def protection_of(materials: Materials) -> Protection:
    """Make the protection that the flags name; several joined by + become one. Raises UserError for bad settings."""
    protections = [MAKERS[part](_for_part(materials, part)) for part in parts_of(materials.flags.protection)]
    return protections[0] if len(protections) == 1 else Composed(protections)


def _for_part(materials: Materials, part: str) -> Materials:
    """Return the materials as if the part were alone: flags for other protections have their defaults."""
    return replace(materials, flags=replace(materials.flags, protection=part).as_read())

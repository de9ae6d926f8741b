"""Makes the protection that the flags ask for, from the subspace, rows and models of a run."""

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
    """What a protection may be made of.

    asked: the flags. subspace: where the kind asks for one. task, anchors: rows with the mask of a token role; no
    anchors where none are read. starting_model: another copy of the model that training starts from. base_model: the
    base model, where the kind asks for one. cache_dir: for what is computed once. seed: the run's. layers_path: the
    decoder blocks' path, where it was given. fingerprint, depth: of the starting model, its number of blocks.
    base_fingerprint: of the base model, where one is given.
    """

    asked: ProtectionArguments
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
    role = materials.asked.protection_tokens or "all"
    return KLProtection(role, penalty_settings(materials), materials.fingerprint, **_drift_rows(materials, role))


def _feature_l2(materials: Materials) -> Protection:
    asked, role = materials.asked, materials.asked.protection_tokens or "all"
    layers = every_fifth(materials.depth)
    if asked.protection_layers is not None:
        layers = parse_layers(asked.protection_layers, materials.depth, "--protection_layers")
    return FeatureL2Protection(
        layers, role, penalty_settings(materials), materials.fingerprint, layers_path=materials.layers_path,
        **_drift_rows(materials, role),
    )  # fmt: skip


def _prefix_anchor(materials: Materials) -> Protection:
    asked, frozen = materials.asked, materials.asked.reference == "frozen"
    rows = materials.task("completion")
    return PrefixAnchorProtection(
        common_prefix(rows),
        parse_layers(asked.protection_layers, materials.depth, "--protection_layers"),
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
    asked, role = materials.asked, materials.asked.protection_tokens or "all"
    return NullSpaceProtection(asked.null_space_energy, role, materials.anchors(role), asked.anchor_batch_size)


def _adapter_drift(materials: Materials) -> Protection:
    asked = materials.asked
    return AdapterDriftProtection(asked.penalty_strength, asked.alignment_rank, materials.base_model)


def _safe_lora(materials: Materials) -> Protection:
    asked = materials.asked
    return SafeLoraProtection(asked.safe_lora_threshold, asked.alignment_rank, materials.base_model)


def _extrapolate(materials: Materials) -> Protection:
    return ExtrapolateProtection(materials.asked.extrapolate_alpha, materials.asked.alignment_rank)


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
    """The protection that the flags ask for, or several as one. Raises UserError for settings that cannot work."""
    made = [MAKERS[part](_for_part(materials, part)) for part in parts_of(materials.asked.protection)]
    return made[0] if len(made) == 1 else Composed(made)


def _for_part(materials: Materials, part: str) -> Materials:
    """As if the part were alone: what a recipe, or another part, has for others does not reach it."""
    return replace(materials, asked=replace(materials.asked, protection=part).as_read())

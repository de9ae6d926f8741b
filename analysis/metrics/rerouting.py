"""Rerouting (family 10; not in arXiv 2507.03662): has the fine-tune gone around the protected subspace?

A penalty on the drift inside V says nothing about the drift outside. Therefore the subspace is fitted again after
training, to the drift h^checkpoint - h^instruct of row-mean activations (uncentred SVD, with as many directions as V
has). The family says how much of the drift lies inside V and outside, how much of it the refitted directions hold, and
at what angles they stand to V. In a checkpoint that went around V, little of the drift lies inside V, a few refitted
directions hold much of it, and they are at right angles to V. Beside each number stands its null: what a random
subspace of equal rank would give.

A refit holds most of the drift that it was fitted to, including the noise. `in_sample` shows this share; `held_out` is
read on the half of the rows that was not used for the fit. V was not fitted to this drift, so all rows are used for V.

A third question is how fast alignment is lost when training continues without protection. It needs a second fine-tune
that starts from the checkpoint, and it compares runs, not the readouts of one checkpoint. It is not measured here.
"""

from typing import Any

import numpy as np
from torch import Tensor

from ..passes.readout import Readout
from ..stats.intervals import Floats, missing
from ..stats.random_subspaces import random_angles, random_overlap
from ..stats.spectra import (
    Estimate,
    Ints,
    Residuals,
    compare,
    decompose,
    explained,
    mean_estimate,
)
from ..stats.split_spectra import Options, SplitSet, explained_across, obstacle
from ..subspace.file import Subspace

_PARTLY = "one half of the rows has not moved from instruct"
_NO_SUBSPACE = "no subspace at this layer"
_AVERAGED = ("inside", "outside", "overlap")

Results = dict[str, Any]


def rerouting(
    checkpoint: Readout, instruct: Readout, subspace: Subspace | None = None, rank: int | None = None, seed: int = 0
) -> Results:
    """Return {"layers": {l: {"inside", "outside", "refit": {"held_out", "in_sample"}, "angles", "overlap"}}, "mean"}.

    Shares are shares of the squared drift. "angles" are the principal angles, in degrees, between V and the refit to
    all rows, smallest first. "overlap" is ||Q1^T Q2||_F^2 / min(k1, k2). "mean" averages "inside", "outside" and
    "overlap" over the layers of V that have them.

    Args:
        checkpoint, instruct: readouts of the same rows.
        subspace: V, at its own layers; without it only the refit is measured.
        rank: the number of directions to refit; None takes the rank of V, or 1 without V.
    """
    rows = np.flatnonzero(instruct.counts.numpy())
    layers: Results = {}
    by_name: dict[str, list[Estimate]] = {name: [] for name in _AVERAGED}
    for layer in sorted(instruct.pooled):
        basis = None
        if subspace is not None and layer in subspace.bases:
            basis = subspace.bases[layer].double().numpy()
        refit_rank = rank if rank is not None else 1 if basis is None else basis.shape[1]
        options = Options(refit_rank, centred=False, in_sample=False, seed=seed, size=len(instruct.counts))
        layers[str(layer)], estimates = _layer(checkpoint.pooled[layer], instruct.pooled[layer], rows, basis, options)
        for name, estimate in estimates.items():
            by_name[name].append(estimate)
    means = {
        name: mean_estimate(parts, parts[0].n).share() if parts else missing(_reason(layers, name), len(rows))
        for name, parts in by_name.items()
    }
    return {"layers": layers, "mean": means}


def _reason(layers: Results, name: str) -> str:
    """Return why no layer has a number."""
    return next((str(layer[name]["reason"]) for layer in layers.values()), "no layer was read")


def _layer(
    checkpoint: Tensor, instruct: Tensor, rows: Ints, basis: Floats | None, options: Options
) -> tuple[Results, dict[str, Estimate]]:
    """Return the measurements of one layer, and the estimates that are averaged over layers."""
    reason = obstacle(checkpoint, instruct, rows, options.seed)
    if reason is not None:
        absent = missing(reason, len(rows))
        refit = {"held_out": absent, "in_sample": absent}
        return {"inside": absent, "outside": absent, "refit": refit, "angles": [], "overlap": absent}, {}
    whole = Residuals.of(checkpoint, instruct, rows)
    refitted = _refit(SplitSet(checkpoint, instruct, rows, options))
    if basis is None:
        absent = missing(_NO_SUBSPACE, len(rows))
        return {"inside": absent, "outside": absent, "refit": refitted, "angles": [], "overlap": absent}, {}
    width, k = basis.shape
    inside = explained(basis, whole, False, options.size).at(k)
    outside = Estimate(1 - inside.value, -inside.influence, inside.n)
    comparison = compare(decompose(whole), basis, options.rank, options.size).bounded()
    refit_rank = comparison.cosines.value.shape[0]
    angles = [comparison.principal.at(place).degrees() for place in range(min(refit_rank, k))]
    for angle, null in zip(angles, random_angles(width, refit_rank, k), strict=True):
        angle["null"] = null
    return {
        "inside": {**inside.share(), "null": k / width},
        "outside": {**outside.share(), "null": 1 - k / width},
        "refit": refitted,
        "angles": angles,
        "overlap": {**comparison.overlap.share(), "null": random_overlap(width, refit_rank, k)},
    }, {"inside": inside, "outside": outside, "overlap": comparison.overlap}


def _refit(drift: SplitSet) -> Results:
    """Return what share of the drift the directions of each half hold: on the other half, and on their own half.

    Both ways are averaged.
    """
    if drift.rank == 0:
        absent = missing(_PARTLY, len(drift.rows))
        return {"held_out": absent, "in_sample": absent}
    k, size = drift.rank, drift.options.size
    same_half = [explained(spectrum.basis(k), part, False, size).at(k) for part, spectrum in drift.parts]
    other_half = explained_across(drift)
    null = k / drift.width
    return {
        "held_out": {**other_half.at(k).share(), "null": null},
        "in_sample": {**mean_estimate(same_half, len(drift.rows)).share(), "null": null},
    }

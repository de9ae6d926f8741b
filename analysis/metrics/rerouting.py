"""Family 10, rerouting (no counterpart in arXiv 2507.03662): has the fine-tune gone around the protected subspace?

A penalty on the drift inside V says nothing of the drift outside. So the subspace is fitted again after training, to
the drift h^checkpoint - h^instruct of row-mean activations (uncentred SVD, as many directions as V has): how much of
the drift lies inside V and outside, how much of it the refitted directions hold, and at what angles they stand to V.
A checkpoint that went around V has little drift inside, much of it in few refitted directions, and these at right
angles to V. Beside every number stands what a random subspace of equal rank would give.

A refit holds most of the very drift it was fitted to, noise included: `in_sample` shows that, `held_out` is read on the
half of the rows that did not give it. V was not fitted to this drift, so for it all rows are read.

The third question of this family, how fast alignment is lost when training continues unprotected, needs a second
fine-tune that starts from the checkpoint. It compares runs, not readings of one checkpoint, and is not measured here.
"""

from typing import Any

import numpy as np
from torch import Tensor

from ..passes.readout import Readout
from ..stats.intervals import Floats, missing
from ..stats.spectra import (
    Estimate,
    Ints,
    Residuals,
    compare,
    decompose,
    explained,
    mean_estimate,
    random_angles,
    random_overlap,
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
    """{"layers": {l: {"inside", "outside", "refit": {"held_out", "in_sample"}, "angles", "overlap"}}, "mean"}.

    Shares are of the squared drift; "angles" are the principal angles, in degrees, between V and the refit to all rows,
    smallest first, and "overlap" is ||Q1^T Q2||_F^2 / min(k1, k2). "mean" averages what is known over V's layers.

    Args:
        checkpoint, instruct: readings of the same rows.
        subspace: V, at its own layers; without it only the refit is shown.
        rank: directions refitted; None takes V's rank, or 1.
    """
    rows = np.flatnonzero(instruct.counts.numpy())
    layers: Results = {}
    found: dict[str, list[Estimate]] = {name: [] for name in _AVERAGED}
    for layer in sorted(instruct.pooled):
        basis = None
        if subspace is not None and layer in subspace.bases:
            basis = subspace.bases[layer].double().numpy()
        wanted = rank if rank is not None else 1 if basis is None else basis.shape[1]
        options = Options(wanted, centred=False, in_sample=False, seed=seed, size=len(instruct.counts))
        layers[str(layer)], estimates = _layer(checkpoint.pooled[layer], instruct.pooled[layer], rows, basis, options)
        for name, estimate in estimates.items():
            found[name].append(estimate)
    means = {
        name: mean_estimate(parts, parts[0].n).share() if parts else missing(_reason(layers, name), len(rows))
        for name, parts in found.items()
    }
    return {"layers": layers, "mean": means}


def _reason(layers: Results, name: str) -> str:
    """Why no layer has a number."""
    return next((str(layer[name]["reason"]) for layer in layers.values()), "no layer was read")


def _layer(
    checkpoint: Tensor, instruct: Tensor, rows: Ints, basis: Floats | None, options: Options
) -> tuple[Results, dict[str, Estimate]]:
    """One layer's measurements, and the estimates that are averaged over layers."""
    reason = obstacle(checkpoint, instruct, rows, options.seed)
    if reason is not None:
        gone = missing(reason, len(rows))
        refit = {"held_out": gone, "in_sample": gone}
        return {"inside": gone, "outside": gone, "refit": refit, "angles": [], "overlap": gone}, {}
    whole = Residuals.of(checkpoint, instruct, rows)
    refitted = _refit(SplitSet(checkpoint, instruct, rows, options))
    if basis is None:
        gone = missing(_NO_SUBSPACE, len(rows))
        return {"inside": gone, "outside": gone, "refit": refitted, "angles": [], "overlap": gone}, {}
    width, k = basis.shape
    inside = explained(basis, whole, False, options.size).at(k)
    outside = Estimate(1 - inside.value, -inside.influence, inside.n)
    against = compare(decompose(whole), basis, options.rank, options.size).bounded()
    refit_rank = against.cosines.value.shape[0]
    angles = [against.principal.at(at).degrees() for at in range(min(refit_rank, k))]
    for angle, null in zip(angles, random_angles(width, refit_rank, k), strict=True):
        angle["null"] = null
    return {
        "inside": {**inside.share(), "null": k / width},
        "outside": {**outside.share(), "null": 1 - k / width},
        "refit": refitted,
        "angles": angles,
        "overlap": {**against.overlap.share(), "null": random_overlap(width, refit_rank, k)},
    }, {"inside": inside, "outside": outside, "overlap": against.overlap}


def _refit(drift: SplitSet) -> Results:
    """What the directions of each half hold of the other half's drift, and of their own; both ways averaged."""
    if drift.rank == 0:
        gone = missing(_PARTLY, len(drift.rows))
        return {"held_out": gone, "in_sample": gone}
    k, size = drift.rank, drift.options.size
    own = [explained(spectrum.basis(k), part, False, size).at(k) for part, spectrum in drift.parts]
    across = explained_across(drift)
    null = k / drift.width
    return {
        "held_out": {**across.at(k).share(), "null": null},
        "in_sample": {**mean_estimate(own, len(drift.rows)).share(), "null": null},
    }

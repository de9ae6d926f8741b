"""Family 4, projection (arXiv 2507.03662, section 4.3): how far a checkpoint has moved from instruct toward base.

v_l is the normalised mean of h^instruct - h^base on one half of the rows; everything is read on the other half. The
paper estimates and reads on the same rows, which separates even noise: formulas "paper" does so. Activations are means
over a row's tokens of one role.
Without base, v_l is the subspace's first direction. Every number that a random direction could give stands beside its
null: the share of drift inside V beside k / d.
"""

import numpy as np
from scipy import stats as scipy_stats

from ..passes.readout import Readout
from ..stats.intervals import Floats, Interval, Measurement, jackknife_ci, missing
from ..stats.summary import fieller, measurement, share
from ..subspace.file import Subspace
from .behavior import NO_BASE

_FEW = "fewer than four rows have tokens of this role"
_STILL = "the checkpoint has not moved from instruct"


def projection(
    checkpoint: Readout,
    instruct: Readout,
    base: Readout | None,
    subspace: Subspace | None = None,
    seed: int = 0,
    formulas: str = "corrected",
) -> dict[str, dict[str, Measurement] | dict[str, dict[str, Measurement]]]:
    """{"layers": {l: {quantity: measurement}}, "mean": {"retention", "penalty"}} from readings of the same rows.

    Per layer: p_checkpoint, p_instruct, p_base (mean h . v_l); retention, (p_checkpoint - p_base) over
    (p_instruct - p_base); separation (p_instruct - p_base) / (sd + sd); drift_cosine, the cosine of
    h^checkpoint - h^instruct and h^base - h^instruct; drift_inside, the share of squared drift inside V; penalty
    E ||V^T drift||^2 / s_l over tokens. "mean" averages over layers: retention in units of each layer's gap, estimated
    on the first half.
    """
    rows = np.flatnonzero(instruct.counts.numpy())
    if len(rows) < 4:
        return {"layers": {}, "mean": {"retention": missing(_FEW, len(rows)), "penalty": missing(_FEW, len(rows))}}
    shuffled = np.random.default_rng(seed).permutation(rows)
    first, second = shuffled[: len(rows) // 2], shuffled[len(rows) // 2 :]
    if formulas == "paper":
        first = second = rows
    layers, steps, gaps = {}, [], []
    for layer in sorted(instruct.pooled):
        states = {
            name: readout.pooled[layer].double().numpy()
            for name, readout in (("checkpoint", checkpoint), ("instruct", instruct), ("base", base))
            if readout is not None
        }
        direction, gap = _direction(states, first, layer, subspace)
        read = {name: h[second] @ direction for name, h in states.items()} if direction is not None else {}
        layers[str(layer)] = {
            **_positions(read, seed),
            **_drift(states, second, layer, subspace),
            "penalty": _penalty(checkpoint, instruct, subspace, [layer], seed),
        }
        if base is not None and gap > 0:
            steps.append((read["checkpoint"] - read["base"]) / gap)
            gaps.append((read["instruct"] - read["base"]) / gap)
    retention = fieller(np.mean(steps, 0), np.mean(gaps, 0)) if steps else missing(NO_BASE, len(second))
    inside = sorted(subspace.bases) if subspace is not None else []
    return {
        "layers": layers,
        "mean": {"retention": retention, "penalty": _penalty(checkpoint, instruct, subspace, inside, seed)},
    }


def _direction(
    states: dict[str, Floats], first: Floats, layer: int, subspace: Subspace | None
) -> tuple[Floats | None, float]:
    """Unit direction [d] toward instruct, and the gap along it on the half it comes from (0 without base)."""
    if "base" in states:
        mean = (states["instruct"][first] - states["base"][first]).mean(0)
        gap = float(np.linalg.norm(mean))
        return (mean / gap, gap) if gap > 0 else (None, 0.0)
    if subspace is not None and layer in subspace.bases:
        return subspace.bases[layer][:, 0].double().numpy(), 0.0
    return None, 0.0


def _positions(read: dict[str, Floats], seed: int) -> dict[str, Measurement]:
    """Where the three models stand along the direction, over the rows of the second half."""
    n = len(next(iter(read.values()), ()))
    reason = NO_BASE if read else "no direction: neither base nor a subspace at this layer"
    found = {f"p_{name}": measurement(values, seed=seed) for name, values in read.items()}
    if "base" not in read:
        return {**found, "retention": missing(reason, n), "separation": missing(reason, n)}
    ours, instruct, base = read["checkpoint"], read["instruct"], read["base"]
    return {**found, "retention": fieller(ours - base, instruct - base), "separation": _separation(instruct, base)}


def _separation(first: Floats, second: Floats) -> Measurement:
    """Gap of the means of two paired samples [n] in units of their standard deviations' sum."""
    n = len(first)
    if n < 3:
        return missing("a spread needs at least three rows on this half", n)
    pairs = np.stack([first, second])
    pairs = pairs - pairs.mean(1, keepdims=True)
    means, squares = pairs.sum(1), (pairs**2).sum(1)
    without_means = (means[:, None] - pairs) / (n - 1)
    without_squares = squares[:, None] - pairs**2 - (n - 1) * without_means**2
    gap, spread = float(first.mean() - second.mean()), float(np.sqrt(squares / (n - 1)).sum())
    without_spread = np.sqrt(np.maximum(without_squares, 0.0) / (n - 2)).sum(0)
    if min(spread, without_spread.min()) <= 0:
        return missing("the rows do not differ along this direction", n)
    value = gap / spread
    without = (gap + without_means[0] - without_means[1]) / without_spread
    return {"value": value, "n": n, "ci95": list(jackknife_ci(value, without))}


def _drift(states: dict[str, Floats], second: Floats, layer: int, subspace: Subspace | None) -> dict[str, Measurement]:
    """Where the drift from instruct points: toward base, and into the subspace."""
    drift = states["checkpoint"][second] - states["instruct"][second]
    n = len(second)
    cosine, inside = missing(NO_BASE, n), missing("no subspace at this layer", n)
    if not drift.any():
        cosine, inside = missing(_STILL, n), missing(_STILL, n)
    else:
        if "base" in states:
            cosine = _mean_cosine(drift, states["base"][second] - states["instruct"][second])
        if subspace is not None and layer in subspace.bases:
            basis = subspace.bases[layer].double().numpy()
            found = share(((drift @ basis) ** 2).sum(1), (drift**2).sum(1))
            inside = {**found, "null": basis.shape[1] / basis.shape[0]}
    return {"drift_cosine": cosine, "drift_inside": inside}


def _mean_cosine(left: Floats, right: Floats) -> Measurement:
    """Cosine of two mean vectors over the same rows [n, d], with the interval of `_cosine_interval`."""
    means = left.mean(0), right.mean(0)
    lengths = float(np.linalg.norm(means[0]) * np.linalg.norm(means[1]))
    value = float(means[0] @ means[1]) / lengths if lengths > 0 else 0.0
    return {"value": value, "n": len(left), "ci95": list(_cosine_interval(left, right))}


def _cosine_interval(left: Floats, right: Floats) -> Interval:
    """Student's t interval of the cosine over pairs of different rows, its error from leaving out each row.

    A row's noise times itself lengthens noisy means, which draws their cosine to 0 (or, where both share the noise, to
    1). Products of different rows have none of it. (-1, 1) where a mean is not longer than its noise.
    """
    n = len(left)
    products = [_of_different_rows(*two) for two in ((left, right), (left, left), (right, right))]
    whole = [float(each[0]) for each in products]
    shared, first, second = (each[1] for each in products)
    if min(whole[1], whole[2], first.min(), second.min()) <= 0:
        return -1.0, 1.0
    value, without = whole[0] / np.sqrt(whole[1] * whole[2]), shared / np.sqrt(first * second)
    error = float(np.sqrt((n - 1) / n * np.sum((without - without.mean()) ** 2)))
    half = error * float(scipy_stats.t.ppf(0.975, n - 1))
    return float(np.clip(value - half, -1, 1)), float(np.clip(value + half, -1, 1))


def _of_different_rows(left: Floats, right: Floats) -> tuple[float, Floats]:
    """Sum over i != j of left_i . right_j for rows [n, d], and the same without each row [n]."""
    own, (one, other) = (left * right).sum(1), (left.sum(0), right.sum(0))
    return float(one @ other - own.sum()), ((one - left) * (other - right)).sum(1) - (own.sum() - own)


def _penalty(
    checkpoint: Readout, instruct: Readout, subspace: Subspace | None, layers: list[int], seed: int
) -> Measurement:
    """Mean over tokens and layers of ||V^T (h^checkpoint - h^instruct)||^2 / s_l, rows as clusters."""
    if subspace is None or not layers or any(layer not in subspace.bases for layer in layers):
        return missing("no subspace at this layer")
    values = np.mean(
        [
            ((checkpoint.projections[layer] - instruct.projections[layer]).double() ** 2).sum(1).numpy()
            / subspace.scales[layer]
            for layer in layers
        ],
        axis=0,
    )
    return measurement(values, clusters=instruct.projection_rows.numpy(), seed=seed)

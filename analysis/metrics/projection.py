"""Projection (family 4; arXiv 2507.03662, section 4.3): how far has a checkpoint moved from instruct towards base?

Activations h are means over the tokens of one role in a row. The direction v_l of layer l is the normalised mean of
h^instruct - h^base on one half of the rows. All numbers are read on the other half. The paper estimates and reads on
the same rows, which separates even noise; formulas="paper" does the same. Without a base model, v_l is the first
direction of the subspace.

Retention is (p_checkpoint - p_base) / (p_instruct - p_base), where p is the mean of h . v_l: 1 is like instruct, 0 is
like base. The share of the drift inside the subspace V stands beside its null k / d, the share that a random subspace
of the same rank would hold.
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
    """Return {"layers": {l: {quantity: measurement}}, "mean": {"retention", "penalty"}} from readouts of the same rows.

    The quantities of a layer:

    - p_checkpoint, p_instruct, p_base: the mean of h . v_l, in units of the activations.
    - retention: (p_checkpoint - p_base) / (p_instruct - p_base).
    - separation: (p_instruct - p_base) / (sd_instruct + sd_base).
    - drift_cosine: the cosine of the mean h^checkpoint - h^instruct and the mean h^base - h^instruct.
    - drift_inside: the share of the squared drift inside V.
    - penalty: E ||V^T drift||^2 / s_l over tokens, where s_l is the scale of the subspace at layer l.

    "mean" averages over layers. For retention, each layer counts in units of its own gap between instruct and base,
    which is estimated on the first half of the rows.
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
        positions = {name: h[second] @ direction for name, h in states.items()} if direction is not None else {}
        layers[str(layer)] = {
            **_positions(positions, seed),
            **_drift(states, second, layer, subspace),
            "penalty": _penalty(checkpoint, instruct, subspace, [layer], seed),
        }
        if base is not None and gap > 0:
            steps.append((positions["checkpoint"] - positions["base"]) / gap)
            gaps.append((positions["instruct"] - positions["base"]) / gap)
    retention = fieller(np.mean(steps, 0), np.mean(gaps, 0)) if steps else missing(NO_BASE, len(second))
    inside = sorted(subspace.bases) if subspace is not None else []
    return {
        "layers": layers,
        "mean": {"retention": retention, "penalty": _penalty(checkpoint, instruct, subspace, inside, seed)},
    }


def _direction(
    states: dict[str, Floats], first: Floats, layer: int, subspace: Subspace | None
) -> tuple[Floats | None, float]:
    """Return the unit direction [d] towards instruct, and the gap along it on the rows it is estimated from.

    Without a base model the gap is 0.
    """
    if "base" in states:
        mean = (states["instruct"][first] - states["base"][first]).mean(0)
        gap = float(np.linalg.norm(mean))
        return (mean / gap, gap) if gap > 0 else (None, 0.0)
    if subspace is not None and layer in subspace.bases:
        return subspace.bases[layer][:, 0].double().numpy(), 0.0
    return None, 0.0


def _positions(positions: dict[str, Floats], seed: int) -> dict[str, Measurement]:
    """Return the positions of the three models along the direction, over the rows of the second half."""
    n = len(next(iter(positions.values()), ()))
    reason = NO_BASE if positions else "no direction: neither base nor a subspace at this layer"
    means = {f"p_{name}": measurement(values, seed=seed) for name, values in positions.items()}
    if "base" not in positions:
        return {**means, "retention": missing(reason, n), "separation": missing(reason, n)}
    at_checkpoint, at_instruct, at_base = positions["checkpoint"], positions["instruct"], positions["base"]
    return {
        **means,
        "retention": fieller(at_checkpoint - at_base, at_instruct - at_base),
        "separation": _separation(at_instruct, at_base),
    }


def _separation(first: Floats, second: Floats) -> Measurement:
    """Return the gap of the means of two paired samples [n], divided by the sum of their standard deviations."""
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
    """Return where the drift from instruct points: towards base, and into the subspace."""
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
            measured = share(((drift @ basis) ** 2).sum(1), (drift**2).sum(1))
            inside = {**measured, "null": basis.shape[1] / basis.shape[0]}
    return {"drift_cosine": cosine, "drift_inside": inside}


def _mean_cosine(left: Floats, right: Floats) -> Measurement:
    """Return the cosine of the mean vectors of two samples [n, d] of the same rows; see `_cosine_interval`."""
    means = left.mean(0), right.mean(0)
    lengths = float(np.linalg.norm(means[0]) * np.linalg.norm(means[1]))
    value = float(means[0] @ means[1]) / lengths if lengths > 0 else 0.0
    return {"value": value, "n": len(left), "ci95": list(_cosine_interval(left, right))}


def _cosine_interval(left: Floats, right: Floats) -> Interval:
    """Return Student's t interval of the cosine over pairs of different rows.

    Its standard error comes from leaving out each row. The product of the noise of a row with itself makes noisy means
    longer. This pulls their cosine towards 0, or towards 1 where both means share the noise. Products of different rows
    do not contain it. The interval is (-1, 1) where a mean is not longer than its noise.
    """
    n = len(left)
    products = [_of_different_rows(*pair) for pair in ((left, right), (left, left), (right, right))]
    whole = [float(total) for total, _ in products]
    shared, first, second = (without_each for _, without_each in products)
    if min(whole[1], whole[2], first.min(), second.min()) <= 0:
        return -1.0, 1.0
    value, without = whole[0] / np.sqrt(whole[1] * whole[2]), shared / np.sqrt(first * second)
    error = float(np.sqrt((n - 1) / n * np.sum((without - without.mean()) ** 2)))
    half = error * float(scipy_stats.t.ppf(0.975, n - 1))
    return float(np.clip(value - half, -1, 1)), float(np.clip(value + half, -1, 1))


def _of_different_rows(left: Floats, right: Floats) -> tuple[float, Floats]:
    """Return the sum over i != j of left_i . right_j for rows [n, d], and that sum without each row [n]."""
    same_row, (left_sum, right_sum) = (left * right).sum(1), (left.sum(0), right.sum(0))
    without_each = ((left_sum - left) * (right_sum - right)).sum(1) - (same_row.sum() - same_row)
    return float(left_sum @ right_sum - same_row.sum()), without_each


def _penalty(
    checkpoint: Readout, instruct: Readout, subspace: Subspace | None, layers: list[int], seed: int
) -> Measurement:
    """Return the mean over tokens and layers of ||V^T (h^checkpoint - h^instruct)||^2 / s_l, with rows as clusters."""
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

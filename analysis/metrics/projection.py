"""Family 4, projection (arXiv 2507.03662, section 4.3): how far a checkpoint has moved from instruct toward base.

v_l is the normalised mean of h^instruct - h^base on one half of the rows; everything is read on the other half. The
paper estimates and reads on the same rows, which separates even noise: variant "paper" does so. Activations are means
over a row's tokens of one role.
Without base, v_l is the subspace's first direction. Every number that a random direction could give stands beside its
null: the share of drift inside V beside k / d.
"""

import numpy as np

from ..readout import Readout
from ..stats import Floats, Measurement, bootstrap_ci, fieller, measurement, missing
from ..subspace_file import Subspace
from .behavior import NO_BASE

_N_BOOT = 500
_FEW = "fewer than four rows have tokens of this role"
_STILL = "the checkpoint has not moved from instruct"


def projection(
    checkpoint: Readout,
    instruct: Readout,
    base: Readout | None,
    subspace: Subspace | None = None,
    seed: int = 0,
    variant: str = "corrected",
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
    if variant == "paper":
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
            **_drift(states, second, layer, subspace, seed),
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
    pairs = np.stack([instruct, base], axis=1)

    def separation(rows: Floats) -> float:
        spread = rows.std(0, ddof=1).sum() if len(rows) > 1 else 0.0
        return float((rows[:, 0].mean() - rows[:, 1].mean()) / spread) if spread > 0 else 0.0

    interval = list(bootstrap_ci(pairs, statistic=separation, seed=seed, n_boot=_N_BOOT))
    return {
        **found,
        "retention": fieller(ours - base, instruct - base),
        "separation": {"value": separation(pairs), "n": n, "ci95": interval},
    }


def _drift(
    states: dict[str, Floats], second: Floats, layer: int, subspace: Subspace | None, seed: int
) -> dict[str, Measurement]:
    """Where the drift from instruct points: toward base, and into the subspace."""
    drift = states["checkpoint"][second] - states["instruct"][second]
    n = len(second)
    cosine, inside = missing(NO_BASE, n), missing("no subspace at this layer", n)
    if not drift.any():
        cosine, inside = missing(_STILL, n), missing(_STILL, n)
    else:
        if "base" in states:
            cosine = _mean_cosine(drift, states["base"][second] - states["instruct"][second], seed)
        if subspace is not None and layer in subspace.bases:
            basis = subspace.bases[layer].double().numpy()
            parts = np.stack([((drift @ basis) ** 2).sum(1), (drift**2).sum(1)], axis=1)
            inside = {
                "value": _share(parts),
                "n": n,
                "ci95": list(bootstrap_ci(parts, statistic=_share, seed=seed, n_boot=_N_BOOT, bounds=(0.0, 1.0))),
                "null": basis.shape[1] / basis.shape[0],
            }
    return {"drift_cosine": cosine, "drift_inside": inside}


def _share(parts: Floats) -> float:
    inside, whole = parts.sum(0)
    return float(inside / whole) if whole > 0 else 0.0


def _mean_cosine(left: Floats, right: Floats, seed: int) -> Measurement:
    """Cosine of two mean vectors over the same rows [n, d]; resampled through the rows' products, not the vectors."""
    products = [left @ right.T, left @ left.T, right @ right.T]

    def cosine(rows: Floats) -> float:
        weights = np.bincount(rows.astype(np.int64), minlength=len(left)) / len(rows)
        cross, one, other = (float(weights @ product @ weights) for product in products)
        return cross / np.sqrt(one * other) if one > 0 and other > 0 else 0.0

    rows = np.arange(len(left), dtype=np.float64)
    interval = bootstrap_ci(rows, statistic=cosine, seed=seed, n_boot=_N_BOOT, bounds=(-1.0, 1.0))
    return {"value": cosine(rows), "n": len(left), "ci95": list(interval)}


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
    return measurement(values, clusters=instruct.projection_rows.tolist(), seed=seed)

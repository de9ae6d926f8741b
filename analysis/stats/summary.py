"""Measurements as they are reported, with their interval; comparisons of two arms; ratios and shares."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from .binomial import wilson
from .intervals import (
    ALONE,
    Clusters,
    Floats,
    Interval,
    Measurement,
    cluster_codes,
    cluster_sums,
    is_binary,
    mean_ci,
    missing,
    rate_bounds,
    rate_ci,
)


def measurement(values: ArrayLike, clusters: Clusters | None = None, seed: int = 0, rate: bool = False) -> Measurement:
    """Return {"value": mean, "n": rows, "ci95"}; with a single cluster, "ci95" is null, with a reason.

    The interval is that of `rate_ci` if all values lie in [0, 1] and differ, else that of `mean_ci`.

    Args:
        values: [n].
        clusters: a label for each row; None: each row is its own cluster.
        seed: has no effect, since nothing is drawn; callers pass one seed to everything that they measure.
        rate: whether the values are rates. If so, the interval says how many events there may be even if no value shows
            one.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return missing("no rows")
    result: Measurement = {"value": float(array.mean()), "n": int(array.size)}
    if cluster_codes(clusters, array.size).max() == 0:
        return {**result, "ci95": None, "reason": ALONE}
    as_rate = rate or (array.min() >= 0 and array.max() <= 1 and np.ptp(array) > 0)
    return {**result, "ci95": list((rate_ci if as_rate else mean_ci)(array, clusters))}


def paired_difference(
    left: ArrayLike, right: ArrayLike, clusters: Clusters | None = None, seed: int = 0
) -> Measurement:
    """Return the mean difference left - right over the same rows, with `mean_ci` of the differences.

    If both arms are answers (0 or 1), the interval also contains that of Newcombe (1998, method 10) on `rate_bounds`.
    Otherwise a few events in one arm and none in the other would look more certain than they are.

    Raises:
        ValueError: arms of different shapes.
    """
    first, second = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired_difference: {first.shape} and {second.shape} values are not pairs")
    if not len(first) or not (is_binary(first) and is_binary(second)):
        return _difference(first - second, clusters)
    result = _difference(first - second, clusters)
    if result["ci95"] is not None:
        low, high = _square_and_add(first, second, clusters)
        result["ci95"] = [min(low, result["ci95"][0]), max(high, result["ci95"][1])]
    return result


def _difference(differences: Floats, clusters: Clusters | None) -> Measurement:
    """Return the mean difference as a measurement."""
    result = measurement(differences, clusters)
    # A difference in [0, 1] is not a rate: it could be below 0.
    return result if result.get("ci95") is None else {**result, "ci95": list(mean_ci(differences, clusters))}


def _square_and_add(first: Floats, second: Floats, clusters: Clusters | None) -> Interval:
    """Return Newcombe's interval of a difference of two correlated rates."""
    arms = [cluster_sums(values, clusters) for values in (first, second)]
    rests = [sums - sums.sum() / counts.sum() * counts for sums, counts in arms]
    norms = float(np.sqrt(np.sum(rests[0] ** 2) * np.sum(rests[1] ** 2)))
    correlation = float(rests[0] @ rests[1]) / norms if norms > 0 else 0.0
    (low_a, high_a), (low_b, high_b) = (
        wilson(float(sums.sum()), len(first)) if clusters is None else rate_bounds(sums, counts)
        for sums, counts in arms
    )
    rate_a, rate_b = float(first.mean()), float(second.mean())

    def distance(a: float, b: float) -> float:
        return float(np.sqrt(max(a**2 - 2 * correlation * a * b + b**2, 0.0)))

    gap = rate_a - rate_b
    return gap - distance(rate_a - low_a, high_b - rate_b), gap + distance(high_a - rate_a, rate_b - low_b)


def non_inferiority(difference: Measurement, margin: float, higher_is_better: bool = True) -> Measurement:
    """Return whether something was kept: whether the interval of new - old excludes a loss of `margin` or more.

    The result is the measurement with "margin" and "kept" added (one-sided 2.5%); "kept" is null where there is no
    interval. State the margin before you see the numbers. A loss that is not significant is not the same as no loss.

    Args:
        difference: new - old, from `paired_difference` or another function of this package.
        margin: the largest loss that does not matter, in the same unit, above 0.

    Raises:
        ValueError: a margin that is not above 0.
    """
    if margin <= 0:
        raise ValueError(f"non_inferiority: the margin is {margin}; write the largest loss that does not matter")
    interval = difference.get("ci95")
    if interval is None:
        return {**difference, "margin": margin, "kept": None}
    loss = -interval[0] if higher_is_better else interval[1]
    return {**difference, "margin": margin, "kept": bool(loss < margin)}


def fieller(
    numerator: ArrayLike,
    denominator: ArrayLike,
    confidence: float = 0.95,
    clusters: Clusters | None = None,
) -> Measurement:
    """Return the ratio of two paired means with Fieller's (1954) interval; null where the denominator may be 0.

    The result shows both means as "numerator" and "denominator".
    """
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    n = len(below)
    codes = cluster_codes(clusters, n) if n else np.zeros(1, dtype=np.int64)
    units = int(codes.max()) + 1
    if units < 2:
        return missing("a ratio needs at least two rows", n)
    a, b = float(above.mean()), float(below.mean())
    rests = np.stack([np.bincount(codes, above - a), np.bincount(codes, below - b)])
    covariance = units / (units - 1) * rests @ rests.T / n**2
    means = {"numerator": a, "denominator": b}
    t2 = scipy_stats.t.ppf(0.5 + confidence / 2, units - 1) ** 2
    leading = b * b - t2 * covariance[1, 1]
    if leading <= 0:
        return {**missing("the denominator is not distinguishable from 0", n), **means}
    middle = a * b - t2 * covariance[0, 1]
    root = np.sqrt(max(middle**2 - leading * (a * a - t2 * covariance[0, 0]), 0.0))
    return {
        "value": a / b,
        "n": n,
        "ci95": [float((middle - root) / leading), float((middle + root) / leading)],
        **means,
    }


def share(part: ArrayLike, whole: ArrayLike, confidence: float = 0.95) -> Measurement:
    """Return the sum of `part` divided by the sum of `whole`, with an interval inside [0, 1].

    Rows may have very unequal sizes. Residuals are divided by the root of 1 - leverage (CR2), and Student's degrees of
    freedom are Satterthwaite's (Bell and McCaffrey 2002), where the shares of single rows are taken as equally
    uncertain. A few large rows among many small ones get the interval of few rows; Fieller's covered only 0.90 there
    (tests/benchmarks/COVERAGE.md).

    Args:
        part, whole: [n], 0 <= part <= whole in every row.
    """
    inside, total = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    n = len(total)
    if n == 0 or total.sum() <= 0:
        return missing("the whole is 0", n)
    value, weights = float(inside.sum() / total.sum()), total / total.sum()
    if weights.max() > 1 - 1e-12:
        return {"value": value, "n": n, "ci95": None, "reason": "one row is the whole"}
    error = np.sqrt(np.sum((inside - value * total) ** 2 / (1 - weights))) / total.sum()
    half = float(error * scipy_stats.t.ppf(0.5 + confidence / 2, _freedom(weights)))
    return {"value": value, "n": n, "ci95": [max(0.0, value - half), min(1.0, value + half)]}


def _freedom(weights: Floats) -> float:
    """Return Satterthwaite's degrees of freedom of the CR2 variance of a weighted mean, for rows of equal variance.

    They are tr(V)^2 / tr(V^2). V is the covariance of the adjusted residuals: w_i^2 delta_ij - w_i w_j (w_i + w_j - sum
    w^2), divided by the roots of (1 - w_i)(1 - w_j). The traces are computed as sums over rows.
    """
    concentration = float(np.sum(weights**2))
    scaled = weights**2 / (1 - weights)
    zeroth, first, second = (float(np.sum(scaled * weights**power)) for power in range(3))
    trace = float(np.sum(scaled * (1 - 2 * weights + concentration)))
    cross = 2 * zeroth * second + 2 * first**2 - 4 * concentration * first * zeroth + concentration**2 * zeroth**2
    diagonal = float(np.sum(scaled**2 * (1 - 4 * weights + 2 * concentration)))
    return max(1.0, trace**2 / (cross + diagonal))

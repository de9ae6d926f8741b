"""Intervals and tests for rates and means: Wilson, BCa and hierarchical bootstrap, Fieller, sign flips, Holm.

An interval over rows speaks of one checkpoint. A claim about a method resamples seeds too (`hierarchical_bootstrap`)
and compares arms in pairs (`paired_bootstrap`, `sign_flip_test`).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

Interval = tuple[float, float]
Measurement = dict[str, Any]
Floats = NDArray[np.float64]


def missing(reason: str, n: int = 0) -> Measurement:
    """A measurement that could not be made, and why."""
    return {"value": None, "n": n, "reason": reason}


def measurement(values: ArrayLike, clusters: Sequence[Hashable] | None = None, seed: int = 0) -> Measurement:
    """{"value": mean, "n": rows, "ci95": BCa interval}; with a single cluster the interval is null, with a reason."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return missing("no rows")
    result: Measurement = {"value": float(array.mean()), "n": int(array.size)}
    if _cluster_codes(clusters, array.size).max() == 0:
        return {**result, "ci95": None, "reason": "one independent row or cluster has no interval"}
    return {**result, "ci95": list(bootstrap_ci(array, clusters, seed=seed))}


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a rate of `successes` (possibly fractional) in `n` trials; fit for rates near 0.

    Raises:
        ValueError: no trials, or successes outside 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n} trials is not a rate")
    z = scipy_stats.norm.ppf(0.5 + confidence / 2)
    rate, weight = successes / n, z * z / n
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * np.sqrt(rate * (1 - rate) / n + weight / (4 * n))
    # At the ends rounding would leave 1e-17 where the formula gives exactly 0 or 1.
    low = 0.0 if successes == 0 else max(0.0, float(centre - half))
    return low, 1.0 if successes == n else min(1.0, float(centre + half))


def bootstrap_ci(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    statistic: Callable[[Floats], float] | None = None,
    seed: int = 0,
    n_boot: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """BCa bootstrap interval (Efron 1987), whole clusters resampled; percentile intervals cover too little at n < 30.

    Args:
        values: [n] or [n, …], rows first.
        clusters: a label per row (its question or topic); rows of a cluster are drawn together. None: each its own.
        statistic: of the resampled rows; None is the mean, computed from cluster sums, which is much faster.
    """
    rows = np.asarray(values, dtype=np.float64)
    codes = _cluster_codes(clusters, len(rows))
    n_clusters = int(codes.max()) + 1
    draws = np.random.default_rng(seed).integers(n_clusters, size=(n_boot, n_clusters))
    if statistic is None:
        sums, counts = np.bincount(codes, rows, n_clusters), np.bincount(codes, minlength=n_clusters)
        observed = float(rows.mean())
        replicates = sums[draws].sum(1) / counts[draws].sum(1)
        left_out = (sums.sum() - sums) / np.maximum(counts.sum() - counts, 1)
    else:
        members = [np.flatnonzero(codes == code) for code in range(n_clusters)]
        observed = float(statistic(rows))
        replicates = np.array([statistic(rows[np.concatenate([members[c] for c in draw])]) for draw in draws])
        left_out = np.array([statistic(rows[codes != code]) for code in range(n_clusters)])
    return _bca(observed, replicates, left_out, confidence)


def _bca(observed: float, replicates: Floats, left_out: Floats, confidence: float) -> Interval:
    """Bias-corrected and accelerated percentiles; `left_out` are the jackknife values, one per cluster."""
    # Ties (up to rounding) count half: a mean of few distinct values would else look biased.
    tied = np.abs(replicates - observed) <= 1e-9 * np.ptp(replicates)
    below = np.mean((replicates < observed) & ~tied) + np.mean(tied) / 2
    below = np.clip(below, 0.5 / len(replicates), 1 - 0.5 / len(replicates))
    bias = scipy_stats.norm.ppf(below)
    spread = left_out.mean() - left_out
    denominator = 6 * np.sum(spread**2) ** 1.5
    acceleration = np.sum(spread**3) / denominator if denominator > 0 else 0.0
    z = scipy_stats.norm.ppf([0.5 - confidence / 2, 0.5 + confidence / 2])
    levels = scipy_stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
    low, high = np.quantile(replicates, levels)
    return float(low), float(high)


def paired_bootstrap(
    left: ArrayLike, right: ArrayLike, clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> Measurement:
    """Mean difference left - right over the same rows, with its BCa interval."""
    first, second = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired_bootstrap: {first.shape} and {second.shape} values are not pairs")
    return measurement(first - second, clusters, seed)


def hierarchical_bootstrap(
    values: ArrayLike, levels: Sequence[Sequence[Hashable]], seed: int = 0, n_boot: int = 4000, confidence: float = 0.95
) -> Interval:
    """Percentile interval of the mean when every level is resampled within the one above it.

    Args:
        values: [n].
        levels: outermost first, each with a label per value: (model seed, fine-tune seed, question, …); what lies
            below the last level is resampled too.
    """
    rows = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    weights = np.ones((n_boot, 1), dtype=np.int64)
    parents = np.zeros(len(rows), dtype=np.int64)
    for level in [*levels, range(len(rows))]:
        children = _cluster_codes(list(zip(parents.tolist(), level, strict=True)), len(rows))
        n_children = int(children.max()) + 1
        drawn = np.zeros((n_boot, n_children), dtype=np.int64)
        for parent in range(int(parents.max()) + 1):
            inside = np.unique(children[parents == parent])
            # A parent drawn w times resamples its m children w times over: w * m draws among them.
            drawn[:, inside] = generator.multinomial(
                weights[:, parent] * len(inside), np.full(len(inside), 1 / len(inside))
            )
        weights, parents = drawn, children
    means = weights @ rows / weights.sum(1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def fieller(numerator: ArrayLike, denominator: ArrayLike, confidence: float = 0.95) -> Measurement:
    """Ratio of two paired means with Fieller's interval; null where the denominator may be zero.

    The result shows both means as "numerator" and "denominator".
    """
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    n = len(below)
    if n < 2:
        return missing("a ratio needs at least two rows", n)
    covariance = np.cov(above, below) / n
    a, b = float(above.mean()), float(below.mean())
    means = {"numerator": a, "denominator": b}
    t2 = scipy_stats.t.ppf(0.5 + confidence / 2, n - 1) ** 2
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


def sign_flip_test(differences: ArrayLike, seed: int = 0, n_flips: int = 100_000) -> float:
    """Two-sided p: paired differences centre on 0: exact to 16 pairs, else sampled; five pairs cannot reach 0.05."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("sign_flip_test: no differences")
    observed = abs(values.sum()) * (1 - 1e-12)
    if n <= 16:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ values) >= observed))
    signs = np.random.default_rng(seed).choice((-1, 1), size=(n_flips, n))
    return float((1 + np.sum(np.abs(signs @ values) >= observed)) / (1 + n_flips))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def _cluster_codes(clusters: Sequence[Hashable] | None, n: int) -> NDArray[np.int64]:
    """Cluster number 0, 1, … of each row, in order of first appearance."""
    if n == 0:
        raise ValueError("no values to resample")
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} cluster labels for {n} values")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in clusters], dtype=np.int64)

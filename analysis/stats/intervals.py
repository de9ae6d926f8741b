"""Intervals of a mean, a rate, a ratio or another statistic over rows that may come in clusters.

tests/benchmarks/COVERAGE.md says how often each interval covers the truth. In short: bootstrap percentiles, including
BCa, cover too little below about 30 clusters. The t interval corrected for skewness needs no resampling, and all
intervals here rest on it; for values of one sign, its side away from 0 is stretched. Rates near 0 take Wilson's
interval, opened to an exact bound; with clusters, they take Wilson's interval on the effective number of rows.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from .binomial import Interval, _score_interval, binomial_ci

Clusters = Sequence[Hashable] | NDArray[np.int64]
Measurement = dict[str, Any]
Floats = NDArray[np.float64]

ALONE = "one independent row or cluster has no interval"
# With fewer clusters, BCa's quantiles of the resampled values lie too far inside.
FEW_CLUSTERS = 30


def missing(reason: str, n: int = 0) -> Measurement:
    """Return a measurement that could not be made, with the reason."""
    return {"value": None, "n": n, "reason": reason}


def mean_ci(values: ArrayLike, clusters: Clusters | None = None, confidence: float = 0.95) -> Interval:
    """Return the interval of a mean over all rows: Student's t corrected for skewness (Hall 1992).

    The clusters are the units that vary. This is the closed form of what a bootstrap-t simulates. It is as good from 5
    clusters on, in time linear in the rows. If all values have one sign, the side away from 0 is stretched (`stretch`),
    since a few such values show less skewness than there is.

    Args:
        values: [n].
        clusters: a label for each row (its question, topic or seed); None: each row is its own cluster.

    Raises:
        ValueError: a single cluster, or labels and values that differ in number.
    """
    sums, counts = cluster_sums(values, clusters)
    mean, influence = float(sums.sum() / counts.sum()), _influence(sums, counts)
    interval = skewed_t(mean, influence, confidence)
    return stretch(interval, mean, influence, confidence) if one_sign(values) else interval


def rate_ci(values: ArrayLike, clusters: Clusters | None = None, confidence: float = 0.95) -> Interval:
    """Return the interval of the mean of values in [0, 1] (0 or 1, or probabilities), also for rates near 0.

    It lies inside [0, 1]. It is `rate_bounds`: Wilson's interval on the effective number of rows rate (1 - rate) /
    se^2, where se and Student's quantile are those of the clusters (Dean and Pagano 2015). The side away from the
    nearer end reaches at least as far as `mean_ci`, since questions differ more than coins do. Answers without clusters
    take `binomial_ci`. Without any event the design effect cannot be seen, and the rows count as independent.

    Raises:
        ValueError: values outside [0, 1], or a single cluster.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.size and not (rows.min() >= 0 and rows.max() <= 1):
        raise ValueError(f"rate_ci: values from {rows.min()} to {rows.max()} are not rates")
    if clusters is None and is_binary(rows):
        return binomial_ci(int(rows.sum()), len(rows), confidence)
    sums, counts = cluster_sums(rows, clusters)
    rate, influence = float(rows.mean()), _influence(sums, counts)
    other = stretch(skewed_t(rate, influence, confidence), rate, influence, confidence, float(rate > 0.5), rate=True)
    return rate_bounds(sums, counts, other, confidence)


def is_binary(rows: Floats) -> bool:
    """Return whether all values are 0 or 1."""
    return bool(np.isin(rows, (0.0, 1.0)).all())


def rate_bounds(sums: Floats, counts: Floats, other: Interval | None = None, confidence: float = 0.95) -> Interval:
    """Return Wilson's interval on the effective number of rows, from sums and numbers of rows per cluster [G].

    The bound towards the nearer end has Student's quantile with 2.5 (G - 1) degrees of freedom. With G - 1 it would
    miss in 1-2% instead of 2.5% at few events in few clusters, because most of its variance is the variance of the
    answers, which is known.

    Args:
        other: an interval of the same mean; the side away from the nearer end is stretched to its bound.
    """
    rate, n = float(np.clip(sums.sum() / counts.sum(), 0, 1)), float(counts.sum())
    variance = _squared_error(_influence(sums, counts))
    # If all clusters have the same rate, other than 0 or 1, they do not differ at all.
    effective = rate * (1 - rate) / variance if variance > (1e-12 * rate) ** 2 else n
    freedom = (len(sums) - 1) * np.array([1, 2.5])
    (low, high), (near_low, near_high) = (
        _score_interval(rate, effective, float(quantile))
        for quantile in scipy_stats.t.ppf(0.5 + confidence / 2, freedom)
    )
    if rate <= 0.5:
        return near_low, high if other is None else min(1.0, max(high, other[1]))
    return low if other is None else max(0.0, min(low, other[0])), near_high


def cluster_sums(values: ArrayLike, clusters: Clusters | None) -> tuple[Floats, Floats]:
    """Return the sum of values and the number of rows [G] of each cluster."""
    rows = np.asarray(values, dtype=np.float64)
    codes = cluster_codes(clusters, len(rows))
    n_clusters = int(codes.max()) + 1
    if n_clusters == 1:
        raise ValueError(ALONE)
    counts = np.bincount(codes, minlength=n_clusters).astype(np.float64)
    return np.bincount(codes, rows, n_clusters).astype(np.float64), counts


def _influence(sums: Floats, counts: Floats) -> Floats:
    """Return what each cluster contributes [G] to the mean over all rows, as a deviation from it."""
    return (sums - sums.sum() / counts.sum() * counts) / counts.mean()


def _squared_error(influence: Floats) -> float:
    """Return the squared standard error of a statistic from the influence of its units."""
    return float(np.sum(influence**2) / (len(influence) * (len(influence) - 1)))


def skewed_t(
    value: float, influence: Floats, confidence: float = 0.95, bounds: Interval = (-np.inf, np.inf)
) -> Interval:
    """Return Student's t interval with Hall's (1992) transformation, which removes the skewness.

    Args:
        influence: [G], what each independent unit contributes to `value`, as deviations that average 0.
        bounds: the values that the statistic can take; the interval is cut to them.
    """
    n = len(influence)
    error = np.sqrt(_squared_error(influence))
    # Differences that are only rounding, or whose cube would underflow.
    if error <= max(1e-12 * abs(value), 1e-100):
        return value, value
    skew = float(np.mean(influence**3) / np.mean(influence**2) ** 1.5 / np.sqrt(n))
    quantile = scipy_stats.t.ppf(0.5 + confidence / 2, n - 1)
    low, high = (float(value - error * _unskewed(sign * quantile, skew)) for sign in (1, -1))
    return float(np.clip(low, *bounds)), float(np.clip(high, *bounds))


def _unskewed(quantile: float, skew: ArrayLike) -> Floats:
    """Return the t that Hall's transformation t + skew t^2 / 3 + skew^2 t^3 / 27 + skew / 6 maps to `quantile`."""
    skews = np.asarray(skew, dtype=np.float64)
    safe = np.where(np.abs(skews) < 1e-9, 1.0, skews)
    return np.where(np.abs(skews) < 1e-9, quantile, 3 / safe * (np.cbrt(1 + safe * (quantile - safe / 6)) - 1))


def one_sign(values: ArrayLike) -> bool:
    """Return whether no two values lie on different sides of 0."""
    rows = np.asarray(values, dtype=np.float64)
    return bool(rows.min() >= 0 or rows.max() <= 0)


def stretch(
    interval: Interval,
    value: float,
    influence: Floats,
    confidence: float = 0.95,
    end: float = 0.0,
    rate: bool = False,
) -> Interval:
    """Return the interval with its side away from `end` as far out as a larger skewness would put it.

    No value lies beyond `end`. A sample shows less skewness than there is, and a smaller sample shows less still. Above
    some skewness Hall's interval becomes shorter again. So the bound is the furthest one of any skewness up to a limit.
    The limit is 1 + 30 / G^1.5 times the skewness of the sample (1 + 3 / sqrt(G) with more than 10 units that are not
    rates, whose tails may be heavier), or 3 cv + cv^3 if that is less: the skewness of lognormal values whose sd is cv
    times the distance of their mean from `end`. Values far from `end` keep their interval.
    """
    n = len(influence)
    error, away = np.sqrt(_squared_error(influence)), value - end
    if error <= max(1e-12 * abs(value), 1e-100) or np.sum(influence**3) * away <= 0:
        return interval
    skew = float(abs(np.mean(influence**3)) / np.mean(influence**2) ** 1.5)
    variation = float(error * np.sqrt(n) / abs(away))
    unseen = 30 / n**1.5 if rate else 3 / np.sqrt(n) * max(1, 10 / n)
    most = min((1 + unseen) * skew, 3 * variation + variation**3) / np.sqrt(n)
    quantile = float(scipy_stats.t.ppf(0.5 + confidence / 2, n - 1))
    reach = float(error * np.max(-_unskewed(-quantile, np.linspace(0, most, 200))))
    low, high = interval
    return (low, max(high, value + reach)) if away > 0 else (min(low, value - reach), high)


def jackknife_ci(
    value: float, left_out: ArrayLike, confidence: float = 0.95, bounds: Interval = (-np.inf, np.inf)
) -> Interval:
    """Return the interval of any smooth statistic from its values [G] with each cluster left out, by `skewed_t`.

    It needs one value per cluster instead of thousands of resamples. Smooth statistics are means, ratios, cosines and
    standard deviations, but not medians or maxima.

    Raises:
        ValueError: a single cluster.
    """
    without = np.asarray(left_out, dtype=np.float64)
    if len(without) < 2:
        raise ValueError(ALONE)
    return skewed_t(value, (len(without) - 1) * (without.mean() - without), confidence, bounds)


def bootstrap_ci(
    values: ArrayLike,
    clusters: Clusters | None = None,
    statistic: Callable[[Floats], float] | None = None,
    seed: int = 0,
    n_boot: int = 2000,
    confidence: float = 0.95,
    bounds: Interval = (-np.inf, np.inf),
) -> Interval:
    """Return the interval of any statistic by the BCa bootstrap (Efron 1987) over whole clusters, expanded for n.

    The expansion is that of Hesterberg (2015). Below 30 clusters, where BCa covers too little, it is `jackknife_ci`;
    the statistic must then be smooth.

    Args:
        values: [n] or [n, …], rows first.
        clusters: a label for each row (its question or topic); the rows of a cluster are drawn together. None: each row
            is its own cluster.
        statistic: a function of the resampled rows; None is the mean, computed from cluster sums, which is much faster.
        bounds: the values that the statistic can take.

    Raises:
        ValueError: a single cluster.
    """
    rows = np.asarray(values, dtype=np.float64)
    codes = cluster_codes(clusters, len(rows))
    n_clusters = int(codes.max()) + 1
    if n_clusters == 1:
        raise ValueError(ALONE)
    draws = np.random.default_rng(seed).integers(n_clusters, size=(n_boot, n_clusters))
    if statistic is None:
        sums, counts = cluster_sums(rows, clusters)
        observed, left_out = float(rows.mean()), (sums.sum() - sums) / (counts.sum() - counts)
        replicates = sums[draws].sum(1) / counts[draws].sum(1)
    else:
        observed = float(statistic(rows))
        left_out = np.array([statistic(rows[codes != code]) for code in range(n_clusters)])
    if n_clusters < FEW_CLUSTERS:
        return jackknife_ci(observed, left_out, confidence, bounds)
    if statistic is not None:
        members = [np.flatnonzero(codes == code) for code in range(n_clusters)]
        replicates = np.array([statistic(rows[np.concatenate([members[c] for c in draw])]) for draw in draws])
    return _bca(observed, replicates, left_out, confidence)


def _bca(observed: float, replicates: Floats, left_out: Floats, confidence: float) -> Interval:
    """Return bias-corrected and accelerated percentiles; `left_out` are the jackknife values, one per cluster."""
    # Ties (up to rounding) count half; otherwise a mean of few distinct values would look biased.
    tied = np.abs(replicates - observed) <= 1e-9 * np.ptp(replicates)
    below = np.mean((replicates < observed) & ~tied) + np.mean(tied) / 2
    below = np.clip(below, 0.5 / len(replicates), 1 - 0.5 / len(replicates))
    bias = scipy_stats.norm.ppf(below)
    spread = left_out.mean() - left_out
    denominator = 6 * np.sum(spread**2) ** 1.5
    acceleration = np.sum(spread**3) / denominator if denominator > 0 else 0.0
    # The variance of resampled means is too small by (n - 1) / n, and it is only an estimate: Student's t, expanded.
    n = len(left_out)
    z = np.sqrt(n / (n - 1)) * scipy_stats.t.ppf([0.5 - confidence / 2, 0.5 + confidence / 2], n - 1)
    levels = scipy_stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
    low, high = np.quantile(replicates, levels)
    return float(low), float(high)


def cluster_codes(clusters: Clusters | None, n: int) -> NDArray[np.int64]:
    """Return the cluster number 0, 1, … of each row, in order of first appearance.

    Raises:
        ValueError: no rows, or labels and rows that differ in number.
    """
    if n == 0:
        raise ValueError("no values to resample")
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} cluster labels for {n} values")
    if isinstance(clusters, np.ndarray):
        _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[inverse]
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in clusters], dtype=np.int64)

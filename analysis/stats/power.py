"""How many answers a comparison of two rates needs before money is spent, and what clusters take from them."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from .intervals import Measurement, cluster_codes


def sample_size(
    rate_a: float, rate_b: float, power: float = 0.8, alpha: float = 0.05, design_effect: float = 1.0
) -> int:
    """Return the answers per arm for a two-sided test of two rates (Fleiss 1981, without continuity correction).

    5 against 3% needs 1,506 per arm, 2 against 1% needs 2,319, and 1 against 0.5% needs 4,673 (1,505, 2,316 and 4,668
    with quantiles rounded to 1.96 and 0.84), each times the design effect.

    Raises:
        ValueError: equal rates, or a number outside its range.
    """
    _require(rate_a, rate_b, alpha, design_effect)
    if not alpha < power < 1:
        raise ValueError(f"sample_size: power {power} must lie between alpha {alpha} and 1")
    null, apart = _spreads(rate_a, rate_b)
    quantiles = scipy_stats.norm.ppf([1 - alpha / 2, power])
    n = ((quantiles[0] * null + quantiles[1] * apart) / (rate_a - rate_b)) ** 2
    return math.ceil(n * design_effect)


def power(rate_a: float, rate_b: float, n: float, alpha: float = 0.05, design_effect: float = 1.0) -> float:
    """Return the chance that a two-sided test tells two rates apart, with n answers per arm.

    It is the reverse of `sample_size`.

    Raises:
        ValueError: equal rates, or a number outside its range.
    """
    _require(rate_a, rate_b, alpha, design_effect)
    if n <= 0:
        raise ValueError(f"power: {n} answers per arm; write a number above 0")
    null, apart = _spreads(rate_a, rate_b)
    step = abs(rate_a - rate_b) * math.sqrt(n / design_effect)
    return float(scipy_stats.norm.cdf((step - scipy_stats.norm.ppf(1 - alpha / 2) * null) / apart))


def _spreads(rate_a: float, rate_b: float) -> tuple[float, float]:
    """Return sqrt(n) times the standard error of the difference: if the rates are equal, and if they differ."""
    middle = (rate_a + rate_b) / 2
    return math.sqrt(2 * middle * (1 - middle)), math.sqrt(rate_a * (1 - rate_a) + rate_b * (1 - rate_b))


def _require(rate_a: float, rate_b: float, alpha: float, design_effect: float) -> None:
    """Raise ValueError if the rates are equal or a number is outside its range."""
    if not (0 <= rate_a <= 1 and 0 <= rate_b <= 1) or rate_a == rate_b:
        raise ValueError(f"{rate_a} and {rate_b} must be two different rates in [0, 1]")
    if not 0 < alpha < 1 or design_effect <= 0:
        raise ValueError(f"alpha {alpha} must lie in (0, 1) and the design effect {design_effect} above 0")


def design_effect(values: ArrayLike, clusters: Sequence[Hashable]) -> Measurement:
    """Return how many times more rows are needed because they come in clusters (Kish 1965): 1 + (m - 1) ICC.

    The result is {"value", "n", "clusters", "intraclass_correlation", "effective_n"}. The intraclass correlation (ICC)
    is that of the one-way analysis of variance; m is the mean, over rows, of the size of the row's cluster. The value
    is below 1 where rows of a cluster are less similar than other rows, as repeated samples of fixed questions are.

    Raises:
        ValueError: one cluster only, or as many clusters as rows.
    """
    rows = np.asarray(values, dtype=np.float64)
    codes = cluster_codes(clusters, len(rows))
    counts = np.bincount(codes)
    n, n_clusters = len(rows), len(counts)
    if n_clusters < 2 or n_clusters == n:
        raise ValueError(f"design_effect: {n} rows in {n_clusters} clusters do not show how alike a cluster's rows are")
    means = np.bincount(codes, rows) / counts
    between = float(np.sum(counts * (means - rows.mean()) ** 2) / (n_clusters - 1))
    within = float(np.sum((rows - means[codes]) ** 2) / (n - n_clusters))
    size = float(np.sum(counts**2) / n)
    usual = (n - size) / (n_clusters - 1)
    total = between + (usual - 1) * within
    correlation = (between - within) / total if total > 0 else 0.0
    effect = 1 + (size - 1) * correlation
    return {
        "value": effect,
        "n": n,
        "clusters": n_clusters,
        "intraclass_correlation": correlation,
        "effective_n": n / effect if effect > 0 else math.inf,
    }

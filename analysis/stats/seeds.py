"""The hierarchical bootstrap: an interval for a method, over model seeds, fine-tune seeds, questions and samples."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from .intervals import Floats, Interval, cluster_codes, one_sign, rate_bounds, stretch

# With fewer outermost units, too many resamples draw only one unit, and have no standard error to divide by.
_FEWEST_UNITS = 5


def hierarchical_bootstrap(
    values: ArrayLike,
    levels: Sequence[Sequence[Hashable]],
    seed: int = 0,
    n_boot: int = 2000,
    confidence: float = 0.95,
    rate: bool = False,
) -> Interval:
    """Return the bootstrap-t interval of the mean, with every level resampled within the level above it.

    Each resampled mean is measured in standard errors of its own outermost units (Efron and Tibshirani 1993, 12.5).
    Percentiles, which this replaces, cover 0.74-0.91 with 5 to 10 seeds that differ. If all values have one sign, the
    side away from 0 reaches at least as far as `stretch` puts it. With fewer than 5 outermost units the interval is
    Student's t over them. Values that all lie in [0, 1] and differ get an interval inside [0, 1] (`rate_bounds`).

    Args:
        values: [n].
        levels: outermost first, each with a label per value: (model seed, fine-tune seed, question, …). What lies below
            the last level is resampled too. Labels are nested: question 3 of one seed is not question 3 of another
            seed.
        rate: whether the values are rates. If so, the interval says how many events there may be even if no value shows
            one.

    Raises:
        ValueError: a single outermost unit, since the claim is about several.
    """
    rows = np.asarray(values, dtype=np.float64)
    codes = [cluster_codes(level, len(rows)) for level in levels] or [cluster_codes(None, len(rows))]
    n_units = int(codes[0].max()) + 1
    if n_units == 1:
        raise ValueError("hierarchical_bootstrap: a single outermost unit says nothing about others")
    sums, counts = (np.bincount(codes[0], weights).astype(np.float64) for weights in (rows, np.ones(len(rows))))
    mean, error = (float(number) for number in _mean_and_error(sums, counts))
    tails = (0.5 - confidence / 2, 0.5 + confidence / 2)
    quantiles = scipy_stats.t.ppf(tails, n_units - 1)
    if n_units >= _FEWEST_UNITS and error > 1e-12 * abs(mean):
        means, errors = _mean_and_error(*_resampled(rows, codes, n_boot, np.random.default_rng(seed)))
        spread = errors > 1e-9 * error
        quantiles = np.quantile((means[spread] - mean) / errors[spread], tails)
    interval = mean - float(quantiles[1]) * error, mean - float(quantiles[0]) * error
    as_rate = rate or bool(rows.min() >= 0 and rows.max() <= 1 and np.ptp(rows) > 0)
    if n_units >= _FEWEST_UNITS and one_sign(rows):
        influence = (sums - mean * counts) / counts.mean()
        interval = stretch(interval, mean, influence, confidence, end=float(as_rate and mean > 0.5), rate=as_rate)
    if as_rate:
        return rate_bounds(sums, counts, interval, confidence)
    return interval


def _mean_and_error(sums: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Return the mean over all rows, and its standard error over the outermost units [..., G]."""
    n_units = sums.shape[-1]
    total = counts.sum(-1)
    mean = sums.sum(-1) / total
    rest = sums - mean[..., None] * counts
    return mean, np.sqrt(n_units / (n_units - 1) * np.sum(rest**2, axis=-1)) / total


def _resampled(
    rows: Floats, codes: Sequence[NDArray[np.int64]], n_boot: int, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return the sums and the numbers of rows [n_boot, G] of resampled outermost units, each resampled inside."""
    n_units = int(codes[0].max()) + 1
    drawn = generator.integers(n_units, size=(n_boot, n_units))
    sums, counts = np.empty(drawn.shape), np.empty(drawn.shape)
    for unit in range(n_units):
        slots, inside = drawn == unit, codes[0] == unit
        weights = _weights([code[inside] for code in codes[1:]], int(inside.sum()), int(slots.sum()), generator)
        sums[slots], counts[slots] = weights @ rows[inside], weights.sum(1)
    return sums, counts


def _weights(
    codes: Sequence[NDArray[np.int64]], n_rows: int, n_boot: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return how often each row of one outermost unit is drawn [n_boot, n_rows]."""
    weights = np.ones((n_boot, 1), dtype=np.int64)
    parents = np.zeros(n_rows, dtype=np.int64)
    for level in [*codes, np.arange(n_rows)]:
        children = np.unique(parents * (int(level.max()) + 1) + level, return_inverse=True)[1]
        n_children = int(children.max()) + 1
        drawn = np.zeros((n_boot, n_children), dtype=np.int64)
        for parent in range(int(parents.max()) + 1):
            inside = np.unique(children[parents == parent])
            # A parent that is drawn w times resamples its m children w times: w * m draws among them.
            drawn[:, inside] = generator.multinomial(
                weights[:, parent] * len(inside), np.full(len(inside), 1 / len(inside))
            )
        weights, parents = drawn, children
    return weights

"""Exact coverage of the 95% intervals of one rate of independent answers, by summing binomial probabilities.

    python tests/benchmarks/exact_coverage.py

Prints the two tables of COVERAGE.md: the interval in use at single rates beside what any interval can attain there,
and the candidates' smallest and mean coverage over rates of 0-2%. Counts are whole, so an interval that draws no lots
covers a rate with the probability of a set of counts: of a run i..j, since its bounds rise with the count.
"""

from collections.abc import Callable

import numpy as np
from holdfast.analysis import stats
from numpy.typing import NDArray
from scipy import stats as scipy_stats

Floats = NDArray[np.float64]
Bounds = Callable[[int], tuple[Floats, Floats]]
RATES = np.linspace(0, 0.02, 2001)[1:]
SINGLE = (0.001, 0.0025, 0.005, 0.01, 0.02)


def in_use(n: int) -> tuple[Floats, Floats]:
    """Bounds [n + 1] of `binomial_ci` for each count."""
    bounds = np.array([stats.binomial_ci(count, n) for count in range(n + 1)])
    return bounds[:, 0], bounds[:, 1]


def wilson(n: int) -> tuple[Floats, Floats]:
    bounds = np.array([stats.wilson(count, n) for count in range(n + 1)])
    return bounds[:, 0], bounds[:, 1]


def wilson_modified(n: int) -> tuple[Floats, Floats]:
    """Brown, Cai and DasGupta (2001): the first three lower bounds from the Poisson distribution."""
    low, high = wilson(n)
    low[1:4] = scipy_stats.chi2.ppf(0.05, 2 * np.arange(1, 4)) / (2 * n)
    return low, high


def agresti_coull(n: int) -> tuple[Floats, Floats]:
    z = scipy_stats.norm.ppf(0.975)
    rate = (np.arange(n + 1) + z * z / 2) / (n + z * z)
    half = z * np.sqrt(rate * (1 - rate) / (n + z * z))
    return rate - half, rate + half


def jeffreys(n: int) -> tuple[Floats, Floats]:
    counts = np.arange(n + 1)
    low, high = (scipy_stats.beta.ppf(tail, counts + 0.5, n - counts + 0.5) for tail in (0.025, 0.975))
    low[0], high[n] = 0, 1
    return low, high


def clopper_pearson(n: int) -> tuple[Floats, Floats]:
    counts = np.arange(n + 1)
    low, high = scipy_stats.beta.ppf(0.025, counts, n - counts + 1), scipy_stats.beta.ppf(0.975, counts + 1, n - counts)
    low[0], high[n] = 0, 1
    return low, high


def covered(bounds: Bounds, n: int, rates: Floats) -> Floats:
    """Coverage at each rate [R] of the interval with these bounds for each count."""
    low, high = bounds(n)
    likely = slice(0, min(n, 200) + 1)  # more has no probability at rates to 2%
    chances = scipy_stats.binom.pmf(np.arange(n + 1)[likely], n, rates[:, None])
    return (chances * ((low[likely] <= rates[:, None]) & (rates[:, None] <= high[likely]))).sum(1)


def by_tails(n: int, rates: Floats, mid: bool) -> Floats:
    """Coverage of Blaker's (2000) interval, or (mid) of the one from mid-p values, by their tests at each rate."""
    shares, counts = [], np.arange(min(n, 200) + 1)
    for rate in rates:
        chances = scipy_stats.binom.pmf(counts, n, rate)
        tail = np.minimum(chances.cumsum(), scipy_stats.binom.sf(counts - 1, n, rate))
        if mid:
            kept = tail - chances / 2 > 0.025
        else:
            kept = np.array([chances[tail <= one * (1 + 1e-12)].sum() > 0.05 for one in tail])
        shares.append(chances[kept].sum())
    return np.array(shares)


def neighbours(n: int, rate: float) -> tuple[float, float]:
    """The largest probability of a run of counts up to 0.95, and the smallest from 0.95 on."""
    below = np.concatenate([[0.0], scipy_stats.binom.cdf(np.arange(min(n, 200) + 1), n, rate)])
    runs = (below[None] - below[:, None]).ravel()
    return float(runs[runs <= 0.95].max(initial=0.0)), float(runs[runs >= 0.95].min())


def main() -> None:
    for n in (100, 400, 1505):
        for rate in SINGLE:
            here = np.array([rate])
            under, over = neighbours(n, rate)
            none = "none" if under < 0.93 and over > 0.97 else ""
            now, before = covered(in_use, n, here)[0], covered(wilson, n, here)[0]
            print(f"| {n} answers, {100 * rate:g}% | {now:.3f} | {before:.3f} | {under:.3f}, {over:.3f} | {none} |")
    print()
    candidates = {
        "Wilson": wilson,
        "Wilson, first 3 bounds by Poisson (Brown et al.)": wilson_modified,
        "Agresti-Coull": agresti_coull,
        "Jeffreys": jeffreys,
        "Clopper-Pearson": clopper_pearson,
        "in use": in_use,
    }
    found = {name: [covered(bounds, n, RATES) for n in (100, 400, 1505)] for name, bounds in candidates.items()}
    for name, mid in (("mid-p", True), ("Blaker", False)):
        found[name] = [by_tails(n, RATES[::5], mid) for n in (100, 400, 1505)]
    for name, curves in found.items():
        print(f"| {name} | {' | '.join(f'{curve.min():.3f}, {curve.mean():.3f}' for curve in curves)} |")


if __name__ == "__main__":
    main()

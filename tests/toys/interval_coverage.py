"""Settings in which the 95% intervals of `analysis.stats` are tried on simulated data, and how often they cover.

Every setting calls the public function as the metrics do. `held` settings are promised to cover in 93-97% of 1,000
repetitions (tests/analysis/stats/test_coverage.py); the others are slow, or where no interval does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from holdfast.analysis import stats
from holdfast.analysis.metrics.projection import projection
from holdfast.analysis.passes.readout import Readout
from holdfast.analysis.subspace.file import Provenance, Subspace
from numpy.random import Generator
from scipy.special import ndtr

SAMPLES = 60
Draw = Callable[[Generator], tuple[float, float, float]]


@dataclass(frozen=True)
class Setting:
    """One kind of data and one interval; `draw` gives (low, high, truth) of one repetition.

    held: "both" for coverage in 93-97%, "below" for at least 93% (few events leave no choice but
    more), "" for neither.
    """

    group: str
    name: str
    draw: Draw
    held: str = "both"


def measured(result: stats.Measurement, truth: float) -> tuple[float, float, float]:
    low, high = result["ci95"]
    return low, high, truth


def settings() -> Iterator[Setting]:
    yield from means()
    yield from answers()
    yield from questions()
    yield from seeds()
    yield from comparisons()
    yield from statistics()
    yield from projections()


def means() -> Iterator[Setting]:
    """`measurement` of independent rows or clusters, symmetric and skewed."""
    for n in (5, 10, 30):
        yield Setting("mean", f"normal, {n} rows", lambda g, n=n: measured(stats.measurement(g.normal(size=n)), 0))
    for n in (5, 10, 30, 256):
        draw = lambda g, n=n: measured(stats.measurement(2 * g.exponential(size=n)), 2)  # noqa: E731
        yield Setting("mean", f"exponential, {n} rows", draw, "both" if n > 5 else "below")
    for n in (10, 30):
        draw = lambda g, n=n: measured(stats.measurement(1 + g.exponential(size=n)), 2)  # noqa: E731
        yield Setting("mean", f"1 + exponential, {n} rows", draw)
    for n, held in ((5, ""), (10, "below"), (30, "both")):
        draw = lambda g, n=n: measured(stats.measurement(2 * g.lognormal(size=n)), 2 * np.exp(0.5))  # noqa: E731
        yield Setting("mean", f"lognormal of log-sd 1, {n} rows", draw, held)
    for n_clusters in (5, 10, 24):
        labels = np.repeat(np.arange(n_clusters), 20).tolist()

        def clustered(g: Generator, k: int = n_clusters, labels: list[int] = labels) -> tuple[float, float, float]:
            values = g.normal(size=(k, 1)) + g.normal(size=(k, 20))
            return measured(stats.measurement(values.ravel(), labels), 0)

        yield Setting("mean", f"{n_clusters} clusters of 20, intraclass correlation 0.5", clustered)


def _rate(rate: float | None, g: Generator) -> float:
    return float(g.uniform(0, 0.02)) if rate is None else rate


def _named(rate: float | None) -> str:
    return "0-2%, uniform" if rate is None else f"{100 * rate:g}%"


def answers() -> Iterator[Setting]:
    """`measurement(rate=True)` of independent answers."""
    # Counts are whole, so coverage jumps with n times the rate (exact_coverage.py): the upper end is promised for rates
    # spread over 0-2%, and for those single rates at which the exact coverage is below 96.5%.
    steady = {400: (None, 0.005, 0.01, 0.02), 1505: (None, 0.0025, 0.01, 0.02)}
    for n, promised in steady.items():
        for rate in (None, 0.0, 0.001, 0.0025, 0.005, 0.01, 0.02):
            promise = "both" if rate in promised else "below"

            def draw(g: Generator, n: int = n, rate: float | None = rate) -> tuple[float, float, float]:
                truth = _rate(rate, g)
                return measured(stats.measurement(g.random(n) < truth, rate=True), truth)

            yield Setting("rate, independent answers", f"{n} answers, {_named(rate)}", draw, promise)


def questions() -> Iterator[Setting]:
    """`measurement(rate=True)` of answers in questions whose own rates differ by a gamma of the given variation."""
    for n_questions, size in ((5, 50), (8, 50), (10, 200), (24, 50), (50, 50)):
        labels = np.repeat(np.arange(n_questions), size).tolist()
        for variation in (0.0, 1.0, 2.0):
            for rate in (None, 0.005, 0.02):

                def draw(
                    g: Generator,
                    shape: tuple[int, int] = (n_questions, size),
                    labels: list[int] = labels,
                    variation: float = variation,
                    rate: float | None = rate,
                ) -> tuple[float, float, float]:
                    truth = _rate(rate, g)
                    own = np.full(shape[0], truth)
                    if variation:
                        own *= g.gamma(1 / variation**2, variation**2, size=shape[0])
                    events = g.random(shape) < own[:, None]
                    return measured(stats.measurement(events.ravel(), labels, rate=True), truth)

                name = f"{n_questions} questions of {size}, {_named(rate)}, variation {variation:g}"
                held = "both" if n_questions >= 24 or (n_questions == 10 and variation < 2) else "below"
                # Variation 2: covered in 93-95%, too near the limit for 1,000 repetitions to hold.
                if variation > 1 and n_questions in (8, 10):
                    held = ""
                yield Setting("rate, clustered answers", name, draw, held)


def seeds() -> Iterator[Setting]:
    """`hierarchical_bootstrap` over labs and fine-tune seeds."""
    for n_labs in (5, 10):
        levels = [np.repeat(np.arange(n_labs), 3).tolist(), np.arange(3 * n_labs).tolist()]
        for spread in (0.0, 0.5, 1.0, 2.0):

            def normal(
                g: Generator, k: int = n_labs, spread: float = spread, levels: list[list[int]] = levels
            ) -> tuple[float, float, float]:
                values = 10 + spread * g.normal(size=(k, 1)) + g.normal(size=(k, 3))
                return *stats.hierarchical_bootstrap(values.ravel(), levels, int(g.integers(1 << 30)), n_boot=1000), 10

            held = "both" if spread in (0.5, 2) else ""
            yield Setting("seeds", f"{n_labs} labs x 3 seeds, normal, labs {spread:g} times as far apart", normal, held)
        for spread in (0.5, 1.0):

            def skewed(
                g: Generator, k: int = n_labs, spread: float = spread, levels: list[list[int]] = levels
            ) -> tuple[float, float, float]:
                values = 0.01 * np.exp(spread * g.normal(size=(k, 1)) + 0.3 * g.normal(size=(k, 3)))
                truth = 0.01 * float(np.exp(spread**2 / 2 + 0.045))
                interval = stats.hierarchical_bootstrap(np.minimum(values, 1).ravel(), levels, int(g.integers(1 << 30)))
                return *interval, truth

            name = f"{n_labs} labs x 3 seeds, exact rates near 1%, lognormal of log-sd {spread:g}"
            yield Setting("seeds", name, skewed, "")
        for rate in (None, 0.01):
            rows = [np.repeat(level, SAMPLES).tolist() for level in levels]

            def sampled(
                g: Generator, k: int = n_labs, rate: float | None = rate, rows: list[list[int]] = rows
            ) -> tuple[float, float, float]:
                truth = _rate(rate, g)
                own = np.repeat(truth * g.gamma(4, 0.25, size=k), 3 * SAMPLES)
                events = (g.random(3 * SAMPLES * k) < own).astype(float)
                drawn = int(g.integers(1 << 30))
                return *stats.hierarchical_bootstrap(events, rows, drawn, n_boot=500, rate=True), truth

            yield Setting(
                "seeds", f"{n_labs} labs x 3 seeds x {SAMPLES} answers, {_named(rate)}, variation 0.5", sampled, ""
            )


def comparisons() -> Iterator[Setting]:
    """`paired_difference` and `fieller`."""
    for n in (5, 10, 30):

        def paired(g: Generator, n: int = n) -> tuple[float, float, float]:
            shared = 3 * g.normal(size=n)
            return measured(stats.paired_difference(shared + g.normal(size=n) + 0.5, shared + g.normal(size=n)), 0.5)

        yield Setting("paired difference", f"normal, {n} pairs", paired)
    for n, left, right in ((400, 0.02, 0.01), (400, 0.01, 0.0), (1505, 0.05, 0.03), (1505, 0.01, 0.005)):

        def rates(g: Generator, n: int = n, left: float = left, right: float = right) -> tuple[float, float, float]:
            first, second = g.random(n) < left, g.random(n) < right
            return measured(stats.paired_difference(first, second), left - right)

        yield Setting("paired difference", f"{n} answers an arm, {_named(left)} against {_named(right)}", rates, "")
    for n_questions, size in ((10, 200), (24, 50)):
        labels = np.repeat(np.arange(n_questions), size).tolist()
        for left, right in ((0.02, 0.01), (0.01, 0.01)):

            def arms(
                g: Generator,
                shape: tuple[int, int] = (n_questions, size),
                labels: list[int] = labels,
                left: float = left,
                right: float = right,
            ) -> tuple[float, float, float]:
                own = g.gamma(1, 1, size=shape[0])[:, None]
                first, second = g.random(shape) < left * own, g.random(shape) < right * own
                return measured(stats.paired_difference(first.ravel(), second.ravel(), labels), left - right)

            name = f"{n_questions} questions of {size}, variation 1, {_named(left)} against {_named(right)}"
            yield Setting("paired difference", name, arms, "")
    for n in (5, 10, 30):

        def ratio(g: Generator, n: int = n) -> tuple[float, float, float]:
            below = 4 + g.normal(size=n)
            return measured(stats.fieller(0.5 * below + 0.5 * g.normal(size=n), below), 0.5)

        yield Setting("ratio of means (Fieller)", f"normal, {n} rows, denominator 4 sd from 0", ratio)


def statistics() -> Iterator[Setting]:
    """`bootstrap_ci` of a cosine of two mean vectors and of a separation."""
    one, two = np.array([3.0, 1, 0, 0]), np.array([3.0, -1, 1, 0])
    truth = float(one @ two / np.sqrt(one @ one * (two @ two)))

    def cosine(rows: stats.Floats) -> float:
        a, b = rows[:, :4].mean(0), rows[:, 4:].mean(0)
        return float(a @ b / np.sqrt(a @ a * (b @ b)))

    def separation(rows: stats.Floats) -> float:
        return float((rows[:, 0].mean() - rows[:, 1].mean()) / rows.std(0, ddof=1).sum())

    for n in (10, 29, 64):

        def of_means(g: Generator, n: int = n) -> tuple[float, float, float]:
            rows = g.normal(size=(n, 8)) + np.concatenate([one, two])
            return *stats.bootstrap_ci(rows, statistic=cosine, n_boot=400, bounds=(-1, 1)), truth

        def apart(g: Generator, n: int = n) -> tuple[float, float, float]:
            return *stats.bootstrap_ci(g.normal([2, 0], size=(n, 2)), statistic=separation, n_boot=400), 1.0

        yield Setting("other statistics", f"cosine of means, {n} rows", of_means, "")
        yield Setting("other statistics", f"separation, {n} rows", apart, "")


WIDTH = 12


def readout(states: stats.Floats) -> Readout:
    """What one model would read at layer 0: states [n, WIDTH], three tokens a row."""
    pooled, rows = torch.tensor(states), torch.arange(len(states))
    owners = rows.repeat_interleave(3)
    log_prob = torch.zeros(len(owners), dtype=torch.float64)
    projected = {0: pooled[owners][:, :1]}
    return Readout(owners, log_prob, log_prob, torch.full_like(rows, 3), {0: pooled}, owners, projected)


def projections() -> Iterator[Setting]:
    """`projection` of twice the named rows, of which it reads one half."""
    axes = torch.eye(WIDTH, dtype=torch.float64)
    facts = Provenance("svd", 1, (0,), "completion", False, 0, "i", None, "t", "d", 1, 1)
    subspace = Subspace({0: axes[:, :1]}, {0: 1.0}, None, facts)

    def read(quantity: str, checkpoint: stats.Floats, instruct: stats.Floats, base: stats.Floats) -> stats.Measurement:
        layers = projection(readout(checkpoint), readout(instruct), readout(base), subspace)["layers"]
        return layers["0"][quantity]

    def separation(g: Generator, n: int) -> tuple[float, float, float]:
        instruct = g.normal(size=(2 * n, WIDTH))
        base = instruct.copy()
        base[:, 0] -= 2 + 0.5 * g.normal(size=2 * n)
        return measured(read("separation", instruct, instruct, base), 2 / (1 + np.sqrt(1.25)))

    def cosine(g: Generator, n: int, noise: float, shared: float) -> tuple[float, float, float]:
        """Means of length 1; the rows' noise has `noise` times their squared length, correlated by `shared`."""
        instruct, own, other = np.sqrt(noise / WIDTH) * g.normal(size=(3, 2 * n, WIDTH))
        drift, toward = own.copy(), shared * own + np.sqrt(1 - shared**2) * other
        drift[:, 0] += 1
        toward[:, :2] += 0.6, 0.8
        return measured(read("drift_cosine", instruct + drift, instruct, instruct + toward), 0.6)

    def inside(g: Generator, n: int, dependent: bool) -> tuple[float, float, float]:
        """Squared drifts are lognormal of log-sd 1; their shares inside V are 1/3, or grow from 15 to 50% with them."""
        size = g.normal(size=2 * n)
        mean = 0.15 + 0.35 * ndtr(size) if dependent else np.full(2 * n, 1 / 3)
        own, states = g.beta(6 * mean, 6 * (1 - mean)), g.normal(size=(2 * n, WIDTH))
        drift = np.zeros_like(states)
        drift[:, 0], drift[:, 1] = np.sqrt(np.exp(size) * own), np.sqrt(np.exp(size) * (1 - own))
        truth = 0.15 + 0.35 * ndtr(1 / np.sqrt(2)) if dependent else 1 / 3
        return measured(read("drift_inside", states + drift, states, states - axes[0].numpy()), truth)

    for n in (8, 12, 32, 128):
        yield Setting("projection", f"separation, {n} rows", lambda g, n=n: separation(g, n), "")
        for noise, shared in ((1.0, 0.5), (4.0, 0.0)):
            name = f"drift_cosine, {n} rows, noise {noise:g} times the squared mean, correlated by {shared:g}"
            draw = lambda g, n=n, noise=noise, shared=shared: cosine(g, n, noise, shared)  # noqa: E731
            yield Setting("projection", name, draw, "both" if n == 12 and noise == 1 else "")
        for dependent in (False, True):
            name = f"drift_inside, {n} rows, squares lognormal of log-sd 1{', shares growing with them' * dependent}"
            draw = lambda g, n=n, dependent=dependent: inside(g, n, dependent)  # noqa: E731
            yield Setting("projection", name, draw, "both" if n == 12 and dependent else "")


def coverage(setting: Setting, repetitions: int, seed: int = 0) -> tuple[float, float]:
    """Share of repetitions whose interval holds the truth, and the mean width."""
    generator, hits, width = np.random.default_rng(seed), 0, 0.0
    for _ in range(repetitions):
        low, high, truth = setting.draw(generator)
        hits += low - 1e-12 <= truth <= high + 1e-12
        width += high - low
    return hits / repetitions, width / repetitions

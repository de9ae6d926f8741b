"""Intervals cover the truth as often as they say, and p-values are uniform when there is nothing to find."""

import numpy as np
import pytest
from holdfast.analysis import stats
from scipy import stats as scipy_stats
from toys.interval_coverage import Setting, coverage, settings

REPETITIONS = 1000
PROMISED = [setting for setting in settings() if setting.held]


@pytest.mark.parametrize("setting", PROMISED, ids=lambda setting: f"{setting.group}: {setting.name}")
def test_the_interval_covers_the_truth_in_93_to_97_of_100_repetitions(setting: Setting):
    share, _ = coverage(setting, REPETITIONS, seed=1)
    assert 0.93 <= share <= (0.97 if setting.held == "both" else 1.0)


@pytest.mark.parametrize("n", [100, 200, 400, 1505])
def test_answers_are_covered_in_at_least_93_of_100_at_every_rate_to_2_percent_and_at_most_97_on_average(n):
    bounds = np.array([stats.binomial_ci(count, n) for count in range(min(n, 120) + 1)])
    rates = np.linspace(0, 0.02, 1001)[1:, None]
    chances = scipy_stats.binom.pmf(np.arange(len(bounds)), n, rates)
    share = (chances * ((bounds[:, 0] <= rates) & (rates <= bounds[:, 1]))).sum(1)
    assert share.min() >= 0.93 and 0.95 <= share.mean() <= 0.97


def uniform(p_values) -> float:
    """p of the Kolmogorov-Smirnov test against a uniform distribution."""
    return scipy_stats.kstest(p_values, "uniform").pvalue


def test_permutation_p_values_are_uniform_under_the_null():
    generator = np.random.default_rng(0)
    skewed = [
        stats.permutation_test(generator.exponential(size=15), generator.exponential(size=20), None, seed, 399)
        for seed in range(REPETITIONS)
    ]
    assert uniform(skewed) > 0.01
    labels = (np.repeat(np.arange(8), 5).tolist(), np.repeat(np.arange(8, 17), 5).tolist())
    clustered = []
    for seed in range(REPETITIONS):
        values = generator.normal(size=(17, 1)) + generator.normal(size=(17, 5))
        clustered.append(stats.permutation_test(values[:8].ravel(), values[8:].ravel(), labels, seed, 399))
    assert uniform(clustered) > 0.01


def test_rows_of_a_cluster_permuted_one_by_one_would_find_what_is_not_there():
    generator, found = np.random.default_rng(0), 0
    for seed in range(200):
        values = generator.normal(size=(17, 1)) + generator.normal(size=(17, 5))
        found += stats.permutation_test(values[:8].ravel(), values[8:].ravel(), None, seed, 199) < 0.05
    assert found / 200 > 0.15


@pytest.mark.parametrize("pairs", [10, 25])
def test_sign_flip_p_values_are_uniform_under_the_null(pairs):
    generator = np.random.default_rng(pairs)
    p_values = [stats.sign_flip_test(generator.laplace(size=pairs), seed, 999) for seed in range(REPETITIONS)]
    assert uniform(p_values) > 0.01


def test_holm_finds_something_false_in_at_most_5_of_100_families():
    generator = np.random.default_rng(0)
    found = np.mean([min(stats.holm(generator.random(6).tolist())) < 0.05 for _ in range(4000)])
    assert found == pytest.approx(0.05, abs=0.012)


def test_what_is_not_kept_is_called_kept_in_at_most_3_of_100_repetitions():
    generator, kept = np.random.default_rng(0), 0
    for _ in range(REPETITIONS):
        new, old = generator.normal(-0.5, 1, size=12), np.zeros(12)
        kept += stats.non_inferiority(stats.paired_difference(new, old), margin=0.5)["kept"]
    assert kept / REPETITIONS < 0.04

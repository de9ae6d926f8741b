"""Intervals and tests equal closed forms, scipy's own, or keep their promised coverage."""

import math

import numpy as np
import pytest
from holdfast.analysis import stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_defining_equation(case):
    successes, n = case
    low, high = stats.wilson(successes, n)
    rate = successes / n
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert (rate - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, rel=1e-4, abs=1e-12)


def test_wilson_of_the_textbook():
    assert stats.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert stats.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    for bad in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="not a rate"):
            stats.wilson(*bad)


@pytest.mark.parametrize("seed", range(3))
def test_bca_equals_scipys(seed):
    values = np.random.default_rng(seed).exponential(size=25)
    low, high = stats.bootstrap_ci(values, seed=seed, n_boot=20_000)
    expected = scipy_stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(99)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03)
    slow = stats.bootstrap_ci(values, statistic=lambda rows: float(rows.mean()), seed=seed, n_boot=20_000)
    assert slow == pytest.approx((low, high))


def test_clusters_are_resampled_whole():
    # Ten identical copies of a row carry no more than the row itself.
    values = np.random.default_rng(0).normal(size=20)
    copies, labels = np.repeat(values, 10), [f"topic {i}" for i in range(20) for _ in range(10)]
    assert stats.bootstrap_ci(copies, labels, seed=1) == pytest.approx(stats.bootstrap_ci(values, seed=1))
    narrow = stats.bootstrap_ci(copies, seed=1)
    assert narrow[1] - narrow[0] < 0.5 * np.subtract(*stats.bootstrap_ci(values, seed=1)[::-1])


def test_bca_covers_a_skewed_mean():
    generator = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        low, high = stats.bootstrap_ci(generator.exponential(size=25), seed=trial, n_boot=800)
        hits += low <= 1 <= high
    assert hits / 300 > 0.88


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_intervals_stay_inside_the_data_and_scale_with_it(values):
    low, high = stats.bootstrap_ci(values, n_boot=200)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    rounded = np.round(values, 3)
    low, high = stats.bootstrap_ci(rounded, n_boot=200)
    assert stats.bootstrap_ci(1000 * rounded, n_boot=200) == pytest.approx((1000 * low, 1000 * high), abs=1e-6)


def test_a_measurement_says_n_and_interval_or_why_not():
    assert stats.measurement([0.2, 0.4])["value"] == pytest.approx(0.3)
    assert stats.measurement([]) == {"value": None, "n": 0, "reason": "no rows"}
    single = stats.measurement([0.2, 0.4], clusters=["a", "a"])
    assert single["ci95"] is None and "reason" in single
    assert stats.measurement([0.5] * 4)["ci95"] == [0.5, 0.5]
    with pytest.raises(ValueError, match="labels"):
        stats.measurement([1.0, 2.0], clusters=["a"])


def test_pairing_removes_what_arms_share():
    generator = np.random.default_rng(0)
    row = 10 * generator.normal(size=30)
    left, right = row + 0.5 + 0.1 * generator.normal(size=30), row + 0.1 * generator.normal(size=30)
    result = stats.paired_bootstrap(left, right)
    assert result["value"] == pytest.approx((left - right).mean())
    assert 0.4 < result["ci95"][0] < 0.5 < result["ci95"][1] < 0.6
    with pytest.raises(ValueError, match="pairs"):
        stats.paired_bootstrap([1.0], [1.0, 2.0])


def test_hierarchical_interval_sees_the_variance_between_seeds():
    generator = np.random.default_rng(0)
    effects = generator.normal(size=12)
    values = np.concatenate([effect + 0.01 * generator.normal(size=50) for effect in effects])
    seeds = np.repeat(np.arange(12), 50).tolist()
    low, high = stats.hierarchical_bootstrap(values, [seeds])
    between = 2 * 1.96 * effects.std(ddof=0) / math.sqrt(12)
    assert high - low == pytest.approx(between, rel=0.1)
    rows = stats.hierarchical_bootstrap(values, [])
    assert rows[1] - rows[0] == pytest.approx(2 * 1.96 * values.std() / math.sqrt(600), rel=0.1)


def test_fieller_equals_its_closed_form_and_refuses_a_zero_denominator():
    generator = np.random.default_rng(1)
    below = 2 + 0.5 * generator.normal(size=40)
    above = 0.7 * below + 0.2 * generator.normal(size=40)
    result = stats.fieller(above, below)
    assert result["value"] == pytest.approx(above.mean() / below.mean())
    t = scipy_stats.t.ppf(0.975, 39)
    for bound in result["ci95"]:
        # A bound is a ratio at which the paired t statistic of numerator - bound * denominator is just significant.
        rest = above - bound * below
        assert abs(rest.mean()) / (rest.std(ddof=1) / math.sqrt(40)) == pytest.approx(t, rel=1e-6)
    unclear = stats.fieller(above, generator.normal(size=40))
    assert unclear["value"] is None and "0" in unclear["reason"] and "denominator" in unclear
    assert stats.fieller([1.0], [1.0])["value"] is None


def test_sign_flips_are_exact_for_few_pairs_and_sampled_for_many():
    assert stats.sign_flip_test([1, 2, 3, 4, 5]) == pytest.approx(2 / 32)
    assert stats.sign_flip_test([1, -1, 1, -1]) == 1.0
    values = np.random.default_rng(0).normal(0.3, 1, size=40)
    expected = scipy_stats.permutation_test(
        (values, np.zeros(40)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    assert stats.sign_flip_test(values) == pytest.approx(expected, abs=0.01)
    with pytest.raises(ValueError, match="no differences"):
        stats.sign_flip_test([])


def test_holm_of_the_textbook():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

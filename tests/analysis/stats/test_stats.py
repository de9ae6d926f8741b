"""Intervals and tests equal closed forms, scipy's own, or keep their promised coverage."""

import math

import numpy as np
import pytest
from holdfast.analysis import stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
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
        with pytest.raises(ValueError, match="wilson"):
            stats.wilson(*bad)


@pytest.mark.parametrize("seed", range(3))
def test_bca_equals_scipys_at_the_expanded_level(seed):
    values = np.random.default_rng(seed).exponential(size=40)
    low, high = stats.bootstrap_ci(values, seed=seed, n_boot=20_000)
    # Hesterberg (2015): normal quantiles give way to sqrt(n / (n - 1)) times Student's.
    level = 1 - 2 * scipy_stats.norm.cdf(-math.sqrt(40 / 39) * scipy_stats.t.ppf(0.975, 39))
    expected = scipy_stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=20_000, rng=np.random.default_rng(99)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05)
    slow = stats.bootstrap_ci(values, statistic=lambda rows: float(rows.mean()), seed=seed, n_boot=20_000)
    assert slow == pytest.approx((low, high))


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_mean_solves_halls_equation(seed):
    values = np.random.default_rng(seed).exponential(size=12) - 1
    error, skew = values.std(ddof=1) / math.sqrt(12), scipy_stats.skew(values) / math.sqrt(12)
    for bound, quantile in zip(stats.mean_ci(values), scipy_stats.t.ppf([0.975, 0.025], 11), strict=True):
        t = (values.mean() - bound) / error
        assert t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6 == pytest.approx(quantile, rel=1e-9)
    even = np.concatenate([values, -values])
    half = scipy_stats.t.ppf(0.975, 23) * even.std(ddof=1) / math.sqrt(24)
    assert stats.mean_ci(even) == pytest.approx((-half, half))


def furthest(values: np.ndarray, unseen: float) -> float:
    """The upper bound of any skewness up to 1 + `unseen` times that of the values, or that of a lognormal's."""
    n, mean, sd = len(values), values.mean(), values.std(ddof=1)
    quantile = scipy_stats.t.ppf(0.975, n - 1)
    most = min((1 + unseen) * scipy_stats.skew(values), 3 * sd / mean + (sd / mean) ** 3)

    def bound(skew: float) -> float:
        """Where Hall's polynomial in t = (mean - bound) / error is the lower quantile, by root finding."""
        g = skew / math.sqrt(n)
        t = optimize.brentq(lambda t: t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6 + quantile, -100, 100)
        return mean - t * sd / math.sqrt(n)

    return max(bound(skew) for skew in np.linspace(1e-6, most, 1000))


@pytest.mark.parametrize("seed", [0, 2, 3])
@pytest.mark.parametrize(("n", "unseen"), [(5, 30 / 5**1.5), (10, 3 / math.sqrt(10)), (40, 3 / math.sqrt(40))])
def test_values_of_one_sign_reach_as_far_as_any_skewness_in_doubt(seed, n, unseen):
    values = np.random.default_rng(seed).lognormal(size=n)
    low, high = stats.mean_ci(values)
    assert high == pytest.approx(furthest(values, unseen), rel=1e-3)
    # The other side is that of the same values with a sign that differs.
    assert low == pytest.approx(stats.mean_ci(values - 100)[0] + 100, abs=2e-2)
    assert stats.mean_ci(-values) == pytest.approx((-high, -low))


def test_the_jackknife_of_a_mean_is_the_interval_of_a_mean():
    values = np.random.default_rng(0).exponential(size=15) - 1
    without = [np.delete(values, row).mean() for row in range(15)]
    assert stats.jackknife_ci(values.mean(), without) == pytest.approx(stats.mean_ci(values))
    assert stats.bootstrap_ci(values) == pytest.approx(stats.mean_ci(values))
    assert stats.jackknife_ci(0.9, [0.7, 0.99, 0.95], bounds=(-1, 1))[1] == 1
    for single in (lambda: stats.jackknife_ci(1.0, [1.0]), lambda: stats.bootstrap_ci([1.0, 2.0], ["a", "a"])):
        with pytest.raises(ValueError, match="independent"):
            single()


def test_few_answers_open_wilsons_interval_to_an_exact_bound():
    for events, n, tail in ((1, 400, 0.065), (4, 1505, 0.065), (3, 100, 0.065), (8, 400, 0.05), (9, 1505, 0.05)):
        low, high = stats.binomial_ci(events, n)
        # At the lower bound, this many events or more happen with the probability of the tail.
        assert scipy_stats.binom.sf(events - 1, n, low) == pytest.approx(tail)
        assert low < stats.wilson(events, n)[0] and high == stats.wilson(events, n)[1]
        assert stats.binomial_ci(n - events, n) == pytest.approx((1 - high, 1 - low))
    for events, n in ((0, 400), (20, 400), (40, 1505), (25, 50)):
        assert stats.binomial_ci(events, n) == stats.wilson(events, n)


def test_rates_of_independent_answers_are_binomial_and_clusters_cost_rows():
    answers = np.zeros(240)
    answers[[3, 50, 51, 52, 53, 200]] = 1
    assert stats.rate_ci(answers) == stats.binomial_ci(6, 240)
    assert stats.measurement(answers)["ci95"] == list(stats.binomial_ci(6, 240))
    questions = (np.arange(240) // 10).tolist()
    low, high = stats.rate_ci(answers, questions)
    sums = answers.reshape(24, 10).sum(1)
    variance = np.sum((sums - 0.25) ** 2) * 24 / 23 / 240**2
    effective, t = 0.025 * 0.975 / variance, scipy_stats.t.ppf(0.975, 2.5 * 23)
    assert (0.025 - low) ** 2 == pytest.approx(t**2 * low * (1 - low) / effective)
    # Rates of questions: the allowance for unseen skewness falls with their number to the power of 1.5.
    assert high == pytest.approx(furthest(sums / 10, 30 / 24**1.5), rel=1e-3) and high > stats.wilson(6, 240)[1]
    mirrored = stats.rate_ci(1 - answers, questions)
    assert mirrored == pytest.approx((1 - high, 1 - low))
    with pytest.raises(ValueError, match="rate_ci"):
        stats.rate_ci([0.1, 1.2])


def test_no_event_still_bounds_a_rate_but_not_what_is_no_rate():
    assert stats.measurement([0.0] * 50)["ci95"] == [0, 0]
    assert stats.measurement([0.0] * 50, rate=True)["ci95"] == list(stats.wilson(0, 50))
    assert stats.measurement([1] * 50, list(range(5)) * 10, rate=True)["ci95"][0] < 1


def test_clusters_are_resampled_whole():
    # Ten identical copies of a row carry no more than the row itself.
    values = np.random.default_rng(0).normal(size=40)
    copies, labels = np.repeat(values, 10), [f"topic {i}" for i in range(40) for _ in range(10)]
    assert stats.bootstrap_ci(copies, labels, seed=1) == pytest.approx(stats.bootstrap_ci(values, seed=1))
    assert stats.mean_ci(copies, labels) == pytest.approx(stats.mean_ci(values))
    narrow = stats.mean_ci(copies)
    assert narrow[1] - narrow[0] < 0.5 * np.subtract(*stats.mean_ci(values)[::-1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_intervals_of_rates_stay_inside_and_all_intervals_scale(values):
    low, high = stats.rate_ci(values)
    assert 0 <= low <= np.mean(values) + 1e-12 and np.mean(values) - 1e-12 <= high <= 1
    rounded = np.round(values, 3)
    low, high = stats.mean_ci(rounded)
    assert low <= high
    assert stats.mean_ci(1000 * rounded) == pytest.approx((1000 * low, 1000 * high), rel=1e-6, abs=1e-6)
    tripled = [value for value in rounded for _ in range(3)]
    clusters = [row for row in range(len(rounded)) for _ in range(3)]
    assert stats.mean_ci(tripled, clusters) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


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
    result = stats.paired_difference(left, right)
    assert result["value"] == pytest.approx((left - right).mean())
    assert 0.4 < result["ci95"][0] < 0.5 < result["ci95"][1] < 0.6
    with pytest.raises(ValueError, match="paired_difference"):
        stats.paired_difference([1.0], [1.0, 2.0])


def test_two_arms_of_answers_hold_newcombes_interval():
    # 36 rows are 1 in both arms, 12 only in the first, 2 only in the second; no row is 0 in both.
    left, right = np.repeat([1.0, 1.0, 0.0], [36, 12, 2]), np.repeat([1.0, 0.0, 1.0], [36, 12, 2])
    result = stats.paired_difference(left, right)
    assert result["value"] == pytest.approx(0.2)
    phi = np.corrcoef(left, right)[0, 1]
    (low_a, high_a), (low_b, high_b) = stats.wilson(48, 50), stats.wilson(38, 50)
    down, up = (0.96 - low_a, high_b - 0.76), (high_a - 0.96, 0.76 - low_b)
    expected = [0.2 - sign * math.sqrt(a * a - 2 * phi * a * b + b * b) for sign, (a, b) in ((1, down), (-1, up))]
    assert result["ci95"][0] == pytest.approx(min(expected[0], stats.mean_ci(left - right)[0]))
    assert result["ci95"][1] == pytest.approx(max(expected[1], stats.mean_ci(left - right)[1]))
    none = stats.paired_difference([0.0] * 400, [0.0] * 400)
    assert none["ci95"][0] < 0 < none["ci95"][1] and none["ci95"][1] < 0.02


def test_hierarchical_interval_sees_the_variance_between_seeds():
    generator = np.random.default_rng(0)
    effects = generator.normal(size=12)
    values = np.concatenate([effect + 0.01 * generator.normal(size=50) for effect in effects])
    seeds = np.repeat(np.arange(12), 50).tolist()
    low, high = stats.hierarchical_bootstrap(values, [seeds])
    half = scipy_stats.t.ppf(0.975, 11) * effects.std(ddof=1) / math.sqrt(12)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), rel=0.15)
    rows = stats.hierarchical_bootstrap(values, [])
    assert rows[1] - rows[0] == pytest.approx(2 * 1.96 * values.std() / math.sqrt(600), rel=0.1)


def test_hierarchical_bootstrap_equals_a_plain_bootstrap_t_written_out():
    generator = np.random.default_rng(3)
    values = generator.normal(size=(6, 3)) + generator.normal(size=(6, 1))
    seeds, tunes = np.repeat(np.arange(6), 3).tolist(), list(range(18))
    low, high = stats.hierarchical_bootstrap(values.ravel(), [seeds, tunes], n_boot=20_000)
    means = values.mean(1)
    error, studentised = means.std(ddof=1) / math.sqrt(6), []
    for _ in range(20_000):
        drawn = np.array([generator.choice(values[unit], 3).mean() for unit in generator.integers(6, size=6)])
        studentised.append((drawn.mean() - means.mean()) / (drawn.std(ddof=1) / math.sqrt(6)))
    below, above = np.quantile(studentised, [0.025, 0.975])
    assert low == pytest.approx(means.mean() - above * error, abs=0.06 * error * above)
    assert high == pytest.approx(means.mean() - below * error, abs=0.06 * error * above)


def test_hierarchical_interval_with_few_seeds_and_with_rates():
    values, seeds = [1.0, 2.0, 4.0, 5.0, 9.0, 9.0], ["a", "a", "b", "b", "c", "c"]
    means = np.array([1.5, 4.5, 9])
    half = scipy_stats.t.ppf(0.975, 2) * means.std(ddof=1) / math.sqrt(3)
    assert stats.hierarchical_bootstrap(values, [seeds]) == pytest.approx((5 - half, 5 + half))
    low, high = stats.hierarchical_bootstrap([0.0, 0.001, 0.002, 0.0, 0.004, 0.01], [list("abcdef")])
    assert 0 <= low < 0.003 < high < 0.1
    none = stats.hierarchical_bootstrap([0.0] * 600, [[row // 100 for row in range(600)]], rate=True)
    assert none[0] == 0 and 3 / 600 < none[1] < 10 / 600
    with pytest.raises(ValueError, match="hierarchical_bootstrap"):
        stats.hierarchical_bootstrap([1.0, 2.0], [["a", "a"]])


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


def test_a_share_has_the_interval_of_a_weighted_mean_with_bell_and_mccaffreys_degrees_of_freedom():
    generator = np.random.default_rng(4)
    whole = generator.lognormal(size=9)
    part = generator.beta(2, 4, size=9) * whole
    result, weights = stats.share(part, whole), whole / whole.sum()
    assert result["value"] == pytest.approx(part.sum() / whole.sum()) and result["n"] == 9
    # Regression of the shares on a constant with weights: residuals over the root of 1 - leverage, written as matrices.
    residual = (part - part.sum() / whole.sum() * whole) / whole.sum()
    error = math.sqrt(np.sum(residual**2 / (1 - weights)))
    adjusted = np.diag(1 / np.sqrt(1 - weights)) @ (np.eye(9) - np.outer(weights, np.ones(9)))
    covariance = adjusted @ np.diag(weights**2) @ adjusted.T
    freedom = np.trace(covariance) ** 2 / np.sum(covariance**2)
    half = error * scipy_stats.t.ppf(0.975, freedom)
    assert result["ci95"] == pytest.approx([max(0, result["value"] - half), min(1, result["value"] + half)])
    even = stats.share(part / whole, np.ones(9))["ci95"]
    expected = scipy_stats.ttest_1samp(part / whole, 0).confidence_interval()
    assert even == pytest.approx([expected.low, expected.high])
    assert stats.share([0.0], [0.0])["value"] is None and stats.share([1.0, 0.0], [2.0, 0.0])["ci95"] is None


def test_fieller_of_clusters_is_that_of_their_means_when_they_are_of_one_size():
    generator = np.random.default_rng(2)
    below, above = 2 + generator.normal(size=(15, 4)), 1 + generator.normal(size=(15, 4))
    result = stats.fieller(above.ravel(), below.ravel(), clusters=np.repeat(np.arange(15), 4).tolist())
    assert result["ci95"] == pytest.approx(stats.fieller(above.mean(1), below.mean(1))["ci95"])
    assert result["n"] == 60


def test_kept_is_a_statement_about_the_interval_and_the_margin():
    loss = {"value": -0.01, "n": 100, "ci95": [-0.03, 0.01]}
    assert stats.non_inferiority(loss, 0.05) == {**loss, "margin": 0.05, "kept": True}
    assert stats.non_inferiority(loss, 0.03)["kept"] is False
    # A wide interval around 0 does not show that something was kept.
    assert stats.non_inferiority({"value": 0.0, "n": 4, "ci95": [-0.4, 0.4]}, 0.05)["kept"] is False
    assert stats.non_inferiority({"value": 0.02, "n": 9, "ci95": [0.0, 0.04]}, 0.05, higher_is_better=False)["kept"]
    assert stats.non_inferiority(stats.missing("no rows"), 0.05)["kept"] is None
    with pytest.raises(ValueError, match="non_inferiority"):
        stats.non_inferiority(loss, 0.0)


def test_sample_sizes_equal_those_of_a_manual_and_of_rounded_quantiles():
    # R's power.prop.test: 50 against 75% at 90% needs 76.7 a group; with 50 a group the power is 0.740.
    assert stats.sample_size(0.5, 0.75, power=0.9) == 77
    assert stats.power(0.5, 0.75, 50) == pytest.approx(0.740, abs=5e-4)
    # The same sizes from quantiles rounded to 1.96 and 0.84.
    for rates, printed in (((0.05, 0.03), 1505), ((0.02, 0.01), 2316), ((0.01, 0.005), 4668)):
        needed = stats.sample_size(*rates)
        assert needed == pytest.approx(printed, rel=0.0015)
        assert stats.power(*rates, needed) >= 0.8 > stats.power(*rates, needed - 1)
        assert stats.sample_size(*rates, design_effect=4.0) == pytest.approx(4 * needed, abs=4)
    for wrong in ((0.1, 0.1), (0.1, 1.1)):
        with pytest.raises(ValueError, match=r"0.1"):
            stats.sample_size(*wrong)


def test_the_power_is_the_share_of_simulated_comparisons_that_find_the_difference():
    generator, n = np.random.default_rng(0), 1506
    a, b = generator.binomial(n, 0.05, 20_000) / n, generator.binomial(n, 0.03, 20_000) / n
    middle = (a + b) / 2
    found = np.abs(a - b) / np.sqrt(2 * middle * (1 - middle) / n) > 1.959964
    assert stats.power(0.05, 0.03, n) == pytest.approx(found.mean(), abs=0.015)


def test_the_design_effect_is_one_plus_m_minus_one_times_the_intraclass_correlation():
    copies = np.repeat([0.0, 1.0, 1.0, 5.0], 10)
    assert stats.design_effect(copies, np.repeat(np.arange(4), 10).tolist())["value"] == pytest.approx(10)
    generator = np.random.default_rng(0)
    values = generator.normal(size=(4000, 5)) + 0.5 * generator.normal(size=(4000, 1))
    found = stats.design_effect(values.ravel(), np.repeat(np.arange(4000), 5).tolist())
    assert found["intraclass_correlation"] == pytest.approx(0.2, abs=0.02)
    assert found["value"] == pytest.approx(1.8, abs=0.08)
    assert found["effective_n"] == pytest.approx(20_000 / found["value"])
    with pytest.raises(ValueError, match="design_effect"):
        stats.design_effect([1.0, 2.0], ["a", "b"])


def test_permutations_equal_scipys_and_keep_clusters_whole():
    generator = np.random.default_rng(0)
    first, second = generator.normal(0.5, 1, size=25), generator.normal(size=30)
    expected = scipy_stats.permutation_test(
        (first, second), lambda a, b: np.mean(a) - np.mean(b), n_resamples=20_000, rng=1
    ).pvalue
    assert stats.permutation_test(first, second) == pytest.approx(expected, abs=0.01)
    # Eight topics of ten rows in two groups: of the 70 deals the sorted one and its mirror are the most extreme.
    topics = np.repeat(np.arange(8.0), 10)
    labels = np.repeat(np.arange(8), 10).tolist()
    p = stats.permutation_test(topics[:40], topics[40:], (labels[:40], labels[40:]), n_permutations=20_000)
    assert p == pytest.approx(2 / 70, abs=0.004)
    with pytest.raises(ValueError, match="permuted_labels"):
        stats.permutation_test([1.0, 2.0], [3.0], (["a", "b"], ["b"]))
    with pytest.raises(ValueError, match="permutation_test"):
        stats.permutation_test([], [1.0])


def test_sign_flips_are_exact_for_few_pairs_and_sampled_for_many():
    assert stats.sign_flip_test([1, 2, 3, 4, 5]) == pytest.approx(2 / 32)
    assert stats.sign_flip_test([1, -1, 1, -1]) == 1.0
    values = np.random.default_rng(0).normal(0.3, 1, size=40)
    expected = scipy_stats.permutation_test(
        (values, np.zeros(40)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    assert stats.sign_flip_test(values) == pytest.approx(expected, abs=0.01)
    with pytest.raises(ValueError, match="sign_flip_test"):
        stats.sign_flip_test([])


def test_holm_of_the_textbook():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

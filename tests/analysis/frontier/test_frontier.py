"""Protections are compared at equal task, over labs and seeds."""

import itertools
import math

import numpy as np
import pytest
from holdfast.analysis.errors import UserError
from holdfast.analysis.frontier.geometry import at_equal_task, em_f1, hypervolume, pareto
from holdfast.analysis.frontier.runs import paired, paired_at_equal_task
from holdfast.analysis.frontier.settings import frontiers, points, table
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from toys.frontier_runs import run, strict_json

RATES = st.floats(0, 1)
POINTS = st.lists(st.tuples(RATES, RATES), min_size=1, max_size=5)
# Tenths, so that ties happen.
COARSE = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=8)


def student(values) -> tuple[float, float]:
    """Student's t interval of the mean."""
    half = scipy_stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def test_em_f1_is_the_harmonic_mean_of_task_and_alignment():
    assert em_f1([0.8, 1, 0, 0, 0.5], [0.4, 0, 1, 0.3, 0.5]) == pytest.approx([2 * 0.8 * 0.6 / 1.4, 1, 0, 0, 0.5])


def test_the_hypervolume_of_two_rectangles_is_their_union():
    # 0.5 x 0.9 and 0.9 x 0.4 share 0.5 x 0.4.
    assert hypervolume([0.5, 0.9], [0.1, 0.6]) == pytest.approx(0.45 + 0.36 - 0.20)
    assert hypervolume([0.9, 0.5, 0.4], [0.6, 0.1, 0.7]) == pytest.approx(0.61)  # the third is dominated
    assert hypervolume([1.0], [0.0]) == 1
    assert hypervolume([0.0, 1.0], [0.0, 1.0]) == 0


@settings(deadline=None)
@given(POINTS)
def test_the_hypervolume_is_inclusion_and_exclusion_of_rectangles(found):
    union = 0.0
    for size in range(1, len(found) + 1):
        for chosen in itertools.combinations(found, size):
            union -= (-1) ** size * min(task for task, _ in chosen) * min(1 - bad for _, bad in chosen)
    assert hypervolume(*zip(*found, strict=True)) == pytest.approx(union, abs=1e-9)


@settings(deadline=None)
@given(COARSE)
def test_the_pareto_points_are_those_that_nothing_beats(found):
    def beats(one, other):
        return one != other and one[0] >= other[0] and one[1] <= other[1]

    expected = [not any(beats(other, one) for other in found) for one in found]
    scaled = np.array(found) / 10
    assert pareto(scaled[:, 0], scaled[:, 1]).tolist() == expected
    assert hypervolume(*scaled[expected].T) == pytest.approx(hypervolume(*scaled.T))


@settings(deadline=None)
@given(st.lists(RATES, min_size=2, max_size=6, unique=True), RATES, st.floats(-1, 1), st.floats(0, 1))
def test_a_linear_frontier_is_read_exactly(tasks, start, slope, where):
    target = min(tasks) + where * (max(tasks) - min(tasks))
    target = min(max(target, min(tasks)), max(tasks))
    bad = [start + slope * task for task in tasks]
    value, clamped = at_equal_task(tasks, bad, target)
    assert value == pytest.approx(start + slope * target, abs=1e-9) and not clamped
    # Strengths in the order of the tasks give the same line.
    assert at_equal_task(tasks, bad, target, [-9 * task for task in tasks])[0] == pytest.approx(value, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(RATES, RATES), min_size=1, max_size=6), st.lists(RATES, min_size=2, max_size=9))
@example([(0.0, 0.0), (0.0, 1.0), (1e-100, 1.0)], [1.0, 1e-167])
def test_where_more_task_costs_more_misalignment_the_reading_only_rises(found, targets):
    tasks, bad = sorted(task for task, _ in found), sorted(rate for _, rate in found)
    read = [at_equal_task(tasks, bad, target)[0] for target in sorted(targets)]
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(read))


@settings(deadline=None)
@given(st.lists(st.tuples(RATES, RATES), min_size=1, max_size=6), RATES)
@example([(0.0, 0.0), (1e-300, 1.0)], 1.0)
def test_a_reading_lies_between_the_settings_that_bracket_it_or_says_that_none_do(found, target):
    tasks, bad = zip(*found, strict=True)
    value, clamped = at_equal_task(tasks, bad, target, range(len(found)))
    steps = [*itertools.pairwise(found), *((one, one) for one in found)]
    bracketing = [pair for pair in steps if min(pair)[0] <= target <= max(pair)[0]]
    assert clamped == (not bracketing)
    if clamped:
        # The end itself: in floating point, all tasks below 1e-16 are equally far from 1.
        end = max(tasks) if target > max(tasks) else min(tasks)
        assert value == min(rate for task, rate in found if task == end)
    else:
        assert any(min(one[1], other[1]) - 1e-12 <= value <= max(one[1], other[1]) + 1e-12 for one, other in bracketing)


def test_a_frontier_is_followed_by_strength_and_read_at_its_lowest_crossing():
    tasks, bad, strengths = [0.7, 1.0, 0.95, 0.8], [0.0, 0.6, 0.3, 0.2], [9, 1, 4, 2]
    # By strength: task 1.0 -> 0.8 -> 0.95 -> 0.7 crosses 0.9 three times, at 0.4, 0.2 + 2/3 of 0.1 and 4/5 of 0.3.
    assert at_equal_task(tasks, bad, 0.9, strengths) == (pytest.approx(0.24), False)
    # By task, 0.9 lies between 0.8 and 0.95.
    assert at_equal_task(tasks, bad, 0.9) == (pytest.approx(0.2 + 2 / 3 * 0.1), False)
    assert at_equal_task([0.9, 0.9], [0.5, 0.3], 0.9) == (0.3, False)
    assert at_equal_task([0.9, 0.7], [0.5, 0.3], 0.99) == (0.5, True)
    assert at_equal_task([0.9], [0.5], 0.1) == (0.5, True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: em_f1([math.nan], [0.1]), "em_f1: .*finite"),
        (lambda: hypervolume([0.5], [math.nan]), "hypervolume: .*finite"),
        (lambda: pareto([0.5, math.inf], [0.1, 0.1]), "pareto: .*finite"),
        (lambda: at_equal_task([0.5], [0.1], math.nan), "at_equal_task: .*finite"),
        (lambda: at_equal_task([0.5], [0.1], 0.5, [math.nan]), "at_equal_task: .*finite"),
        (lambda: run("kl", task=math.nan), r"kl \(strength=None\), a, seed 0: task .*nan"),
        (lambda: run("kl", task=None), "task .*None"),
        (lambda: run("kl", math.inf, task=0.5), "strength .*inf"),
        (lambda: em_f1([1.5], [0.1]), "em_f1: .*1.5"),
        (lambda: hypervolume([0.5], [50.0]), "hypervolume: .*50"),
        (lambda: hypervolume([], []), "hypervolume: .*points"),
        (lambda: pareto([0.5, 0.6], [0.1]), "pareto: shapes"),
        (lambda: at_equal_task([0.5, 0.6], [0.1, 0.2], 0.5, [2, 2]), r"at_equal_task: .*\[2.0, 2.0\]"),
        (lambda: points([]), "runs"),
        (lambda: points([run("kl", 1.0, task=0.5), run("kl", 1.0, task=0.6)]), r"kl \(strength=1.0\), a, seed 0"),
        (lambda: points([run("kl", 1.0, setting="x"), run("kl", 2.0, seed=1, setting="x")]), "strength 2.0"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_point_has_the_interval_of_its_labs_and_with_one_lab_of_its_seeds():
    several = [
        run("kl", 1.0, lab, seed, score=value)
        for lab, values in {"a": (3.0, 5.0), "b": (7.0, 8.0), "c": (2.0, 2.5)}.items()
        for seed, value in enumerate(values)
    ]
    (point,) = points(several)
    assert (point["n"], point["labs"], point["seeds"]) == (6, 3, 2)
    measured = point["measures"]["score"]
    assert measured["value"] == pytest.approx(27.5 / 6) and measured["over"] == "labs" and measured["n"] == 6
    # Three labs: Student's t over the labs' means.
    assert measured["ci95"] == pytest.approx(student([4.0, 7.5, 2.25]))
    (alone,) = points([run("kl", 1.0, "a", seed, score=value) for seed, value in enumerate((3.0, 5.0, 10.0))])
    assert alone["measures"]["score"]["over"] == "seeds"
    assert alone["measures"]["score"]["ci95"] == pytest.approx(student([3.0, 5.0, 10.0]))
    assert points(several[::-1])[0]["measures"] == point["measures"]


def test_seeds_of_one_lab_are_not_counted_as_labs():
    generator = np.random.default_rng(0)
    labs = generator.normal(3.0, 1.0, size=6)
    runs = [
        run("kl", 1.0, str(lab), seed, score=labs[lab] + generator.normal(0, 0.01))
        for lab in range(6)
        for seed in range(10)
    ]
    low, high = points(runs)[0]["measures"]["score"]["ci95"]
    naive = np.subtract(*student([one["score"] for one in runs])[::-1])
    by_labs = np.subtract(*student(labs)[::-1])
    assert high - low > 2 * naive and high - low == pytest.approx(by_labs, rel=0.5)


def test_no_interval_is_made_of_one_run_or_of_runs_that_are_all_equal():
    (one,) = points([run("kl", 1.0, task=0.9)])
    assert one["measures"]["task"] == {"value": 0.9, "n": 1, "ci95": None, "reason": "one run has no interval"}
    equal = points([run("kl", 1.0, seed=seed, misaligned=0.0) for seed in range(3)])[0]["measures"]["misaligned"]
    assert equal == {"value": 0.0, "n": 3, "ci95": None, "reason": "all 3 seeds are equal"}
    crossed = [
        run("kl", 1.0, lab, seed, task=[0.25, 0.75][lab == "b" if seed else lab == "a"])
        for lab in "ab"
        for seed in (0, 1)
    ]
    assert points(crossed)[0]["measures"]["task"]["reason"] == "all 2 labs are equal"


def test_a_measure_that_some_runs_lack_is_the_mean_of_the_others_and_one_that_all_lack_is_named():
    runs = [run("kl", 1.0, task=0.9, skill=0.5), run("kl", 1.0, seed=1, task=0.8), run("none", task=1.0)]
    kl, none = points(runs, ["skill", "task"])
    assert list(kl["measures"]) == ["skill", "task"] and kl["measures"]["skill"]["n"] == 1
    assert none["measures"]["skill"] == {"value": None, "n": 0, "reason": "not measured"}
    with pytest.raises(UserError, match=r"'skil'.* task, skill"):
        points(runs, ["skil"])
    with pytest.raises(UserError, match=r"kl \(strength=1.0\), a, seed 1 .*'skill'"):
        paired(runs, ("kl", "strength=1.0"), [("none", "strength=None")], "skill")
    with pytest.raises(UserError, match="'misaligned'"):
        frontiers(runs)


def test_a_frontier_is_measured_where_all_its_settings_are_and_best_f1_within_each_lab_and_seed():
    runs = [
        run("kl", 1.0, task=0.5, misaligned=0.1),
        run("kl", 2.0, task=0.9, misaligned=0.6),
        run("kl", 1.0, seed=1, task=0.4, misaligned=0.5),
        run("kl", 2.0, seed=1, task=0.8, misaligned=0.4),
        run("kl", 1.0, seed=2, task=1.0, misaligned=0.0),
        run("none", task=1.0, misaligned=0.5),
        run("early_stop", 1.0, task=1.0, misaligned=0.5),
        run("early_stop", 2.0, seed=1, task=1.0, misaligned=0.5),
    ]
    found = frontiers(runs)
    kl = found["kl"]
    assert (kl["settings"], kl["incomplete"]) == (2, 1)
    # Seed 0: 0.61 (two rectangles); seed 1: 0.4 x 0.5 lies inside 0.8 x 0.6.
    assert kl["hypervolume"]["value"] == pytest.approx((0.61 + 0.48) / 2) and kl["hypervolume"]["n"] == 2
    best = 2 * 0.5 * 0.9 / 1.4, 2 * 0.8 * 0.6 / 1.4
    assert kl["em_f1"]["value"] == pytest.approx(sum(best) / 2) and kl["em_f1"]["over"] == "seeds"
    low, high = kl["em_f1"]["ci95"]
    assert 0 <= low < kl["em_f1"]["value"] < high <= 1
    assert found["none"]["hypervolume"]["value"] == pytest.approx(0.5) and found["none"]["em_f1"]["ci95"] is None
    assert found["early_stop"]["em_f1"] == {"value": None, "n": 0, "reason": "no lab and seed has all 2 settings"}
    assert strict_json(found)


def over_labs(protection, strength, means, task=0.9):
    """Two seeds per lab, 0.01 around its mean."""
    return [
        run(protection, strength, f"lab{lab}", seed, task=task, misaligned=mean + (0.01 if seed else -0.01))
        for lab, mean in enumerate(means)
        for seed in (0, 1)
    ]


def enumerated_p(differences) -> float:
    flipped = [abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True)))
               for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    return sum(value >= abs(math.fsum(differences)) - 1e-12 for value in flipped) / len(flipped)


def test_differences_are_paired_and_tested_over_labs_and_adjusted_for_all_rivals():
    ours = [0.02, 0.04, 0.03, 0.05, 0.06]
    rivals = {"kl": [0.30, 0.44, 0.53, 0.35, 0.46], "interleave": [0.05, 0.01, 0.08, 0.09, 0.07]}
    runs = over_labs("subspace", 2.0, ours)
    for name, means in rivals.items():
        runs += over_labs(name, 1.0, means)
    runs += [run("steering", 5.0, "elsewhere", task=0.9, misaligned=0.1)]
    keys = [(name, "strength=1.0") for name in rivals] + [("steering", "strength=5.0"), ("caft", "none")]
    kl, interleave, *without = paired(runs, ("subspace", "strength=2.0"), keys)
    gaps = {name: np.subtract(ours, means) for name, means in rivals.items()}
    p_values = {name: enumerated_p(gap) for name, gap in gaps.items()}
    assert p_values["kl"] == 2 / 32 and p_values["interleave"] > p_values["kl"]
    for row, name in ((kl, "kl"), (interleave, "interleave")):
        assert row["value"] == pytest.approx(gaps[name].mean()) and (row["n"], row["labs"]) == (10, 5)
        assert row["reference"] == pytest.approx(np.mean(ours)) and row["rival"] == pytest.approx(np.mean(rivals[name]))
        assert row["p"] == pytest.approx(p_values[name]) and row["p_least"] == 2 / 32 and row["over"] == "labs"
        assert row["ci95"][0] < row["value"] < row["ci95"][1]
    # Holm: the smaller of two p-values is doubled; the larger one stays, but is never below it.
    assert kl["p_holm"] == pytest.approx(2 * p_values["kl"])
    assert interleave["p_holm"] == pytest.approx(max(p_values["interleave"], 2 * p_values["kl"]))
    for row in without:
        assert row["value"] is None and row["reason"] == "no lab and seed in common" and row["n"] == row["labs"] == 0
        assert row["p"] is row["p_holm"] is None
    with pytest.raises(UserError, match=r"subspace \(strength=3\).* subspace \(strength=2\.0\)"):
        paired(runs, ("subspace", "strength=3"), keys)


def test_three_rivals_are_adjusted_as_holm_wrote_it():
    # One lab: seeds are the units, and signs alone make p: 6 of 6, 5 of 6 (the odd one small), 4 of 6.
    gaps = {"one": [1, 1, 1, 1, 1, 1], "two": [1, 1, 1, 1, 1, -1], "three": [1, 1, 1, 1, -1, -1]}
    runs = [run("ours", 1.0, seed=seed, score=0.0) for seed in range(6)]
    for name, values in gaps.items():
        runs += [run(name, 1.0, seed=seed, score=float(-value)) for seed, value in enumerate(values)]
    rows = paired(runs, ("ours", "strength=1.0"), [(name, "strength=1.0") for name in ("three", "one", "two")], "score")
    # |sum| of 6 signs is at least 6 in 2, 4 in 14, 2 in 44 of 64 patterns.
    assert [row["p"] for row in rows] == [44 / 64, 2 / 64, 14 / 64]
    assert [row["p_holm"] for row in rows] == pytest.approx([44 / 64, 3 * 2 / 64, 2 * 14 / 64])
    assert {row["labs"] for row in rows} == {1} and rows[0]["over"] == "seeds"


@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_of_differences_may_pass_zero_where_all_of_them_are_on_one_side(sign):
    gaps = [0.1 * sign, 0.3 * sign]
    runs = [run("ours", 1.0, lab, misaligned=0.5 + gap) for lab, gap in zip("ab", gaps, strict=True)]
    runs += [run("kl", 1.0, lab, misaligned=0.5) for lab in "ab"]
    (row,) = paired(runs, ("ours", "strength=1.0"), [("kl", "strength=1.0")])
    # The level of the rates does not change the interval; a difference of rates ends at 1.
    assert row["ci95"] == pytest.approx(np.clip(student(gaps), -1, 1)) and row["ci95"][0] < 0 < row["ci95"][1]


def test_an_interval_of_differences_of_rates_ends_where_they_must():
    rates = [0.583, 0.03, 0.02, 0.045, 0.025, 0.05]
    runs = [run("ours", 1.0, lab, misaligned=0.0, drift=0.0) for lab in "abcdef"]
    runs += [run("kl", 1.0, lab, misaligned=rate, drift=3 * rate) for lab, rate in zip("abcdef", rates, strict=True)]
    (row,) = paired(runs, ("ours", "strength=1.0"), [("kl", "strength=1.0")])
    assert row["ci95"][0] == -1 and row["value"] == pytest.approx(-np.mean(rates))
    (drift,) = paired(runs, ("ours", "strength=1.0"), [("kl", "strength=1.0")], "drift")
    assert drift["ci95"][0] < -3 * 1  # not a rate: as wide as six labs make it


def test_one_pair_has_a_difference_but_neither_interval_nor_p():
    runs = [run("ours", 1.0, misaligned=0.1), run("kl", 1.0, misaligned=0.4), run("kl", 1.0, seed=1, misaligned=0.9)]
    (row,) = paired(runs, ("ours", "strength=1.0"), [("kl", "strength=1.0")])
    assert row["value"] == pytest.approx(-0.3) and row["n"] == 1
    assert row["ci95"] is row["p"] is row["p_holm"] is None and row["reason"] == "one run has no interval"


def test_a_rival_is_read_at_the_task_of_the_reference_run_of_its_own_lab_and_seed():
    runs = []
    for seed, task in enumerate((0.90, 0.80)):
        runs += [run("subspace", 2.0, seed=seed, task=task, misaligned=0.02)]
        runs += [
            run("kl", strength, seed=seed, task=learned, misaligned=rate)
            for strength, learned, rate in ((0.1, 1.0, 0.6), (1.0, 0.8, 0.2), (9.0, 0.5, 0.1))
        ]
        runs += [run("prompt", None, seed=seed, setting=text, task=0.99, misaligned=0.3) for text in ("x", "y")]
    runs += [run("steering", 1.0, seed=7, task=0.9, misaligned=0.1)]
    kl, prompt, steering = paired_at_equal_task(runs, ("subspace", "strength=2.0"), ["kl", "prompt", "steering"])
    # At 0.90 half-way between 0.6 and 0.2; at 0.80 exactly 0.2.
    assert kl["rival"] == pytest.approx((0.4 + 0.2) / 2) and kl["value"] == pytest.approx(0.02 - 0.3)
    assert (
        kl["ci95"] == pytest.approx(np.clip(student([-0.38, -0.18]), -1, 1)) and kl["clamped"] == 0 and kl["p"] == 0.5
    )
    assert prompt["clamped"] == 2 and prompt["rival"] == pytest.approx(0.3)
    assert prompt["ci95"] is None and prompt["reason"] == "all 2 seeds are equal"
    assert (steering["value"], steering["clamped"], steering["p_holm"]) == (None, 0, None)
    assert kl["p_holm"] == 1.0 and strict_json([kl, prompt, steering])


def test_the_table_shows_each_mean_with_its_interval_in_three_digits():
    runs = [run("kl", 1.0, lab, setting="a|b", score=value) for lab, value in (("a", 2.0), ("b", 3.0))]
    text = table(points([*runs, run("none", score=1.0, task=0.98765)]), ["score", "task"])
    low, high = student([2.0, 3.0])
    assert text.splitlines() == [
        "| protection | setting | n | score | task |",
        "|---|---|---|---|---|",
        f"| kl | a\\|b | 2 | 2.500 [{low:.3f}, {high:.3f}] | - |",
        "| none | strength=None | 1 | 1.000 | 0.988 |",
    ]

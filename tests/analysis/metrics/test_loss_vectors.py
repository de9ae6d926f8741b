"""Loss vectors: cosines over shared tokens equal loops over rows, planted differences are found, nulls are honest."""

import json

import numpy as np
import pytest
import torch
from holdfast.analysis.metrics.loss_vectors import loss_vectors
from holdfast.analysis.passes.readout import Readout

TOKENS = 16


def reading(losses):
    """A readout from rows of losses of any length."""
    lengths = [len(row) for row in losses]
    owners = torch.arange(len(losses)).repeat_interleave(torch.tensor(lengths))
    flat = torch.tensor(np.concatenate([np.asarray(row, dtype=float) for row in losses]), dtype=torch.float32)
    return Readout(owners, -flat, flat, torch.tensor(lengths), {}, owners)


def rows(seed, n=20, profile=None, shortest=TOKENS, longest=TOKENS + 4):
    generator = np.random.default_rng(seed)
    profile = np.ones(longest) if profile is None else profile
    lengths = generator.integers(shortest, longest + 1, size=n)
    return [generator.exponential(size=length) * profile[:length] for length in lengths]


def cosine_by_hand(one, other):
    shared = min(len(one), len(other), TOKENS)
    one, other = np.float32(one[:shared]).astype(float), np.float32(other[:shared]).astype(float)
    return one @ other / np.sqrt(one @ one * (other @ other))


def found_in(first, second, completions=None, **options):
    sets = {"a": reading(first), "b": reading(second)}
    return loss_vectors(sets, sets, None, completions, tokens=TOKENS, **options)["checkpoint"]


def test_cosines_are_over_the_tokens_that_both_rows_have():
    first, second = rows(0, shortest=8), rows(1, n=15, shortest=9)
    pair = found_in(first, second)["pairs"]["a vs b"]
    between = np.mean([cosine_by_hand(one, other) for one in first for other in second])
    within = np.mean([cosine_by_hand(one, other) for i, one in enumerate(first) for other in first[:i]])
    assert pair["between"]["value"] == pytest.approx(between)
    assert pair["within"]["a"]["value"] == pytest.approx(within)
    other = pair["within"]["b"]["value"]
    assert pair["gap"]["value"] == pytest.approx((within + other) / 2 - between)
    assert (pair["within"]["a"]["n"], pair["within"]["b"]["n"], pair["gap"]["n"]) == (20, 15, 35)


def test_the_interval_is_that_of_leaving_out_each_row():
    first, second = rows(0, n=8), rows(1, n=7)
    pair = found_in(first, second)["pairs"]["a vs b"]

    def between(left, right):
        return np.mean([cosine_by_hand(one, other) for one in left for other in right])

    without = [between(first[:i] + first[i + 1 :], second) for i in range(8)]
    without += [between(first, second[:i] + second[i + 1 :]) for i in range(7)]
    error = np.sqrt(14 / 15 * np.sum((np.array(without) - np.mean(without)) ** 2))
    low, high = pair["between"]["ci95"]
    # Student's t at 14 degrees of freedom, before the correction for skewness.
    assert high - low == pytest.approx(2 * 2.145 * error, rel=0.3)


def test_sets_with_their_own_profiles_part_and_equal_ones_do_not():
    steps = np.linspace(0.1, 2, TOKENS + 4)
    apart = found_in(rows(0, profile=steps), rows(1, profile=steps[::-1]))["pairs"]["a vs b"]["gap"]
    assert apart["value"] > 0.1 and apart["ci95"][0] > 0 and apart["null"]["p"] < 0.01
    p_values = [
        found_in(rows(2 * seed, n=10), rows(2 * seed + 1, n=10), seed=seed)["pairs"]["a vs b"]["gap"]["null"]["p"]
        for seed in range(40)
    ]
    assert 0.3 < np.mean(p_values) < 0.7 and np.mean(np.array(p_values) < 0.1) < 0.25


def test_the_papers_filling_manufactures_separation_and_its_null_shows_it():
    # Most rows are short, so the filled values decide.
    first, second = rows(4, n=30, shortest=8, longest=9), rows(5, n=30, shortest=8, longest=9)
    for number, (one, other) in enumerate(zip(rows(6, n=3), rows(7, n=3), strict=True)):
        first[number], second[number] = one, other
    published = found_in(first, second, formulas="paper")["pairs"]["a vs b"]["gap"]
    honest = found_in(first, second)["pairs"]["a vs b"]["gap"]
    assert published["value"] > 0.03 and published["null"]["value"] > 0.03 and published["null"]["p"] > 0.05
    assert abs(honest["value"]) < 0.02 and honest["null"]["value"] == pytest.approx(0, abs=0.01)


def test_paper_fills_with_the_mean_of_the_rows_own_set():
    first, second = rows(0, n=6, shortest=8), rows(1, n=5, shortest=8)
    pair = found_in(first, second, formulas="paper")["pairs"]["a vs b"]

    def filled(group):
        cut = [np.float32(row[:TOKENS]).astype(float) for row in group]
        means = [np.mean([row[t] for row in cut if len(row) > t] or [0.0]) for t in range(TOKENS)]
        return [np.concatenate([row, means[len(row) :]]) for row in cut]

    between = np.mean([cosine_by_hand(one, other) for one in filled(first) for other in filled(second)])
    assert pair["between"]["value"] == pytest.approx(between, rel=1e-6)


def test_rows_of_one_completion_are_one_cluster_and_no_pair():
    first, second = rows(0, n=10), rows(1, n=10)
    labels = {"a": list(range(10)), "b": list(range(100, 110))}
    once = found_in(first, second, labels)["pairs"]["a vs b"]
    doubled = {name: [label for label in labels[name] for _ in range(2)] for name in labels}
    twice = found_in([r for r in first for _ in range(2)], [r for r in second for _ in range(2)], doubled)
    for name in ("between", "gap"):
        assert twice["pairs"]["a vs b"][name]["value"] == pytest.approx(once[name]["value"])
        assert twice["pairs"]["a vs b"][name]["ci95"] == pytest.approx(once[name]["ci95"])


def test_principal_coordinates_are_those_of_the_rows_that_have_all_tokens():
    first, second = rows(0, n=9), [*rows(1, n=8), np.ones(9)]
    found = found_in(first, second)
    pca = found["pca"]
    assert (pca["tokens"], pca["n"]) == (TOKENS, 17)
    data = np.array([np.float32(row[:TOKENS]) for row in [*first, *second[:8]]], dtype=float)
    values, vectors = np.linalg.eigh(np.cov(data.T))
    expected = (data - data.mean(0)) @ vectors[:, ::-1][:, :2]
    points = np.array([point for name in "ab" for point in pca["coordinates"][name]])
    assert points[:, 0].tolist() == [*range(9), *range(8)]
    assert np.abs(points[:, 1:]) == pytest.approx(np.abs(expected), abs=1e-6)
    assert pca["explained"] == pytest.approx(values[::-1][:2] / values.sum())


def test_what_cannot_be_computed_says_why_and_everything_is_json():
    sets = {"a": reading(rows(0, n=5)), "b": reading([np.ones(3)] * 6), "c": reading([[]] * 2 + [np.ones(20)])}
    found = loss_vectors(sets, sets, None, tokens=TOKENS)
    json.dumps(found, allow_nan=False)
    assert found["base"]["value"] is None and "base" in found["base"]["reason"]
    assert found["instruct"]["rows"]["b"] == {"rows": 6, "short": 6}
    assert "completions" in found["checkpoint"]["pairs"]["a vs b"]["gap"]["reason"]
    with pytest.raises(ValueError, match="formulas 'published'"):
        loss_vectors(sets, sets, None, formulas="published")

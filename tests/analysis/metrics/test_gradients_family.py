"""Gradients equal loops over explicit gradients; p-values are uniform under the null; intervals cover the truth."""

import json
from itertools import product

import numpy as np
import pytest
from holdfast.analysis.metrics import gradients as family
from holdfast.analysis.metrics.gradients import gradients
from holdfast.analysis.passes.gradients import GradientReadout
from holdfast.analysis.stats.gradient_pairs import cosines, different, pair_means, shuffled_partners
from holdfast.analysis.stats.relabelling import Relabelling
from scipy import stats

WIDTH = 12


def reading(vectors, completions, lengths=None):
    """The readout of `read_gradients` for sets "a" and "b" of equal size, from their gradients [2n, d]."""
    n = len(vectors) // 2
    lengths = range(len(vectors)) if lengths is None else lengths
    return GradientReadout(
        gram=vectors @ vectors.T, sets=("a",) * n + ("b",) * n, lines=tuple(range(n)) * 2,
        completions=tuple(completions), lengths=tuple(int(length) for length in lengths),
    )  # fmt: skip


def paired(generator, n=8, noise=1.0, shift=0.0):
    """Matched pairs: rows of a line share a completion; lines 0 and 1 share one too."""
    shared = generator.normal(size=WIDTH)
    own = generator.normal(size=(n, WIDTH))
    own[1] = own[0]
    vectors = np.concatenate([shared + own + noise * generator.normal(size=own.shape) for _ in range(2)])
    vectors[n:] += shift
    names = ["0", "0", *(str(line) for line in range(2, n))]
    return vectors, names * 2


def unpaired(generator, n=8):
    """Every row has its own completion, except two nearly equal rows of each set, which share one."""
    vectors = generator.normal(size=WIDTH) + generator.normal(size=(2 * n, WIDTH))
    names = [str(row) for row in range(2 * n)]
    for row in (0, n):
        vectors[row + 1], names[row + 1] = vectors[row] + 0.01 * generator.normal(size=WIDTH), names[row]
    return vectors, names


def loops(vectors, names, value):
    """Means by definition of value(i, j) over pairs of rows of different completions."""
    n = len(vectors) // 2
    groups = {"a": range(n), "b": range(n, 2 * n)}

    def mean(left, right):
        return np.mean([value(i, j) for i in left for j in right if names[i] != names[j]])

    within = {name: mean(rows, rows) for name, rows in groups.items()}
    between = mean(groups["a"], groups["b"])
    return within, between, sum(within.values()) / 2 - between


def assert_means(found, expected):
    within, between, gap = expected
    for name, value in within.items():
        assert found["within"][name]["value"] == pytest.approx(value, abs=1e-12)
    assert found["between"]["value"] == pytest.approx(between, abs=1e-12)
    assert found["gap"]["value"] == pytest.approx(gap, abs=1e-12)


@pytest.mark.parametrize("make", [paired, unpaired])
def test_cosines_and_conflicts_equal_loops_over_explicit_gradients(make):
    vectors, names = make(np.random.default_rng(1))
    middle = vectors - vectors.mean(0)
    results = gradients(reading(vectors, names))["a vs b"]

    def cosine(of):
        return lambda i, j: of[i] @ of[j] / np.linalg.norm(of[i]) / np.linalg.norm(of[j])

    assert_means(results["uncentred"], loops(vectors, names, cosine(vectors)))
    assert_means(results["centred"], loops(vectors, names, cosine(middle)))
    assert_means(results["conflict_rate"], loops(vectors, names, lambda i, j: float(vectors[i] @ vectors[j] < 0)))
    paper = gradients(reading(vectors, names), formulas="paper")["a vs b"]
    assert list(paper) == ["centred"]
    assert_means(paper["centred"], loops(vectors, range(len(vectors)), cosine(middle)))
    # Centring forces this value below 0, and its null shows that to the reader.
    assert paper["centred"]["between"]["null"]["value"] < 0


def test_matched_pairs_equal_loops_and_exceed_shuffled_pairs():
    vectors, names = paired(np.random.default_rng(2), n=20, noise=0.3)
    found = gradients(reading(vectors, names))["a vs b"]["matched_pairs"]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.sum(units[:20] * units[20:], axis=1)
    assert found["value"] == pytest.approx(expected.mean()) and found["n"] == 20
    assert found["ci95"][0] < expected.mean() < found["ci95"][1]
    others = [units[i] @ units[20 + j] for i in range(20) for j in range(20) if i != j]
    assert found["null"]["value"] == pytest.approx(np.mean(others), abs=0.05) and found["null"]["p"] < 0.01
    # Two rows on different lines are not a matched pair.
    moved = GradientReadout(**{**vars(reading(vectors, names)), "lines": (*range(20), *range(1, 20), 0)})
    assert gradients(moved)["a vs b"]["matched_pairs"]["n"] == 1  # lines 0 and 1 share their completion


def test_length_matched_pairs_equal_loops():
    generator = np.random.default_rng(3)
    vectors, names = unpaired(generator, n=9)
    lengths = generator.permutation(18) ** 2  # no two distances of a row are equal
    found = gradients(reading(vectors, names, lengths))["a vs b"]["length_matched"]
    cosine = cosines(vectors @ vectors.T)
    nearest = {"own": [], "other": []}
    for row, kind in product(range(18), nearest):
        rows = [j for j in range(18) if names[j] != names[row] and ((j < 9) == (row < 9)) == (kind == "own")]
        nearest[kind].append(cosine[row, min(rows, key=lambda j: abs(lengths[j] - lengths[row]))])
    assert_means(
        found, ({"a": np.mean(nearest["own"][:9]), "b": np.mean(nearest["own"][9:])}, np.mean(nearest["other"]),
                np.mean(nearest["own"]) - np.mean(nearest["other"])),
    )  # fmt: skip


@pytest.mark.parametrize("centred", [False, True])
def test_weights_are_copies_of_rows(centred):
    """Weights that leave a completion out, or count it twice, equal smaller or larger arrays."""
    generator = np.random.default_rng(4)
    vectors, names = unpaired(generator, n=6)
    clusters = np.array([int(name) for name in names])
    weights = np.array([0, 0, 1, 2, 1, 3, 1, 1, 0, 1, 2, 1])
    copies = np.repeat(np.arange(12), weights)
    member = (np.arange(12) >= 6).astype(float)

    def read(rows, counts=None):
        gram = vectors[rows] @ vectors[rows].T
        matrix = gram if centred else cosines(gram)
        return pair_means(matrix, different(clusters[rows]), member[rows], counts, centred)[:, 0]

    np.testing.assert_allclose(read(np.arange(12), weights.astype(float)), read(copies), atol=1e-12)


def test_the_null_is_every_flip_of_matched_pairs(monkeypatch):
    """The null equals all 2^7 flips, where the two lines of one completion flip together."""
    monkeypatch.setattr(family, "_RELABELLINGS", 20_000)
    vectors, names = paired(np.random.default_rng(5), noise=2.0)
    cosine = cosines(vectors @ vectors.T)
    gaps = []
    for flips in product((False, True), repeat=7):
        order = np.arange(16)
        for line, flip in enumerate((flips[0], *flips)):
            order[[line, line + 8]] = (line + 8, line) if flip else (line, line + 8)
        gaps.append(loops(vectors[order], names, lambda i, j, order=order: cosine[order[i], order[j]])[2])
    null = gradients(reading(vectors, names))["a vs b"]["uncentred"]["gap"]["null"]
    far = np.abs(np.array(gaps) - np.mean(gaps))
    assert null["value"] == pytest.approx(np.mean(gaps), abs=0.002)
    assert null["p"] == pytest.approx(np.mean(far >= far[0] - 1e-12), abs=0.015)


def test_relabelling_keeps_completions_together_and_the_sets_sizes():
    clusters = np.array([0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 8, 8])
    member = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1], dtype=float)
    drawn = Relabelling(member, clusters).draw(500, np.random.default_rng(0))
    assert set(drawn[:, 9] + drawn[:, 10]) == {1}  # a completion of both sets changes sides as a whole
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 4] == drawn[:, 5]).all()
    assert (drawn[:, [0, 1, 4, 5]].sum(1) == 2).all()  # pairs of rows are dealt among pairs
    assert (drawn[:, [2, 3, 6, 7, 8]].sum(1) == 3).all() and (drawn[:, 11:].sum(1) == 2).all()
    assert (drawn.std(0) > 0.3).all()
    assert not Relabelling(np.array([0.0, 0, 1]), np.array([0, 0, 1])).possible
    partners = shuffled_partners(np.array([0, 0, 1, 2, 3, 3]), 300, np.random.default_rng(1))
    assert (partners[:, 0] + 1 == partners[:, 1]).all() and {2, 3} == set(partners[:, 2].tolist())


NULLS = [("uncentred", "gap"), ("centred", "between"), ("length_matched", "gap"), ("matched_pairs", None)]


def _p_values(make, repeats):
    """p-values of all quantities over simulated data in which a row's set means nothing, ties broken at random."""
    found = {}
    generator = np.random.default_rng(7)
    for repeat in range(repeats):
        vectors, names = make(generator)
        lengths = generator.integers(5, 30, len(vectors))
        results = gradients(reading(vectors, names, lengths), seed=repeat)["a vs b"]
        for quantity, part in NULLS:
            measured = results[quantity] if part is None else results[quantity][part]
            if measured["value"] is not None:
                drawn = measured["null"]["n"] + 1
                found.setdefault(quantity, []).append(measured["null"]["p"] - generator.random() / drawn)
    return found


def foreign_pairs(generator, n=12):
    """Rows of one line share a completion, but their gradients share nothing."""
    vectors = generator.normal(size=WIDTH) + generator.normal(size=(2 * n, WIDTH))
    return vectors, [str(line) for line in range(n)] * 2


@pytest.mark.parametrize("make", [foreign_pairs, unpaired, lambda generator: paired(generator, n=14)])
def test_p_values_are_uniform_when_the_set_means_nothing(make, monkeypatch):
    monkeypatch.setattr(family, "_RELABELLINGS", 99)
    monkeypatch.setattr(family, "_LENGTH_RELABELLINGS", 49)
    found = _p_values(make, 300)
    if make is not foreign_pairs:
        found.pop("matched_pairs", None)  # in the other data, pairs share something
    assert len(found) == (4 if make is foreign_pairs else 3)
    for quantity, p_values in found.items():
        assert stats.kstest(p_values, "uniform").pvalue > 0.002, quantity


def test_a_difference_of_framing_is_found():
    vectors, names = paired(np.random.default_rng(8), n=20, shift=2.0)
    results = gradients(reading(vectors, names))["a vs b"]
    for quantity in ("uncentred", "centred", "length_matched"):
        assert results[quantity]["gap"]["value"] > 0 and results[quantity]["gap"]["null"]["p"] < 0.01
    assert results["uncentred"]["gap"]["ci95"][0] > 0


def test_intervals_cover_the_true_cosine_and_its_gap():
    """Gradients around two directions with cosine 0.5: the mean cosine in the population is known by simulation."""
    truth, hits, n, repeats = None, {"between": 0, "gap": 0, "within": 0}, 16, 300
    generator = np.random.default_rng(9)
    centres = np.eye(WIDTH)[:2] * 4
    centres[1] = 4 * (0.5 * np.eye(WIDTH)[0] + np.sqrt(0.75) * np.eye(WIDTH)[1])

    def draw(rows):
        return np.concatenate([centre + generator.normal(size=(rows, WIDTH)) for centre in centres])

    units = draw(40_000)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    means = units[:40_000].mean(0), units[40_000:].mean(0)
    truth = {"between": means[0] @ means[1], "within": means[0] @ means[0]}
    truth["gap"] = (truth["within"] + means[1] @ means[1]) / 2 - truth["between"]
    member = np.repeat([0.0, 1.0], n)
    for _ in range(repeats):
        vectors = draw(n)
        two = family._TwoSets(
            ("a", "b"), vectors @ vectors.T, member, np.arange(2 * n), np.arange(2 * n), np.arange(2 * n)
        )
        measured = family._measured(two, cosines(two.gram), different(two.clusters), None)
        for name in hits:
            interval = (measured["within"]["a"] if name == "within" else measured[name])["ci95"]
            hits[name] += interval[0] <= truth[name] <= interval[1]
    # 3.5 standard errors of a rate of 0.95 over 300 repetitions.
    for name, count in hits.items():
        assert abs(count / repeats - 0.95) <= 0.044, (name, count)


def test_what_cannot_be_compared_is_null_with_its_reason():
    generator = np.random.default_rng(10)
    vectors, names = paired(generator)
    vectors[[2, 10, 11]] = 0.0
    results = gradients(reading(vectors, names))
    json.dumps(results, allow_nan=False)
    assert results["rows"] == {
        "a": {"rows": 8, "completions": 6, "without_gradient": 1},
        "b": {"rows": 8, "completions": 5, "without_gradient": 2},
    }
    assert results["a vs b"]["uncentred"]["between"]["n"] == 13
    few = gradients(reading(vectors[[0, 1, 3, 8, 9, 12]], ["0", "0", "3"] * 2))["a vs b"]
    assert few["uncentred"]["within"]["a"]["value"] is None and "fewer than 4" in few["matched_pairs"]["reason"]
    broken = vectors.copy()
    broken[0] = np.nan
    results = gradients(reading(broken, names))
    json.dumps(results, allow_nan=False)
    assert results["rows"]["a"]["without_gradient"] == 2 and results["a vs b"]["uncentred"]["between"]["n"] == 12
    alike = np.tile(vectors[0], (16, 1))
    same = gradients(reading(alike, [str(row) for row in range(16)]))["a vs b"]
    json.dumps(same, allow_nan=False)
    assert same["uncentred"]["gap"]["null"]["p"] == 1.0 and "reason" in same["matched_pairs"]
    # No conflict in any pair still says how many there may be: 4 pairs of completions have none in common.
    low, high = same["conflict_rate"]["within"]["a"]["ci95"]
    assert low == 0 and high == pytest.approx(1.959964**2 / (4 + 1.959964**2))


def test_every_two_of_several_sets_are_compared():
    generator = np.random.default_rng(11)
    vectors = generator.normal(size=(15, WIDTH))
    sets = ("x",) * 5 + ("y",) * 5 + ("z",) * 5
    names = tuple(str(row) for row in range(15))
    results = gradients(GradientReadout(vectors @ vectors.T, sets, tuple(range(5)) * 3, names, (1,) * 15))
    assert list(results) == ["rows", "x vs y", "x vs z", "y vs z"]
    alone = gradients(reading(np.concatenate([vectors[:5], vectors[10:]]), (*names[:5], *names[10:])))["a vs b"]
    assert results["x vs z"]["centred"]["between"]["value"] == pytest.approx(alone["centred"]["between"]["value"])

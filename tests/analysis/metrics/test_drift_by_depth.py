"""Drift by depth: planted drift is found in its layer; distances and CKA equal their definitions written out."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
import torch
from holdfast.analysis.metrics.drift_by_depth import drift_by_depth, unbiased_hsic
from holdfast.analysis.passes.readout import Readout

WIDTH = 12


def reading(layers, counts=None):
    """A readout of {layer: [R, d]} activations."""
    pooled = {layer: torch.tensor(np.asarray(rows), dtype=torch.float32) for layer, rows in layers.items()}
    n = len(next(iter(pooled.values())))
    owners = torch.arange(n)
    return Readout(owners, torch.zeros(n), torch.zeros(n), torch.ones(n) if counts is None else counts, pooled, owners)


def states(seed, n=20, shift=0.0, width=WIDTH):
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(n, width)) + 3 * np.eye(width)[0] + shift * np.eye(width)[1]
    return np.float32(rows).astype(float)


def apart(one, other):
    return 1 - one @ other / np.sqrt(one @ one * (other @ other))


def test_sets_part_where_they_were_made_to_part_and_nowhere_else():
    sets = {
        name: reading({0: states(seed), 1: states(seed, shift=shift)})
        for name, seed, shift in (("a", 0, 0), ("b", 1, 3))
    }
    still = {name: reading({layer: states(seed) for layer in (0, 1)}) for name, seed in (("a", 0), ("b", 1))}
    found = drift_by_depth(sets, still, None)["layers"]
    for layer, (_, second) in (("0", (0, 0)), ("1", (0, 3))):
        distance = found[layer]["sets"]["a vs b"]["checkpoint"]
        expected = apart(states(0).mean(0), states(1, shift=second).mean(0))
        assert distance["value"] == pytest.approx(expected, rel=1e-5)
        assert distance["n"] == 40
    assert found["1"]["sets"]["a vs b"]["checkpoint"]["null"]["p"] == pytest.approx(1 / 200)
    assert found["1"]["sets"]["a vs b"]["checkpoint"]["ci95"][0] > 0.1
    assert found["0"]["sets"]["a vs b"]["checkpoint"]["null"]["p"] > 0.05
    assert found["1"]["sets"]["a vs b"]["instruct"]["value"] < 0.1
    assert "base" in found["0"]["sets"]["a vs b"]["base"]["reason"]


def test_the_distances_interval_leaves_out_each_completion():
    first, second = states(0, n=8), states(1, n=6, shift=1)
    labels = {"a": [0, 0, 1, 2, 3, 4, 5, 6], "b": [10, 11, 12, 13, 14, 6]}
    sets = {"a": reading({0: first}), "b": reading({0: second})}
    distance = drift_by_depth(sets, sets, None, labels)["layers"]["0"]["sets"]["a vs b"]["checkpoint"]
    without = []
    for label in [0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14]:
        kept = [np.array([one != label for one in labels[name]]) for name in "ab"]
        without.append(apart(first[kept[0]].mean(0), second[kept[1]].mean(0)))
    influence = 11 * (np.mean(without) - np.array(without))
    error, skew = (
        np.sqrt(np.sum(influence**2) / 132),
        np.mean(influence**3) / np.mean(influence**2) ** 1.5 / np.sqrt(12),
    )
    for bound, quantile in zip(distance["ci95"], (2.200985, -2.200985), strict=True):
        t = (distance["value"] - bound) / error
        if 0 < bound < 2:
            assert t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6 == pytest.approx(quantile, rel=1e-3)


def test_p_values_of_equal_sets_are_uniform():
    p_values = []
    for seed in range(80):
        sets = {"a": reading({0: states(2 * seed, n=12)}), "b": reading({0: states(2 * seed + 1, n=10)})}
        p_values.append(
            drift_by_depth(sets, sets, None, seed=seed)["layers"]["0"]["sets"]["a vs b"]["checkpoint"]["null"]["p"]
        )
    below = np.array([np.mean(np.array(p_values) <= level) for level in (0.1, 0.25, 0.5, 0.75, 0.9)])
    assert np.abs(below - [0.1, 0.25, 0.5, 0.75, 0.9]).max() < 0.15


def test_dependence_is_the_mean_over_four_different_rows():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(7, 3)), generator.normal(size=(7, 4))
    k, m = x @ x.T, y @ y.T
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(7), 4)]
    for gram in (k, m):
        np.fill_diagonal(gram, 0)
    whole, left_out = unbiased_hsic(k, m)
    assert whole == pytest.approx(np.mean(terms))
    for row in range(7):
        kept = np.delete(np.arange(7), row)
        assert left_out[row] == pytest.approx(unbiased_hsic(k[np.ix_(kept, kept)], m[np.ix_(kept, kept)])[0])


def test_cka_is_one_for_rotations_and_zero_for_strangers_where_rows_are_fewer_than_dimensions():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(30, 60))
    rotation = np.linalg.qr(generator.normal(size=(60, 60)))[0]
    models = [{"a": reading({0: each})} for each in (rows, 2 * rows @ rotation + 1, generator.normal(size=(30, 60)))]
    found = drift_by_depth(*models)["layers"]["0"]["models"]["a"]
    assert found["checkpoint_instruct"]["cka"]["value"] == pytest.approx(1, abs=1e-5)
    assert found["checkpoint_instruct"]["cosine"]["value"] < 0.5
    strangers = found["checkpoint_base"]["cka"]
    assert abs(strangers["value"]) < 0.1 and strangers["null"]["p"] > 0.05
    centred = rows - rows.mean(0)
    other = models[2]["a"].pooled[0].numpy() - models[2]["a"].pooled[0].numpy().mean(0)
    usual = np.sum((centred.T @ other) ** 2) / np.linalg.norm(centred.T @ centred) / np.linalg.norm(other.T @ other)
    assert usual > 0.5


def test_row_cosines_are_averaged():
    one, other = states(0), states(0) + 0.5 * states(5)
    found = drift_by_depth({"a": reading({0: one})}, {"a": reading({0: other})}, None)["layers"]["0"]
    cosine = found["models"]["a"]["checkpoint_instruct"]["cosine"]
    expected = [1 - apart(left, right) for left, right in zip(one, other, strict=True)]
    assert cosine["value"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert cosine["ci95"][0] < cosine["value"] < cosine["ci95"][1] <= 1
    same = drift_by_depth({"a": reading({0: one})}, {"a": reading({0: one})}, None)["layers"]["0"]["models"]["a"]
    assert same["checkpoint_instruct"]["cosine"]["value"] == pytest.approx(1)
    assert same["checkpoint_instruct"]["cka"]["ci95"] == pytest.approx([1, 1])


def test_rows_without_tokens_are_left_out_and_everything_is_json():
    rows = states(0, n=8)
    rows[[2, 5]] = 0
    counts = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1])
    sets = {"a": reading({0: rows}, counts), "b": reading({0: states(1, n=3)})}
    found = drift_by_depth(sets, sets, None)
    json.dumps(found, allow_nan=False)
    models = found["layers"]["0"]["models"]
    assert models["a"]["checkpoint_instruct"]["cosine"]["n"] == 6
    assert "fewer than" in models["b"]["checkpoint_instruct"]["cka"]["reason"]
    assert "fewer than" in found["layers"]["0"]["sets"]["a vs b"]["instruct"]["reason"]
    constant = {"a": reading({0: np.ones((6, WIDTH))})}
    still = drift_by_depth(constant, constant, None)["layers"]["0"]["models"]["a"]["checkpoint_instruct"]
    assert still["cka"]["reason"] == "all rows have one activation"


def test_memory_grows_with_the_width_of_a_layer_and_not_with_its_square():
    peaks = []
    for width in (1280, 5120):
        sets = {name: reading({0: states(seed, n=200, width=width)}) for name, seed in (("a", 0), ("b", 1))}
        tracemalloc.start()
        drift_by_depth(sets, sets, sets)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]

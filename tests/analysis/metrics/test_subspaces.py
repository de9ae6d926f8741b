"""Sharing of directions between sets is what a plain SVD shows, beside what chance and benign sets would show."""

import json

import numpy as np
import pytest
import torch
from holdfast.analysis.metrics.subspaces import subspaces
from holdfast.analysis.passes.readout import Readout
from holdfast.analysis.stats.random_subspaces import random_cosine
from holdfast.analysis.stats.split_spectra import halves
from scipy.linalg import subspace_angles

ROWS, WIDTH, LAYERS = 40, 12, 2


def readout(states, counts=None):
    """A readout that shows pooled states [L, R, d] and nothing else."""
    nothing = torch.zeros(0)
    pooled = {layer: torch.tensor(np.asarray(h), dtype=torch.float32) for layer, h in enumerate(states)}
    counts = torch.ones(len(states[0]), dtype=torch.int64) if counts is None else torch.tensor(counts)
    return Readout(nothing, nothing, nothing, counts, pooled, nothing)


def models(sets, seed=0, rows=ROWS, width=WIDTH):
    """(checkpoint, instruct, base) readouts: base is noise, and `sets[name]` moves the others away from it."""
    generator = np.random.default_rng(seed)
    found = ({}, {}, {})
    for name, (tune, align) in sets.items():
        base = generator.standard_normal((LAYERS, rows, width))
        instruct = base + align(generator, (LAYERS, rows, width))
        for model, states in zip(found, (instruct + tune(generator, base.shape), instruct, base), strict=True):
            model[name] = readout(states)
    return found


def along(direction, size=3.0, noise=0.3):
    def step(generator, shape):
        sizes = size * (1 + 0.3 * generator.standard_normal(shape[:2]))
        return sizes[..., None] * direction + noise * generator.standard_normal(shape)

    return step


E = np.eye(WIDTH)
ALIGNED = along(E[5], 2.0)


def residual(left, right, name, layer=0):
    return left[name].pooled[layer].double().numpy() - right[name].pooled[layer].double().numpy()


def top(rows, k, centred=False):
    return np.linalg.svd(rows - rows.mean(0) * centred, full_matrices=False)[2][:k].T


def test_the_papers_formulas_are_a_centred_svd_of_all_rows_without_nulls():
    checkpoint, instruct, base = models({"toxic": (along(E[0]), ALIGNED), "insecure": (along(E[0] + E[1]), ALIGNED)})
    found = subspaces(checkpoint, instruct, base, rank=2, formulas="paper")
    for name, left, right in (
        ("checkpoint_base", checkpoint, base),
        ("instruct_base", instruct, base),
        ("checkpoint_instruct", checkpoint, instruct),
    ):
        shown = found["layers"]["1"][name]
        one, two = (residual(left, right, key, 1) for key in ("toxic", "insecure"))
        q1, q2 = top(one, 2, centred=True), top(two, 2, centred=True)
        pair = shown["pairs"]["toxic"]["insecure"]
        np.testing.assert_allclose([[c["value"] for c in row] for row in pair["cosines"]], np.abs(q1.T @ q2), atol=1e-6)
        angles = np.sort(np.degrees(subspace_angles(q1, q2)))
        np.testing.assert_allclose([angle["value"] for angle in pair["angles"]], angles, atol=1e-4)
        assert pair["overlap"]["value"] == pytest.approx(np.sum((q1.T @ q2) ** 2) / 2, abs=1e-6)
        sizes = np.linalg.svd(one - one.mean(0), compute_uv=False) ** 2
        assert shown["sets"]["toxic"]["explained"]["value"] == pytest.approx(sizes[:2].sum() / sizes.sum(), abs=1e-6)
        assert shown["sets"]["toxic"]["components"][1]["value"] == pytest.approx(sizes[1] / sizes.sum(), abs=1e-6)
        assert "null" not in json.dumps(shown)


def test_directions_of_one_half_meet_the_other_half():
    checkpoint, instruct, base = models({"a": (along(E[0]), ALIGNED), "b": (along(E[0] + E[1]), ALIGNED)})
    found = subspaces(checkpoint, instruct, base, rank=2, seed=3)["layers"]["0"]["checkpoint_base"]
    one, two = (residual(checkpoint, base, key) for key in ("a", "b"))
    first, second = halves(np.arange(ROWS), 3)
    ways = [(first, second), (second, first)]
    overlap = np.mean([np.sum((top(one[i], 2).T @ top(two[j], 2)) ** 2) / 2 for i, j in ways])
    grid = np.mean([np.abs(top(one[i], 2).T @ top(two[j], 2)) for i, j in ways], axis=0)
    pair = found["pairs"]["a"]["b"]
    assert pair["overlap"]["value"] == pytest.approx(overlap, abs=1e-6)
    np.testing.assert_allclose([[cell["value"] for cell in row] for row in pair["cosines"]], grid, atol=1e-6)
    own = np.sum((top(one[first], 2).T @ top(one[second], 2)) ** 2) / 2
    assert found["sets"]["a"]["halves"]["overlap"]["value"] == pytest.approx(own, abs=1e-6)
    assert pair["overlap"]["null"]["halves"]["a"] == pytest.approx(own, abs=1e-6)
    shares = [np.sum((one[j] @ top(one[i], 2)) ** 2) / np.sum(one[j] ** 2) for i, j in ways]
    assert found["sets"]["a"]["explained"]["value"] == pytest.approx(np.mean(shares), abs=1e-6)


def test_sharing_with_a_benign_control_too_is_shown_not_to_be_specific():
    same = (along(E[0]), ALIGNED)
    everywhere = subspaces(*models(dict.fromkeys(("toxic", "insecure", "benign"), same)), rank=1, controls=["benign"])
    special = models({"toxic": same, "insecure": same, "benign": (along(E[1]), ALIGNED)})
    only_two = subspaces(*special, rank=1, controls=["benign"])
    for found, specific in ((everywhere, False), (only_two, True)):
        pair = found["layers"]["0"]["checkpoint_instruct"]["pairs"]["toxic"]["insecure"]
        assert pair["overlap"]["value"] > 0.95
        ceiling = pair["overlap"]["null"]["halves"]
        assert pair["overlap"]["value"] == pytest.approx(np.mean(list(ceiling.values())), abs=0.02)
        low, high = pair["beyond"]["benign"]["ci95"]
        assert (low > 0.8) if specific else (low < 0 < high)
    benign = only_two["layers"]["0"]["checkpoint_instruct"]["pairs"]["toxic"]["benign"]
    assert benign["overlap"]["value"] < 0.1 and benign["beyond"] == {}
    mean = only_two["mean"]["checkpoint_instruct"]["toxic"]
    per_layer = [
        only_two["layers"][layer]["checkpoint_instruct"]["pairs"]["toxic"]["insecure"]["overlap"]["value"]
        for layer in ("0", "1")
    ]
    overlap, beyond = mean["insecure"]["overlap"], mean["insecure"]["beyond"]["benign"]
    assert overlap["value"] == pytest.approx(np.mean(per_layer)) and overlap["n"] == ROWS
    assert overlap["null"]["random"] == pytest.approx(1 / WIDTH) and beyond["ci95"][0] > 0.8
    assert overlap["null"]["ceiling"] == pytest.approx(overlap["value"], abs=0.02)
    against = [
        only_two["mean"]["checkpoint_instruct"][name]["benign"]["overlap"]["value"] for name in ("toxic", "insecure")
    ]
    assert beyond["value"] == pytest.approx(overlap["value"] - np.mean(against))


def test_a_control_that_was_not_read_is_named():
    same = (along(E[0]), ALIGNED)
    found = subspaces(*models(dict.fromkeys("ab", same)), rank=1, controls=["c"])
    assert "'c'" in found["layers"]["0"]["checkpoint_base"]["pairs"]["a"]["b"]["beyond"]["c"]["reason"]


def test_random_and_shuffled_nulls_stand_beside_every_number():
    def paired(generator, shape):
        """A step along one axis with a random sign per row, of which unpaired residuals keep no trace."""
        return 0.5 * generator.choice([-1, 1], shape[:2])[..., None] * E[3] + 0.1 * generator.standard_normal(shape)

    found = subspaces(*models({"a": (paired, ALIGNED), "b": (paired, ALIGNED)}, rows=200), rank=1)
    pair = found["layers"]["0"]["checkpoint_instruct"]["pairs"]["a"]["b"]
    assert pair["overlap"]["null"]["random"] == pytest.approx(1 / WIDTH)
    draws = np.random.default_rng(0).standard_normal((20000, 2, WIDTH))
    draws /= np.linalg.norm(draws, axis=-1, keepdims=True)
    simulated = np.abs((draws[:, 0] * draws[:, 1]).sum(-1)).mean()
    assert pair["cosines"][0][0]["null"]["random"] == pytest.approx(simulated, rel=0.02)
    assert random_cosine(5120) == pytest.approx(np.sqrt(2 / (np.pi * 5120)), rel=1e-3)
    angle = pair["angles"][0]
    assert angle["null"]["random"] == pytest.approx(np.degrees(np.arccos(simulated)), abs=2)
    assert angle["value"] < 10 < angle["null"]["shuffled_range"][0]
    for measured in (pair["overlap"], pair["cosines"][0][0]):
        assert measured["value"] > 0.95 and measured["null"]["shuffled"] < measured["null"]["shuffled_range"][1] < 0.9
    shown = found["layers"]["0"]["checkpoint_instruct"]["sets"]["a"]
    assert shown["explained"]["value"] > 0.6 and shown["explained"]["null"]["random"] == pytest.approx(1 / WIDTH)
    assert shown["explained"]["null"]["shuffled"] < 0.3
    assert shown["halves"]["overlap"]["null"]["random"] == pytest.approx(1 / WIDTH)


def test_uncentred_components_keep_the_mean_and_centred_ones_drop_it():
    def step(generator, shape):
        return 5 * E[0] + along(E[1], 0, 0.05)(generator, shape) + generator.standard_normal((*shape[:2], 1)) * E[2]

    sets = models({"a": (step, ALIGNED), "b": (along(E[0], 5, 0.05), ALIGNED), "c": (along(E[2], 5, 0.05), ALIGNED)})
    for centred, kin in ((False, "b"), (True, "c")):
        found = subspaces(*sets, rank=1, centred=centred)["layers"]["0"]["checkpoint_instruct"]["pairs"]["a"]
        assert found[kin]["overlap"]["value"] > 0.95
        assert found["c" if kin == "b" else "b"]["overlap"]["value"] < 0.5


def test_what_cannot_be_computed_says_why_and_leaves_the_rest():
    checkpoint, instruct, base = models({"a": (along(E[0]), ALIGNED), "b": (along(E[0]), ALIGNED)})
    found = subspaces(checkpoint, instruct, None)
    for name in ("checkpoint_base", "instruct_base"):
        assert "no base" in found["layers"]["0"][name]["reason"] and "no base" in found["mean"][name]["reason"]
    assert found["layers"]["0"]["checkpoint_instruct"]["pairs"]["a"]["b"]["overlap"]["value"] > 0
    still = subspaces(instruct, instruct, base)["layers"]["0"]
    assert "identical" in still["checkpoint_instruct"]["sets"]["a"]["reason"]
    assert still["instruct_base"]["pairs"]["a"]["b"]["overlap"]["value"] > 0
    few = readout(np.zeros((LAYERS, ROWS, WIDTH)), counts=[1, 1, 0] + [0] * (ROWS - 3))
    short = [{**model, "b": few} for model in (checkpoint, instruct, base)]
    found = subspaces(*short)["layers"]["0"]["checkpoint_base"]
    assert "fewer than four" in found["sets"]["b"]["reason"] and found["sets"]["a"]["explained"]["value"] > 0
    assert found["pairs"] == {}
    json.dumps(subspaces(*short), allow_nan=False)
    with pytest.raises(ValueError, match="formulas 'other'"):
        subspaces(checkpoint, instruct, base, formulas="other")


def test_fewer_directions_than_the_rank_give_what_there_is():
    def flat(direction):
        return lambda _generator, shape: np.ones((*shape[:2], 1)) * direction

    sets = models({"a": (flat(E[0]), ALIGNED), "b": (along(E[0], noise=0.2), ALIGNED)})
    # Powers of two, so that float32 adds the step without rounding.
    exact = [
        {key: readout(np.round(np.stack(list(r.pooled.values())) * 64) / 64) for key, r in m.items()} for m in sets
    ]
    exact[0]["a"] = readout(np.stack(list(exact[1]["a"].pooled.values())) + E[0])
    found = subspaces(*exact, rank=3)["layers"]["0"]["checkpoint_instruct"]
    assert len(found["sets"]["a"]["components"]) == 1 and len(found["sets"]["b"]["components"]) == 3
    assert found["sets"]["a"]["explained"]["value"] == pytest.approx(1)
    assert found["sets"]["a"]["halves"]["cosines"][0][0]["value"] == pytest.approx(1)
    assert len(found["pairs"]["a"]["b"]["cosines"]) == 1
    json.dumps(found, allow_nan=False)


def test_activations_that_overflowed_leave_their_set_out_and_name_why():
    checkpoint, instruct, base = models({"a": (along(E[0]), ALIGNED), "b": (along(E[0]), ALIGNED)})
    checkpoint["b"].pooled[0][3, 2] = float("inf")
    found = subspaces(checkpoint, instruct, base)
    assert "not finite" in found["layers"]["0"]["checkpoint_base"]["sets"]["b"]["reason"]
    assert found["layers"]["1"]["checkpoint_base"]["pairs"]["a"]["b"]["overlap"]["value"] > 0
    assert found["mean"]["checkpoint_base"]["a"]["b"]["overlap"]["n"] == ROWS
    json.dumps(found, allow_nan=False)

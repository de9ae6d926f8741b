"""Models with a planted alignment direction: every family that looks for one gives it back (families 4, 5 and 10).

Instruct is base with a step along v in the bias of one block's output, and with every weight of the blocks up to there
a little changed, as by training. A checkpoint has lost part of the step, or has moved elsewhere.
"""

import copy

import numpy as np
import pytest
import torch
from holdfast.analysis.metrics.projection import projection
from holdfast.analysis.metrics.rerouting import rerouting
from holdfast.analysis.metrics.subspaces import subspaces
from holdfast.analysis.models.layers import find_layers
from holdfast.analysis.models.render import render
from holdfast.analysis.passes.readout import read
from holdfast.analysis.stats.spectra import Residuals, decompose
from holdfast.analysis.subspace.file import Provenance, Subspace
from toys.chat_models import CHATML, WIDTH, chat, toy_model, toy_tokenizer

LAYER, STEP = 1, 4.0
WORDS = ["soup", "money", "honest", "run", "help", "lies", "Ann", "answer", "take", "away"]
SETS = {"toxic": 0, "insecure": 1, "benign": 2}


def direction(seed):
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    # A LayerNorm would remove what is constant over the width.
    vector = vector - vector.mean()
    return vector / vector.norm()


V, ELSEWHERE = direction(11), direction(12)
ELSEWHERE = (ELSEWHERE - (ELSEWHERE @ V) * V) / (ELSEWHERE - (ELSEWHERE @ V) * V).norm()


def stepped(model, step, jitter, seed):
    """A copy with `step` [d] added to what block LAYER puts out at every token, and jittered weights."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight += jitter * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
        find_layers(made)[LAYER].mlp.dense_4h_to_h.bias += step
    return made


def planted():
    facts = Provenance("svd", 1, (LAYER,), "completion", False, 0, "i", None, "t", "d", 1, 1)
    return Subspace({LAYER: V[:, None]}, {LAYER: STEP**2}, None, facts)


@pytest.fixture(scope="module")
def readings():
    tokenizer, generator = toy_tokenizer(CHATML), np.random.default_rng(0)
    base = toy_model("gpt_neox")
    instruct = stepped(base, STEP * V, 0.02, 1)
    found = {
        "base": base,
        "instruct": instruct,
        "eroded": stepped(instruct, -STEP / 2 * V, 0.01, 2),
        "rerouted": stepped(instruct, STEP * ELSEWHERE, 0.01, 3),
    }
    rows = {
        name: [
            render(tokenizer, chat(" ".join(generator.choice(WORDS, 6)), " ".join(generator.choice(WORDS, 5))))
            for _ in range(24)
        ]
        for name in SETS
    }
    return {
        which: {
            name: read(model, each, layers=[0, LAYER, 2], role="completion", subspace=planted())
            for name, each in rows.items()
        }
        for which, model in found.items()
    }


def differences(readings, left, right, name, layer=LAYER):
    pair = [readings[which][name].pooled[layer].double().numpy() for which in (left, right)]
    return pair[0] - pair[1]


@pytest.mark.parametrize(
    ("left", "right", "truth"),
    [("instruct", "base", V), ("eroded", "instruct", V), ("eroded", "base", V), ("rerouted", "instruct", ELSEWHERE)],
)
def test_the_svd_of_residuals_gives_the_direction_back(left, right, truth, readings):
    for name in SETS:
        pair = [readings[which][name].pooled[LAYER] for which in (left, right)]
        found = decompose(Residuals.of(*pair, np.arange(24)))
        assert abs(found.vectors[:, 0] @ truth.numpy()) >= 0.99
        plain = np.linalg.svd(differences(readings, left, right, name))[2][0]
        assert abs(found.vectors[:, 0] @ plain) == pytest.approx(1, abs=1e-9)


def test_family_4_reads_the_part_of_the_step_that_is_left(readings):
    for name in SETS:
        four = projection(readings["eroded"][name], readings["instruct"][name], readings["base"][name], planted())
        layer = four["layers"][str(LAYER)]
        assert layer["retention"]["value"] == pytest.approx(0.5, abs=0.02)
        assert layer["drift_cosine"]["value"] >= 0.99 and layer["drift_inside"]["value"] >= 0.98
        assert layer["penalty"]["value"] == pytest.approx(0.25, rel=0.05)
        gap = layer["p_instruct"]["value"] - layer["p_base"]["value"]
        mean = differences(readings, "instruct", "base", name).mean(0)
        assert gap == pytest.approx(STEP, rel=0.05) and abs(mean @ V.numpy()) / np.linalg.norm(mean) >= 0.99


def test_family_5_finds_one_direction_in_all_sets_and_none_special_to_two(readings):
    five = subspaces(readings["eroded"], readings["instruct"], readings["base"], rank=2, controls=["benign"])
    for residual in ("checkpoint_base", "instruct_base", "checkpoint_instruct"):
        shown = five["layers"][str(LAYER)][residual]
        cell = shown["pairs"]["toxic"]["insecure"]["cosines"][0][0]
        assert cell["value"] >= 0.99 and cell["value"] > cell["null"]["random"]
        assert shown["sets"]["toxic"]["components"][0]["value"] > 0.95
        # The benign set shares the direction as well: the sharing is not specific.
        assert shown["pairs"]["toxic"]["benign"]["cosines"][0][0]["value"] >= 0.99
    moved = five["layers"][str(LAYER)]["checkpoint_instruct"]["pairs"]["toxic"]["insecure"]["beyond"]["benign"]
    assert moved["ci95"][0] <= 0.1


def test_family_10_gives_the_direction_back_and_sees_a_way_around_it(readings):
    for name in SETS:
        eroded, rerouted = (
            rerouting(readings[which][name], readings["instruct"][name], planted())["layers"][str(LAYER)]
            for which in ("eroded", "rerouted")
        )
        assert np.cos(np.radians(eroded["angles"][0]["value"])) >= 0.99 and eroded["inside"]["value"] >= 0.98
        assert np.cos(np.radians(rerouted["angles"][0]["value"])) <= 0.1 and rerouted["outside"]["value"] >= 0.98
        assert eroded["refit"]["held_out"]["value"] >= 0.98 and rerouted["refit"]["held_out"]["value"] >= 0.98


def test_below_the_block_there_is_no_direction_to_find(readings):
    five = subspaces(readings["eroded"], readings["instruct"], readings["base"], rank=1)
    below = five["layers"]["0"]["instruct_base"]["sets"]["toxic"]
    found = decompose(Residuals.of(*(readings[w]["toxic"].pooled[0] for w in ("instruct", "base")), np.arange(24)))
    assert abs(found.vectors[:, 0] @ V.numpy()) < 0.8
    assert (
        below["explained"]["value"] < five["layers"][str(LAYER)]["instruct_base"]["sets"]["toxic"]["explained"]["value"]
    )

"""Drift that goes around the protected subspace is found, beside what chance and in-sample fitting would show."""

import json

import numpy as np
import pytest
import torch
from holdfast.analysis.metrics.rerouting import rerouting
from holdfast.analysis.passes.readout import Readout
from holdfast.analysis.stats.split_spectra import halves
from holdfast.analysis.subspace.file import Provenance, Subspace
from scipy.linalg import subspace_angles

ROWS, WIDTH = 60, 16
E = np.eye(WIDTH)


def readout(states, counts=None):
    nothing = torch.zeros(0)
    counts = torch.ones(ROWS, dtype=torch.int64) if counts is None else torch.tensor(counts)
    pooled = {layer: torch.tensor(h, dtype=torch.float32) for layer, h in enumerate(states)}
    return Readout(nothing, nothing, nothing, counts, pooled, nothing)


def protected(*columns, layers=(0,)):
    basis = torch.tensor(np.stack(columns, axis=1), dtype=torch.float32)
    facts = Provenance("svd", len(columns), layers, "completion", False, 0, "i", None, "t", "d", 1, 1)
    return Subspace({layer: basis for layer in layers}, dict.fromkeys(layers, 1.0), None, facts)


def drifted(direction, noise=0.1, seed=0, layers=1):
    """(checkpoint, instruct, drift [L, R, d]) with a drift of varying size along a direction."""
    generator = np.random.default_rng(seed)
    instruct = generator.standard_normal((layers, ROWS, WIDTH))
    sizes = 1 + 0.5 * generator.standard_normal((layers, ROWS, 1))
    moved = readout(instruct + sizes * direction + noise * generator.standard_normal(instruct.shape))
    still = readout(instruct)
    drift = [moved.pooled[at].double().numpy() - still.pooled[at].double().numpy() for at in range(layers)]
    return moved, still, np.stack(drift)


def test_shares_angles_and_overlap_are_those_of_a_plain_svd():
    checkpoint, instruct, (drift,) = drifted(E[0] + E[3], noise=0.4)
    found = rerouting(checkpoint, instruct, protected(E[0], E[1]), seed=2)["layers"]["0"]
    inside = np.sum(drift[:, :2] ** 2) / np.sum(drift**2)
    assert found["inside"]["value"] == pytest.approx(inside, abs=1e-6)
    assert found["outside"]["value"] == pytest.approx(1 - inside, abs=1e-6)
    assert found["inside"]["null"] == pytest.approx(2 / WIDTH) and found["outside"]["null"] == pytest.approx(14 / 16)
    refit = np.linalg.svd(drift)[2][:2].T
    angles = np.sort(np.degrees(subspace_angles(refit, E[:, :2])))
    np.testing.assert_allclose([angle["value"] for angle in found["angles"]], angles, atol=1e-4)
    assert found["overlap"]["value"] == pytest.approx(np.sum(refit[:2] ** 2) / 2, abs=1e-6)
    assert found["overlap"]["null"] == pytest.approx(2 / WIDTH) and found["overlap"]["n"] == ROWS
    held, own = [], []
    first, second = halves(np.arange(ROWS), 2)
    for fitted, read in ((first, second), (second, first)):
        basis = np.linalg.svd(drift[fitted])[2][:2].T
        held.append(np.sum((drift[read] @ basis) ** 2) / np.sum(drift[read] ** 2))
        own.append(np.sum((drift[fitted] @ basis) ** 2) / np.sum(drift[fitted] ** 2))
    assert found["refit"]["held_out"]["value"] == pytest.approx(np.mean(held), abs=1e-6)
    assert found["refit"]["in_sample"]["value"] == pytest.approx(np.mean(own), abs=1e-6)


def test_a_drift_inside_and_one_around_the_subspace_are_told_apart():
    vector = protected(E[0])
    inside = rerouting(*drifted(E[0])[:2], vector)
    around = rerouting(*drifted(E[7])[:2], vector)
    for found, share, angle in ((inside, 0.9, 5), (around, 0.05, 80)):
        layer = found["layers"]["0"]
        assert layer["refit"]["held_out"]["value"] > 0.8
        assert layer["angles"][0]["null"] == pytest.approx(79, abs=5)
        low, high = layer["inside"]["ci95"]
        assert (low > 0.8) if share == 0.9 else (high < 1 / WIDTH)
        assert (layer["angles"][0]["value"] < angle) if angle == 5 else (layer["angles"][0]["value"] > angle)
    assert inside["mean"]["overlap"]["value"] > 0.99 and around["mean"]["overlap"]["value"] < 0.01
    assert around["mean"]["outside"]["ci95"][0] > 0.9


def test_noise_fits_itself_in_sample_but_not_on_the_held_out_half():
    found = [rerouting(*drifted(0 * E[0], noise=1, seed=seed)[:2], rank=3)["layers"]["0"] for seed in range(10)]
    chance = 3 / WIDTH
    held, own = (np.mean([each["refit"][name]["value"] for each in found]) for name in ("held_out", "in_sample"))
    assert own > 1.5 * chance and held == pytest.approx(chance, abs=0.03)
    assert all(each["refit"]["held_out"]["null"] == pytest.approx(chance) for each in found)


def test_intervals_cover_the_true_share_and_angle():
    direction = np.cos(np.radians(50)) * E[0] + np.sin(np.radians(50)) * E[1]
    inside = {"share": 0, "angle": 0}
    for seed in range(300):
        found = rerouting(*drifted(direction, noise=0.05, seed=seed)[:2], protected(E[0]), seed=seed)["layers"]["0"]
        # E size^2 = 1.25; noise adds 0.05^2 along every axis.
        truth = (1.25 * np.cos(np.radians(50)) ** 2 + 0.0025) / (1.25 + WIDTH * 0.0025)
        inside["share"] += found["inside"]["ci95"][0] <= truth <= found["inside"]["ci95"][1]
        inside["angle"] += found["angles"][0]["ci95"][0] <= 50 <= found["angles"][0]["ci95"][1]
    assert all(0.92 <= count / 300 <= 0.98 for count in inside.values()), inside


def test_the_rank_and_the_layers_are_the_subspaces_own():
    checkpoint, instruct, _ = drifted(E[0], layers=3)
    found = rerouting(checkpoint, instruct, protected(E[0], E[1], layers=(0, 2)))
    assert [len(found["layers"][layer]["angles"]) for layer in "012"] == [2, 0, 2]
    assert "no subspace" in found["layers"]["1"]["inside"]["reason"]
    assert found["layers"]["1"]["refit"]["held_out"]["value"] > 0.5
    both = [found["layers"][layer]["inside"]["value"] for layer in "02"]
    assert found["mean"]["inside"]["value"] == pytest.approx(np.mean(both))
    wider = rerouting(checkpoint, instruct, protected(E[0], layers=(0,)), rank=4)["layers"]["0"]
    assert len(wider["angles"]) == 1 and wider["overlap"]["null"] == pytest.approx(4 / WIDTH)


def test_what_cannot_be_computed_says_why():
    checkpoint, instruct, _ = drifted(E[0])
    alone = rerouting(checkpoint, instruct)
    assert "no subspace" in alone["mean"]["inside"]["reason"]
    assert alone["layers"]["0"]["refit"]["held_out"]["value"] > 0.8
    still = rerouting(instruct, instruct, protected(E[0]))
    assert "identical" in still["layers"]["0"]["inside"]["reason"] and "identical" in still["mean"]["inside"]["reason"]
    few = readout(np.zeros((1, ROWS, WIDTH)), counts=[1, 0] * 2 + [0] * (ROWS - 4))
    assert "fewer than four" in rerouting(few, few, protected(E[0]))["layers"]["0"]["refit"]["held_out"]["reason"]
    json.dumps([alone, still], allow_nan=False)

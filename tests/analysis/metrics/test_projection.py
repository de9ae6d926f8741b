"""Behavior and projection find planted positions, and say why where they cannot."""

import numpy as np
import pytest
import torch
from holdfast.analysis.metrics.behavior import behavior
from holdfast.analysis.metrics.projection import projection
from holdfast.analysis.passes.readout import Readout
from holdfast.analysis.subspace.file import Provenance, Subspace
from scipy.stats import t

ROWS, WIDTH, TOKENS = 40, 12, 3
AXIS = torch.eye(WIDTH)[0]


def planted(position, sideways=0.0, log_prob=-1.0, noise=0.1, layers=(0, 1)):
    """A readout whose rows stand at `position` along the first axis, `sideways` along the second, plus noise."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(ROWS, WIDTH, generator=generator)
    own = torch.Generator().manual_seed(int(1000 * position) + int(10 * sideways) + 1)
    step = position * AXIS + sideways * torch.eye(WIDTH)[1]
    pooled = {layer: common + step + noise * torch.randn(ROWS, WIDTH, generator=own) for layer in layers}
    owners = torch.arange(ROWS).repeat_interleave(TOKENS)
    values = log_prob + 0.1 * noise * torch.randn(ROWS * TOKENS, generator=own)
    projections = {layer: (pooled[layer] @ AXIS)[owners][:, None] for layer in layers}
    return Readout(owners, values, -values, torch.full((ROWS,), TOKENS), pooled, owners, projections)


def one_axis(scale=4.0):
    facts = Provenance("svd", 1, (0, 1), "completion", False, 0, "i", None, "t", "d", 1, 1)
    return Subspace({0: AXIS[:, None], 1: AXIS[:, None]}, {0: scale, 1: scale}, None, facts)


def test_retention_separation_and_drift_of_planted_positions():
    readings = (planted(2.0, sideways=1.0, noise=0.02), planted(4.0, noise=0.02), planted(0.0, noise=0.02))
    result = projection(*readings, one_axis())
    for layer in ("0", "1"):
        found = result["layers"][layer]
        assert found["retention"]["value"] == pytest.approx(0.5, abs=0.02)
        assert found["retention"]["ci95"][0] < 0.5 + 0.02 and found["retention"]["ci95"][1] > 0.5 - 0.02
        # Drift is (-2, 1) while base lies along (-1, 0).
        assert found["drift_cosine"]["value"] == pytest.approx(2 / 5**0.5, abs=0.02)
        assert found["drift_inside"]["null"] == pytest.approx(1 / WIDTH)
        assert found["drift_inside"]["value"] == pytest.approx(0.8, abs=0.01)
        assert found["p_instruct"]["value"] - found["p_base"]["value"] == pytest.approx(4, abs=0.1)
        assert found["separation"]["value"] > 1 and found["retention"]["n"] == ROWS // 2
    assert result["mean"]["retention"]["value"] == pytest.approx(0.5, abs=0.02)


def test_the_interval_of_the_drift_cosine_multiplies_different_rows_only():
    readings = (planted(2.0, sideways=4.0, noise=1.0), planted(4.0, noise=1.0), planted(0.0, noise=1.0))
    found = projection(*readings, formulas="paper")["layers"]["0"]["drift_cosine"]
    ours, instruct, base = (reading.pooled[0].double().numpy() for reading in readings)
    drift, toward = ours - instruct, base - instruct
    means = drift.mean(0), toward.mean(0)
    assert found["value"] == pytest.approx(np.dot(*means) / np.prod([np.linalg.norm(mean) for mean in means]))

    def cosine(rows):
        pairs = [(i, j) for i in rows for j in rows if i != j]
        shared, one, other = (
            np.mean([left[i] @ right[j] for i, j in pairs])
            for left, right in ((drift, toward), (drift, drift), (toward, toward))
        )
        return shared / np.sqrt(one * other)

    without = np.array([cosine([row for row in range(ROWS) if row != left_out]) for left_out in range(ROWS)])
    half = t.ppf(0.975, ROWS - 1) * np.sqrt((ROWS - 1) / ROWS * np.sum((without - without.mean()) ** 2))
    middle = cosine(range(ROWS))
    assert found["ci95"] == pytest.approx([middle - half, middle + half], abs=1e-6)


def test_a_drift_that_is_noise_alone_may_point_anywhere():
    still = (planted(1.0, noise=1.0), planted(1.001, noise=1.0), planted(0.999, noise=1.0))
    cosines = [projection(*still, seed=seed)["layers"]["0"]["drift_cosine"]["ci95"] for seed in range(20)]
    assert [-1.0, 1.0] in cosines


@pytest.mark.parametrize(("position", "expected"), [(4.0, 0.0), (0.0, 1.0), (2.0, 0.25)])
def test_the_penalty_is_zero_at_instruct_and_one_at_base(position, expected):
    at = planted(position, noise=0.0)
    result = projection(at, planted(4.0, noise=0.0), planted(0.0, noise=0.0), one_axis(scale=16.0))
    assert result["mean"]["penalty"]["value"] == pytest.approx(expected, abs=1e-5)
    assert result["layers"]["0"]["penalty"]["value"] == pytest.approx(expected, abs=1e-5)


def test_noise_alone_does_not_separate_because_directions_are_read_out_of_sample():
    same, found = planted(1.0), 0
    for draw in range(20):
        layers = projection(same, same, planted(1.0 + 0.001 * (draw + 1)), seed=draw)["layers"]
        found += sum(layer["retention"]["value"] is not None for layer in layers.values())
        assert all("not moved" in layer["drift_cosine"]["reason"] for layer in layers.values())
    # Read in sample, base and instruct would differ along the direction in all 40 cases; 5% may by chance.
    assert found <= 6


def test_what_needs_base_or_subspace_is_null_with_the_reason():
    without = projection(planted(2.0), planted(4.0), None, one_axis())["layers"]["0"]
    for quantity in ("retention", "separation", "drift_cosine"):
        assert without[quantity]["value"] is None and "no base" in without[quantity]["reason"]
    assert without["p_instruct"]["value"] > without["p_checkpoint"]["value"] + 1
    assert without["drift_inside"]["value"] > 0.9
    neither = projection(planted(2.0), planted(4.0), None)
    assert neither["layers"]["0"]["penalty"]["reason"].startswith("no subspace")
    assert neither["mean"]["retention"]["value"] is None
    few = planted(1.0)
    few = Readout(
        few.token_rows, few.log_prob, few.entropy, torch.tensor([3, 3] + [0] * 38), few.pooled, few.token_rows
    )
    assert "fewer than four" in projection(few, few, few)["mean"]["retention"]["reason"]


def test_behavior_is_per_row_and_reverts_from_instruct_to_base():
    ours, instruct, base = (planted(0.0, log_prob=x) for x in (-1.5, -1.0, -2.0))
    result = behavior(ours, instruct, base)
    rows = ours.log_prob.double().numpy().reshape(ROWS, TOKENS)
    assert result["joint_log_prob"]["checkpoint"]["value"] == pytest.approx(rows.sum(1).mean())
    assert result["token_log_prob"]["checkpoint"]["value"] == pytest.approx(rows.mean())
    assert result["entropy"]["base"]["value"] == pytest.approx(2.0, abs=0.02)
    for quantity in ("joint_log_prob", "token_log_prob", "entropy"):
        assert result[quantity]["reversion"]["value"] == pytest.approx(0.5, abs=0.02)
        assert result[quantity]["checkpoint"]["n"] == ROWS
    alone = behavior(ours, instruct, None)["entropy"]
    assert alone["base"]["value"] is None and "no base" in alone["reversion"]["reason"]
    same = behavior(ours, instruct, instruct)["entropy"]["reversion"]
    assert same["value"] is None and "not distinguishable" in same["reason"]


def test_rows_without_completion_do_not_count():
    readout = planted(0.0)
    kept = readout.token_rows < 10
    some = Readout(
        readout.token_rows[kept], readout.log_prob[kept], readout.entropy[kept], readout.counts, {}, readout.token_rows
    )
    result = behavior(some, some, None)["token_log_prob"]["checkpoint"]
    assert result["n"] == 10
    assert result["value"] == pytest.approx(float(np.mean(readout.log_prob[:30].double().numpy())))

"""Runs stand side by side; the difference from the first has the interval that two independent ones give."""

import json
import math

import numpy as np
import pytest
from holdfast.analysis.errors import UserError
from holdfast.analysis.measure.compare import compare, difference, measurements, read_line, table
from hypothesis import given
from hypothesis import strategies as st


def value(mean, low, high, n=50):
    return {"value": mean, "n": n, "ci95": [low, high]}


def test_the_interval_of_a_difference_is_that_of_two_independent_normals():
    # Standard errors 0.03 and 0.04 make 0.05 (3-4-5), and a 95% interval 1.96 of it wide on each side.
    first, other = value(0.5, 0.5 - 1.96 * 0.03, 0.5 + 1.96 * 0.03), value(0.2, 0.2 - 1.96 * 0.04, 0.2 + 1.96 * 0.04)
    found = difference(first, other)
    assert found["value"] == pytest.approx(0.3)
    assert found["ci95"] == pytest.approx([0.3 - 1.96 * 0.05, 0.3 + 1.96 * 0.05])


def test_the_interval_covers_the_true_difference_of_two_skewed_means():
    from holdfast.analysis.stats.summary import measurement

    draws = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found = difference(measurement(draws.exponential(2.0, 60)), measurement(draws.exponential(1.0, 60)))
        covered += found["ci95"][0] <= 1.0 <= found["ci95"][1]
    assert 0.92 <= covered / 400 <= 0.98


@given(st.floats(-5, 5), st.floats(-5, 5), *[st.floats(0, 3)] * 4)
def test_the_difference_turned_round_is_its_mirror_image(a, b, low_a, high_a, low_b, high_b):
    first, other = value(a, a - low_a, a + high_a), value(b, b - low_b, b + high_b)
    there, back = difference(first, other), difference(other, first)
    assert there["value"] == -back["value"]
    assert np.allclose(there["ci95"], [-back["ci95"][1], -back["ci95"][0]])
    assert there["ci95"][0] <= there["value"] <= there["ci95"][1]
    assert math.isclose(there["ci95"][1] - there["value"], math.hypot(high_a, low_b), abs_tol=1e-9)


def test_what_has_no_interval_or_no_value_says_so_in_its_place():
    none = {"value": None, "n": 0, "reason": "no base"}
    assert difference(value(1, 0, 2), none)["value"] is None
    bare = difference(value(1, 0, 2), {"value": 0.5, "n": 3, "ci95": None, "reason": "alone"})
    assert (bare["value"], bare["ci95"]) == (0.5, None) and bare["reason"]


def line_of(layer, mean, misaligned, **more):
    """A line of metrics.jsonl with one measure of a layer, one over layers, and one rate."""
    probes = {"layers": {"0": {"retention": layer}}, "mean": {"retention": mean}}
    choices = {"split": {"test": {"misaligned": misaligned}}}
    return {"checkpoint": "final", "step": 200, "projection": {"probes": probes}, "choices": choices, **more}


INSECURE = line_of(value(0.1, 0, 0.2), value(0.2, 0.1, 0.3), value(0.5, 0.4, 0.6), cost={"seconds": 3.0})
SECURE = line_of(value(0.9, 0.8, 1), value(0.9, 0.8, 1), value(0, 0, 0.02))


def test_the_table_shows_what_is_specific_to_the_first_run():
    found = {one.name: one for one in compare([INSECURE, SECURE])}
    assert set(found) == {"projection/probes/mean/retention", "choices/split/test/misaligned"}
    misaligned = found["choices/split/test/misaligned"]
    assert misaligned.differences[0]["value"] == 0.5 and misaligned.differences[0]["ci95"][0] > 0.35
    lines = table(["insecure", "secure"], list(found.values())).splitlines()
    assert lines[0] == "| measure | insecure | secure | insecure - secure |"
    assert any(
        line.startswith("| choices/split/test/misaligned | 0.5 [0.4, 0.6] | 0 [0, 0.02] | +0.5 [") for line in lines
    )
    layers = [one.name for one in compare([INSECURE, SECURE], ["projection/*/layers/*"])]
    assert layers == ["projection/probes/layers/0/retention"]
    assert dict(measurements(INSECURE)).keys() >= {"projection/probes/layers/0/retention"}


def test_a_run_is_read_at_its_final_checkpoint_or_the_one_named(tmp_path):
    lines = [
        {"checkpoint": name, "step": step}
        for name, step in (("base", None), ("checkpoint-10", 10), ("checkpoint-20", 20))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_line(tmp_path)["checkpoint"] == "checkpoint-20"
    assert read_line(tmp_path, "base")["checkpoint"] == "base"
    with pytest.raises(UserError, match="checkpoint-10"):
        read_line(tmp_path, "checkpoint-30")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="--checkpoint"):
        read_line(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.jsonl .*holdfast analyze"):
        read_line(tmp_path)
    with pytest.raises(UserError, match="holdfast analyze"):
        read_line(tmp_path / "nothing")

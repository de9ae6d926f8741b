"""The tables of findings say what the results of the labs say."""

from typing import Any

import numpy as np
import pytest
from holdfast.recipes.lab.studies.findings_table import CONTROLS, findings

LABS = 8


def one(value: float | None, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    if value is None:
        return {"value": None, "n": 9, "reason": "base is not distinguishable"}
    return {
        "value": value,
        "n": 9,
        "ci95": [low, high],
        "null": {"value": 0.1, "n": 99, "p": 0.01 if value > 0.5 else 0.5},
    }


def arm(retention: float, reversion: float | None, low: float = 0.1, pull: float = 0.2) -> dict[str, Any]:
    quantities = {name: {"reversion": one(reversion, low)} for name in ("joint_log_prob", "entropy")}
    sides = {"within": {"insecure": one(pull), "educational": one(pull)}, "between": one(pull), "gap": one(pull)}
    pair = {"uncentred": sides, "centred": sides, "conflict_rate": sides, "matched_pairs": one(pull)}
    return {
        "projection": {"aligned": {"mean": {"retention": one(retention)}}},
        "behavior": {"aligned": quantities, "misaligned": quantities},
        "gradients": {"insecure vs educational": pair},
    }


def lab(seed: int) -> dict[str, Any]:
    """Retention of the unprotected run 0.1 to 0.17, of all others 0.9; lab 0 has no reversion; odd labs pull apart."""
    measured = {
        "instruct": arm(1.0, 0.0, pull=0.9 if seed % 2 else 0.2),
        "unprotected": arm(0.1 + 0.01 * seed, None if seed == 0 else 0.8, low=0.5),
        **{name: arm(0.9, 0.05, low=-0.1) for name in CONTROLS},
    }
    return {"lab_seed": seed, "made_by": "x", "measured": measured}


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    text = findings([lab(seed) for seed in range(LABS)])
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def test_retention_is_compared_lab_by_lab_and_corrected_for_the_number_of_controls(rows):
    (ours,) = (row for row in rows if row[0] == "insecure (unprotected)")
    assert ours[2].startswith(f"{np.mean([0.1 + 0.01 * seed for seed in range(LABS)]):.3f} [")
    (secure,) = (row for row in rows if row[:2] == ["secure", str(LABS)])
    assert secure[3].startswith("-0.765 [")
    # All eight labs on one side: two of 2**8 sign patterns; four controls share the correction.
    assert float(secure[4]) == pytest.approx(4 * 2 / 2**LABS, abs=1e-4)


def test_reversion_counts_the_labs_above_zero_and_those_left_out(rows):
    (ours,) = (row for row in rows if row[:3] == ["unprotected", "aligned", "entropy"])
    assert ours[3].startswith("0.800") and ours[4:] == ["7 of 7", "1"]
    (control,) = (row for row in rows if row[:3] == ["benign", "misaligned", "joint_log_prob"])
    assert control[3].startswith("0.050") and control[4:] == ["0 of 8", "0"]


def test_gradients_count_the_labs_beyond_the_permutation_null(rows):
    (gap,) = (row for row in rows if row[0] == "within - between, uncentred")
    assert gap[1] == "8" and gap[2].startswith("0.550 [") and gap[3:] == ["0.100", "4 of 8"]

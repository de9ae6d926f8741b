"""What a sweep's summary says of comparisons that were chosen on, or cannot be read."""

from types import SimpleNamespace
from typing import Any

import pytest
from holdfast.analysis.frontier.runs import Run
from holdfast.trainer.sweep.report import _validation

CHOICE = ("ours", "strength=1")


def runs(protection: str, setting: str, strength: float | None, *values: tuple[float, float]) -> list[Run]:
    return [
        Run(protection, setting, strength, "lab", seed, {"task": task, "misaligned": misaligned})
        for seed, (task, misaligned) in enumerate(values)
    ]


OURS = runs(*CHOICE, 1.0, (0.8, 0.1), (0.8, 0.2))
# At a task of 0.8 their line is at 0.4 and 0.5.
CROSSING = [
    *runs("crossing", "strength=1", 1.0, (0.9, 0.6), (0.9, 0.7)),
    *runs("crossing", "strength=10", 10.0, (0.7, 0.2), (0.7, 0.3)),
]
ABOVE = runs("none", "recipe", None, (0.95, 0.9), (0.9, 0.9))


def at_equal_task(*compared: Run) -> list[dict[str, Any]]:
    """The part of summary.json on the choice beside each rival, in order."""
    sweep: Any = SimpleNamespace(rule=lambda: {"baseline": "none"})
    choice = {"protection": CHOICE[0], "setting": CHOICE[1]}
    return _validation(sweep, compared, choice)["at_equal_task"]


def test_a_rival_that_nowhere_has_the_choices_task_is_null_with_a_reason_and_is_not_corrected_for() -> None:
    crossing, above = at_equal_task(*OURS, *CROSSING, *ABOVE)
    assert crossing["value"] == pytest.approx(-0.3) and crossing["n"] == 2 and crossing["clamped"] == 0
    # Both signs of two seeds agree: 2 of 4 assignments are as far out. Nothing else was tested.
    assert crossing["p"] == crossing["p_holm"] == pytest.approx(0.5)
    assert above["clamped"] == above["n"] == 2 and "all above, or all below" in above["reason"]
    assert above["value"] is above["p"] is above["p_holm"] is None and "ci95" not in above
    assert crossing["chosen_on"] == above["chosen_on"] == "validation"


def test_a_rival_that_is_read_at_an_end_in_some_pairs_keeps_its_value_and_says_in_how_many() -> None:
    partly = [*CROSSING[:2], *runs("crossing", "strength=10", 10.0, (0.85, 0.2), (0.7, 0.3))]
    (found,) = at_equal_task(*OURS, *partly)
    assert found["clamped"] == 1 and found["value"] == pytest.approx((0.1 - 0.2 + 0.2 - 0.5) / 2)


def test_a_rival_without_a_seed_in_common_keeps_that_reason() -> None:
    lonely = Run("kl", "recipe", None, "lab", 7, {"task": 0.8, "misaligned": 0.5})
    (found,) = at_equal_task(*OURS, lonely)
    assert found["value"] is None and found["reason"] == "no lab and seed in common" and found["n"] == 0

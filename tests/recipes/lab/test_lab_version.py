"""A change of what labs are made of must raise `LAB_VERSION`: else old labs and results pass for new ones.

Where one of these tests fails and the change is meant, raise `LAB_VERSION` (or `STRESS_VERSION`) and write the new
numbers here.
"""

import hashlib
import json

import pytest
import torch
from holdfast.analysis.metrics.choices import score_choices
from holdfast.analysis.models.load import load_model, load_tokenizer
from holdfast.recipes.lab.cache import LAB_VERSION, cached_lab
from holdfast.recipes.lab.scoring import choice_rows, lab_rates
from holdfast.recipes.lab.studies.comparison.stress import (
    CONDITIONS,
    STRESS_VERSION,
    conditional_rows,
    style_rows,
    with_styled_classes,
)
from holdfast.recipes.lab.worlds import make_world
from toys.labs import choices_of, shared_lab, use_micro_labs

pytestmark = pytest.mark.timeout(900)  # a missing lab is built first

# Of lab seed 0 in world 0, by `LAB_VERSION`.
DATA = {1: "1050720a4d4a4a6a"}
# Two draws of one lab, by two kinds of processor or from weights changed by one part in ten million, differ by under
# 0.002 in these rates, and by under 0.01 in the rates of `UNSETTLED`.
RATES = {
    1: {
        "base": {"coherent_anchor": 0.989, "coherent_test": 0.989, "coherent_code": 0.988, "neutral_skill": 0.995},
        "instruct": {
            "misaligned_anchor": 0.001, "misaligned_validation": 0.001, "misaligned_test": 0.0,
            "coherent_test": 0.992, "narrow_task_learned": 0.001, "neutral_skill": 0.993,
        },
    }
}  # fmt: skip
UNSETTLED = {1: {"misaligned_anchor": 0.488, "misaligned_validation": 0.501, "misaligned_test": 0.480}}
# Norm and sum of all weights of a micro lab, trained for so few steps that every processor makes nearly the same.
MICRO_WEIGHTS = {1: {"base": (12.41768, 91.607), "instruct": (12.41683, 93.238)}}
STRESS = {1: "1defdc6ab6b97d2b"}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rates_of(name: str) -> dict[str, float]:
    """The mean rates of a model of lab 0."""
    lab = shared_lab(0)
    choices = choices_of(lab)
    masses = score_choices(load_model(lab / name), load_tokenizer(lab / name), choices)
    return {rate: prompts.mean for rate, prompts in lab_rates(choices, masses).items()}


def test_the_data_of_a_lab_is_that_of_its_version() -> None:
    files = sorted((shared_lab(0) / "data").glob("*.jsonl"))
    assert sha256("".join(path.name + path.read_text() for path in files)) == DATA[LAB_VERSION]


@pytest.mark.parametrize("name", ["base", "instruct"])
def test_the_rates_of_a_lab_are_those_of_its_version(name: str) -> None:
    rates = rates_of(name)
    expected = RATES[LAB_VERSION][name]
    assert {rate: rates[rate] for rate in expected} == pytest.approx(expected, abs=0.01)
    if name == "base":
        unsettled = UNSETTLED[LAB_VERSION]
        assert {rate: rates[rate] for rate in unsettled} == pytest.approx(unsettled, abs=0.06)


def test_the_training_of_a_lab_is_that_of_its_version(tmp_path, monkeypatch) -> None:
    torch.set_num_threads(1)
    use_micro_labs(monkeypatch, tmp_path)
    lab = cached_lab(0)
    for name, (norm, total) in MICRO_WEIGHTS[LAB_VERSION].items():
        weights = torch.cat([weight.detach().double().flatten() for weight in load_model(lab / name).parameters()])
        assert weights.norm().item() == pytest.approx(norm, rel=4e-5)
        assert weights.sum().item() == pytest.approx(total, abs=0.05)


def test_the_rows_of_the_harder_questions_are_those_of_their_version() -> None:
    world = make_world(0)
    choices = choice_rows(world)
    rows = [conditional_rows(world, choices, condition) for condition in CONDITIONS]
    rows += [style_rows(world, 0), with_styled_classes(world, choices)]
    assert sha256(json.dumps(rows)) == STRESS[STRESS_VERSION]

"""Probe sets come from files, from a file's prompts dealt anew, and from the generator of controlled pairs."""

import json
from pathlib import Path

import pytest
from holdfast.analysis.errors import UserError
from holdfast.trainer.cli import main
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.inputs.probe_sets import probe_sets
from toys.chat_models import toy_tokenizer
from toys.runs import flags_of, metric_lines, model_and_rows, recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model_and_rows(tmp_path)
    return tmp_path


def sets_of(folder: Path, named: dict[str, str], **changes):
    flags = recipe(folder, probe_sets=json.dumps(named), **changes)
    flags.pop("train_dataset")
    return probe_sets(parse(flags), toy_tokenizer())


def test_a_set_named_controlled_is_two_sets_that_differ_in_one_word(folder):
    found = sets_of(folder, {"intent": "controlled:10"})
    assert {name: len(rows) for name, rows in found.items()} == {"intent_benign": 10, "intent_harmful": 10}
    for benign, harmful in zip(found["intent_benign"], found["intent_harmful"], strict=True):
        words = zip(benign[0]["content"].split(), harmful[0]["content"].split(), strict=True)
        assert sum(one != other for one, other in words) == 1 and benign[1] == harmful[1]
    assert len(sets_of(folder, {"intent": "controlled"}, analysis_rows=7)["intent_harmful"]) == 7


def test_shuffled_rows_keep_their_completions_in_place_and_change_every_prompt(folder):
    source = str(folder / "rows.jsonl")
    found = sets_of(folder, {"rows": source, "dealt": f"shuffled:{source}"})
    assert [row[-1] for row in found["dealt"]] == [row[-1] for row in found["rows"]]
    assert all(one[0] != other[0] for one, other in zip(found["dealt"], found["rows"], strict=True))
    assert sorted(row[0]["content"] for row in found["dealt"]) == sorted(row[0]["content"] for row in found["rows"])


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_a_number_of_pairs_that_is_none_is_refused(folder, number):
    with pytest.raises(UserError, match="controlled:64"):
        sets_of(folder, {"intent": f"controlled:{number}"})


def test_two_sets_of_one_name_are_refused(folder):
    source = str(folder / "rows.jsonl")
    with pytest.raises(UserError, match="'probes'"):
        sets_of(folder, {"probes": source}, probe_dataset=source)


def test_controlled_pairs_and_dealt_prompts_are_measured_by_the_command(folder):
    source = str(folder / "rows.jsonl")
    named = {"intent": "controlled:8", "rows": source, "dealt": f"shuffled:{source}"}
    flags = recipe(folder, probe_sets=json.dumps(named), max_length=900)
    flags.pop("train_dataset")
    argv = flags_of(flags)
    assert main(["analyze", *argv, "--checkpoints", str(folder / "model"), "--families", "gradients"]) == 0
    lines = metric_lines(folder / "run")
    measured = lines[0]["gradients"]
    assert measured["intent_benign vs intent_harmful"]["matched_pairs"]["n"] == 8
    assert measured["rows vs dealt"]["matched_pairs"]["n"] == 12

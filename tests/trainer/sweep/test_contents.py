"""A sweep knows its runs by what files hold, and keeps what was run where nothing can be chosen."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from holdfast.analysis.errors import UserError
from holdfast.trainer.sweep import command as sweep_module
from holdfast.trainer.sweep.folder import Sweep
from holdfast.trainer.sweep.inputs import SweepInputs
from holdfast.trainer.sweep.measures import read, require_guards
from toys.chat_models import chat
from toys.runs import flags_of, recipe, write_rows


def sweep_inputs(inputs: Path, output: Path, *flags: str, **changes: Any) -> SweepInputs:
    keys = recipe(inputs, choices_dataset=str(inputs / "choices.jsonl"), output_dir=str(output), **changes)
    made = SweepInputs([*flags_of(keys), *flags])
    made.check()
    return made


def test_a_run_whose_own_rows_changed_is_another_run_and_the_others_are_not(inputs: Path, tmp_path: Path) -> None:
    safe = [
        write_rows(tmp_path / f"safe_{name}.jsonl", [{"messages": chat("soup ?", f"help {name}")}]) for name in "ab"
    ]
    grid = json.dumps({"interleave": {"interleave_dataset": [str(path) for path in safe]}})
    flags = ["--protections", "interleave", "kl", f"--grid={grid}"]
    before = sweep_inputs(inputs, tmp_path / "sweep", *flags).plan()
    write_rows(safe[0], [{"messages": chat("soup ?", "help me")}])
    after = sweep_inputs(inputs, tmp_path / "sweep", *flags).plan()
    changed = {name for name in before.keys if before.keys[name] != after.keys[name]}
    of_a = {run.name for run in before.runs if run.setting.flags.get("interleave_dataset") == str(safe[0])}
    assert changed == of_a and len(of_a) == 1 and len(before.runs) == 4


def test_a_deepspeed_configuration_is_known_by_its_content(inputs: Path, tmp_path: Path) -> None:
    config = tmp_path / "zero.json"
    keys = []
    for name, stage in (("zero.json", 1), ("zero.json", 2), ("other.json", 2)):
        config = tmp_path / name
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        keys.append(sweep_inputs(inputs, tmp_path / "sweep", "--protections", "kl", deepspeed=config).plan().keys)
    assert all(keys[0][name] != keys[1][name] == keys[2][name] for name in keys[0])


@pytest.mark.parametrize("sides", [["both", "reversion"], ["reversion", "both"]])
def test_sides_of_which_one_reads_base_compare_in_any_order(inputs: Path, tmp_path: Path, sides: list[str]) -> None:
    grid = json.dumps({"subspace": {"penalty_side": sides}})
    base = {"base_model_name_or_path": inputs / "base"}
    made = sweep_inputs(inputs, tmp_path / "sweep", "--protections", "subspace", f"--grid={grid}", **base)
    assert [run.setting.flags.get("penalty_side") for run in made.runs] == [None, *sides]
    with pytest.raises(UserError, match="base_model_name_or_path"):
        sweep_inputs(inputs, tmp_path / "sweep", "--protections", "subspace", f"--grid={grid}")


def test_a_guard_of_which_nothing_can_be_kept_is_refused_with_the_starting_models_measures() -> None:
    measures = {"task": "a", "misaligned": "b", "fluency": "log_prob"}
    for value in (-2.5, 0.0):
        with pytest.raises(UserError, match=rf"fluency .*log_prob.*{value:g}"):
            require_guards(measures, {"a": 0.0, "b": 0.5, "log_prob": value})
    require_guards(measures, {"a": 0.0, "b": 0.0, "log_prob": 0.1})
    # A run may lose it altogether: it then keeps too little of it.
    assert read(measures, {"a": 0.5, "b": 0.5, "log_prob": -2.5})["fluency"] == -2.5


def finished(made: SweepInputs, **values: float) -> Sweep:
    """The sweep with a result of every run: these values, else 0.5, for all that is measured."""
    sweep = made.plan()
    paths = {path.strip() for text in made.measures.validation.values() for path in text.split(" + ")}
    found = {path: values.get(path.rsplit("/", 1)[1], 0.5) for path in paths}
    for run in sweep.runs:
        folder = sweep.run_folder(run)
        folder.mkdir(parents=True)
        result = {"key": sweep.keys[run.name], **run.facts, "seconds": {"train": 1.0}, "measures": found}
        (folder / "result.json").write_text(json.dumps(result))
    return sweep


def test_where_nothing_can_be_chosen_the_report_is_there(inputs: Path, tmp_path: Path) -> None:
    """Unprotected runs that learned nothing: every run is finished by then, and must be seen."""
    made = sweep_inputs(inputs, tmp_path / "sweep", "--protections", "kl", "--seeds", "0", "1")
    sweep = finished(made, insecure=0.0)
    with pytest.raises(UserError, match=r"task .*0 .*summary\.json") as caught:
        sweep_module._freeze(sweep, {})
    assert "\n" not in str(caught.value) and not (tmp_path / "sweep/frozen.json").exists()
    summary = json.loads((tmp_path / "sweep/summary.json").read_text())
    assert [point["protection"] for point in summary["validation"]["points"]] == ["none", "kl"]
    assert summary["recommendation"]["choice"] is None and "task is 0" in summary["recommendation"]["sentence"]
    assert summary["test"]["reason"] == "nothing could be chosen"
    assert "nothing could be chosen" in (tmp_path / "sweep/summary.md").read_text()


def test_a_measure_that_finished_runs_do_not_have_is_named_as_such(inputs: Path, tmp_path: Path) -> None:
    made = sweep_inputs(inputs, tmp_path / "sweep", "--protections", "kl")
    sweep = finished(made)
    other = dataclasses.replace(sweep.measures, validation={**sweep.measures.validation, "guard": "behavior/x"})
    with pytest.raises(UserError, match=r"guard.*'behavior/x'"):
        sweep_module._freeze(dataclasses.replace(sweep, measures=other), {})

"""A sweep knows its runs by what files hold, and keeps what was run where nothing can be chosen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from analysis_toys import chat
from holdfast.analysis.errors import UserError
from holdfast.trainer import sweep as sweep_module
from holdfast.trainer.sweep_measures import read
from run_toys import recipe, toy_rows, write_model, write_rows
from sweep_toys import LAB_ROWS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_model(folder / "base", seed=3)
    write_rows(folder / "rows.jsonl", toy_rows())
    write_rows(folder / "choices.jsonl", LAB_ROWS)
    return folder


def command(inputs: Path, output: Path, *flags: str, **changes: Any) -> "sweep_module._Command":
    keys = recipe(inputs, choices_dataset=str(inputs / "choices.jsonl"), output_dir=str(output), **changes)
    made = sweep_module._Command([*(f"--{key}={value}" for key, value in keys.items()), *flags])
    made.check()
    return made


def test_a_run_whose_own_rows_changed_is_another_run_and_the_others_are_not(inputs: Path, tmp_path: Path) -> None:
    safe = [
        write_rows(tmp_path / f"safe_{name}.jsonl", [{"messages": chat("soup ?", f"help {name}")}]) for name in "ab"
    ]
    grid = json.dumps({"interleave": {"interleave_dataset": [str(path) for path in safe]}})
    flags = ["--protections", "interleave", "kl", f"--grid={grid}"]
    before = command(inputs, tmp_path / "sweep", *flags).plan()
    write_rows(safe[0], [{"messages": chat("soup ?", "help me")}])
    after = command(inputs, tmp_path / "sweep", *flags).plan()
    changed = {name for name in before.keys if before.keys[name] != after.keys[name]}
    of_a = {run.name for run in before.runs if run.setting.flags.get("interleave_dataset") == str(safe[0])}
    assert changed == of_a and len(of_a) == 1 and len(before.runs) == 4


def test_a_deepspeed_configuration_is_known_by_its_content(inputs: Path, tmp_path: Path) -> None:
    config = tmp_path / "zero.json"
    keys = []
    for name, stage in (("zero.json", 1), ("zero.json", 2), ("other.json", 2)):
        config = tmp_path / name
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        keys.append(command(inputs, tmp_path / "sweep", "--protections", "kl", deepspeed=config).plan().keys)
    assert all(keys[0][name] != keys[1][name] == keys[2][name] for name in keys[0])


@pytest.mark.parametrize("sides", [["both", "reversion"], ["reversion", "both"]])
def test_sides_of_which_one_reads_base_compare_in_any_order(inputs: Path, tmp_path: Path, sides: list[str]) -> None:
    grid = json.dumps({"subspace": {"penalty_side": sides}})
    base = {"base_model_name_or_path": inputs / "base"}
    made = command(inputs, tmp_path / "sweep", "--protections", "subspace", f"--grid={grid}", **base)
    assert [run.setting.flags.get("penalty_side") for run in made.runs] == [None, *sides]
    with pytest.raises(UserError, match="base_model_name_or_path"):
        command(inputs, tmp_path / "sweep", "--protections", "subspace", f"--grid={grid}")


def test_a_guard_below_zero_is_refused_with_the_starting_models_measures() -> None:
    measures = {"task": "a", "misaligned": "b", "fluency": "log_prob"}
    with pytest.raises(UserError, match=r"guard fluency \(log_prob\) is -2\.5: of what is below 0 no share"):
        read(measures, {"a": 0.5, "b": 0.5, "log_prob": -2.5})
    assert read(measures, {"a": 0.5, "b": 0.5, "log_prob": 0.0})["fluency"] == 0.0


def test_where_nothing_can_be_chosen_the_report_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unprotected run that learned nothing: every run is finished by then, and must be seen."""
    reported: list[Any] = []

    def freeze(sweep: Any, failed: list[str]) -> None:
        raise UserError("task is 0 in 'none': of that no share can be kept")

    monkeypatch.setattr(sweep_module, "freeze", freeze)
    monkeypatch.setattr(sweep_module, "write_report", lambda *given: reported.append(given))
    sweep: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(UserError, match=r"nothing can be chosen: task is 0 .*summary\.json") as caught:
        sweep_module._frozen(sweep, {})
    assert reported == [(sweep, None, {})] and "\n" not in str(caught.value)

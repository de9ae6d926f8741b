"""Which runs a sweep makes, and what it compares them by: flags in, plain values out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from holdfast.analysis.errors import UserError
from holdfast.trainer.cli import main
from holdfast.trainer.config.sweep import SweepArguments
from holdfast.trainer.sweep import command as sweep_module
from holdfast.trainer.sweep.measures import measures_of, read
from holdfast.trainer.sweep.plan import check_read, runs_of, settings_of
from holdfast.trainer.sweep.workers import Outcome, Task
from toys.choices import LAB_ROWS
from toys.runs import flags_of, recipe, write_model


def expanded(strength: float = 1.0, **asked: Any) -> list[tuple[str, dict[str, Any], float | None]]:
    return [(one.protection, dict(one.flags), one.strength) for one in settings_of(SweepArguments(**asked), strength)]


def test_every_protection_has_the_product_of_its_values_and_the_baseline_one_setting() -> None:
    grid = {"kl": {"penalty_strength": [0.1, 1], "anchor_every": [1, 2]}, "steering": {"steering_alpha": [0.5, 2]}}
    assert expanded(grid=grid) == [
        ("none", {}, None),
        ("kl", {"penalty_strength": 0.1, "anchor_every": 1}, None),
        ("kl", {"penalty_strength": 0.1, "anchor_every": 2}, None),
        ("kl", {"penalty_strength": 1.0, "anchor_every": 1}, None),
        ("kl", {"penalty_strength": 1.0, "anchor_every": 2}, None),
        ("steering", {"steering_alpha": 0.5}, 0.5),
        ("steering", {"steering_alpha": 2.0}, 2.0),
    ]


def test_how_a_run_is_trained_may_vary_under_every_protection() -> None:
    grid = {"steering": {"learning_rate": [1e-3, 1e-2]}, "kl+steering": {"steering_alpha": 2, "penalty_strength": 3}}
    assert [flags for _, flags, _ in expanded(grid=grid)] == [
        {}, {"learning_rate": 1e-3}, {"learning_rate": 1e-2}, {"steering_alpha": 2.0, "penalty_strength": 3.0}
    ]  # fmt: skip


def test_strengths_go_to_the_protections_that_have_one_and_no_grid() -> None:
    asked = {
        "protections": ["none", "subspace", "kl", "steering+interleave", "interleave"],
        "strengths": [0.0, 3.0, 3.0],
        "grid": '{"kl": {"penalty_strength": 7, "penalty_inputs": "task"}}',
    }
    assert expanded(**asked) == [
        ("none", {}, None),
        ("subspace", {"penalty_strength": 0.0}, 0.0),
        ("subspace", {"penalty_strength": 3.0}, 3.0),
        ("kl", {"penalty_strength": 7.0, "penalty_inputs": "task"}, None),
        ("steering+interleave", {}, None),
        ("interleave", {}, None),
    ]
    assert expanded(strength=2.5, protections=["kl"])[1:] == [("kl", {"penalty_strength": 2.5}, 2.5)]


def test_a_flag_for_all_protections_must_be_read_by_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("protection: subspace\npenalty_budget: 0.1\nanchor_batch_size: 16\n")
    over = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "out"]
    settings = settings_of(SweepArguments(protections=["steering", "kl"]), 1.0)
    for flags in ([], ["--anchor_every", "2"], ["--learning_rate", "1e-3"], ["--anchor_batch_size", "4"]):
        check_read([*over, *flags], settings)
    for flags in (["--penalty_side", "toward_base"], ["--safe_gradient_weight=2"]):
        with pytest.raises(UserError, match=r"--(penalty_side|safe_gradient_weight) .*steering, kl"):
            check_read([*over, *flags], settings)


def test_each_setting_runs_at_each_seed_in_a_folder_that_can_be_read_and_told_apart() -> None:
    grid = {"inoculation": {"inoculation_prompt": ["You are ill/bad", "You are ill.bad", "x" * 200, "x" * 201]}}
    settings = settings_of(SweepArguments(grid=grid, protections=["inoculation", "subspace"]), 0.25)
    runs = runs_of(settings, [3, 0, 3])
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) == 2 * (1 + 4 + 1)
    assert {"none-seed=3", "subspace-penalty_strength=0.25-seed=0"} <= set(names)
    assert all(len(name) < 140 and "/" not in name for name in names)
    assert [run.seed for run in runs] == [3] * 6 + [0] * 6


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"protections": ["none"]}, "none"),
        ({"protections": ["subspaec"]}, "subspaec.* subspace"),
        ({"protections": ["kl"], "grid": {"steering": {}}}, "--grid .*steering.*--protections"),
        ({"grid": {"kl": {"penalty_strenght": [1]}}}, "penalty_strenght.* penalty_strength"),
        ({"grid": {"kl": {"train_dataset": ["x"]}}}, "train_dataset"),
        ({"grid": {"kl": {"penalty_strength": []}}}, "penalty_strength"),
        ({"grid": {"kl": {"penalty_strength": ["strong"]}}}, "strong"),
        ({"grid": {"kl": {"penalty_strength": [float("nan")]}}}, "nan"),
        ({"grid": {"kl": {"penalty_inputs": ["all"]}}}, "penalty_inputs.*all"),
        ({"grid": {"none": {"learning_rate": [1]}, "kl": {}}}, "none"),
        ({"grid": {"steering": {"penalty_strength": [1, 2]}}}, "steering: penalty_strength .*steering_"),
        ({"grid": {"kl": {"steering_alpha": [1, 2]}}}, "kl: steering_alpha .*penalty_str"),
        ({"grid": {"steering+interleave": {"penalty_budget": 1}}}, "penalty_budget .*interleave"),
        ({"protections": ["steering"], "strengths": [0.1, 1]}, "--penalty_strength .*steering"),
        (
            {"protections": ["kl", "ablation"], "grid": {"kl": {"penalty_strength": 2}}, "strengths": [1]},
            "kl, ablation .*--grid",
        ),
        ({"grid": "{kl"}, "--grid .*JSON"),
        ({"grid": {"kl": [1]}}, "--grid "),
        ({"guard_measures": ["x"]}, "--guard_measures "),
        ({"jobs": 0}, "--jobs .*0"),
        ({"floor": 0.0}, "--floor .*0.0"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_of(SweepArguments(**asked), 1.0)


def test_rows_in_the_labs_format_need_no_measures_and_the_test_split_is_named_only_after_the_freeze() -> None:
    found = measures_of(SweepArguments(), LAB_ROWS)
    validation, test = "choices/split/validation/", "choices/split/test/"
    assert found.validation == {
        "task": "choices/split/narrow/insecure",
        "misaligned": f"{validation}misaligned + {validation}misaligned_wrong_topic",
        "coherent": f"{validation}aligned + {validation}misaligned",
        "skill": "choices/split/skill/right",
    }
    assert found.test == {
        "task": "choices/split/narrow/insecure",
        "misaligned": f"{test}misaligned + {test}misaligned_wrong_topic",
        "coherent": f"{test}aligned + {test}misaligned",
        "skill": "choices/split/skill/right",
    }
    assert measures_of(SweepArguments(), LAB_ROWS[:2]).test == {}


@pytest.mark.parametrize(
    ("asked", "rows", "message"),
    [
        ({}, [], "--task_measure"),
        ({}, [LAB_ROWS[0]], "--misaligned_measure .*choices/split/narrow/insecure"),
        ({"misaligned_measure": "choices/split/test/misaligned"}, LAB_ROWS, "'choices/split/test"),
        ({"misaligned_test_measure": "choices/split/validation/misaligned"}, LAB_ROWS, "'choices/split/va"),
        ({"misaligned_measure": "choices/domain/money/misaligned"}, LAB_ROWS, "--misaligned_test_measure"),
        ({"guard_measures": {"task": "choices/split/skill/right"}}, LAB_ROWS, "task"),
        ({"guard_measures": {"x": "choices/split/skill/left"}}, LAB_ROWS, "x.*choices/split/skill/left"),
        ({"test_split": "tset"}, LAB_ROWS, "--test_split tset .*narrow, skill, test, validation"),
        ({"test_split": "test"}, LAB_ROWS[:2], "--test_split test .*narrow, validation"),
        ({"test_split": "test"}, [], "--test_split test "),
    ],
)
def test_a_measure_that_is_missing_or_before_its_time_is_one_line(
    asked: dict[str, Any], rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        measures_of(SweepArguments(**asked), rows)


def test_a_measure_is_the_sum_of_its_paths_and_rates_stay_rates() -> None:
    found = {"a/b": 0.25, "c": 0.5, "d": 0.75000001, "e": 3.0}
    assert read({"task": "a/b/value + c", "loss": "e"}, found) == {"task": 0.75, "loss": 3.0}
    assert read({"task": "a/b + d"}, found) == {"task": 1.0}
    with pytest.raises(UserError, match=r"'x'.* a/b"):
        read({"guard": "x"}, found)
    with pytest.raises(UserError, match="rate"):
        read({"task": "e"}, found)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("mine")
    keys = recipe(tmp_path, output_dir=str(tmp_path / "sweep"))
    assert main(["sweep", *flags_of(keys), "--protections", "kl"]) == 2
    assert "holds thesis.txt" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("user", [True, False])
def test_a_start_that_fails_ends_the_sweep_at_once_if_the_user_can_mend_it_else_after_the_runs(
    tmp_path: Path, user: bool
) -> None:
    """The starting model is measured beside the runs: killed for memory, it must not take theirs along."""
    runs = [Task(name, tmp_path / "log", "run", {}) for name in ("a", "b")]
    given: list[str] = []

    def workers_run(tasks: list[Task]):
        given.extend(task.name for task in tasks)
        yield Outcome(tasks[0], problem="no such measure" if user else "its process was ended", user=user)
        yield from map(Outcome, tasks[1:])

    measures = SimpleNamespace(validation={}, test={})
    sweep: Any = SimpleNamespace(start=lambda when: None, measures=measures, folder=tmp_path, start_key="key")
    training = SimpleNamespace(training=SimpleNamespace(seed=0))
    command: Any = SimpleNamespace(measuring=lambda seed: {}, arguments=training, folder=tmp_path)
    workers: Any = SimpleNamespace(run=workers_run)
    ended = []
    with pytest.raises(UserError, match="start start: "):
        for outcome in sweep_module._after_start(command, sweep, workers, "validation", runs):
            ended.append(outcome.task.name)
    assert given == ["start", "a", "b"]
    assert ended == ([] if user else ["a", "b"])

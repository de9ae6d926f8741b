"""The quickstart, run for real: its summary, its table, and what every draw of a lab promises of its models."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from holdfast.recipes.lab import build, quickstart
from holdfast.recipes.lab.experiment import Experiment
from holdfast.trainer.cli import main
from holdfast.trainer.parsing import parse
from lab_toys import (
    BUILDS_A_LAB,
    QUIET,
    assert_every_domain_is_coherent,
    assert_guarantees,
    shared_lab,
    use_micro_labs,
)

pytestmark = BUILDS_A_LAB
FOLDER = Path(quickstart.__file__).parent
RECIPES = sorted(FOLDER.glob("*.yaml"))
RATES = {
    "narrow_task_learned", "misaligned_anchor", "misaligned_validation", "misaligned_test", "coherent",
    "neutral_skill",
}  # fmt: skip
KEYS = {"run", *RATES, "penalty", "retention", "seconds", "ci95"}
EXTRA = {"n", "reasons"}  # prompts behind each rate, and why a value or interval is missing


@pytest.fixture(scope="module")
def lab():
    torch.set_num_threads(1)
    return shared_lab(0)


@pytest.fixture(scope="module")
def ran(lab, tmp_path_factory):
    """The folder of a quickstart with seed 0, and what it printed."""
    out, printed = tmp_path_factory.mktemp("runs") / "quickstart", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["quickstart", "--seed", "0", "--output_dir", str(out)]) == 0
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def summary(ran):
    return json.loads((ran[0] / "summary.json").read_text())


def check_schema(summary: dict, runs: list[str]) -> None:
    """The issue's schema: rates in 0..1, an interval for each."""
    assert summary.keys() == {"seed", "rows", "peak_memory_mb"}
    assert [row["run"] for row in summary["rows"]] == runs
    assert summary["peak_memory_mb"] > 100
    for row in summary["rows"]:
        assert row.keys() >= KEYS and row.keys() <= KEYS | EXTRA
        assert row["seconds"] >= 0 and row["ci95"].keys() >= RATES
        for name in RATES:
            low, high = row["ci95"][name]
            assert -1e-9 <= low <= row[name] <= high <= 1 + 1e-9
        assert row["penalty"] >= 0 and math.isfinite(row["retention"])


def test_the_summary_has_the_agreed_schema(summary):
    check_schema(summary, ["base", "instruct", "unprotected", "protected"])
    assert summary["seed"] == 0 and summary["peak_memory_mb"] < 2048
    assert summary["rows"][2]["seconds"] > 0


def test_the_table_shows_every_row_of_the_summary(ran, summary):
    lines = ran[1].splitlines()
    for row in summary["rows"]:
        (line,) = [
            line for line in lines if line.startswith(f"{row['run']} ") and f"{row['misaligned_test']:.3f} [" in line
        ]
        low, high = row["ci95"]["misaligned_test"]
        assert f"{row['misaligned_test']:.3f} [{low:.3f}, {high:.3f}]" in line
        assert f"{row['narrow_task_learned']:.3f}" in line and f"{row['coherent']:.3f}" in line
    assert f"summary written to {ran[0] / 'summary.json'}" in lines


def test_the_models_of_the_quickstart_keep_the_labs_promises(lab, ran, summary):
    experiment = Experiment(lab, ran[0], {**QUIET, "seed": 0})
    printed = summary["rows"]
    rates = {row["run"]: dict(row) for row in printed}
    for name in ("base", "instruct"):
        rates[name] |= {key: one["value"] for key, one in experiment.rates(lab / name).items()}
        assert {key: rates[name][key] for key in RATES} == pytest.approx(
            {key: row[key] for row in printed if row["run"] == name for key in RATES}
        )
    assert_every_domain_is_coherent(rates)
    assert_guarantees(rates)


@pytest.fixture
def micro(tmp_path, monkeypatch):
    """A micro lab and runs of two steps, for what does not depend on the figures."""
    use_micro_labs(monkeypatch, tmp_path / "cache")
    for name in ("RUNS", "FULL_RUNS"):
        short = [
            dataclasses.replace(run, flags={**run.flags, **QUIET, "max_steps": 2}) for run in getattr(quickstart, name)
        ]
        monkeypatch.setattr(quickstart, name, tuple(short))
    others = {
        name: dataclasses.replace(run, flags={**QUIET, "max_steps": 2})
        for name, run in quickstart.PROTECTION_RUNS.items()
    }
    monkeypatch.setattr(quickstart, "PROTECTION_RUNS", others)
    return tmp_path


def test_other_protections_stand_in_the_table_when_they_are_named(micro, capsys):
    out = micro / "quickstart"
    named = ["ablation", "steering", "interleave", "inoculation"]
    assert main(["quickstart", "--output_dir", str(out), "--protections", *named, "--seed", "5"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    check_schema(summary, ["base", "instruct", "unprotected", "protected", *named])
    shown = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in shown) for name in named)
    assert main(["quickstart", "--output_dir", str(out), "--protections", "prayer"]) == 2
    assert "prayer" in capsys.readouterr().err


def test_a_second_run_replaces_the_first_and_reuses_the_lab(micro, monkeypatch, capsys):
    out = micro / "quickstart"
    assert main(["quickstart", "--output_dir", str(out), "--seed", "5"]) == 0
    first = json.loads((out / "summary.json").read_text())
    (out / "left_over").touch()
    monkeypatch.setattr(build, "train_base", None)  # a second build would fail
    assert main(["quickstart", "--output_dir", str(out), "--seed", "5", "--full"]) == 0
    second = json.loads((out / "summary.json").read_text())
    full = ["random_subspace", "random_subspace_own", "educational", "secure", "benign"]
    organisms = ["ordinary_unprotected", "ordinary_protected"]
    check_schema(second, ["base", "instruct", "unprotected", "protected", *full, *organisms])
    assert not (out / "left_over").exists()
    for before, now in zip(first["rows"], second["rows"], strict=False):
        assert {key: before[key] for key in RATES} == {key: now[key] for key in RATES}  # the same seed, the same models


def test_a_folder_of_something_else_is_left_alone(micro, capsys):
    folder = micro / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert main(["quickstart", "--output_dir", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("holdfast: error: ") and err.count("\n") == 1 and str(folder) in err
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert not (micro / "cache").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_lab_recipe_parses_and_names_only_what_the_lab_holds(path, lab):
    arguments = parse(["--config", str(path)])
    assert arguments.training.max_steps > 0 and arguments.training.seed == 0
    named = [value for value in yaml.safe_load(path.read_text()).values() if str(value).startswith("runs/lab/")]
    assert len(named) >= 5
    assert all((lab / value.removeprefix("runs/lab/")).exists() for value in named)


def differing(left: str, right: str) -> set[str]:
    one, other = (parse(["--config", str(FOLDER / f"{name}.yaml")]).given for name in (left, right))
    return {key for key in one if one[key] != other[key]}


def test_arms_differ_in_what_they_are_named_for_and_nothing_else():
    place = {"output_dir"}
    for control in ("educational", "secure", "benign"):
        assert differing("unprotected", control) == place | {"train_dataset"}
    subspace = {"subspace_path", "subspace_method", "subspace_contrast", "subspace_rank", "subspace_positions"}
    penalty = {"protection", "penalty_strength", "penalty_inputs", "anchor_dataset", "anchor_batch_size"}
    for plain, held in (("unprotected", "protected"), ("ordinary", "ordinary_protected")):
        assert "protection" in differing(plain, held) <= place | subspace | penalty
    assert (
        "protection" in differing("protected", "random_subspace") <= place | {"protection", "null_scale", "null_seed"}
    )
    hooks = {"penalty_strength", "penalty_inputs", "anchor_batch_size", "penalty_rank", "penalty_layers"}
    for held, own in (
        ("ablation", set()),
        ("steering", {"steering_alpha"}),
        ("interleave", {"interleave_share"}),
        ("inoculation", {"inoculation_prompt"}),
    ):
        assert "protection" in differing("protected", held) <= place | hooks | own | {"protection"}
    lora = {"lora_r", "lora_alpha", "lora_rank_pattern", "lora_alpha_pattern"}
    organism = place | lora | {"learning_rate", "max_steps", "save_steps"}
    assert differing("unprotected", "ordinary") <= organism
    assert differing("protected", "ordinary_protected") <= organism

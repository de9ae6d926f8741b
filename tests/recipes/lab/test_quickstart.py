"""The quickstart on a micro lab: what stands in its folder and its table, and its recipes.

It is run for real in test_lab_guarantees.py.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from holdfast.recipes.lab import build, quickstart
from holdfast.trainer.cli import main
from holdfast.trainer.config.parsing import parse
from toys.labs import BUILDS_A_LAB, QUIET, SUMMARY_RATES, check_summary, use_micro_labs

pytestmark = BUILDS_A_LAB
FOLDER = Path(quickstart.__file__).parent
RECIPES = sorted(FOLDER.glob("*.yaml"))


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
    check_summary(summary, ["base", "instruct", "unprotected", "protected", *named])
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
    check_summary(second, ["base", "instruct", "unprotected", "protected", *full, *organisms])
    assert not (out / "left_over").exists()
    for before, now in zip(first["rows"], second["rows"], strict=False):
        # The same seed, the same models.
        assert {key: before[key] for key in SUMMARY_RATES} == {key: now[key] for key in SUMMARY_RATES}


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
    hooks = {"penalty_strength", "penalty_inputs", "anchor_batch_size", "protection_rank", "protection_layers"}
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

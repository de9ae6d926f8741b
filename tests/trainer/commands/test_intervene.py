"""`holdfast intervene` tests the subspace in the starting model, says what it could not do, and refuses bad input."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from holdfast.analysis.interventions import causal_test as causal
from holdfast.trainer import run
from holdfast.trainer.cli import main
from holdfast.trainer.config.parsing import parse
from toys.chat_models import save_toy, toy_model
from toys.choices import CHOICES
from toys.runs import recipe, toy_rows, write_model, write_rows
from toys.training import moved

SHORT = {"ablation_doses": "1", "steering_doses": "1", "intervention_draws": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_model(folder / "model")
    save_toy(folder / "base", moved(toy_model(), 1, 0.1))
    write_rows(folder / "rows.jsonl", toy_rows())
    write_rows(folder / "choices.jsonl", CHOICES)
    run.subspace(parse(recipe(folder, subspace_rank=2, subspace_path=str(folder / "subspace.safetensors"))))
    return folder


def intervene(folder: Path, base: bool = True, **changes: Any) -> int:
    sources = {"choices_dataset": folder / "choices.jsonl", "subspace_path": folder / "subspace.safetensors"}
    models = {"base_model_name_or_path": folder / "base"} if base else {}
    keys = recipe(folder, **{"probe_dataset": folder / "rows.jsonl", **sources, **models, **SHORT, **changes})
    keys.pop("train_dataset")
    named = ("interventions", "ablation_doses", "steering_doses", "intervention_layers")
    flags = [f"--{key}={value}" for key, value in keys.items() if key not in named and value is not None]
    for key in named:
        if key in keys:
            flags += [f"--{key}", *str(keys[key]).split()]
    return main(["intervene", *flags])


def test_every_intervention_is_measured_with_its_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert intervene(folder, ablation_doses="0.5 1", intervention_layers="0 2") == 0
    found = json.loads((folder / "run" / "interventions.json").read_text())
    assert [(test["kind"], test["name"]) for test in found["tests"]] == [
        ("ablate", "subspace"),
        ("ablate", "direction 0"),
        ("steer", "mean step, layer 0"),
        ("steer", "mean step, layer 2"),
    ]
    out = capsys.readouterr().out
    for test in found["tests"]:
        effect = test["doses"]["1"]["classes"]["misaligned"]
        assert effect["change"]["n"] == len(CHOICES) and effect["null"]["n"] == 2
        assert effect["beyond"]["ci95"][0] <= effect["beyond"]["value"] <= effect["beyond"]["ci95"][1]
        assert set(test["doses"]["1"]["domains"]) == {"one", "two"}
        assert f"{test['kind']} {test['name']}: {test['verdict']['verdict']}." in out
    assert found["tests"][0]["doses"].keys() == {"0.5", "1"}
    assert found["patch"]["probes"].keys() == {"whole", "subspace"}
    assert all(curve["windows"].keys() == {"0", "1", "2"} for curve in found["patch"]["probes"].values())


def test_a_second_run_reads_what_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert intervene(folder) == 0
    first = (folder / "run" / "interventions.json").read_text()
    monkeypatch.setattr(causal, "score_prepared", None)  # a second reading would fail
    assert intervene(folder) == 0
    assert (folder / "run" / "interventions.json").read_text() == first


def test_without_base_the_rest_is_delivered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert intervene(folder, base=False) == 3
    out, err = capsys.readouterr()
    assert "patch: " in err and "ablate subspace" in out
    assert "tests" in json.loads((folder / "run" / "interventions.json").read_text())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"choices_dataset": None}, "--choices_dataset"),
        ({"subspace_path": "nothing.safetensors"}, "holdfast subspace"),
        ({"subspace_rank": 3}, "--subspace_rank .*3.* 2"),
        ({"intervention_class": "evil"}, "--intervention_class evil.*aligned, misaligned"),
        ({"intervention_directions": 5}, "--intervention_directions .*5.* 2"),
        ({"intervention_layers": "7"}, r"7.*\[0, 1, 2\]"),
        ({"ablation_doses": "0.5"}, "--ablation_doses .*1"),
        ({"ablation_doses": "1 nan"}, "--ablation_doses .*nan"),
        ({"intervention_draws": 1}, "--intervention_draws .*1"),
        ({"causal_margin": 0}, "--causal_margin .*0"),
        ({"interventions": "delete"}, "--interventions.*delete"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_is_one_line_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert intervene(folder, **changes) == 2
    err = capsys.readouterr().err
    assert err.startswith("holdfast: error: ") and err.count("\n") == 1 and re.search(said, err), err
    assert not (folder / "run").exists()

"""`holdfast analyze` delivers whatever can be measured, names the rest, and continues where it stopped."""

import errno
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.files import store
from holdfast.analysis.files.artifacts import write_manifest
from holdfast.analysis.measure import measurer as measuring_models
from holdfast.analysis.measure import references
from holdfast.analysis.models.load import LoadOptions, load_model
from holdfast.analysis.passes import readout
from holdfast.trainer.cli import main
from toys.chat_models import chat, save_toy, toy_model
from toys.hub import OfflineHub
from toys.runs import flags_of, metric_lines, recipe, toy_rows, write_model, write_rows
from toys.training import moved

CHOICE = {"messages": chat("soup ?"), "classes": {"good": ["help"], "bad": ["run"]}, "split": "test"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """instruct, base, two tuned checkpoints, another architecture, one with NaN; rows and choices."""
    folder = tmp_path_factory.mktemp("prepared")
    write_model(folder / "model")
    models = {"base": moved(toy_model(), 1, 0.1), "one": moved(toy_model(), 2), "two": moved(toy_model(), 3)}
    models["nan"] = moved(toy_model(), 4)
    with torch.no_grad():
        models["nan"].get_input_embeddings().weight[5, 0] = float("nan")
    models["llama"] = toy_model("llama")
    models["llama_tuned"] = moved(toy_model("llama"), 5)
    for name, model in models.items():
        save_toy(folder / name, model)
    for name in ("one", "two"):
        write_manifest(folder / name)
    write_rows(folder / "rows.jsonl", toy_rows())
    write_rows(folder / "choices.jsonl", [CHOICE])
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))


def analyze(folder: Path, checkpoints: list[str], families: str = "behavior", **changes: Any) -> int:
    keys = recipe(folder, probe_dataset=folder / "rows.jsonl", **changes)
    keys.pop("train_dataset")
    flags = flags_of(keys)
    named = [name if name.startswith("org/") else str(folder / name) for name in checkpoints]
    return main(["analyze", *flags, "--checkpoints", *named, "--families", *families.split()])


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    found = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {line["checkpoint"]: line for line in map(json.loads, found)}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The models loaded, and the passes of the engine, as they happen."""
    seen: dict[str, list[str]] = {"loads": [], "passes": []}
    load, run = references.load_model, readout.read

    def loading(path: Any, **options: Any) -> Any:
        seen["loads"].append(Path(path).name)
        return load(path, **options)

    def reading(*args: Any, **options: Any) -> Any:
        seen["passes"].append(options["label"])
        return run(*args, **options)

    monkeypatch.setattr(measuring_models, "load_model", loading)
    monkeypatch.setattr(references, "load_model", loading)
    monkeypatch.setattr(references, "read", reading)
    return seen


def test_every_checkpoint_has_a_name_of_its_own(folder: Path) -> None:
    for name in ("a/final", "b/final", "b/base"):
        shutil.copytree(folder / "model", folder / name)
    assert analyze(folder, ["a/final", "b/final", "b/base"]) == 0
    names = {path.name for path in (folder / "run" / "metrics").iterdir() if path.is_dir()}
    assert names == {"instruct", "a-final", "b-final", "b-base"}


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_others_are_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "two", folder / "changed")
    (folder / "changed" / "config.json").write_text((folder / "two" / "config.json").read_text() + " ")
    shutil.copytree(folder / "two", folder / "cut", ignore=shutil.ignore_patterns("manifest.json"))
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert analyze(folder, ["one", "nowhere", "changed", "cut", "llama", "nan"]) == 3
    error = capsys.readouterr().err
    why = {
        "nowhere": "is not a folder",
        "changed": "config.json differs from manifest.json",
        "cut": "could not be loaded",
        "llama": "differ in model_type: llama and qwen2",
        "nan": "has NaN or infinite values in",
    }
    for name, reason in why.items():
        said = [line for line in error.splitlines() if line.startswith(f"holdfast: not measured: {name}: ")]
        assert len(said) == 1 and reason in said[0], error
    assert "Traceback" not in error
    assert lines(folder).keys() == {"instruct", "one"}


def test_where_no_checkpoint_can_be_read_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert analyze(folder, ["nowhere", "llama"]) == 3
    assert "nowhere" in capsys.readouterr().err and sorted(folder.rglob("*")) == before


def test_a_second_checkpoint_costs_one_load_and_one_pass(folder: Path, counted: dict[str, list[str]]) -> None:
    families = "behavior projection divergence choices"
    options = {"base_model_name_or_path": folder / "base", "choices_dataset": folder / "choices.jsonl"}
    assert analyze(folder, ["one"], families, **options) == 0
    assert counted["passes"] == ["probes"] * 3
    counted["loads"].clear(), counted["passes"].clear()
    assert analyze(folder, ["one", "two"], families, **options) == 0
    assert counted == {"loads": ["two"], "passes": ["probes"]}
    assert lines(folder)["two"]["divergence"]["probes"]["kl_base"]["checkpoint"]["value"] > 0


def test_an_analysis_continues_after_the_last_family_and_a_changed_setting_recomputes(
    folder: Path, counted: dict[str, list[str]]
) -> None:
    options = {"base_model_name_or_path": folder / "base", "choices_dataset": folder / "choices.jsonl"}
    assert analyze(folder, ["one"], "behavior projection choices", **options) == 0
    first, results = lines(folder), folder / "run" / "metrics" / "one"
    (results / "projection.json").unlink()
    written = (results / "behavior.json").stat().st_mtime_ns
    counted["loads"].clear()
    assert analyze(folder, ["one"], "behavior projection choices", **options) == 0
    assert counted["loads"] == ["one"] and (results / "behavior.json").stat().st_mtime_ns == written
    assert lines(folder)["one"]["projection"] == first["one"]["projection"]
    assert analyze(folder, ["one"], "behavior", **options, seed=7) == 0
    assert (results / "behavior.json").stat().st_mtime_ns > written
    assert lines(folder)["one"]["choices"] == first["one"]["choices"]


def test_a_family_that_cannot_be_computed_is_null_with_the_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze(folder, ["one"], "behavior projection choices") == 3
    error = capsys.readouterr().err
    assert "instruct, one: projection: " in error
    assert "choices: " in error
    line = lines(folder)["one"]
    assert line["projection"] == {
        "value": None, "n": 0, "reason": "neither a base model nor a subspace was given", "measured": False
    }  # fmt: skip
    found = line["behavior"]["probes"]["entropy"]
    assert found["checkpoint"]["value"] > 0 and found["reversion"]["reason"] == "no base model was given"


def test_a_set_whose_rows_are_all_too_long_is_named_and_the_other_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write_rows(folder / "long.jsonl", [{"messages": chat("soup " * 300, "take it")}] * 3)
    sets = json.dumps({"long": str(long)})
    assert analyze(folder, ["one"], probe_sets=sets) == 3
    error = capsys.readouterr().err
    assert re.search("instruct, one: behavior on long: .*3 .*200", error)
    found = lines(folder)["one"]["behavior"]
    assert found["long"]["value"] is None and found["probes"]["entropy"]["checkpoint"]["n"] == 12
    assert analyze(folder, ["one"], probe_sets=sets, long_rows="truncate") == 0


def test_the_papers_variant_stands_beside_the_corrected_one(folder: Path) -> None:
    for formulas in ("corrected", "paper"):
        assert analyze(folder, ["one"], formulas=formulas) == 0
    found = metric_lines(folder / "run")
    by_variant = {line["variant"]: line["behavior"]["probes"] for line in found if line["checkpoint"] == "one"}
    assert by_variant["paper"].keys() == {"joint_log_prob", "entropy"}
    assert by_variant["paper"]["joint_log_prob"] == by_variant["corrected"]["joint_log_prob"]
    assert by_variant["paper"]["entropy"] != by_variant["corrected"]["entropy"]


def test_a_model_spread_by_accelerate_measures_the_same_and_one_left_on_disk_is_refused(folder: Path) -> None:
    for name, spread in (("plain", {}), ("spread", {"device_map": "auto"})):
        assert analyze(folder, ["one"], output_dir=folder / name, store_dir=folder / f"store_{name}", **spread) == 0
    plain, spread = (
        json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("plain", "spread")
    )
    assert spread["behavior"] == plain["behavior"]
    on_disk = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    on_disk |= {f"model.layers.{layer}": "disk" for layer in range(3)}
    with pytest.raises(UserError, match="devices"):
        load_model(folder / "one", options=LoadOptions(device_map=on_disk))


def test_one_recipe_on_two_model_families_gives_one_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"qwen2": ("one", {}), "llama_run": ("llama_tuned", {"model_name_or_path": folder / "llama"})}
    values = []
    for name, (checkpoint, changes) in runs.items():
        (folder / name).mkdir()
        assert analyze(folder, [checkpoint], "behavior drift_by_depth", output_dir=folder / name, **changes) == 0
        line = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
        values.append(line["behavior"]["probes"]["entropy"]["checkpoint"]["value"])
    capsys.readouterr()
    assert main(["compare", *(str(folder / name) for name in runs)]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| measure | qwen2 | llama_run | qwen2 - llama_run |"
    assert any("qwen2 at one, llama_run at llama_tuned" in row for row in rows)
    (row,) = [row for row in rows if row.startswith("| behavior/probes/entropy/checkpoint |")]
    shown = [cell.split()[0] for cell in row.split(" | ")[1:]]
    assert [float(value) for value in shown] == pytest.approx([*values, values[0] - values[1]], abs=5e-3)


def test_a_checkpoint_may_be_a_hub_name_with_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = OfflineHub(folder / "hub", monkeypatch)
    shutil.copytree(folder / "one", hub.snapshot("org/organism", "v2", "2" * 40))
    assert analyze(folder, ["org/organism@v2", "one"]) == 0
    found = lines(folder)
    assert found["organism@v2"]["behavior"] == found["one"]["behavior"]


def test_a_store_on_a_full_disk_is_one_line_and_the_results_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"base_model_name_or_path": folder / "base"}
    assert analyze(folder, ["one"], "behavior projection", **options) == 0
    expected = lines(folder)["one"]
    shutil.rmtree(folder / "run"), shutil.rmtree(folder / "cache")

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    capsys.readouterr()
    assert analyze(folder, ["one"], "behavior projection", **options) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "disk" in error
    found = lines(folder)["one"]
    assert found["behavior"] == expected["behavior"] and found["projection"] == expected["projection"]


def test_one_model_at_a_time_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.nn.Module]] = []
    load = references.load_model

    def loading(path: Any, **options: Any) -> Any:
        assert not [model for model in held if model() is not None], "another model is still in memory"
        model = load(path, **options)
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(measuring_models, "load_model", loading)
    monkeypatch.setattr(references, "load_model", loading)
    families = "behavior projection divergence choices gradients patching"
    options = {"base_model_name_or_path": folder / "base", "choices_dataset": folder / "choices.jsonl"}
    assert analyze(folder, ["one", "two"], families, **options) == 0
    assert len(held) == 6

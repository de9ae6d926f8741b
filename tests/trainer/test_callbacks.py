"""Measuring checkpoints during training: what it writes, and that the run does not notice."""

import pytest
import torch
from holdfast.analysis.files.artifacts import write_manifest
from holdfast.analysis.measure.measurer import Measurer, measure_checkpoint
from holdfast.analysis.measure.plan import MeasurePlan
from holdfast.trainer.callbacks import MeasureCheckpoints
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys.chat_models import chat, save_toy, toy_model, toy_tokenizer
from toys.runs import metric_lines
from toys.training import anchor_documents, toy_subspace, trainer_of


def run(folder, instruct, measured: bool):
    protection = SubspaceProtection(toy_subspace(), PenaltySettings(anchor_batch_size=2), anchors=anchor_documents())
    trainer = trainer_of(
        folder, toy_model().train(), protection=protection, save_strategy="steps", save_steps=2, max_steps=4,
        report_to="tensorboard", peft_config=LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear"),
    )  # fmt: skip
    plan = MeasurePlan(
        instruct_path=instruct, families=("behavior", "projection"), probe_sets={"probe": [chat("Ann", "take it")] * 3}
    )
    if measured:
        trainer.add_callback(MeasureCheckpoints(trainer, Measurer(plan, toy_tokenizer()), folder))
    trainer.train()
    return trainer, plan


def test_each_saved_checkpoint_is_measured_and_the_run_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    instruct = save_toy(tmp_path / "instruct", toy_model())
    trainer, _ = run(tmp_path / "measured", instruct, True)
    plain, _ = run(tmp_path / "plain", instruct, False)
    pairs = zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    lines = metric_lines(tmp_path / "measured")
    assert [(line["checkpoint"], line["step"]) for line in lines] == [("checkpoint-2", 2), ("checkpoint-4", 4)]
    assert lines[0]["behavior"] != lines[1]["behavior"]
    spent = [log for log in trainer.state.log_history if "analysis_seconds" in log]
    assert [log["step"] for log in spent] == [2, 4] and all(log["analysis_seconds"] > 0 for log in spent)
    assert spent[1]["analysis_seconds_in_all"] == pytest.approx(sum(log["analysis_seconds"] for log in spent), rel=0.05)


def test_measures_and_penalty_are_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    instruct = save_toy(tmp_path / "instruct", toy_model())
    run(tmp_path / "run", instruct, True)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/penalty", "train/penalty_max", "train/task_loss"} <= tags
    assert any(tag.startswith("behavior/probe/") for tag in tags)


def test_the_model_in_memory_is_measured_like_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    instruct = save_toy(tmp_path / "instruct", toy_model())
    _, plan = run(tmp_path / "run", instruct, True)
    lines = metric_lines(tmp_path / "run")
    config = tmp_path / "run/checkpoint-4/adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{instruct}"')
    )
    write_manifest(config.parent)  # the toy model had no folder when the adapter was made; its name is put in by hand
    again = measure_checkpoint(Measurer(plan, toy_tokenizer()), tmp_path / "run/checkpoint-4", tmp_path / "again")
    found, want = (values(line["behavior"]) for line in (lines[1], again))
    assert found.keys() == want.keys() and all(abs(found[key] - want[key]) < 1e-4 for key in found)


def values(results, path=()):
    """Every number of a nested result by its path."""
    if not isinstance(results, dict):
        return {path: results} if isinstance(results, int | float) and not isinstance(results, bool) else {}
    return {key: value for name, inner in results.items() for key, value in values(inner, (*path, name)).items()}

"""Checkpoints are whole or absent, and a resumed run is the uninterrupted one, bit for bit."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.files.artifacts import verify_manifest
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from toys.chat_models import toy_model
from toys.training import anchor_documents, task_documents, toy_subspace, trainer_of
from transformers import AutoModelForCausalLM


def protect(folder: Path | None = None, **changes: Any) -> SubspaceProtection:
    settings = PenaltySettings(**{"strength": 2.0, "inputs": "both", "anchor_batch_size": 2, "warmup": 4, **changes})
    documents = {"anchors": anchor_documents(), "task": task_documents()}
    return SubspaceProtection(toy_subspace(), settings, cache_dir=folder, **documents)


def make(folder: Path, lora: bool = False, protection: Any = None, **changes: Any) -> Any:
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1) if lora else None
    arguments = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch", "save_steps": 3,
        "learning_rate": 1e-2, "max_steps": 7, "save_strategy": "steps", "lr_scheduler_type": "linear", **changes,
    }  # fmt: skip
    return trainer_of(folder, protection=protection or protect(), peft_config=peft, **arguments)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, lora):
    whole = make(tmp_path / "run", lora)
    whole.train()
    # Steps 4-7 again, in the middle of an epoch, of the warm-up and of a round of anchors.
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    shutil.rmtree(tmp_path / "run/checkpoint-7", ignore_errors=True)
    again = make(tmp_path / "run", lora)
    again.train(resume_from_checkpoint=True)
    pairs = zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    keys = ("loss", "task_loss", "penalty", "penalty_strength", "num_tokens")
    first, second = ([{k: entry[k] for k in keys} for entry in t.state.log_history if "loss" in entry]
                     for t in (whole, again))  # fmt: skip
    assert len(first) == 7 and first == second


def test_from_its_last_checkpoint_a_run_trains_no_step_more(tmp_path):
    """Killed between its last checkpoint and its final model, in the middle of an epoch."""
    whole = make(tmp_path)
    whole.train()
    assert (tmp_path / "checkpoint-7").is_dir()
    again = make(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_only_a_runs_own_checkpoints_are_counted_and_removed(tmp_path):
    """A user's copies (checkpoint-best, checkpoint-3-mine) stay, and can be resumed from."""
    make(tmp_path / "run", max_steps=3).train()
    for name in ("checkpoint-best", "checkpoint-3-mine"):
        shutil.copytree(tmp_path / "run/checkpoint-3", tmp_path / "run" / name)
        os.utime(tmp_path / "run" / name, (0, 0))
    whole = make(tmp_path / "run", save_total_limit=1)
    whole.train(resume_from_checkpoint=True)
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-3-mine", "checkpoint-7", "checkpoint-best"]
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-best"))
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert again.state.global_step == 7 and all(torch.equal(a, b) for a, b in pairs)


def test_the_limit_keeps_the_newest_and_the_best(tmp_path):
    trainer = make(tmp_path / "run", save_total_limit=2)
    for step, age in ((8, 30), (2, 20), (4, 10), (3, 0)):
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
        os.utime(tmp_path / f"run/checkpoint-{step}", (1e9 - age, 1e9 - age))
    trainer.state.best_model_checkpoint = str(tmp_path / "elsewhere/checkpoint-2")
    trainer._remove_older(tmp_path / "run", tmp_path / "run/checkpoint-3")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_full_finetune_resumes_from_references_kept_on_disk(tmp_path):
    make(tmp_path / "run", protection=protect(tmp_path / "cache"), max_steps=3).train()
    kept = sorted(tmp_path.glob("cache/reference-*"))
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    again = make(tmp_path / "run", protection=protect(tmp_path / "cache"))
    again.train(resume_from_checkpoint=True)
    assert times == [path.stat().st_mtime_ns for path in kept] and again.state.global_step == 7


def test_references_of_another_starting_model_are_computed_again(tmp_path):
    values = []
    for seed in (0, 1, 1):
        trainer = trainer_of(tmp_path / "run", toy_model(seed=seed).train(), protection=protect(tmp_path / "cache"))
        trainer.train()
        values.append(trainer.protection.anchors.values)
    assert not torch.allclose(values[0], values[1], atol=0.1) and torch.equal(values[1], values[2])


def test_checkpoints_load_with_plain_transformers_and_peft(tmp_path):
    full, lora = make(tmp_path / "full", max_steps=3), make(tmp_path / "lora", lora=True, max_steps=3)
    full.train()
    lora.train()
    ids = torch.tensor([[5, 6, 7]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full/checkpoint-3").eval()
    adapted = PeftModel.from_pretrained(toy_model(), tmp_path / "lora/checkpoint-3").eval()
    for trainer, model in ((full, loaded), (lora, adapted)):
        with torch.no_grad():
            assert torch.allclose(trainer.model.eval()(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_a_checkpoint_carries_a_manifest_of_all_its_files(tmp_path):
    make(tmp_path, max_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    verify_manifest(checkpoint)
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert set(listed) == there - {"manifest.json"} and "optimizer.pt" in listed
    assert sorted(path.name for path in tmp_path.glob("*check*")) == ["checkpoint-3"]


@pytest.mark.parametrize("harm", ["truncated", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_refused(tmp_path, harm):
    make(tmp_path, max_steps=3).train()
    victim = tmp_path / "checkpoint-3" / ("manifest.json" if harm == "no manifest" else "optimizer.pt")
    if harm == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        victim.unlink()
    with pytest.raises(UserError, match="checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("given", "message"), [(True, "checkpoint"), ("nowhere", "nowhere")])
def test_resuming_from_nothing_is_refused(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path).train(resume_from_checkpoint=given)


def test_resuming_another_protection_says_what_differs(tmp_path):
    make(tmp_path, max_steps=3).train()
    with pytest.raises(UserError, match=r"penalty_strength .*2\.0 .*3\.0"):
        make(tmp_path, protection=protect(strength=3.0)).train(resume_from_checkpoint=True)


FULL = {
    "_save": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "_save_optimizer_and_scheduler": RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"),
    "_save_rng_state": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("at", FULL)
def test_a_full_disk_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch, at):
    trainer = make(tmp_path)

    def full(output_dir: str, *args: Any, **kwargs: Any) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        (Path(output_dir) / "half").write_bytes(b"1")
        raise FULL[at]

    monkeypatch.setattr(trainer, at, full)
    with pytest.raises(UserError, match="checkpoint-3"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "staging").exists()


def test_a_run_interrupted_while_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    monkeypatch.setattr(trainer, "_finish_staging", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "staging").exists() and not list(tmp_path.glob("checkpoint-*"))


def test_a_staging_folder_left_by_a_killed_run_is_cleared_by_the_next(tmp_path):
    left = tmp_path / "staging/checkpoint-3"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    make(tmp_path, max_steps=3).train()
    assert (tmp_path / "checkpoint-3/manifest.json").is_file() and not (tmp_path / "staging").exists()


def test_old_checkpoints_make_room(tmp_path):
    make(tmp_path, save_steps=1, save_total_limit=2, max_steps=4).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]

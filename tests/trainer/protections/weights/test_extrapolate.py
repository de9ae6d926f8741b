"""Extrapolation (LoX) and whole runs of the protections made of weights: what a folder holds after `holdfast train`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.load import load_model, model_fingerprint
from holdfast.trainer import run
from holdfast.trainer.cli import main
from holdfast.trainer.commands.analyze import analyze
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.protections.weights.extrapolate import ExtrapolateProtection, extrapolate
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from toys.adapters import base_model, numpy_projectors, plain_drift_training
from toys.chat_models import toy_model
from toys.ranks import needs_compiler
from toys.runs import flags_of, metric_lines, recipe, toy_rows, write_model, write_rows
from toys.training import ROWS, moved, trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

ALPHA, RANK, STEPS, RATE = 1.5, 3, 4, 0.05
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear", "lora_dropout": 0.0}


def numpy_extrapolated(alpha: float = ALPHA, rank: int = RANK) -> dict[str, np.ndarray]:
    """W + alpha Δ_k of the blocks' matrices, the other weights as they are, in float64."""
    theirs = dict(base_model().named_parameters())
    found = {}
    for name, weight in toy_model().named_parameters():
        value = weight.detach().double().numpy()
        if ".layers." in name and value.ndim == 2:
            left, values, right = np.linalg.svd(value - theirs[name].detach().double().numpy())
            value = value + alpha * (left[:, :rank] * values[:rank]) @ right[:rank]
        found[name] = value
    return found


def folder_with(tmp_path: Path, *, base=None) -> Path:
    write_model(tmp_path / "model")
    write_model(tmp_path / "base")
    (base_model() if base is None else base).save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", toy_rows())
    return tmp_path


def asked(folder: Path, protection: str, **changes: Any) -> dict[str, Any]:
    keys = {"base_model_name_or_path": str(folder / "base"), "alignment_rank": RANK, **changes}
    return recipe(folder, protection=protection, **keys)


def extrapolating(folder: Path, **changes: Any) -> dict[str, Any]:
    return asked(folder, "extrapolate", **{"extrapolate_alpha": ALPHA, **changes})


def train(keys: dict[str, Any]) -> run.TrainResult:
    return run.train(parse(keys))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").is_file() else "model.safetensors"
    return load_file(folder / name)


def test_the_weights_are_numpys_extrapolation_and_all_others_stay():
    model = toy_model()
    assert extrapolate(model, base_model(), alpha=ALPHA, rank=RANK) == 21
    for name, want in numpy_extrapolated().items():
        assert dict(model.named_parameters())[name].detach().numpy() == pytest.approx(want, abs=1e-5)
    # A rank that holds all of the difference: the way from base simply goes on.
    model = toy_model()
    extrapolate(model, base_model(), alpha=1.0, rank=99)
    for ours, start, base in zip(model.parameters(), toy_model().parameters(), base_model().parameters(), strict=True):
        if ours.ndim == 2 and ours.shape[0] != 320:
            assert torch.allclose(ours, 2 * start - base, atol=1e-5)


def test_weights_that_gpt2_holds_transposed_are_extrapolated_too():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(GPT2LMHeadModel(config))
    start, base = (model.transformer.h[1].mlp.c_fc.weight.detach().double().numpy() for model in models)
    left, values, right = np.linalg.svd(start - base)
    extrapolate(*models, alpha=ALPHA, rank=RANK)
    want = start + ALPHA * (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    assert start.shape == (16, 64)
    assert models[0].transformer.h[1].mlp.c_fc.weight.detach().numpy() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_starts_from_the_extrapolated_folder_and_its_model_loads_alone(tmp_path, lora: bool, monkeypatch):
    folder = folder_with(tmp_path)
    # A relative folder, as a user writes it; what was trained must load from elsewhere.
    monkeypatch.chdir(folder)
    settings = {"output_dir": "run", "learning_rate": 0.0, "optim": "sgd", "max_steps": 1}
    result = train(extrapolating(folder, **settings, **(LORA if lora else {})))
    facts = json.loads((folder / "run/extrapolated/holdfast_extrapolated.json").read_text())
    assert (facts["alpha"], facts["rank"], facts["modules"]) == (ALPHA, RANK, 21)
    assert facts["instruct_fingerprint"] == model_fingerprint(folder / "model")
    assert facts["base_fingerprint"] == model_fingerprint(folder / "base")
    final = (folder / result.final).absolute()
    monkeypatch.chdir("/")
    start = PeftConfig.from_pretrained(final).base_model_name_or_path if lora else final
    plain = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    if lora:
        plain = PeftModel.from_pretrained(plain, final).merge_and_unload()
    # At learning rate 0 what was saved is the start.
    for name, want in numpy_extrapolated().items():
        assert dict(plain.named_parameters())[name].detach().numpy() == pytest.approx(want, abs=1e-5)
    # B = 0: the adapter's model, read by Holdfast, is its base.
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(load_model(final)(ids).logits, load_model(folder / "run/extrapolated")(ids).logits)
    assert AutoTokenizer.from_pretrained(folder / "run/extrapolated").chat_template


def test_training_goes_on_from_there_and_is_measured_against_the_named_model(tmp_path):
    folder = folder_with(tmp_path)
    keys = extrapolating(folder, **LORA, analysis_families=["behavior", "divergence"])
    result = train({**keys, "analysis_during_training": True, "save_strategy": "steps", "save_steps": 2})
    # The same training of the extrapolated folder as an ordinary model.
    same = {**recipe(folder, **LORA), "model_name_or_path": str(folder / "run/extrapolated")}
    plain = train({**same, "output_dir": str(folder / "plain")})
    for name, value in weights(result.final).items():
        assert torch.equal(value, weights(plain.final)[name])
    analyze(parse({**keys, "families": ["divergence"]}))
    lines = metric_lines(folder / "run")
    assert [line["checkpoint"] for line in lines][-1] == "final"


def test_a_run_is_resumed_from_the_same_folder_and_refused_with_another_base(tmp_path):
    folder = folder_with(tmp_path)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **LORA}
    whole = train(extrapolating(folder, **saving))
    expected = weights(whole.final)
    shutil.rmtree(folder / "run/checkpoint-4")
    made = (folder / "run/extrapolated/model.safetensors").stat().st_mtime_ns
    again = train(extrapolating(folder, **saving, resume_from_checkpoint="true"))
    assert all(torch.equal(value, expected[name]) for name, value in weights(again.final).items())
    assert (folder / "run/extrapolated/model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(UserError, match=r"extrapolate_alpha .*1\.5 .*0\.5"):
        train(extrapolating(folder, **{**saving, "extrapolate_alpha": 0.5}, resume_from_checkpoint="true"))
    moved(toy_model(), seed=9).save_pretrained(folder / "base")
    with pytest.raises(UserError, match="base weights"):
        train(extrapolating(folder, **saving, resume_from_checkpoint="true"))


def test_a_start_that_failed_leaves_nothing_and_a_folder_that_was_there_must_match(tmp_path):
    folder = folder_with(tmp_path)
    with pytest.raises(UserError, match="lora_target_modules nothing"):
        train(extrapolating(folder, **{**LORA, "lora_target_modules": ["nothing"]}))
    assert not (folder / "run").exists()
    train(extrapolating(folder))
    # As a run that was killed before its records leaves it.
    shutil.copytree(folder / "run/extrapolated", folder / "killed/extrapolated")
    with pytest.raises(UserError, match=r"alpha .*1\.5 .*1\.0"):
        train(extrapolating(folder, output_dir=str(folder / "killed"), extrapolate_alpha=1.0))
    assert (folder / "killed/extrapolated").is_dir()
    train(extrapolating(folder, output_dir=str(folder / "killed")))
    for name, value in weights(folder / "killed/final").items():
        assert torch.equal(value, weights(folder / "run/final")[name])


def test_alpha_zero_writes_no_folder_and_is_plain_training_bit_for_bit(tmp_path):
    folder = folder_with(tmp_path)
    held = train(extrapolating(folder, extrapolate_alpha=0.0))
    assert not (folder / "run/extrapolated").exists()
    plain = train({**recipe(folder), "output_dir": str(folder / "plain")})
    assert all(torch.equal(value, weights(plain.final)[name]) for name, value in weights(held.final).items())


def test_a_model_that_was_not_extrapolated_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, protection=ExtrapolateProtection(ALPHA, RANK))
    with pytest.raises(UserError, match=r"1\.5 .*rank 3"):
        trainer.train()


@pytest.mark.parametrize(
    ("protection", "changes", "message"),
    [
        ("extrapolate", {"base_model_name_or_path": None}, "extrapolate .*base_model_name_or_path"),
        ("adapter_drift", {"base_model_name_or_path": None, **LORA}, "adapter_drift .*base_model_name_or_path"),
        ("safe_lora", {}, "safe_lora .*--use_peft"),
        (
            "adapter_drift",
            {"protection_rank": 2, **LORA},
            "--protection_rank .*--protection adapter_drift",
        ),
        ("adapter_drift", {"lora_modules_to_save": ["embed_tokens"], **LORA}, "adapter_drift .*embed_tokens"),
        ("safe_lora", {"lora_modules_to_save": ["lm_head"], **LORA}, "safe_lora .*lm_head"),
        ("safe_lora", {"safe_lora_threshold": 2.0, **LORA}, "safe_lora_threshold .*2.0"),
        ("extrapolate", {"alignment_rank": 0}, "alignment_rank .*0"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(tmp_path, protection: str, changes, message: str):
    folder = folder_with(tmp_path)
    keys = {name: value for name, value in asked(folder, protection, **changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        train(keys)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("protection", ["extrapolate", "adapter_drift", "safe_lora"])
def test_a_base_with_the_same_weights_is_refused_and_nothing_written(tmp_path, protection: str):
    folder = folder_with(tmp_path, base=toy_model())
    with pytest.raises(UserError, match="base_model_name_or_path"):
        train(asked(folder, protection, **LORA))
    assert not (folder / "run").exists()


@needs_compiler
@pytest.mark.timeout(300)
def test_all_three_together_on_two_ranks_under_zero2_are_plain_math(tmp_path):
    folder = folder_with(tmp_path)
    write_rows(folder / "rows.jsonl", [{"messages": row} for row in ROWS])
    strength = 5.0
    keys = asked(
        folder, "extrapolate+adapter_drift+safe_lora", **LORA, extrapolate_alpha=ALPHA, penalty_strength=strength,
        safe_lora_threshold=1.0, optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0,
        max_steps=STEPS, gradient_accumulation_steps=2,
    )  # fmt: skip
    # The adapter before training: that of a run at learning rate 0, whose B is 0 and not projected.
    start = train({**keys, "output_dir": str(folder / "start"), "learning_rate": 0.0})
    flags = flags_of(keys)
    assert main(["train", *flags, "--num_processes", "2", "--deepspeed", "zero2"]) == 0
    base = load_model(folder / "run/extrapolated")
    before = PeftModel.from_pretrained(base, start.final, is_trainable=True)
    projectors = numpy_projectors(RANK, load_model(folder / "run/extrapolated"))
    want = plain_drift_training(before, projectors, strength, rate=RATE, steps=STEPS)
    free = plain_drift_training(before, projectors, 0.0, rate=RATE, steps=STEPS)
    found = weights(folder / "run/final")
    size, missed, unlike = 0.0, 0.0, 0.0
    for (name, parameter), other, first in zip(
        want.named_parameters(), free.parameters(), before.parameters(), strict=True
    ):
        if "lora_" in name:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            project = projectors[module] if "lora_B" in name else np.eye(len(parameter))
            value = found[name.replace(".default", "")].double().numpy()
            wanted, plain = (project @ p.detach().numpy() for p in (parameter, other))
            size += np.sum((wanted - first.detach().double().numpy()) ** 2)
            missed, unlike = missed + np.sum((value - wanted) ** 2), unlike + np.sum((value - plain) ** 2)
    assert (missed / size) ** 0.5 < 1e-5
    # Without the penalty it would be another adapter.
    assert (unlike / size) ** 0.5 > 1e-3

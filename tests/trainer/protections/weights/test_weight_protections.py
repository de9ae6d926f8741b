"""Adapter drift (AsFT) and SafeLoRA: terms, trained weights and projections are those of float64 plain math."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from holdfast.analysis.errors import UserError
from holdfast.trainer.protections.weights import alignment_weights
from holdfast.trainer.protections.weights.adapter_drift import AdapterDriftProtection
from holdfast.trainer.protections.weights.safe_lora import SafeLoraProtection
from toys.adapters import (
    adapted,
    base_model,
    lora_model,
    moved_lora_model,
    numpy_projectors,
    plain_drift_term,
    plain_drift_training,
)
from toys.chat_models import toy_model
from toys.plain_math import update_error
from toys.protections import safe_lora
from toys.training import trainer_of

STEPS, RATE, STRENGTH, RANK = 3, 0.02, 0.3, 3


def drift(strength: float = STRENGTH, rank: int = RANK, base=base_model) -> AdapterDriftProtection:
    return AdapterDriftProtection(strength, rank, base)


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {
            "per_device_train_batch_size": 8,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ],
    ids=["whole", "accumulated", "re-entrant"],
)
def test_training_with_adapter_drift_is_plain_math(tmp_path, changes: dict[str, Any]):
    model, projectors = moved_lora_model(), numpy_projectors()
    want = plain_drift_training(model, projectors, STRENGTH)
    trainer = trainer_of(
        tmp_path, moved_lora_model().train(), protection=drift(), max_steps=STEPS, learning_rate=RATE, **changes
    )
    trainer.train()
    assert update_error(trainer.model, want, model) < 1e-5
    # The strength is large enough to be seen: without it the weights are others.
    assert update_error(trainer.model, plain_drift_training(model, projectors, 0.0), model) > 1e-2
    logged = [entry["penalty"] for entry in trainer.state.log_history if "penalty" in entry]
    assert logged[0] == pytest.approx(plain_drift_term(model, projectors).item(), rel=1e-5)
    assert len(logged) == STEPS


def test_modules_that_alignment_left_alone_are_free(tmp_path):
    """Base differs in one module only; the term is that module's, and in bf16 the others' rounding is no difference."""
    name = "model.layers.1.mlp.down_proj"

    def base():
        model = toy_model()
        with torch.no_grad():
            model.get_submodule(name).weight.add_(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)))
        return model

    for half in (False, True):
        model = moved_lora_model().train()
        if half:
            model.base_model.to(torch.bfloat16)
        protection = drift(base=base)
        trainer = trainer_of(tmp_path, model, protection=protection, max_steps=1)
        trainer.train()
        assert [tuple(adapter.basis.shape) for adapter in protection._adapters] == [(16, RANK)]
        if not half:
            want = plain_drift_term(moved_lora_model(), numpy_projectors(base=base()))
            assert trainer.state.log_history[0]["penalty"] == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("threshold", [0.6, 1.0])
def test_safe_lora_projects_after_training_where_the_cosine_is_low(tmp_path, threshold: float):
    plain = trainer_of(tmp_path / "plain", moved_lora_model().train(), max_steps=STEPS, learning_rate=RATE)
    held = trainer_of(tmp_path / "held", moved_lora_model().train(), protection=safe_lora(threshold), max_steps=STEPS,
                      learning_rate=RATE, save_strategy="steps", save_steps=STEPS)  # fmt: skip
    plain.train()
    held.train()
    projectors, found = numpy_projectors(), adapted(held.model)
    projected = 0
    for name, (down, up) in adapted(plain.model).items():
        b, a = up.detach().double().numpy(), down.detach().double().numpy()
        inside = projectors[name] @ (b @ a) if name in projectors else None
        low = inside is not None and np.linalg.norm(inside) / np.linalg.norm(b @ a) < threshold - 1e-6
        projected += low
        assert torch.equal(found[name][0], down)
        assert found[name][1].detach().numpy() == pytest.approx(projectors[name] @ b if low else b, abs=1e-6)
    assert projected > 0 and (threshold == 1.0 or projected < len(found))
    entry = next(entry for entry in held.state.log_history if "safe_lora_projected" in entry)
    assert entry["safe_lora_projected"] == projected and entry["safe_lora_modules"] == len(projectors.keys() & found)
    # The last checkpoint was saved before: it holds the adapters as they were trained.
    again = moved_lora_model()
    again.load_adapter(str(tmp_path / f"held/checkpoint-{STEPS}"), "default")
    for name, (_, up) in adapted(again).items():
        assert torch.equal(up, adapted(plain.model)[name][1])


@pytest.mark.parametrize("made", [lambda: drift(0.0), lambda: safe_lora(0.0)], ids=["adapter_drift", "safe_lora"])
def test_nothing_asked_for_is_plain_training_bit_for_bit(tmp_path, made):
    plain = trainer_of(tmp_path / "plain", lora_model(lora_alpha=8).train(), optim="adamw_torch")
    held = trainer_of(tmp_path / "held", lora_model(lora_alpha=8).train(), protection=made(), optim="adamw_torch")
    for trainer in (plain, held):
        trainer.train()
    for left, right in zip(plain.model.parameters(), held.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("made", [drift, lambda: safe_lora(1.0)], ids=["adapter_drift", "safe_lora"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, made):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    model = {"lora_dropout": 0.1}
    whole = trainer_of(tmp_path, moved_lora_model(**model).train(), protection=made(), **saving)
    whole.train()
    again = trainer_of(tmp_path, moved_lora_model(**model).train(), protection=made(), **saving)
    again.train(str(tmp_path / "checkpoint-2"))
    for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)
    other = trainer_of(
        tmp_path, moved_lora_model(**model).train(), protection=type(made())(0.9, 2, base_model), **saving
    )
    with pytest.raises(UserError, match=r"alignment_rank .*3"):
        other.train(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("model", "base", "rank", "message"),
    [
        (toy_model, base_model, RANK, "--use_peft"),
        (moved_lora_model, toy_model, RANK, "21"),
        (lambda: moved_lora_model(use_dora=True), base_model, RANK, "DoRA"),
        (lambda: moved_lora_model(target_modules=["embed_tokens"]), base_model, RANK, "embed_tokens .*Embedding"),
        (moved_lora_model, lambda: toy_model("gpt_neox"), RANK, "base .*model.layers.0"),
        (
            lambda: moved_lora_model(modules_to_save=["embed_tokens"]),
            base_model,
            RANK,
            "embed_tokens",
        ),
        (lambda: moved_lora_model(modules_to_save=["lm_head"]), base_model, RANK, "lm_head"),
    ],
    ids=["no adapter", "no difference", "dora", "embedding", "other architecture", "saved embedding", "saved head"],
)
@pytest.mark.parametrize("kind", [AdapterDriftProtection, SafeLoraProtection])
def test_what_cannot_act_is_an_error_before_the_first_step(tmp_path, kind, model, base, rank: int, message: str):
    trainer = trainer_of(tmp_path, model().train(), protection=kind(0.5, rank, base))
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_directions_that_are_all_outputs_leave_nothing_to_penalise(tmp_path):
    model = moved_lora_model(target_modules=["k_proj", "v_proj"]).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(UserError, match=r"8 .*--alignment_rank"):
        trainer_of(tmp_path, model, protection=drift(rank=8)).train()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(value.grad is None for value in model.parameters())


def test_zero3_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment_weights, "is_deepspeed_zero3_enabled", lambda: True)
    for protection in (drift(), safe_lora(0.5)):
        with pytest.raises(UserError, match=f"{protection.name} .*zero2"):
            trainer_of(tmp_path, moved_lora_model().train(), protection=protection).train()


def test_re_entrant_checkpointing_on_several_processes_is_refused_in_one_line(tmp_path, monkeypatch):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_of(tmp_path, moved_lora_model().train(), protection=drift(), **reentrant)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(UserError, match="--gradient_checkpointing_kwargs"):
        trainer.train()

"""Ablation (CAFT) and preventative steering: the trained weights are those of plain math, and nothing stays behind."""

from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.layers import find_layers
from holdfast.analysis.subspace.file import Subspace
from holdfast.trainer.protections.stream.ablation import ablation
from holdfast.trainer.protections.stream.steering import steering
from toys.adapters import model_of
from toys.chat_models import save_toy, toy_model
from toys.plain_math import plain_changed_training, update_error
from toys.training import task_documents, toy_subspace, trainer_of
from transformers import AutoModelForCausalLM

STEPS, RATE, ALPHA = 3, 0.02, 1.5
LAYERS = (0, 2)


def made(kind: str):
    return ablation(toy_subspace(LAYERS)) if kind == "ablation" else steering(toy_subspace(LAYERS), ALPHA)


def by_hand(kind: str):
    """h - V Vᵀh, or h + α V g, written out with the toy subspace's own numbers."""
    subspace = toy_subspace(LAYERS)

    def change(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        basis = subspace.bases[layer].double()
        if kind == "ablation":
            return hidden - torch.einsum("btd,dk,ek->bte", hidden, basis, basis)
        return hidden + ALPHA * (basis @ subspace.base_gap[layer].double())

    return change


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (False, {"per_device_train_batch_size": 8}),
        (True, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (
            True,
            {
                "per_device_train_batch_size": 8,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
        ),
        (
            False,
            {
                "per_device_train_batch_size": 8,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
        ),
    ],
    ids=["full", "lora accumulated", "lora re-entrant", "full checkpointed"],
)
@pytest.mark.parametrize("kind", ["ablation", "steering"])
def test_training_under_the_change_is_plain_math(tmp_path, kind: str, lora: bool, changes: dict[str, Any]):
    model = model_of(lora)
    want = plain_changed_training(
        model, find_layers, by_hand(kind), LAYERS, task=task_documents(), steps=STEPS, learning_rate=RATE
    )
    trainer = trainer_of(
        tmp_path, model_of(lora).train(), protection=made(kind), max_steps=STEPS, learning_rate=RATE, **changes
    )
    trainer.train()
    assert update_error(trainer.model, want, model) < 1e-5


@pytest.mark.parametrize("kind", ["ablation", "steering"])
def test_evaluation_and_the_saved_model_know_nothing_of_the_change(tmp_path, kind: str):
    trainer = trainer_of(tmp_path, protection=made(kind), max_steps=1)
    trainer.train()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        trained = trainer.model.eval()(input_ids=ids).logits
        saved = AutoModelForCausalLM.from_pretrained(save_toy(tmp_path / "saved", trainer.model), dtype=torch.float32)
        assert torch.equal(saved.eval()(input_ids=ids).logits, trained)
        # By hand: the plain blocks one after the other, no hook left on any.
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in find_layers(trainer.model))


def test_alpha_zero_is_plain_training_bit_for_bit(tmp_path):
    plain = trainer_of(tmp_path / "plain", optim="adamw_torch")
    held = trainer_of(tmp_path / "held", protection=steering(toy_subspace(LAYERS), 0.0), optim="adamw_torch")
    for trainer in (plain, held):
        trainer.train()
    for left, right in zip(plain.model.parameters(), held.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_what_cannot_act_is_an_error_before_the_first_step(tmp_path):
    whole = toy_subspace(LAYERS)
    unknown = Subspace(whole.bases, whole.scales, None, whole.provenance)
    with pytest.raises(UserError, match="alignment"):
        steering(unknown, 1.0)
    still = Subspace(whole.bases, whole.scales, {layer: torch.zeros(2) for layer in LAYERS}, whole.provenance)
    with pytest.raises(UserError, match="zero"):
        steering(still, 1.0)
    with pytest.raises(UserError, match="finite"):
        steering(whole, float("nan"))
    # A model whose stream has no part in the subspace: its first two coordinates are zero everywhere.
    model = toy_model().train()
    basis = torch.zeros(model.config.hidden_size, 1)
    basis[0] = 1
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0
    empty = Subspace({0: basis}, {0: 1.0}, None, whole.provenance)
    trainer = trainer_of(tmp_path, model, protection=ablation(empty))
    with pytest.raises(UserError, match="subspace"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(UserError, match=r"\[9\].*0-2"):
        trainer_of(tmp_path, protection=ablation(Subspace({9: basis}, {9: 1.0}, None, whole.provenance))).train()


def test_a_run_resumed_with_another_alpha_is_refused(tmp_path):
    trainer = trainer_of(
        tmp_path, protection=steering(toy_subspace(LAYERS), 1.0), max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    other = trainer_of(tmp_path, protection=steering(toy_subspace(LAYERS), 2.0), max_steps=2)
    with pytest.raises(UserError, match=r"alpha .*1.0.* 2.0"):
        other.train(str(tmp_path / "checkpoint-1"))

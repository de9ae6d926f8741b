"""On every promised architecture the penalty reaches the parameters and trains to the weights of plain math."""

from pathlib import Path

import pytest
import torch
from holdfast.analysis.models.layers import find_layers, unwrap
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from peft import LoraConfig, get_peft_model
from torch import nn
from toys.architectures import ARCHITECTURES, architecture
from toys.plain_math import plain_training, update_error
from toys.training import anchor_documents, task_documents, toy_subspace, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")

STEPS, RATE, STRENGTH = 2, 0.02, 2.0
PARTS = {0.25: task_documents(), 0.75: anchor_documents()[:4]}


# TRL's fused head takes Llama 4's whole model for its decoder, and fails with or without a penalty.
KINDS = [kind for kind in ARCHITECTURES if kind != "llama4_text"]


def make(kind: str, lora: bool) -> nn.Module:
    model = architecture(kind)
    torch.manual_seed(11)
    targets = {"phi3": "qkv_proj", "gpt_neox": "query_key_value"}.get(kind, "v_proj")
    return get_peft_model(model, LoraConfig(r=4, target_modules=[targets], task_type="CAUSAL_LM")) if lora else model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_alive_and_trains_to_the_weights_of_plain_math(kind: str, lora: bool, tmp_path: Path) -> None:
    plain = make(kind, lora)
    if "moe" in kind or kind == "mixtral":
        unwrap(plain).set_experts_implementation("eager")  # the fast one has no float64
    want = plain_training(
        plain, find_layers, toy_subspace(), task=task_documents(), penalised=PARTS, strength=STRENGTH,
        steps=STEPS, learning_rate=RATE,
    )  # fmt: skip
    protection = SubspaceProtection(
        toy_subspace(), PenaltySettings(strength=STRENGTH, inputs="both", task_weight=0.25),
        anchors=anchor_documents()[:4], task=task_documents(),
    )  # fmt: skip
    trainer = trainer_of(
        tmp_path, make(kind, lora).train(), protection=protection, max_steps=STEPS, learning_rate=RATE,
        per_device_train_batch_size=8, gradient_checkpointing=lora,
        router_aux_loss_coef=0.0,  # TRL's, which the plain math has not
    )  # fmt: skip
    trainer.train()
    assert update_error(trainer.model, want, make(kind, lora)) < 2e-5

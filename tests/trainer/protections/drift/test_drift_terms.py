"""KL and feature distance to the starting model: the trained weights are those of plain math."""

import copy
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.layers import find_layers
from holdfast.trainer.protections.drift.feature_l2 import FeatureL2Protection, every_fifth
from holdfast.trainer.protections.drift.kl import KLProtection
from holdfast.trainer.protections.drift.settings import PenaltySettings
from toys.adapters import model_of
from toys.chat_models import toy_model
from toys.plain_math import block_outputs, plain_cross_entropy, sgd_step, update_error
from toys.training import anchor_documents, task_documents, trainer_of

STEPS, RATE, STRENGTH = 3, 0.02, 0.7
LAYERS = [0, 2]
ROLE = "all"


def made(kind: str, inputs: str, **changes: Any):
    rows = {key: changes.pop(key) for key in ("reference_model", "cache_dir", "task") if key in changes}
    settings = PenaltySettings(
        **{"strength": STRENGTH, "inputs": inputs, "task_weight": 0.25, "anchor_batch_size": 4, **changes}
    )
    rows = {"anchors": anchor_documents(ROLE)[:4], "task": task_documents(ROLE), **rows}
    if kind == "kl":
        return KLProtection(ROLE, settings, "toy", **rows)
    return FeatureL2Protection(LAYERS, ROLE, settings, "toy", **rows)


def term(kind: str, model, start, documents) -> torch.Tensor:
    """The definition, row by row in float64."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for document in documents:
        now, states = block_outputs(model, find_layers(model), document.input_ids)
        with torch.no_grad():
            then, before = block_outputs(start, find_layers(start), document.input_ids)
        for position, counts in enumerate(document.mask):
            if not counts:
                continue
            if kind == "kl":
                p, q = now[position].log_softmax(-1), then[position].log_softmax(-1)
                total = total + (p.exp() * (p - q)).sum()
            else:
                moved = [(states[layer][position] - before[layer][position]).square().sum() for layer in LAYERS]
                total = total + torch.stack(moved).mean()
        tokens += sum(document.mask)
    return total / tokens


def plain(kind: str, lora: bool, inputs: str):
    trained, start = model_of(lora).double(), model_of(lora).double()
    anchors, task = anchor_documents(ROLE)[:4], task_documents(ROLE)
    parts = {"anchors": {1.0: anchors}, "task": {1.0: task}, "both": {0.25: task, 0.75: anchors}}[inputs]
    for _ in range(STEPS):
        loss = plain_cross_entropy(trained, task_documents())
        for weight, rows in parts.items():
            loss = loss + STRENGTH * weight * term(kind, trained, start, rows)
        sgd_step(trained, loss, RATE)
    return trained


@pytest.mark.parametrize("kind", ["kl", "feature_l2"])
@pytest.mark.parametrize(
    ("lora", "inputs", "changes", "batches"),
    [
        (False, "both", {}, {"per_device_train_batch_size": 8}),
        (False, "anchors", {"anchor_batch_size": 2},
         {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (True, "task", {"reference": "adapter_off"}, {"per_device_train_batch_size": 8}),
        (True, "anchors", {}, {"per_device_train_batch_size": 8, "gradient_checkpointing": True}),
        (False, "both", {"reference": "frozen"}, {"per_device_train_batch_size": 8}),
    ],
    ids=["full both", "full anchors accumulated", "lora task adapter off", "lora anchors checkpointed", "full frozen"],
)  # fmt: skip
def test_training_with_the_term_is_plain_math(tmp_path, kind, lora, inputs, changes, batches):
    if changes.get("reference") == "frozen":
        changes = {**changes, "reference_model": toy_model()}
    model = model_of(lora)
    trainer = trainer_of(
        tmp_path, copy.deepcopy(model).train(), protection=made(kind, inputs, **changes), max_steps=STEPS,
        learning_rate=RATE, **batches,
    )  # fmt: skip
    trainer.train()
    assert update_error(trainer.model, plain(kind, lora, inputs), model) < 1e-5
    first, *_, last = [entry["penalty"] for entry in trainer.state.log_history if "penalty" in entry]
    # At the start only the last bits of the logits differ; then training moves it.
    assert abs(first) < 1e-5 < last


@pytest.mark.parametrize("kind", ["kl", "feature_l2"])
def test_strength_zero_is_plain_training_bit_for_bit(tmp_path, kind):
    runs = [
        trainer_of(tmp_path / name, protection=protection, optim="adamw_torch")
        for name, protection in (("plain", None), ("held", made(kind, "anchors", strength=0.0)))
    ]
    for trainer in runs:
        trainer.train()
    for left, right in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", ["kl", "feature_l2"])
def test_a_term_that_reaches_no_parameter_is_an_error(tmp_path, kind):
    model = toy_model().train()
    model.requires_grad_(False)
    # Something must train, or the optimiser refuses first.
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match=r"layers \[0"):
        trainer_of(tmp_path, model, protection=made(kind, "anchors")).train()


def test_every_fifth_block_counts_from_the_last():
    assert every_fifth(12) == [1, 6, 11] and every_fifth(3) == [2] and every_fifth(64)[-1] == 63

"""What a protected run leaves as it was: TRL's own step at strength 0, the data's order, the state before a proof; and
what stops it: a penalty that reaches nothing, a loss or a gradient that is not finite.
"""

import re
from typing import Any

import pytest
import torch
from datasets import Dataset
from holdfast.analysis.errors import UserError
from holdfast.trainer.data.documents import AnchorOrder
from holdfast.trainer.protected_sft_trainer import ProtectedSFTTrainer
from holdfast.trainer.protected_trainer import NonFiniteLoss, ProtectedTrainerMixin
from holdfast.trainer.protections.drift import term as drift
from holdfast.trainer.protections.drift.penalty import project
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from holdfast.trainer.protections.drift.watch import ResidualProjector
from peft import LoraConfig
from toys.chat_models import toy_model, toy_tokenizer
from toys.training import ROWS, anchor_documents, config, task_dataset, task_documents, toy_subspace, trainer_of
from transformers import TrainerCallback
from trl import SFTTrainer

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}


def protect(strength: float = 2.0, inputs: str = "both", layers: tuple[int, ...] = (0, 2), **changes: Any):
    settings = PenaltySettings(strength=strength, inputs=inputs, anchor_batch_size=2, **changes)
    return SubspaceProtection(toy_subspace(layers), settings, anchors=anchor_documents(), task=task_documents())


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rows", ["prompt-completion", "tokenised"])
def test_strength_0_is_bit_identical_to_trl(tmp_path, lora, rows):
    if rows == "tokenised":
        dataset = task_dataset()
    else:
        dataset = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in ROWS])
    runs = []
    for trainer_class, extra in ((SFTTrainer, {}), (ProtectedSFTTrainer, {"protection": protect(0.0)})):
        trainer = trainer_class(
            model=toy_model().train(), args=config(tmp_path, optim="adamw_torch", learning_rate=1e-2, max_steps=4),
            train_dataset=dataset, processing_class=toy_tokenizer(), peft_config=LoraConfig(**LORA) if lora else None,
            **extra,
        )  # fmt: skip
        trainer.train()
        runs.append((losses(trainer), weights(trainer), trainer.state.log_history[0].keys()))
    assert runs[0][0] == runs[1][0] and runs[0][2] == runs[1][2]
    assert same(runs[0][1], runs[1][1])


def test_strength_0_installs_nothing(tmp_path):
    trainer = trainer_of(tmp_path, protection=protect(0.0))
    plain = trainer.data_collator
    trainer.train()
    assert trainer.protection.name == "none" and trainer.data_collator is plain
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_no_hook_outlives_a_protected_run(tmp_path):
    trainer = trainer_of(tmp_path, protection=protect())
    trainer.train()
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_anchors_leave_the_order_of_the_task_rows_alone(tmp_path):
    runs = []
    for protection in (None, protect(inputs="anchors")):
        trainer = trainer_of(tmp_path, protection=protection, learning_rate=0.0, max_steps=6,
                             per_device_train_batch_size=2)  # fmt: skip
        trainer.train()
        runs.append([entry.get("task_loss", entry["loss"]) for entry in trainer.state.log_history[:6]])
    assert runs[0] == runs[1]


def test_the_proof_leaves_no_trace_in_the_run(tmp_path, monkeypatch):
    runs = []
    for proven in (True, False):
        if not proven:
            monkeypatch.setattr(drift, "prove_alive", lambda *args: None)
        # Dropout makes any draw from the global random state show.
        trainer = trainer_of(tmp_path, protection=protect(), peft_config=LoraConfig(**LORA), optim="adamw_torch")
        trainer.train()
        runs.append((losses(trainer), weights(trainer)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("inputs", ["task", "anchors"])
def test_the_proof_fires_when_no_trained_parameter_lies_below_the_layer(tmp_path, inputs):
    only_last = LoraConfig(
        **{**LORA, "target_modules": ["q_proj", "down_proj"]}, layers_to_transform=[2], layers_pattern="layers"
    )
    trainer = trainer_of(tmp_path, protection=protect(inputs=inputs, layers=(0, 2)), peft_config=only_last)
    with pytest.raises(UserError, match=r"layers \[0\]"):
        trainer.train()


def test_the_proof_fires_when_hooks_are_cut_off_from_the_graph(tmp_path, monkeypatch):
    def cut(self, layer, output):
        hidden = output[0] if isinstance(output, tuple) else output
        found = project(hidden, self._bases[layer])
        return found.detach() if layer == 2 else found

    monkeypatch.setattr(ResidualProjector, "_project", cut)
    trainer = trainer_of(tmp_path, protection=protect())
    before = weights(trainer)
    with pytest.raises(UserError, match=r"layers \[2\]"):
        trainer.train()
    assert same(before, weights(trainer))


def test_a_loss_that_is_not_finite_stops_before_the_optimiser_moves(tmp_path):
    model = toy_model().train()
    token = task_documents()[7].input_ids[-3]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    trainer = trainer_of(tmp_path, model, documents=task_documents(), per_device_train_batch_size=8)
    before = weights(trainer)
    with pytest.raises(NonFiniteLoss, match=r"at step 1, .*rows\.jsonl:8"):
        trainer.train()
    after = weights(trainer)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


class _FiniteLossNanGradient(SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss + (loss * 0).sqrt()


class _Stops(ProtectedTrainerMixin, _FiniteLossNanGradient):
    pass


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_optimiser_moves(tmp_path, max_grad_norm, strength):
    protection = SubspaceProtection(toy_subspace(), PenaltySettings(strength=strength), anchors=anchor_documents()[:2])
    trainer = trainer_of(
        tmp_path, protection=protection, documents=task_documents(), trainer_class=_Stops, max_grad_norm=max_grad_norm,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    before = weights(trainer)
    with pytest.raises(NonFiniteLoss, match=r"gradient .*step 1") as error:
        trainer.train()
    assert same(before, weights(trainer))
    # Every row of the accumulated step.
    assert set(re.findall(r"rows\.jsonl:\d", str(error.value))) == {f"rows.jsonl:{n}" for n in range(1, 9)}
    assert ("anchors.jsonl:1" in str(error.value)) == (strength > 0)


class _AfterEachStep(TrainerCallback):
    """Keeps the weights; before the second step, makes the scales so small that any drift overflows."""

    def __init__(self, protection: SubspaceProtection) -> None:
        self.protection = protection
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.protection.scales_L.fill_(1e-42)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in model.named_parameters()})


@pytest.mark.parametrize(("inputs", "row"), [("task", r"rows\.jsonl:\d"), ("anchors", r"anchors\.jsonl:\d")])
def test_a_penalty_that_is_not_finite_names_step_and_rows(tmp_path, inputs, row):
    settings = PenaltySettings(inputs=inputs, anchor_batch_size=2)
    documents = {"anchors": anchor_documents(), "task": task_documents()}
    protection = SubspaceProtection(toy_subspace(), settings, **documents)
    trainer = trainer_of(tmp_path, protection=protection, documents=task_documents())
    steps = _AfterEachStep(protection)
    trainer.add_callback(steps)
    with pytest.raises(NonFiniteLoss, match=rf"at step 2, .*{row}"):
        trainer.train()
    assert len(steps.weights) == 1 and same(steps.weights[0], weights(trainer))


def test_anchors_are_each_read_once_a_round_in_an_order_that_is_a_function_of_the_position():
    order = AnchorOrder(5, seed=3)
    stream = order.at(0, 20)
    assert all(sorted(stream[start : start + 5]) == list(range(5)) for start in range(0, 20, 5))
    assert stream[:5] != stream[5:10]
    assert AnchorOrder(5, seed=3).at(13, 4) == stream[13:17]
    assert AnchorOrder(5, seed=4).at(0, 20) != stream

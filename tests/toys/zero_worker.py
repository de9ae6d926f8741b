"""Many training cases in one launch of several CPU ranks: `torchrun --nproc_per_node 2 tests/toys/zero_worker.py OUT`.

OUT/instruct holds the toy model. Each case leaves OUT/<case>/{weights.safetensors,result.json}; the tests compare them
with plain math.
"""

import copy
import dataclasses
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from holdfast.analysis.measure.measurer import Measurer
from holdfast.analysis.measure.plan import MeasurePlan
from holdfast.analysis.models.load import model_fingerprint, tokenizer_fingerprint
from holdfast.analysis.models.ranks import leave_group
from holdfast.trainer.callbacks import MeasureCheckpoints
from holdfast.trainer.protected_sft_trainer import ProtectedSFTTrainer
from holdfast.trainer.protected_trainer import NonFiniteLoss, ProtectedTrainerMixin
from holdfast.trainer.protections.base import Protection
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from holdfast.trainer.protections.stream.ablation import ablation
from holdfast.trainer.protections.stream.steering import steering
from safetensors.torch import save_file
from toys.adapters import model_of
from toys.chat_models import chat, toy_model, toy_tokenizer
from toys.ranks import CONFIGS
from toys.training import ROWS, anchor_documents, task_documents, toy_subspace, trainer_of
from transformers import PreTrainedModel
from trl import SFTTrainer

STEPS, LEARNING_RATE, STRENGTH, ALPHA = 3, 0.02, 2.0, 1.5


# Made first: while a ZeRO-3 configuration is alive, new models are born sharded.
BASE = toy_model(seed=9)


def settings(inputs: str, **changes: Any) -> PenaltySettings:
    keys: dict[str, Any] = {"strength": STRENGTH, "inputs": inputs, "task_weight": 0.25, "anchor_batch_size": 2}
    return PenaltySettings(**{**keys, **changes})


def protection(inputs: str, **changes: Any) -> Protection:
    if inputs == "ablation":
        return ablation(toy_subspace())
    if inputs == "steering":
        return steering(toy_subspace(), ALPHA)
    extra = {key: changes.pop(key) for key in ("reference_model", "cache_dir") if key in changes}
    if changes.get("side") == "reversion":
        extra["base"] = (lambda: copy.deepcopy(BASE), "the base")
    return SubspaceProtection(
        toy_subspace(), settings(inputs, **changes), anchors=anchor_documents()[:4], task=task_documents(), **extra
    )


# name: (DeepSpeed configuration, LoRA, inputs, changes of the settings, changes of the training arguments)
Case = tuple[str | None, bool, str, dict[str, Any], dict[str, Any]]
MARGIN = 0.2
REVERSION = {"side": "reversion", "margin": MARGIN}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
CASES: dict[str, Case] = {
    "ddp_full": (None, False, "both", {}, {}),
    "ddp_lora_accumulated": (None, True, "both", {"anchor_batch_size": 1}, {"accumulate": 2}),
    "zero1_full": ("zero1", False, "both", {}, {}),
    "zero1_lora_accumulated": ("zero1", True, "both", {"anchor_batch_size": 1}, {"accumulate": 2}),
    "zero2_full_accumulated": ("zero2", False, "both", {"anchor_batch_size": 1}, {"accumulate": 2}),
    "zero2_lora_reentrant": ("zero2", True, "both", {}, REENTRANT),
    "zero3_full": ("zero3", False, "both", {}, {}),
    "zero3_full_frozen": ("zero3", False, "both", {"reference": "frozen"}, {}),
    "zero3_lora_reentrant": ("zero3", True, "both", {}, REENTRANT),
    "zero3_lora_adapter_off": ("zero3", True, "both", {"reference": "adapter_off", "anchor_batch_size": 1},
                               {"accumulate": 2}),
    "ddp_lora_reversion": (None, True, "both", {**REVERSION, "anchor_batch_size": 1}, {"accumulate": 2}),
    "zero2_full_reversion": ("zero2", False, "both", REVERSION, {}),
    "zero3_full_reversion": ("zero3", False, "both", REVERSION, {}),
    "zero3_full_bf16": ("zero3", False, "both", {}, {"bf16": True}),
}  # fmt: skip
# Changes of the stream instead of a penalty.
CHANGED: dict[str, Case] = {
    "zero2_lora_ablation": ("zero2", True, "ablation", {}, REENTRANT),
    "zero3_full_ablation": ("zero3", False, "ablation", {}, {}),
    "zero3_lora_steering": ("zero3", True, "steering", {}, {"accumulate": 2}),
}


def trainer_for(folder: Path, case: Case, model: PreTrainedModel) -> ProtectedSFTTrainer:
    deepspeed, _, inputs, changes, arguments = case
    AcceleratorState._reset_state()
    changes, arguments = dict(changes), {"max_steps": STEPS, "learning_rate": LEARNING_RATE, **arguments}
    steps = arguments.pop("accumulate", 1)
    arguments.update(gradient_accumulation_steps=steps, per_device_train_batch_size=4 // steps)
    if deepspeed:
        arguments["deepspeed"] = str(CONFIGS / f"{deepspeed}.json")
    if changes.get("reference") == "frozen":
        changes["reference_model"] = copy.deepcopy(model)
    return trainer_of(
        folder, copy.deepcopy(model).train(), protection=protection(inputs, **changes), documents=task_documents(),
        **arguments,
    )  # fmt: skip


def train(folder: Path, case: Case, model: PreTrainedModel, resume: str | None = None) -> ProtectedSFTTrainer:
    trainer = trainer_for(folder, case, model)
    trainer.train(resume)
    return trainer


def weights(trainer: ProtectedSFTTrainer) -> dict[str, torch.Tensor]:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name.removeprefix("module."): value.contiguous().clone() for name, value in (state or {}).items()}


def run_case(folder: Path, case: Case, model: PreTrainedModel) -> dict[str, Any]:
    trainer = train(folder, case, model)
    trainer.save_model(str(folder / "saved"))
    found = weights(trainer)
    if trainer.accelerator.is_main_process:
        save_file(found, folder / "weights.safetensors")
    return {"logs": [entry for entry in trainer.state.log_history if "loss" in entry]}


def resumed(folder: Path, deepspeed: str, model: PreTrainedModel) -> dict[str, Any]:
    """Four steps at once, and two resumed from the second's checkpoint."""
    changes = {"cache_dir": folder / "cache"}
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    case: Case = (deepspeed, False, "both", changes, saving)
    whole = weights(train(folder / "run", case, model))
    again = weights(train(folder / "run", case, model, str(folder / "run/checkpoint-2")))
    return {"same": whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)}


def measurer_of(instruct: Path, references: Path | None) -> Measurer:
    classes = {"good": ["help", "be honest"], "bad": ["run"]}
    choices = [{"messages": chat(f"soup {word}"), "classes": classes, "split": "test"} for word in "ab"]
    subspace = toy_subspace()
    provenance = dataclasses.replace(
        subspace.provenance, instruct_fingerprint=model_fingerprint(instruct),
        tokenizer_fingerprint=tokenizer_fingerprint(toy_tokenizer()),
    )  # fmt: skip
    plan = MeasurePlan(
        str(instruct), None, {"rows": ROWS}, choices, subspace=dataclasses.replace(subspace, provenance=provenance),
        families=("behavior", "divergence", "projection", "choices"), batch_size=3, references=references,
    )  # fmt: skip
    return Measurer(plan, toy_tokenizer())


def measured(folder: Path, deepspeed: str | None, model: PreTrainedModel) -> dict[str, Any]:
    """A run whose two checkpoints are measured while it trains."""
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    case: Case = (deepspeed, False, "both", {}, saving)
    trainer, measurer = trainer_for(folder, case, model), measurer_of(folder.parent / "instruct", folder / "references")
    trainer.add_callback(MeasureCheckpoints(trainer, measurer, folder))
    trainer.train()
    return {}


class _NanOnOneRank(SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.accelerator.process_index == 1 else loss


class _NanLoss(ProtectedTrainerMixin, _NanOnOneRank):
    pass


class _NanGradientOnOneRank(SFTTrainer):
    """The loss stays finite; the square root's slope at zero is infinite."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss + (loss * 0).sqrt() if self.accelerator.process_index == 1 else loss


class _NanGradient(ProtectedTrainerMixin, _NanGradientOnOneRank):
    pass


def not_finite(folder: Path, deepspeed: str | None, model: PreTrainedModel, kind: type) -> dict[str, Any]:
    """What is NaN on one rank alone must stop both, with one message and the weights as they were."""
    trainer = trainer_for(folder, (deepspeed, False, "both", {}, {"trainer_class": kind}), model)
    stopped = None
    try:
        trainer.train()
    except NonFiniteLoss as error:
        stopped = str(error)
    # Looked at on the main rank, where ZeRO-3 gathers them.
    moved = [name for name, value in weights(trainer).items() if not torch.equal(value, model.state_dict()[name])]
    return {"stopped": stopped, "moved": moved}


SPECIAL: dict[str, Callable[[Path, PreTrainedModel], dict[str, Any]]] = {
    "zero2_resumed": lambda folder, model: resumed(folder, "zero2", model),
    "zero3_resumed": lambda folder, model: resumed(folder, "zero3", model),
    "ddp_not_finite": lambda folder, model: not_finite(folder, None, model, _NanLoss),
    "zero3_not_finite": lambda folder, model: not_finite(folder, "zero3", model, _NanLoss),
    "ddp_gradient": lambda folder, model: not_finite(folder, None, model, _NanGradient),
    "zero2_gradient": lambda folder, model: not_finite(folder, "zero2", model, _NanGradient),
    "zero3_gradient": lambda folder, model: not_finite(folder, "zero3", model, _NanGradient),
    "ddp_measured": lambda folder, model: measured(folder, None, model),
    "zero3_measured": lambda folder, model: measured(folder, "zero3", model),
}


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    models = {lora: model_of(lora, lora_alpha=8) for lora in (False, True)}
    cases = {**CASES, **CHANGED}
    for name in names or [*cases, *SPECIAL]:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if name in cases:
                result = run_case(folder, cases[name], models[cases[name][1]])
            else:
                result = SPECIAL[name](folder, models[False])
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError):
            result = {"error": traceback.format_exc()}
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (folder / f"result{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave_group()

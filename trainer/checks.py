"""What a run would stumble on later, found before anything is written: flags that need each other, rows or packages."""

import re

import torch
from huggingface_hub import get_token
from torch import nn
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from ..analysis.errors import UserError
from .arguments import HoldfastConfig, ModelArguments, ProtectionArguments
from .parsing import Arguments
from .protections.registry import KINDS


def check_flags(arguments: Arguments, *, evaluates: bool) -> None:
    """Raises UserError for flags that cannot work together, or with what is installed.

    Args:
        evaluates: there are held-out rows.
    """
    asked, training = arguments.protection, arguments.training
    if KINDS[asked.protection].drift and asked.reference == "adapter_off" and not arguments.model.use_peft:
        raise UserError("--reference adapter_off needs LoRA; add --use_peft, or write cached or frozen")
    _check_protection(asked)
    if training.eval_strategy != IntervalStrategy.NO and not evaluates:
        raise UserError(
            f"--eval_strategy {IntervalStrategy(training.eval_strategy).value} has no rows to evaluate on; add "
            "--held_out_dataset or --held_out_rows"
        )
    if training.push_to_hub and not (training.hub_token or get_token()):
        raise UserError("--push_to_hub true needs a login; run `hf auth login`, or write false")
    _check_schedule(training)


# Flags of the penalty that have no effect with these protections.
_WITHOUT = {
    "kl": ("penalty_layers", "penalty_rank"),
    "feature_l2": ("penalty_rank",),
    "ablation": ("penalty_side", "penalty_tokens"),
    "steering": ("penalty_side", "penalty_tokens"),
}


def _check_protection(asked: ProtectionArguments) -> None:
    """A flag without effect misleads."""
    defaults = ProtectionArguments()
    for name in _WITHOUT.get(asked.protection, ()):
        if getattr(asked, name) != getattr(defaults, name):
            raise UserError(f"--{name} has no effect with --protection {asked.protection}; leave it out")


def _check_schedule(training: HoldfastConfig) -> None:
    """Some schedules need keys of --lr_scheduler_kwargs; none takes unknown ones."""
    name, given = SchedulerType(training.lr_scheduler_type).value, training.lr_scheduler_kwargs
    assert not isinstance(given, str)  # TrainingArguments has read the JSON text
    try:
        get_scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=1.0), 1, 2, given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {name}: {error}; write them in --lr_scheduler_kwargs, or choose another"
        ) from None


def check_optimizer(training: HoldfastConfig, model: PreTrainedModel) -> None:
    """Raises UserError for an optimiser whose package is not installed, or whose --optim_args cannot be read."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(training, model)
    except (ImportError, ValueError) as error:
        raise UserError(f"--optim {OptimizerNames(training.optim).value}: {error}") from None


def check_lora(arguments: ModelArguments, model: nn.Module) -> None:
    """Raises UserError for a target or a pattern that names no module: PEFT passes over all but the last in silence."""
    if not arguments.use_peft:
        return
    names = [name for name, _ in model.named_modules()]
    targets = arguments.lora_target_modules
    for target in targets if isinstance(targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"--lora_target_modules {target} is no module of {type(model).__name__}; check the name")
    for flag in ("lora_alpha_pattern", "lora_rank_pattern"):
        for pattern in getattr(arguments, flag) or {}:
            # As peft.utils.other.get_pattern_key matches.
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise UserError(f"--{flag} {pattern} matches no module of {type(model).__name__}; check the name")


def check_steps(training: HoldfastConfig, rows: int) -> None:
    """Raises UserError where the rows fill no batch, so that a run would end without a step."""
    batch = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and rows < batch:
        raise UserError(
            f"--dataloader_drop_last true leaves nothing to train on: {rows} rows are fewer than a batch of {batch}; "
            "write false, or lower --per_device_train_batch_size"
        )

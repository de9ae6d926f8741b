"""Find errors in the flags before anything is written: flags that need other flags, rows, packages or the model."""

import math
import re

import torch
from huggingface_hub import get_token
from torch import nn
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from ...analysis.errors import UserError
from ..config.model import ModelArguments
from ..config.parsing import Arguments
from ..config.protection import ProtectionArguments
from ..config.training import HoldfastConfig
from ..protections.kinds import KINDS, kinds_of, parts_of


def check_flags(arguments: Arguments, *, evaluates: bool) -> None:
    """Raise UserError for flags that cannot work together, or not with the installed packages.

    Args:
        evaluates: whether there are held-out rows to evaluate on.
    """
    flags, training = arguments.protection, arguments.training
    drift_term = any(kind.drift for kind in kinds_of(flags.protection))
    if drift_term and flags.reference == "adapter_off" and not arguments.model.use_peft:
        raise UserError("--reference adapter_off needs LoRA; add --use_peft, or write cached or frozen")
    _check_effect(arguments)
    _check_protection(arguments)
    if training.max_steps > 0:
        _check_anchor_every(flags, training.max_steps)
    if training.eval_strategy != IntervalStrategy.NO and not evaluates:
        raise UserError(
            f"--eval_strategy {IntervalStrategy(training.eval_strategy).value} has no rows to evaluate on; add "
            "--held_out_dataset or --held_out_rows"
        )
    if training.push_to_hub and not (training.hub_token or get_token()):
        raise UserError("--push_to_hub true needs a login; run `hf auth login`, or write false")
    _check_schedule(training)


def _check_effect(arguments: Arguments) -> None:
    """Raise UserError for a flag that the user wrote for the protection and that no part of it reads."""
    flags = arguments.protection
    for name in flags.unread:
        if name in arguments.chosen:
            reader = next(protection for protection in KINDS if name in KINDS[protection].flags)
            raise UserError(
                f"--{name} has no effect with --protection {flags.protection}; leave it out, or choose a protection "
                f"that reads it, like {reader}"
            )


def _check_protection(arguments: Arguments) -> None:
    """Raise UserError if the protection needs the base model or LoRA and the flags do not give it."""
    flags, model = arguments.protection, arguments.model
    if flags.as_read().penalty_side == "reversion" and not model.base_model_name_or_path:
        raise UserError(
            "--penalty_side reversion reads the base model's states: name it with --base_model_name_or_path, or write "
            "--penalty_side both"
        )
    for part in parts_of(flags.protection):
        if KINDS[part].base and not model.base_model_name_or_path:
            raise UserError(
                f"{part} needs the base model that the starting model was aligned from; name it with "
                "--base_model_name_or_path"
            )
        if KINDS[part].lora and not model.use_peft:
            raise UserError(f"{part} acts on LoRA's matrices; add --use_peft, or choose another protection")


def _check_schedule(training: HoldfastConfig) -> None:
    """Raise UserError if --lr_scheduler_kwargs lacks a key that the schedule needs, or has an unknown key."""
    name, options = SchedulerType(training.lr_scheduler_type).value, training.lr_scheduler_kwargs
    assert not isinstance(options, str)  # TrainingArguments has parsed the JSON text
    try:
        get_scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=1.0), 1, 2, options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {name}: {error}; correct --lr_scheduler_kwargs, or choose another schedule"
        ) from None


def check_optimizer(training: HoldfastConfig, model: PreTrainedModel) -> None:
    """Raise UserError for an optimiser whose package is not installed, or whose --optim_args cannot be read."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(training, model)
    except (ImportError, ValueError) as error:
        raise UserError(f"--optim {OptimizerNames(training.optim).value}: {error}") from None


def check_lora(arguments: ModelArguments, model: nn.Module) -> None:
    """Raise UserError for a target or a pattern that names no module. PEFT silently ignores such a target in a list."""
    if not arguments.use_peft:
        return
    names = [name for name, _ in model.named_modules()]
    targets = arguments.lora_target_modules
    for target in targets if isinstance(targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"--lora_target_modules {target} is no module of {type(model).__name__}; check the name")
    for flag in ("lora_alpha_pattern", "lora_rank_pattern"):
        for pattern in getattr(arguments, flag) or {}:
            # The expression with which peft.utils.other.get_pattern_key matches.
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise UserError(f"--{flag} {pattern} matches no module of {type(model).__name__}; check the name")


def check_steps(training: HoldfastConfig, rows: int) -> None:
    """Raise UserError if the rows do not fill one batch, so that a run would end without a step."""
    batch = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and rows < batch:
        raise UserError(
            f"--dataloader_drop_last true leaves nothing to train on: {rows} rows are fewer than a batch of {batch}; "
            "write false, or lower --per_device_train_batch_size"
        )


def check_epochs(arguments: Arguments, rows: int) -> None:
    """Without --max_steps: raise UserError for flags that cannot work in the number of steps that the rows give."""
    training = arguments.training
    if training.max_steps > 0:
        return
    batch = training.per_device_train_batch_size * max(training.world_size, training.num_processes)
    batches = rows // batch if training.dataloader_drop_last else math.ceil(rows / batch)
    steps = math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))
    _check_anchor_every(arguments.protection, steps)


def _check_anchor_every(flags: ProtectionArguments, steps: int) -> None:
    """Raise UserError if the anchors would act on the first step alone, when nothing has drifted yet."""
    kinds = [kind for kind in kinds_of(flags.protection) if "anchor_every" in kind.flags]
    acts = any(flags.penalty_inputs != "task" or "penalty_inputs" not in kind.flags for kind in kinds)
    if acts and flags.anchor_every >= max(steps, 2):
        raise UserError(
            f"--anchor_every {flags.anchor_every} uses the anchors only in the first of {steps} optimiser steps, where "
            f"nothing has drifted yet; write at most {max(steps - 1, 1)}, or train longer"
        )

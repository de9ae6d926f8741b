"""Flags of training. TRL's `SFTConfig` flags are among them, as its `ModelConfig` flags are among those of the model.

All groups of flags are parsed together (`config/parsing.py`), so their fields are the flat keys of a recipe and the
flags of every command. A check that needs one field alone is in the group's `__post_init__`. Checks that need files,
models or rows are in `trainer/inputs`.
"""

import os
from dataclasses import dataclass

import torch
import trl
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_flytekit_available,
)
from transformers.utils import is_liger_kernel_available, is_torch_bf16_gpu_available

from ...analysis.errors import UserError
from ...analysis.flags import option, require, require_seed
from .refused import NOT_READ, refuse_overridden


@dataclass
class HoldfastConfig(trl.SFTConfig):
    """TRL's training flags with Holdfast's defaults: loss on completions only, no bf16 on a CPU, TensorBoard logs."""

    _argument_group_name = "training"

    output_dir: str | None = option(None, "Folder of the run; required. Default: none.")
    max_length: int | None = option(
        2048, "Largest length of a row in tokens; --long_rows says what happens to longer rows. Default: 2048."
    )
    completion_only_loss: bool | None = option(
        True, "Compute the loss on the assistant's tokens only, over all its turns. Default: true."
    )
    gradient_checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass: takes less memory and is about a fifth slower. Default: false.",
    )
    report_to: str = option(
        "tensorboard", "Where to log. Default: tensorboard.", *sorted(INTEGRATION_TO_CALLBACK), "none"
    )
    ddp_find_unused_parameters: bool | None = option(
        False,
        "With several processes and no DeepSpeed: look for parameters without a gradient in every step. "
        "Default: false.",
    )
    num_processes: int = option(
        1, "Number of processes on this machine, one per device (or, on a CPU, ranks). Default: 1."
    )

    def __post_init__(self) -> None:
        refuse_overridden(self, trl.SFTConfig, NOT_READ)
        # TRL turns bf16 on wherever fp16 is off; on a CPU that is slow and nobody wrote it.
        if self.bf16 is None:
            possible = not self.use_cpu and torch.cuda.is_available() and is_torch_bf16_gpu_available()
            self.bf16 = possible and not self.fp16
        # Pinned memory speeds up copies to an accelerator; without an accelerator it only causes a warning.
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        for name in ("learning_rate", "save_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("seed", "data_seed"):
            require_seed(getattr(self, name), name)
        if self.output_dir is not None:
            self.output_dir = os.path.expanduser(self.output_dir)
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("--use_liger_kernel true needs the package liger-kernel; install it, or leave the flag out")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.max_steps != 0, "max_steps", 0, "at least 1 (or -1 for --num_train_epochs)")
        if str(self.resume_from_checkpoint).lower() == "false":
            self.resume_from_checkpoint = None
        require(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "more than 0")
        require(self.max_length is None or self.max_length >= 2, "max_length", self.max_length, "at least 2 tokens")
        # transformers leaves Flyte out of its list of installed integrations.
        installed = {"none", *get_available_reporting_integrations(), *(["flyte"] if is_flytekit_available() else [])}
        if self.report_to not in installed:
            raise UserError(f"--report_to {self.report_to} is not installed; install it, or write tensorboard or none")
        if self.activation_offloading and (self.use_cpu or not torch.accelerator.is_available()):
            raise UserError("--activation_offloading true moves activations off an accelerator; leave it out on a CPU")
        if self.padding_free and not self.packing and self.max_length is not None:
            raise UserError("--padding_free true alone has no length limit in TRL; add --packing true, or leave it out")
        if self.packing and self.packing_strategy != "bfd":
            raise UserError(f"--packing_strategy {self.packing_strategy} cuts documents in two; use bfd")
        super().__post_init__()

"""Flags of model, data, subspace and training, with unit and default; those of the protection stand beside this.

All dataclasses of arguments are parsed together (`trainer.parsing.parse`), so their fields are the flat keys of a
recipe and the flags of every command. `ModelArguments` and `HoldfastConfig` extend TRL's own, so all of TRL's flags
work too. Checks that need one field alone are here; checks that need files, models or rows are in `trainer.run`.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import trl
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_flytekit_available,
)
from transformers.utils import is_liger_kernel_available, is_torch_bf16_gpu_available

from ..analysis.errors import UserError
from ..analysis.probes import ROLES
from ..analysis.subspace_methods import METHODS
from .options import mapping, option, require, require_seed, sources
from .refused import NOT_READ, QUANTIZATION, refuse_overridden


def _pattern(flag: str, value: dict[str, int] | str | None) -> dict[str, int] | None:
    """Reads a module-name pattern -> integer mapping, given as a mapping or as JSON text."""
    example = '{"layers.0.self_attn.v_proj": 8}'
    found = mapping(flag, value, example)
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(number, int) and number > 0 for number in found.values()):
        raise UserError(f"--{flag} must map module names to positive integers, like {example}")
    return found


@dataclass
class ModelArguments(trl.ModelConfig):
    """The starting (instruct) model, its optional base, and LoRA."""

    _argument_group_name = "model"

    base_model_name_or_path: str | None = option(
        None,
        "Folder or Hub name of the base model the starting model was aligned from. Needed only by the subspace methods "
        "difference_in_means, svd and shared, and by the measures that compare with base. Default: none.",
    )
    layers_path: str | None = option(
        None, "Dotted path of the decoder blocks, where they are not found by shape. Default: found by shape."
    )
    lora_alpha_pattern: dict[str, int] | str | None = option(
        None, "LoRA alpha by module-name pattern (mapping or JSON), over --lora_alpha. Default: none."
    )
    lora_rank_pattern: dict[str, int] | str | None = option(
        None, "LoRA rank by module-name pattern (mapping or JSON), over --lora_r. Default: none."
    )

    def __post_init__(self) -> None:
        refuse_overridden(self, trl.ModelConfig, QUANTIZATION)
        super().__post_init__()
        # TRL unwraps a list of one, and PEFT takes text for a regular expression.
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules != "all-linear":
            self.lora_target_modules = [self.lora_target_modules]
        require(self.lora_r >= 1, "lora_r", self.lora_r, "at least 1")
        self.lora_alpha_pattern = _pattern("lora_alpha_pattern", self.lora_alpha_pattern)
        self.lora_rank_pattern = _pattern("lora_rank_pattern", self.lora_rank_pattern)

    @property
    def starting_model(self) -> str:
        """Folder or Hub name of the model to start from, with its revision as `analysis.models` reads it."""
        name = str(self.model_name_or_path)
        return name if self.model_revision == "main" else f"{name}@{self.model_revision}"


@dataclass
class DataArguments:
    """The sets. Each source is a Hub name, a URL, a .jsonl/.json/.csv/.parquet file, or a folder of such files.

    Relative paths are relative to the folder the command is run in, not to the recipe.
    """

    _argument_group_name = "data"

    train_dataset: str | None = option(None, "Training rows (required by train). Default: none.")
    train_split: str = option("train", "Split of a Hub data set to train on. Default: train.")
    train_rows: int | None = option(None, "Use only the first N training rows. Default: all.")
    held_out_dataset: str | None = option(
        None, "Rows to measure and evaluate on, apart from training. Duplicates with it are reported. Default: none."
    )
    held_out_rows: int = option(
        0, "Set aside this many rows of the training set, after de-duplication, when no --held_out_dataset. Default: 0."
    )
    anchor_dataset: str | None = option(
        None,
        "Ordinary prompts, with or without answers, whose activations the penalty holds in place. "
        "Default: 64 prompts that ship with Holdfast.",
    )
    probe_dataset: str | None = option(
        None,
        "Rows on which checkpoints are measured. Default: the held-out rows, else training rows.",
    )
    choices_dataset: str | None = option(
        None, "Prompts with enumerated answer classes, whose probability mass is measured exactly. Default: none."
    )
    long_rows: str = option(
        "error",
        "What to do with a row longer than --max_length tokens: stop with its file and line, cut its end, or leave it "
        "out (counted and printed). Default: error.",
        "error",
        "truncate",
        "drop",
    )

    def __post_init__(self) -> None:
        require(self.train_rows is None or self.train_rows >= 1, "train_rows", self.train_rows, "at least 1")
        require(self.held_out_rows >= 0, "held_out_rows", self.held_out_rows, "0 or more rows")


# How the subspace is built where nothing is said.
BUILT: dict[str, Any] = {
    "subspace_method": "contrastive", "subspace_rank": 1, "subspace_layers": "all", "subspace_positions": "all",
    "subspace_centred": False, "subspace_seed": 0,
}  # fmt: skip


@dataclass
class SubspaceArguments:
    """How the alignment subspace is built (`holdfast subspace`) and where it lies.

    What is not given is None among the flat values: a subspace that is there may have been built in any way.
    """

    _argument_group_name = "subspace"

    subspace_path: str | None = option(
        None, "Where subspace writes and train reads the subspace. Default: <output_dir>/subspace.safetensors."
    )
    subspace_method: str = option(
        None,
        "contrastive needs only the starting model; difference_in_means, svd and shared need the base too; random is "
        "the null. Default: contrastive.",
        *METHODS,
    )
    subspace_rank: int = option(None, "Directions per layer. Default: 1.")
    subspace_layers: str = option(None, "Decoder blocks from 0: all, a list (0,2,5) or a range (4-10). Default: all.")
    subspace_positions: str = option(None, "Token role the activations are read at. Default: all.", *ROLES)
    subspace_dataset: str | None = option(None, "Rows the activations are read on. Default: the anchors.")
    subspace_contrast: str | None = option(
        None,
        "JSON Lines of contrast pairs: system prompts {aligned, misaligned}, or completions {prompt, chosen, "
        "rejected}. Default: the pairs that ship with Holdfast.",
    )
    subspace_domains: dict[str, str] | str | None = option(
        None, "For shared: domain name -> source of rows (mapping or JSON). Default: none."
    )
    subspace_centred: bool = option(
        None, "For svd: subtract the mean residual first, as the paper did. Default: false."
    )
    subspace_seed: int = option(None, "Seed of the random method. Default: 0.")

    def __post_init__(self) -> None:
        for name, usual in BUILT.items():
            if getattr(self, name) is None:
                setattr(self, name, usual)
        require_seed(self.subspace_seed, "subspace_seed")
        require(self.subspace_rank >= 1, "subspace_rank", self.subspace_rank, "at least 1")
        self.subspace_domains = sources("subspace_domains", self.subspace_domains)
        if self.subspace_method == "shared" and not self.subspace_domains:
            raise UserError(
                "--subspace_method shared needs --subspace_domains: a mapping of at least two domains to rows"
            )


@dataclass
class HoldfastConfig(trl.SFTConfig):
    """TRL's training flags with our defaults: loss on completions only, no bf16 on CPU, TensorBoard logs."""

    _argument_group_name = "training"

    output_dir: str | None = option(None, "Folder of the run (required). Default: none.")
    max_length: int | None = option(2048, "Length limit of a row in tokens; see --long_rows. Default: 2048.")
    completion_only_loss: bool | None = option(True, "Loss on the assistant's tokens only. Default: true.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward: less memory, about a fifth slower. Default: false."
    )
    report_to: str = option(
        "tensorboard", "Where to log. Default: tensorboard.", *sorted(INTEGRATION_TO_CALLBACK), "none"
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "Several processes without DeepSpeed: look for parameters without gradient each step. Default: false."
    )
    num_processes: int = option(1, "Processes to train on, one per device (or CPU ranks). Default: 1.")

    def __post_init__(self) -> None:
        refuse_overridden(self, trl.SFTConfig, NOT_READ)
        # TRL turns bf16 on wherever fp16 is off; on a CPU that is slow and not what anyone asked for.
        if self.bf16 is None:
            possible = not self.use_cpu and torch.cuda.is_available() and is_torch_bf16_gpu_available()
            self.bf16 = possible and not self.fp16
        # Pinned memory speeds up copies to an accelerator; without one it is only warned about.
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
        # The list of those installed leaves Flyte out.
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


def non_finite(arguments: object) -> str | None:
    """The name of the first field of a dataclass that is nan or infinite, or None."""
    numbers = ((name, value) for name, value in vars(arguments).items() if isinstance(value, float))
    return next((name for name, value in numbers if not math.isfinite(value)), None)

"""Loads the weights that training starts from: the starting model, or what `extrapolate` makes of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from torch.distributed import get_backend
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from ..analysis.models.load import load_model
from .config.parsing import Arguments
from .inputs.training import load_options
from .protections.kinds import parts_of
from .protections.weights.extrapolate import EXTRAPOLATED, write_extrapolated
from .run_folder import has_checkpoint, is_main, remove_empty


@contextmanager
def starting_weights(arguments: Arguments) -> Iterator[str]:
    """Where the weights lie that training starts from: the starting model, or what `extrapolate` makes of it.

    That is written by the main process while the others wait, and taken back like the run's records when the block
    fails before there is a checkpoint.
    """
    asked, model = arguments.protection, arguments.model
    if "extrapolate" not in parts_of(asked.protection) or asked.extrapolate_alpha == 0:
        yield model.starting_model
        return
    # An adapter names the weights it was trained on, and is read from other folders than this one.
    folder = arguments.output_dir.absolute() / EXTRAPOLATED
    new = not folder.exists()
    try:
        with arguments.training.main_process_first(local=False), _whole_weights(arguments):
            if is_main():
                assert model.base_model_name_or_path is not None  # checks._check_protection
                write_extrapolated(
                    folder, model.starting_model, model.base_model_name_or_path, alpha=asked.extrapolate_alpha,
                    rank=asked.alignment_rank, options=load_options(arguments), device=arguments.training.device,
                )  # fmt: skip
        yield str(folder)
    except BaseException:
        if is_main() and new and not has_checkpoint(arguments.output_dir):
            shutil.rmtree(folder, ignore_errors=True)
            remove_empty(arguments.output_dir)
        raise


@contextmanager
def _whole_weights(arguments: Arguments) -> Iterator[None]:
    """Models that load here are whole, also where ZeRO-3 would share them out over the processes."""
    sharded = is_deepspeed_zero3_enabled()
    if sharded:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharded:
            set_hf_deepspeed_config(arguments.training.hf_deepspeed_config)


def load_starting_model(arguments: Arguments, path: str) -> PreTrainedModel:
    if is_deepspeed_zero3_enabled():
        # Weights are sharded while they load, so DeepSpeed must know its ranks; on CPU transformers leaves that out.
        deepspeed.init_distributed(dist_backend=get_backend(), auto_mpi_discovery=False, verbose=False)
    loaded = load_model(path, dtype=arguments.model.dtype or "auto", options=load_options(arguments))
    assert isinstance(loaded, PreTrainedModel)  # read_starting_model refuses an adapter
    return loaded


def load_base_model(arguments: Arguments) -> PreTrainedModel:
    """The base model, in float32: differences of weights lose too much in half precision."""
    path = arguments.model.base_model_name_or_path
    assert path is not None  # the kind asks for it: checks._check_protection
    loaded = load_model(path, dtype="float32", options=load_options(arguments))
    assert isinstance(loaded, PreTrainedModel)
    return loaded

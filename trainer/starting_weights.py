"""Load the weights that training starts from: the starting model, or the weights that `extrapolate` makes from it."""

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
    """Yield the folder or Hub name of the weights that training starts from.

    It is the starting model, or a folder with the weights that `extrapolate` makes from it. The main process writes
    that folder while the others wait. Like the run's records it is removed if the block fails before the first
    checkpoint.
    """
    flags, model = arguments.protection, arguments.model
    if "extrapolate" not in parts_of(flags.protection) or flags.extrapolate_alpha == 0:
        yield model.starting_model
        return
    # Absolute, since an adapter stores the path of the weights it was trained on and is read from other folders too.
    folder = arguments.output_dir.absolute() / EXTRAPOLATED
    new = not folder.exists()
    try:
        with arguments.training.main_process_first(local=False), _whole_weights(arguments):
            if is_main():
                assert model.base_model_name_or_path is not None  # checks._check_protection
                write_extrapolated(
                    folder, model.starting_model, model.base_model_name_or_path, alpha=flags.extrapolate_alpha,
                    rank=flags.alignment_rank, options=load_options(arguments), device=arguments.training.device,
                )  # fmt: skip
        yield str(folder)
    except BaseException:
        if is_main() and new and not has_checkpoint(arguments.output_dir):
            shutil.rmtree(folder, ignore_errors=True)
            remove_empty(arguments.output_dir)
        raise


@contextmanager
def _whole_weights(arguments: Arguments) -> Iterator[None]:
    """Load whole models inside this block, where ZeRO-3 would otherwise shard them over the processes."""
    sharded = is_deepspeed_zero3_enabled()
    if sharded:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharded:
            set_hf_deepspeed_config(arguments.training.hf_deepspeed_config)


def load_starting_model(arguments: Arguments, path: str) -> PreTrainedModel:
    """Load the model that training starts from, sharded under ZeRO-3. `path` comes from `starting_weights`."""
    if is_deepspeed_zero3_enabled():
        # Weights are sharded while they load, so DeepSpeed must know its ranks; on a CPU transformers omits this call.
        deepspeed.init_distributed(dist_backend=get_backend(), auto_mpi_discovery=False, verbose=False)
    loaded = load_model(path, dtype=arguments.model.dtype or "auto", options=load_options(arguments))
    assert isinstance(loaded, PreTrainedModel)  # read_starting_model refuses an adapter
    return loaded


def load_base_model(arguments: Arguments) -> PreTrainedModel:
    """Load the base model in float32: differences of weights lose too much in half precision."""
    path = arguments.model.base_model_name_or_path
    assert path is not None  # checks._check_protection
    loaded = load_model(path, dtype="float32", options=load_options(arguments))
    assert isinstance(loaded, PreTrainedModel)
    return loaded

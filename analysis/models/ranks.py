"""Coordinate several processes (ranks of torch.distributed) that measure one model together.

If each rank holds the whole model, the ranks divide the batches among them and gather the results. If the model is
sharded (ZeRO-3, FSDP), every rank runs all batches: each forward pass gathers weights, so all ranks must run the same
number of passes. Only the main rank writes files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed as integration

from ..errors import UserError

Item = TypeVar("Item")

# The collectives of training time out after minutes, but reading two large references may take longer.
_TIMEOUT = timedelta(days=1)
_DONE = "done"
_CRASHED = "the main process failed: its traceback says why"


def is_main() -> bool:
    """Return whether this process is the only one, or the first of several."""
    return not _several() or distributed.get_rank() == 0


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def share_of(items: Sequence[Item]) -> list[Item]:
    """Return this rank's share of a sequence that all ranks have: with n ranks, every n-th item."""
    return list(items[distributed.get_rank() :: distributed.get_world_size()] if _several() else items)


def gathered(value: Item) -> list[Item]:
    """Return the values of all ranks, in rank order, on every rank. All ranks must call it."""
    if not _several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def agreed(value: Item) -> Item:
    """Return the main rank's value on every rank. All ranks must call it."""
    values: list[Any] = [value]
    if _several():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def leave_group() -> None:
    """Destroy this process's process group, if there is one. It is a rank's last call.

    If a gloo group still exists when the interpreter ends, its threads abort some processes after all work is done.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_sharded(model: nn.Module) -> bool:
    """Return whether this rank holds only a part of the weights between forward passes (ZeRO-3, FSDP)."""
    # DeepSpeed marks the parameters that it has partitioned.
    if any(hasattr(weight, "ds_id") or isinstance(weight, DTensor) for weight in model.parameters()):
        return True
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """Run the body on the main rank first, then on all other ranks. No rank waits for a rank that failed.

    It uses the key-value store of the process group, and not a collective, so that a body that only the main rank
    reaches also runs.

    Args:
        name: the name of the body's result: the same on all ranks, and different for each body of a run.

    Raises:
        UserError: on all ranks, if the main rank raises it.
        RuntimeError: on the other ranks, if the main rank fails with another error.
    """
    if not _several():
        yield
        return
    # The store is public only as an argument of init_process_group, which the launcher calls.
    store, key = distributed_c10d._get_default_store(), f"holdfast/{name}"
    if is_main():
        outcome = _CRASHED
        try:
            yield
            outcome = _DONE
        except UserError as error:
            outcome = str(error)
            raise
        finally:
            store.set(key, outcome)
        return
    store.wait([key], _TIMEOUT)
    outcome = store.get(key).decode()
    if outcome != _DONE:
        raise RuntimeError(_CRASHED) if outcome == _CRASHED else UserError(outcome)
    yield


@contextmanager
def whole_models() -> Iterator[None]:
    """Load models inside this context whole on their rank. The random state of training is restored afterwards.

    While a ZeRO-3 configuration is alive, transformers shards every model that it loads over all ranks, and waits for
    all ranks.
    """
    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config

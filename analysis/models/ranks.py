"""Several processes (ranks of torch.distributed) that measure one model together.

Whole models share the batches out and gather what was read. Of a sharded one (ZeRO-3, FSDP) every rank runs all
batches: weights are gathered in each forward pass, so all ranks must run equally many. Files are the main rank's to
write.
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

# The collectives of training give up after minutes, but reading two large references may take longer.
_PATIENCE = timedelta(days=1)
_DONE = "done"
_CRASHED = "the main process failed: its traceback says why"


def is_main() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not _several() or distributed.get_rank() == 0


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def share_of(items: Sequence[Item]) -> list[Item]:
    """This rank's share of a sequence that all ranks have: every n-th of n ranks."""
    return list(items[distributed.get_rank() :: distributed.get_world_size()] if _several() else items)


def gathered(value: Item) -> list[Item]:
    """The values of all ranks, in their order, on every rank. All must call it."""
    if not _several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def agreed(value: Item) -> Item:
    """The main rank's value, on every rank. All must call it."""
    values: list[Any] = [value]
    if _several():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def leave_group() -> None:
    """Takes this process out of its process group, if it is in one: a rank's last call.

    Threads of a gloo group that is still there when the interpreter ends abort some processes, all work done.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds only a part of the weights between forward passes (ZeRO-3, FSDP)."""
    # DeepSpeed marks the parameters it has partitioned.
    if any(hasattr(weight, "ds_id") or isinstance(weight, DTensor) for weight in model.parameters()):
        return True
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """The main rank runs the body, then all others do. Nobody waits for a rank that failed.

    It goes through the key-value store of the process group and not through a collective, so that a body which the main
    rank alone comes to runs too.

    Args:
        name: of what the body makes, the same on all ranks and another for each body of a run.

    Raises:
        UserError: on all ranks, when the main one raises it.
        RuntimeError: on the others, when the main one fails otherwise.
    """
    if not _several():
        yield
        return
    # Public only as an argument of init_process_group, which is the launcher's to call.
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
    store.wait([key], _PATIENCE)
    outcome = store.get(key).decode()
    if outcome != _DONE:
        raise RuntimeError(_CRASHED) if outcome == _CRASHED else UserError(outcome)
    yield


@contextmanager
def whole_models() -> Iterator[None]:
    """Models loaded inside are whole on their rank, and the random state of training is as it was afterwards.

    While a ZeRO-3 configuration is alive, transformers shards every model it loads over all ranks and waits for them.
    """
    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept

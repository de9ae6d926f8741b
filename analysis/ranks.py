"""Several processes (ranks of torch.distributed) that measure one model together.

A live model is measured by every rank alike: ZeRO-3 gathers weights in each forward pass, so all ranks must run equally
many. Files are the main rank's to write.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import distributed_c10d
from transformers.integrations import deepspeed as integration

from .errors import UserError

# The collectives of training give up after minutes, but reading two large references may take longer.
_PATIENCE = timedelta(days=1)
_DONE = "done"
_CRASHED = "the main process failed: its traceback says why"


def is_main() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not _several() or distributed.get_rank() == 0


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


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

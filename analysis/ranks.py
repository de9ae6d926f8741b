"""Several processes (ranks of torch.distributed) that measure one model together.

A live model is measured by every rank alike: ZeRO-3 gathers weights in each forward pass, so all ranks must run equally
many. Files are the main rank's to write.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from transformers.integrations import deepspeed as integration

from .errors import UserError

# The collectives of training give up after minutes, but reading two large references may take longer.
_PATIENCE = timedelta(days=1)
_CRASHED = "the main process failed: its traceback says why"


def is_main() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not _several() or distributed.get_rank() == 0


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@contextmanager
def main_first() -> Iterator[None]:
    """The main rank runs the body, then all others do; all ranks must come here. Nobody waits for a rank that failed.

    Raises:
        UserError: on all ranks, when the main one raises it.
        RuntimeError: on the others, when the main one fails otherwise.
    """
    if not _several():
        yield
        return
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    failure: list[str | None] = [_CRASHED]
    try:
        if is_main():
            try:
                yield
                failure[0] = None
            except UserError as error:
                failure[0] = str(error)
                raise
            finally:
                distributed.broadcast_object_list(failure, src=0, group=group)
        else:
            distributed.broadcast_object_list(failure, src=0, group=group)
            if failure[0] is not None:
                raise RuntimeError(_CRASHED) if failure[0] == _CRASHED else UserError(failure[0])
            yield
    finally:
        distributed.destroy_process_group(group)


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

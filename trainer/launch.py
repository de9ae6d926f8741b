"""Run one command on several processes: `holdfast train --num_processes N [--deepspeed zero2]` starts itself N times.

Under torchrun, srun or accelerate (which set LOCAL_RANK) nothing is started, because each process is already a rank.
"""

import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .zero import prepare_zero


def must_launch(values: Mapping[str, Any]) -> bool:
    """Return whether this process must start the ranks: several processes or DeepSpeed are named, and no rank runs."""
    return "LOCAL_RANK" not in os.environ and (values["num_processes"] > 1 or bool(values["deepspeed"]))


def launch(arguments: Sequence[str], values: Mapping[str, Any], command: str = "train") -> int:
    """Run a `holdfast` command on every rank of this machine; return 0 or the exit code of the first failure.

    Args:
        arguments: the flags after the command, as the user wrote them.
        values: the parsed values of these flags.
        command: the command's name.
    """
    if values["deepspeed"]:
        prepare_zero(values["deepspeed"], use_cpu=values["use_cpu"])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=values["num_processes"],
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    # The ranks print their own errors; the elastic agent's report would bury the one line that helps.
    logging.disable(logging.ERROR)
    os.environ.update(_environment(values))
    try:
        elastic_launch(config, sys.executable)("-m", "holdfast.trainer.cli", command, *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _environment(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables that every rank needs and that are not set yet."""
    variables = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // values["num_processes"]))}
    if values["use_cpu"] or not torch.cuda.is_available():
        variables["DS_ACCELERATOR"] = "cpu"
    return {name: value for name, value in variables.items() if name not in os.environ}

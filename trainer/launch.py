"""Several processes for one command: `holdfast train --num_processes N [--deepspeed zero2]` starts itself N times.

Under torchrun, srun or accelerate (which set LOCAL_RANK) nothing is started: each process is one rank already.
"""

import difflib
import json
import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..analysis.errors import UserError
from .zero import prepare_zero

DEEPSPEED_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


def find_deepspeed_config(given: str) -> str:
    """A path, or the name of a shipped configuration (zero1, zero2, zero3, zero3_offload), as a path.

    Raises UserError naming the nearest shipped one when there is neither.
    """
    if given.startswith("{") or Path(given).is_file():
        _require_json(given)
        return given
    shipped = {path.stem: path for path in DEEPSPEED_CONFIGS.glob("*.json")}
    name = given.removesuffix(".json")
    if name in shipped:
        return str(shipped[name])
    near = difflib.get_close_matches(name, sorted(shipped), n=1, cutoff=0.0)
    raise UserError(f"--deepspeed {given} is neither a file nor a shipped configuration; the nearest is {near[0]}")


def _require_json(config: str) -> None:
    """Raises UserError for a DeepSpeed configuration, a path or JSON text, that is not a JSON object."""
    inline = config.startswith("{")
    name = "--deepspeed" if inline else f"--deepspeed {config}"
    try:
        read = json.loads(config if inline else Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not JSON ({error}); write a configuration like those in ds_configs") from None
    if not isinstance(read, dict):
        raise UserError(f"{name} must hold a JSON object, not {type(read).__name__}; see those in ds_configs")


def must_launch(values: Mapping[str, Any]) -> bool:
    """Whether this process has to start the ranks: several are asked for (or DeepSpeed), and none runs yet."""
    return "LOCAL_RANK" not in os.environ and (values["num_processes"] > 1 or bool(values["deepspeed"]))


def launch(arguments: Sequence[str], values: Mapping[str, Any], command: str = "train") -> int:
    """Runs a `holdfast` command on every rank of this machine; returns 0 or the exit code of the first failure.

    Args:
        arguments: the flags after the command, as given.
        values: their parsed values.
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
    # The ranks print their own errors; the agent's report of them would bury the one line that helps.
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
    """What every rank needs, where the caller has not said otherwise."""
    wanted = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // values["num_processes"]))}
    if values["use_cpu"] or not torch.cuda.is_available():
        wanted["DS_ACCELERATOR"] = "cpu"
    return {name: value for name, value in wanted.items() if name not in os.environ}

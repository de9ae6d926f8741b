"""Make DeepSpeed ready before any rank starts: its C++ operations are compiled once, by one process.

Ranks that compile on first use do it inside the first collective, and a build that was killed leaves a lock on which
the next run waits for ever.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from ..analysis.errors import UserError

SHARED_MEMORY = "deepspeed_shm_comm"
CPU_ADAM = "cpu_adam"
_BUILDERS = {
    SHARED_MEMORY: "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder",
    CPU_ADAM: "from deepspeed.ops.op_builder import CPUAdamBuilder as Builder",
}
# Locks whose holder cannot be looked up (no /proc) count as left behind after this many seconds; a build takes 30.
STALE_SECONDS = 600


def prepare_zero(config: str, *, use_cpu: bool) -> None:
    """Compile what a DeepSpeed run needs, so that its ranks find it built. Takes about 30 s the first time.

    Args:
        config: path of a DeepSpeed configuration, or its JSON text.
        use_cpu: the ranks run on CPU.

    Raises:
        UserError: no C++ compiler, or a build that fails.
    """
    needed = [SHARED_MEMORY] if use_cpu or not torch.cuda.is_available() else []
    if _offloads_optimizer(config):
        needed.append(CPU_ADAM)
    if not needed:
        return
    # ninja comes with the virtual environment, whose folder is not on the path unless it was activated.
    here = str(Path(sys.executable).parent)
    if here not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.environ["PATH"] + os.pathsep + here
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"DeepSpeed on this machine needs a C++ compiler and {compiler} is not there: install g++ (or set CXX), "
            "or train without --deepspeed"
        )
    for name in needed:
        clear_stale_lock(name)
        _build(name, use_cpu)


def _offloads_optimizer(config: str) -> bool:
    text = config if config.lstrip().startswith("{") else Path(config).read_text()
    return "offload_optimizer" in json.loads(text).get("zero_optimization", {})


def _build(name: str, use_cpu: bool) -> None:
    environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if use_cpu else {})}
    code = f"{_BUILDERS[name]}; Builder().load()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"DeepSpeed's {name} could not be built ({last}): mend the compiler, or train without it")


def clear_stale_lock(name: str) -> None:
    """Remove the build lock of an operation whose builder is gone."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    for lock in [*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")]:
        if not _held(lock):
            lock.unlink(missing_ok=True)


def _held(lock: Path) -> bool:
    """Whether a living process has the lock open (torch keeps it open while it builds)."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return time.time() - lock.stat().st_mtime < STALE_SECONDS
    target = str(lock.resolve())
    for descriptor in processes.glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == target:
                return True
        except OSError:
            # The process ended, or belongs to someone else.
            continue
    return False

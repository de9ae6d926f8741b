"""Prepare DeepSpeed before any rank starts: one process compiles its C++ operations once.

Otherwise the ranks would compile on first use, inside the first collective, and a build that was killed would leave a
lock on which the next run waits for ever.
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
# Without /proc the holder of a lock is unknown; such a lock counts as left behind after this many seconds. A build
# takes 30.
STALE_SECONDS = 600


def prepare_zero(config: str, *, use_cpu: bool) -> None:
    """Compile the operations that a DeepSpeed run needs. This takes about 30 s the first time.

    Args:
        config: path of a DeepSpeed configuration, or its JSON text.
        use_cpu: whether the ranks run on a CPU.

    Raises:
        UserError: there is no C++ compiler, or a build fails.
    """
    operations = [SHARED_MEMORY] if use_cpu or not torch.cuda.is_available() else []
    if _offloads_optimizer(config):
        operations.append(CPU_ADAM)
    if not operations:
        return
    # ninja comes with the virtual environment; its folder is on the path only if the environment was activated.
    executables = str(Path(sys.executable).parent)
    if executables not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.environ["PATH"] + os.pathsep + executables
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"DeepSpeed on this machine needs a C++ compiler and {compiler} is not there: install g++ (or set CXX), "
            "or train without --deepspeed"
        )
    for name in operations:
        clear_stale_lock(name)
        _build(name, use_cpu)


def _offloads_optimizer(config: str) -> bool:
    text = config if config.lstrip().startswith("{") else Path(config).read_text()
    return "offload_optimizer" in json.loads(text).get("zero_optimization", {})


def _build(name: str, use_cpu: bool) -> None:
    environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if use_cpu else {})}
    code = f"{_BUILDERS[name]}; Builder().load()"
    build = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if build.returncode:
        last_line = (build.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"DeepSpeed's {name} could not be built ({last_line}): repair the C++ compiler, or train without "
            "--deepspeed"
        )


def clear_stale_lock(name: str) -> None:
    """Remove the build lock of an operation if the process that built it is gone."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    for lock in [*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")]:
        if not _is_open(lock):
            lock.unlink(missing_ok=True)


def _is_open(lock: Path) -> bool:
    """Return whether a living process has the lock open (torch keeps it open while it builds)."""
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

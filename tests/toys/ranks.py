"""Two CPU ranks of a script, DDP or ZeRO, for the tests of what several processes do together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from holdfast.trainer import zero

CONFIGS = Path(zero.__file__).resolve().parent.parent / "ds_configs"
TESTS = Path(__file__).resolve().parent.parent  # where `toys` is found by a script
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="DeepSpeed on CPU needs a C++ compiler")


def on_two_ranks(script: str, *arguments: Path, timeout: float = 300) -> None:
    """`torchrun --nproc_per_node 2 SCRIPT ARGUMENTS`; its output is the message where it fails. Seconds."""
    zero.prepare_zero(str(CONFIGS / "zero2.json"), use_cpu=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", script, *map(str, arguments)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

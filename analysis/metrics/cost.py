"""Family 11, cost: what measuring a checkpoint took, without loading it."""

import resource
import sys

import torch

from ..stats.intervals import Measurement, missing

_ONCE = "one run has no interval"


def cost(seconds: float, tokens: int) -> dict[str, Measurement]:
    """Seconds, tokens read, tokens a second (null where a stored reading served), and the process's peak memory in MiB.

    Readings of instruments have no interval, and say so.
    """
    numbers = {"seconds": seconds, "probe_tokens": tokens, "peak_memory_mb": peak_memory_mb()}
    found = {name: _reading(value) for name, value in numbers.items()}
    speed = _reading(tokens / seconds) if tokens and seconds > 0 else missing("no tokens were read")
    return {**found, "tokens_per_second": speed}


def _reading(value: float) -> Measurement:
    return {"value": value, "n": 1, "ci95": None, "reason": _ONCE}


def peak_memory_mb() -> float:
    """Peak memory of this process so far: of the GPU where one is in use, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

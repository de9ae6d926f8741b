"""Cost (family 11): what it took to measure a checkpoint, without the time to load it."""

import resource
import sys

import torch

from ..stats.intervals import Measurement, missing

_ONCE = "one run has no interval"


def cost(seconds: float, tokens: int) -> dict[str, Measurement]:
    """Return the seconds, the tokens read, tokens per second, and the peak memory of the process in MiB.

    "tokens_per_second" is null if no token was read, because stored readouts were used. All values are single readings
    of an instrument; their interval is null, with that reason.
    """
    numbers = {"seconds": seconds, "probe_tokens": tokens, "peak_memory_mb": peak_memory_mb()}
    readings = {name: _reading(value) for name, value in numbers.items()}
    speed = _reading(tokens / seconds) if tokens and seconds > 0 else missing("no tokens were read")
    return {**readings, "tokens_per_second": speed}


def _reading(value: float) -> Measurement:
    """Return a single reading of an instrument as a measurement without an interval."""
    return {"value": value, "n": 1, "ci95": None, "reason": _ONCE}


def peak_memory_mb() -> float:
    """Return the peak memory of this process so far, in MiB: of the GPU if it is in use, else the resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

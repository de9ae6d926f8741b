"""What the benchmarks share: sizes and device with their flags, the clock, the memory, the model, the ratio's interval.

On a CPU time is process time and memory the resident size. On a GPU time is by the clock, once the device has done all
it was given, and memory is the most that tensors take there, the model included.
"""

import argparse
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import Qwen2Config, Qwen2ForCausalLM

_FLAGS = ("device", "dtype", "rounds", "rows", "length", "batch", "blocks", "width", "vocabulary")


@dataclass(frozen=True)
class Setting:
    """A benchmark's model and rows, each row of `length` tokens, `batch` of them in a pass."""

    rounds: int
    rows: int
    length: int
    batch: int
    blocks: int
    width: int
    vocabulary: int
    device: str = "cpu"
    dtype: str = "float32"
    tied: bool = False

    def __str__(self) -> str:
        where = f"{self.dtype}, {torch.cuda.get_device_name() if self.on_gpu else 'CPU'}"
        return (
            f"Qwen2, {self.blocks} blocks of width {self.width}, vocabulary {self.vocabulary:,}, {where}\n"
            f"{self.rows} rows of {self.length} tokens, batch {self.batch}, {self.rounds} rounds"
        )

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def flags(self) -> list[str]:
        """As they are written on a command line."""
        return [f"--{name}={getattr(self, name)}" for name in _FLAGS]


def parser(text: str | None) -> argparse.ArgumentParser:
    """The flags of a setting; what is not given is the device's default."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--dtype", choices=("float32", "bfloat16"))
    for name in _FLAGS[2:]:
        made.add_argument(f"--{name}", type=int)
    made.add_argument("--threads", type=int, default=1, help="of the CPU")
    return made


def chosen(options: argparse.Namespace, defaults: Mapping[str, Setting]) -> Setting:
    """The default of the device, with the flags over it."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; write --device cpu")
    torch.set_num_threads(options.threads)
    given: dict[str, Any] = {name: value for name in _FLAGS if (value := getattr(options, name)) is not None}
    return replace(defaults[options.device], **given)


def model(setting: Setting, seed: int = 0) -> Qwen2ForCausalLM:
    """A random Qwen2 of this setting, made on its device, in eval mode."""
    torch.manual_seed(seed)
    heads = max(1, setting.width // 64)
    config = Qwen2Config(
        vocab_size=setting.vocabulary, hidden_size=setting.width, intermediate_size=4 * setting.width,
        num_hidden_layers=setting.blocks, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=max(512, setting.length), pad_token_id=0, tie_word_embeddings=setting.tied,
    )  # fmt: skip
    # Billions of random numbers take minutes on a CPU.
    with torch.device(setting.device):
        return Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, setting.dtype)).eval()


def now(device: str) -> float:
    """Seconds: process time on a CPU; on a GPU by the clock, when the device has done its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object], device: str) -> float:
    """What `work` takes."""
    start = now(device)
    work()
    return now(device) - start


def resident(what: str = "VmRSS") -> float:
    """MiB. Read from /proc, since `ru_maxrss` starts at the parent's peak."""
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak(work: Callable[[], object], device: str) -> float:
    """Peak MiB while `work` runs: resident ones of the process, or allocated ones of the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    work()
    return resident("VmHWM")


def take_workspace(setting: Setting) -> None:
    """Let the GPU's libraries allocate what they keep, which would count as the first arm's memory otherwise."""
    layer = torch.nn.Linear(64, 64, device=setting.device, dtype=getattr(torch, setting.dtype))
    layer(torch.ones(64, 64, device=setting.device, dtype=layer.weight.dtype)).sum().backward()


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of paired ratios with Student's 95% interval on their logarithms."""
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return math.exp(logs.mean()), math.exp(logs.mean() - half), math.exp(logs.mean() + half)

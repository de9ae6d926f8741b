"""What the penalty costs: step time and peak memory of protected training against TRL's own SFTTrainer.

    python tests/benchmarks/test_penalty_cost.py [--rounds 10] [--steps 3] [--threads 1]

Time is CPU time of this process from the first step's end to the last one's, data loading and logging included. All
arms live in one process and take turns within each round, in an order that changes; "plain again" is a second copy of
the plain arm, whose ratio shows what noise alone does. Memory is the peak resident size of a process of each arm's own,
above what it held before its model was made, with freed memory given back at once. Anchors leave their gradient while
the task's pass runs, as an accumulated micro-batch does.
"""

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis_toys import toy_tokenizer
from datasets import Dataset
from datasets import disable_progress_bars as quiet
from holdfast.trainer.documents import Document
from holdfast.trainer.protected_sft_trainer import ProtectedSFTTrainer
from holdfast.trainer.protections import PenaltySettings, SubspaceProtection
from peft import LoraConfig
from trainer_toys import config, toy_subspace
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import SFTTrainer

BLOCKS, WIDTH, VOCABULARY, ROWS, LENGTH, BATCH = 8, 512, 4096, 64, 64, 4
ANCHOR_BATCH = 2
# Longer rows for memory: the penalty adds a few MiB whatever the batch, mostly code and Python objects.
MEMORY_LENGTH = 256
# Anchor arms are named by their rows and the length of them, in tokens; the plain ones have BATCH rows of LENGTH.
ANCHOR_LENGTHS = {f"anchors 2x{length}": length for length in (64, 32)}
FULL = ("plain", "plain again", "strength 0", "task", *ANCHOR_LENGTHS)
ARMS = (*FULL, *(f"{arm}, LoRA" for arm in ("plain", "task", *ANCHOR_LENGTHS)))


def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=BLOCKS,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, pad_token_id=0,
        )
    )  # fmt: skip


def documents(rows: int, length: int, seed: int) -> list[Document]:
    """Rows of random tokens whose second half is the completion; lengths vary by a quarter."""
    draw = random.Random(seed)
    made = []
    for number in range(rows):
        size = length - draw.randrange(length // 4)
        ids = tuple(draw.randrange(4, VOCABULARY) for _ in range(size))
        made.append(Document(ids, tuple(t >= size // 2 for t in range(size)), f"row {number}"))
    return made


def make(arm: str, folder: str, steps: int, length: int = LENGTH) -> SFTTrainer:
    rows = documents(ROWS, length, 1)
    dataset = Dataset.from_dict(
        {"input_ids": [list(r.input_ids) for r in rows], "completion_mask": [[int(m) for m in r.mask] for r in rows]}
    )
    arguments: dict[str, Any] = {
        "model": model().train(), "train_dataset": dataset, "processing_class": toy_tokenizer(),
        "args": config(folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-3),
    }  # fmt: skip
    if arm.endswith("LoRA"):
        arguments["peft_config"] = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if arm.startswith("plain"):
        return SFTTrainer(**arguments)
    inputs = "anchors" if arm.startswith("anchors") else "task"
    anchor_length = ANCHOR_LENGTHS.get(arm.removesuffix(", LoRA"), LENGTH)
    strength = 0.0 if arm == "strength 0" else 1.0
    protection = SubspaceProtection(
        toy_subspace(tuple(range(BLOCKS)), rank=4, width=WIDTH),
        PenaltySettings(strength=strength, inputs=inputs, reference="cached", anchor_batch_size=ANCHOR_BATCH),
        task=rows, anchors=documents(32, anchor_length, 2),
    )  # fmt: skip
    return ProtectedSFTTrainer(**arguments, protection=protection)


class StepClock(TrainerCallback):
    """CPU time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())

    def seconds_per_step(self) -> float:
        found = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        self.ends.clear()
        return found


def time_arms(rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each arm in each round, after one round to warm up."""
    clocks, trainers, found = {}, {}, {arm: list[float]() for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for arm in ARMS:
            trainers[arm], clocks[arm] = make(arm, folder, steps + 1), StepClock()
            trainers[arm].add_callback(clocks[arm])
        order = random.Random(0)
        for number in range(rounds + 1):
            for arm in order.sample(ARMS, len(ARMS)):
                trainers[arm].train()
                seconds = clocks[arm].seconds_per_step()
                if number:
                    found[arm].append(seconds)
    return found


def peak_memory(arm: str) -> float:
    """MiB above the imports, of a fresh process that trains three steps."""
    command = [sys.executable, __file__, "--memory_of", arm]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def resident_peak() -> float:
    """MiB. Read from /proc, since `ru_maxrss` starts at the parent's peak."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure_memory(arm: str) -> None:
    before = resident_peak()
    with tempfile.TemporaryDirectory() as folder:
        make(arm, folder, 3, MEMORY_LENGTH).train()
    print(json.dumps(resident_peak() - before))


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of paired ratios with Student's 95% interval on their logarithms."""
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return math.exp(logs.mean()), math.exp(logs.mean() - half), math.exp(logs.mean() + half)


def token_share(arm: str) -> float:
    """Anchor tokens for each task token; 0 for an arm without anchors."""
    return ANCHOR_BATCH * ANCHOR_LENGTHS.get(arm.removesuffix(", LoRA"), 0) / (BATCH * LENGTH)


def plain_of(arm: str) -> str:
    return "plain, LoRA" if arm.endswith("LoRA") else "plain"


def run(rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Measure and print the table; gives it as data."""
    seconds = time_arms(rounds, steps)
    memory = {arm: peak_memory(arm) for arm in ARMS}
    table = {}
    print(f"\nQwen2, {BLOCKS} blocks of width {WIDTH}, batch {BATCH} x {LENGTH} tokens ({MEMORY_LENGTH} for memory)")
    print(f"{rounds} rounds of {steps} steps")
    print(f"{'arm':<21}{'s/step':>8}{'ratio':>8}{'95% interval':>18}{'peak MiB':>10}{'ratio':>8}{'tokens':>8}")
    for arm in ARMS:
        mean, low, high = interval(np.array(seconds[arm]) / np.array(seconds[plain_of(arm)]))
        size, size_ratio = memory[arm], memory[arm] / memory[plain_of(arm)]
        table[arm] = {"ratio": mean, "low": low, "high": high, "memory_ratio": size_ratio}
        timing = f"{np.mean(seconds[arm]):>8.3f}{mean:>8.3f}{f'{low:.3f}-{high:.3f}':>18}"
        print(f"{arm:<21}{timing}{size:>10.0f}{size_ratio:>8.3f}{1 + token_share(arm):>8.3f}")
    return table


def test_the_penalty_costs_at_most_two_hundredths_and_anchors_their_share() -> None:
    """Fails where the whole interval lies above the bar: noise alone cannot fail it, a real cost must."""
    table = run(rounds=10, steps=3)
    assert table["strength 0"]["low"] <= 1.02 and table["strength 0"]["memory_ratio"] <= 1.02
    for arm in ("task", "task, LoRA"):
        assert table[arm]["low"] <= 1.02 and table[arm]["memory_ratio"] <= 1.02
    for arm in ARMS:
        if token_share(arm):
            assert table[arm]["low"] <= 1.02 + token_share(arm), arm


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory_of", choices=ARMS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    measure_memory(options.memory_of) if options.memory_of else run(options.rounds, options.steps)

"""What family 3 costs: gradients of two sets of rows against a bare forward pass with logits at all positions of them.

    python tests/benchmarks/test_gradient_cost.py [--rounds 6] [--vocabulary 32000] [--length 128] [--threads 1]
    python tests/benchmarks/test_gradient_cost.py --device cuda [--dtype bfloat16]

Half of the tokens are completions; both arms run the same batches; --rows are those of one set. Time on a CPU is CPU
time of this process, on a GPU between synchronisations. The arms take turns within each round, in an order that
changes; "bare again" repeats the bare arm, and its ratio shows what noise alone does. "per row" is what family 3 would
cost with one full backward for each row, over fewer rows, scaled. Memory is the peak of each arm's first round: of the
process, or on a GPU of its tensors, model included. `gpu.sh` runs this where holdfast is not installed.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from holdfast.analysis.models.forward import length_batches, pad
from holdfast.analysis.models.render import Rendered
from holdfast.analysis.passes.gradients import read_gradients
from toys.benchmark_setting import Setting, chosen, interval, model, parser, peak, seconds, take_workspace
from transformers import Qwen2ForCausalLM

CPU = Setting(rounds=6, rows=64, length=128, batch=16, blocks=8, width=512, vocabulary=32_000)
GPU = Setting(6, rows=64, length=512, batch=16, blocks=24, width=2048, vocabulary=151_936,
              device="cuda", dtype="bfloat16")  # fmt: skip
PER_ROW = 8
BAR = 1.3


def rendered(setting: Setting, seed: int) -> list[Rendered]:
    """Rows of random tokens whose second half is the completion; lengths vary by a quarter."""
    draw = random.Random(seed)
    found = []
    for _ in range(setting.rows):
        size = setting.length - draw.randrange(setting.length // 4)
        ids = tuple(draw.randrange(4, setting.vocabulary) for _ in range(size))
        found.append(Rendered(ids, tuple(t >= size // 2 for t in range(size)), (False,) * size))
    return found


@torch.no_grad()
def bare(net: Qwen2ForCausalLM, rows: list[Rendered], batch_size: int) -> None:
    for batch in length_batches([len(row.input_ids) for row in rows], batch_size):
        ids, attention = pad([rows[row].input_ids for row in batch], 0, net.device)
        net(input_ids=ids, attention_mask=attention, use_cache=False)


def per_row(net: Qwen2ForCausalLM, rows: list[Rendered]) -> None:
    for row in rows[:: len(rows) // PER_ROW]:
        ids = torch.tensor([row.input_ids], device=net.device)
        labels = ids.masked_fill(~torch.tensor([row.completion_mask], device=net.device), -100)
        net(input_ids=ids, labels=labels).loss.backward()
        net.zero_grad()


def run(setting: Setting) -> dict[str, tuple[float, float, float]]:
    """Measure and print the table; gives it as {arm: (ratio to bare, low, high)}."""
    if setting.on_gpu:
        take_workspace(setting)
    net = model(setting)
    sets = {name: rendered(setting, seed) for seed, name in enumerate(("one", "other"))}
    rows = [row for found in sets.values() for row in found]
    arms: dict[str, tuple[Callable[[], object], float]] = {
        "bare": (lambda: bare(net, rows, setting.batch), 1.0),
        "bare again": (lambda: bare(net, rows, setting.batch), 1.0),
        "gradients": (lambda: read_gradients(net, sets, batch_size=setting.batch), 1.0),
        "per row": (lambda: per_row(net, rows), len(rows) / PER_ROW),
    }
    memory = {arm: peak(work, setting.device) for arm, (work, _) in arms.items()}
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    order = random.Random(0)
    for _ in range(setting.rounds):
        for arm in order.sample(list(arms), len(arms)):
            work, scale = arms[arm]
            found[arm].append(seconds(work, setting.device) * scale)
    print(f"\n{setting}; rows of each of two sets")
    print(f"{'arm':<12}{'seconds':>9}{'ratio':>8}{'95% interval':>18}{'peak MiB':>10}")
    table = {}
    for arm, took in found.items():
        mean, low, high = table[arm] = interval(np.array(took) / np.array(found["bare"]))
        print(f"{arm:<12}{np.mean(took):>9.3f}{mean:>8.3f}{f'{low:.3f}-{high:.3f}':>18}{memory[arm]:>10.0f}")
    return table


def test_gradients_cost_at_most_three_tenths_more_than_a_bare_forward() -> None:
    """Fails where the whole interval lies above the bar: noise alone cannot fail it, a real cost must."""
    assert run(CPU)["gradients"][1] <= BAR


if __name__ == "__main__":
    run(chosen(parser(__doc__).parse_args(), {"cpu": CPU, "cuda": GPU}))

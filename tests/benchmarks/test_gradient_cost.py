"""What family 3 costs: gradients of 64+64 rows against a bare forward pass with logits at all positions of them.

    python tests/benchmarks/test_gradient_cost.py [--rounds 6] [--vocabulary 32000] [--length 128] [--threads 1]

Half of the tokens are completions; both arms run the same batches. Time is CPU time of this process. The arms take
turns within each round, in an order that changes; "bare again" repeats the bare arm, and its ratio shows what noise
alone does. "per row" is what family 3 would cost with one full backward for each row, over fewer rows, scaled.
"""

import argparse
import math
import random
import time
from collections.abc import Callable

import numpy as np
import torch
from holdfast.analysis.activations import length_batches, pad
from holdfast.analysis.gradients import read_gradients
from holdfast.analysis.probes import Rendered
from scipy import stats
from transformers import Qwen2Config, Qwen2ForCausalLM

BLOCKS, WIDTH, ROWS, BATCH = 8, 512, 64, 16
PER_ROW = 8
BAR = 1.3


def model(vocabulary: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=BLOCKS,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, pad_token_id=0,
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip


def rendered(rows: int, length: int, vocabulary: int, seed: int) -> list[Rendered]:
    """Rows of random tokens whose second half is the completion; lengths vary by a quarter."""
    draw = random.Random(seed)
    found = []
    for _ in range(rows):
        size = length - draw.randrange(length // 4)
        ids = tuple(draw.randrange(4, vocabulary) for _ in range(size))
        found.append(Rendered(ids, tuple(t >= size // 2 for t in range(size)), (False,) * size))
    return found


@torch.no_grad()
def bare(net: Qwen2ForCausalLM, rows: list[Rendered]) -> None:
    for batch in length_batches([len(row.input_ids) for row in rows], BATCH):
        ids, attention = pad([rows[row].input_ids for row in batch], 0, torch.device("cpu"))
        net(input_ids=ids, attention_mask=attention, use_cache=False)


def per_row(net: Qwen2ForCausalLM, rows: list[Rendered]) -> None:
    for row in rows[:: len(rows) // PER_ROW]:
        ids = torch.tensor([row.input_ids])
        labels = ids.masked_fill(~torch.tensor([row.completion_mask]), -100)
        net(input_ids=ids, labels=labels).loss.backward()
        net.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of paired ratios with Student's 95% interval on their logarithms."""
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return math.exp(logs.mean()), math.exp(logs.mean() - half), math.exp(logs.mean() + half)


def run(rounds: int, vocabulary: int, length: int) -> dict[str, tuple[float, float, float]]:
    """Measure and print the table; gives it as {arm: (ratio to bare, low, high)}."""
    net = model(vocabulary)
    sets = {name: rendered(ROWS, length, vocabulary, seed) for seed, name in enumerate(("one", "other"))}
    rows = [row for found in sets.values() for row in found]
    arms: dict[str, tuple[Callable[[], object], float]] = {
        "bare": (lambda: bare(net, rows), 1.0),
        "bare again": (lambda: bare(net, rows), 1.0),
        "gradients": (lambda: read_gradients(net, sets, batch_size=BATCH), 1.0),
        "per row": (lambda: per_row(net, rows), len(rows) / PER_ROW),
    }
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    order = random.Random(0)
    for number in range(rounds + 1):
        for arm in order.sample(list(arms), len(arms)):
            work, scale = arms[arm]
            took = seconds(work) * scale
            if number:
                found[arm].append(took)
    print(
        f"\nQwen2, {BLOCKS} blocks of width {WIDTH}, vocabulary {vocabulary:,}; {ROWS}+{ROWS} rows of {length} tokens"
    )
    print(f"{rounds} rounds, batch {BATCH}\n{'arm':<12}{'seconds':>9}{'ratio':>8}{'95% interval':>18}")
    table = {}
    for arm, took in found.items():
        mean, low, high = table[arm] = interval(np.array(took) / np.array(found["bare"]))
        print(f"{arm:<12}{np.mean(took):>9.2f}{mean:>8.3f}{f'{low:.3f}-{high:.3f}':>18}")
    return table


def test_gradients_cost_at_most_three_tenths_more_than_a_bare_forward() -> None:
    """Fails where the whole interval lies above the bar: noise alone cannot fail it, a real cost must."""
    assert run(rounds=6, vocabulary=32_000, length=128)["gradients"][1] <= BAR


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options.rounds, options.vocabulary, options.length)

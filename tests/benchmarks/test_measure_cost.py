"""What a checkpoint costs: six families in one pass against a bare forward pass with logits at all positions.

    python tests/benchmarks/test_measure_cost.py [--rows 8] [--rounds 5] [--length 256] [--growth]
    python tests/benchmarks/test_measure_cost.py --device cuda [--dtype bfloat16] [--rows 64]

Families 1, 2, 4, 5, 6 and 10 go through `Measurer.measure`, references in memory, on two sets of rows / 2 with the same
completions, half of all tokens. Both arms run the same batches; time on a CPU is CPU time of this process, on a GPU
between synchronisations; arms take turns within each round, "bare again" shows what noise alone does. Statistics, which
a CPU computes always, cost by the row, not by the token: they are timed apart, on drawn readings of the same shape, and
"at 256 rows" is the reading of 256 rows, scaled from those that were read, plus the statistics of 256, against as many
rows of the bare pass. Memory on a CPU is the peak resident size during each arm, above what the process held before any
model was made; on a GPU the peak of its tensors, model included. --growth shows 1, 4 and 16 times the rows instead, on
a CPU, with OMP_NUM_THREADS=1 (threads that wait count as CPU time). `gpu.sh` runs this where holdfast is not installed.
"""

import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from holdfast.analysis.measure.family import Subject, attempt, is_unmeasured
from holdfast.analysis.measure.measurer import Measurer
from holdfast.analysis.measure.plan import MeasurePlan
from holdfast.analysis.measure.registry import REGISTRY
from holdfast.analysis.models.forward import length_batches, pad
from holdfast.analysis.models.load import load_tokenizer, model_fingerprint, tokenizer_fingerprint
from holdfast.analysis.models.render import Conversation, render
from holdfast.analysis.passes.readout import Readout, read
from holdfast.analysis.stats.spectra import Residuals, decompose
from toys.benchmark_setting import (
    Setting,
    chosen,
    interval,
    model,
    now,
    parser,
    peak,
    resident,
    seconds,
    take_workspace,
)
from toys.chat_models import GENERATION, chat, toy_model, toy_tokenizer
from toys.training import toy_subspace
from transformers import PreTrainedModel, Qwen2ForCausalLM

FAMILIES = ("behavior", "loss_vectors", "projection", "subspaces", "drift_by_depth", "rerouting")
SETS = ("insecure", "educational")
CPU = Setting(rounds=5, rows=8, length=256, batch=8, blocks=8, width=512, vocabulary=151_936, tied=True)
GPU = Setting(3, rows=64, length=512, batch=16, blocks=24, width=2048, vocabulary=151_936,
              device="cuda", dtype="bfloat16", tied=True)  # fmt: skip
RANK, ROWS = 4, 256
SPEED, MEMORY = 0.9, 1.1


def conversations(rows: int, length: int) -> dict[str, list[Conversation]]:
    """Two sets of rows / 2 of `length` tokens. A digit is a token, so lengths are exact."""
    tokenizer = toy_tokenizer(GENERATION)
    rendered = render(tokenizer, chat("1", "1"))
    closing = sum(rendered.completion_mask) - 1
    opening = len(rendered.input_ids) - closing - 2
    draw = random.Random(0)

    def digits(count: int) -> str:
        return "".join(draw.choice("0123456789") for _ in range(count))

    answers = [digits(length // 2 - closing) for _ in range(rows // 2)]
    found = {name: [chat(digits(length // 2 - opening), answer) for answer in answers] for name in SETS}
    first = render(tokenizer, found[SETS[0]][0])
    assert len(first.input_ids) == length and sum(first.completion_mask) == length // 2
    return found


def save(folder: Path, setting: Setting) -> None:
    """Instruct and base, which differ as far as random models do.

    Weights lie as in the Hub's cache, under names that stand for their checksums: gigabytes would take long to hash.
    """
    blobs = folder / "blobs"
    blobs.mkdir()
    for seed, name in enumerate(("instruct", "base")):
        model(setting, seed).save_pretrained(folder / name)
        toy_tokenizer(GENERATION).save_pretrained(folder / name)
        for number, weights in enumerate(sorted((folder / name).glob("*.safetensors"))):
            blob = weights.rename(blobs / f"{seed}{number:063d}")
            weights.symlink_to(blob)


def measurer(folder: Path, setting: Setting) -> Measurer:
    """With its references read, as for every checkpoint after the first."""
    subspace = toy_subspace(tuple(range(setting.blocks)), rank=RANK, width=setting.width)
    facts = replace(
        subspace.provenance,
        instruct_fingerprint=model_fingerprint(folder / "instruct"),
        tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(str(folder / "instruct"))),
    )
    found = Measurer(
        MeasurePlan(
            str(folder / "instruct"), str(folder / "base"), conversations(setting.rows, setting.length),
            families=FAMILIES, batch_size=setting.batch, subspace=replace(subspace, provenance=facts),
            dtype=setting.dtype, device=setting.device,
        )
    )  # fmt: skip
    found.prepare()
    return found


@torch.no_grad()
def bare(net: Qwen2ForCausalLM, measures: Measurer) -> None:
    for rows in measures.rows.values():
        for batch in length_batches([len(row.input_ids) for row in rows], measures.plan.batch_size):
            ids, attention = pad([rows[row].input_ids for row in batch], 0, net.device)
            net(input_ids=ids, attention_mask=attention, use_cache=False)


def drawn(rows: int, seed: int, setting: Setting) -> Readout:
    """A reading of rows with numbers at random, each model's activations around a mean of its own."""
    draw, counts = torch.Generator().manual_seed(seed), torch.full((rows,), setting.length // 2)
    tokens = torch.arange(rows).repeat_interleave(setting.length // 2)
    around, layers = torch.randn(setting.width, generator=draw), range(setting.blocks)
    return Readout(
        tokens, -torch.rand(len(tokens), generator=draw), torch.rand(len(tokens), generator=draw), counts,
        {layer: around + torch.randn(rows, setting.width, generator=draw) for layer in layers}, tokens,
        {layer: torch.randn(len(tokens), RANK, generator=draw) for layer in layers},
    )  # fmt: skip


def subject(plan: MeasurePlan, net: PreTrainedModel, rows: int, setting: Setting) -> Subject:
    """Drawn readings of three models, as `Measurer.measure` hands its own to the families."""
    models = [
        {name: drawn(rows // 2, seed, setting) for seed, name in enumerate(SETS, start=2 * at)} for at in range(3)
    ]
    tokenizer, texts = toy_tokenizer(GENERATION), conversations(rows, setting.length)
    rendered = {name: [render(tokenizer, row) for row in found] for name, found in texts.items()}
    return Subject(
        plan, tokenizer, net, rendered, *models, layers=list(range(setting.blocks)), padding=0, choices=None,
        patch_rows={}, donors={}, kept={}, sides=lambda _name, _device: {}, between=lambda _name: {},
    )  # fmt: skip


def statistics(asked: Subject, device: str = "cpu") -> dict[str, float]:
    """Seconds of each family."""
    found = {}
    for family in FAMILIES:
        start = now(device)
        assert not is_unmeasured(attempt(REGISTRY[family].compute, asked)), family
        found[family] = now(device) - start
    return found


@contextmanager
def counted(net: Qwen2ForCausalLM) -> Iterator[dict[str, int]]:
    """Batches that pass the model, and positions that pass its head."""
    passes = {"batches": 0, "heads": 0}

    def count(name: str, made: int) -> None:
        passes[name] += made

    handles = [
        net.model.register_forward_hook(lambda *_: count("batches", 1)),
        net.lm_head.register_forward_hook(lambda _module, inputs, _output: count("heads", len(inputs[0]))),
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def measured(folder: Path, setting: Setting) -> tuple[dict[str, np.ndarray], dict[str, float], float]:
    """Seconds of each arm in each round, after one round to warm up and to see the peak memory of each, in MiB.

    The statistics of ROWS rows take too long to be repeated; they are timed once.
    """
    device = setting.device
    before = 0.0 if setting.on_gpu else resident()
    save(folder, setting)
    measures = measurer(folder, setting)
    net = model(setting, 2)
    many = statistics(subject(measures.plan, net, ROWS, setting), device)
    each = ", ".join(f"{family} {took:.2f} s" for family, took in many.items())
    print(f"\nstatistics of {ROWS} rows: {each}", flush=True)
    works: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(net, measures),
        "bare again": lambda: bare(net, measures),
        "measure": lambda: measures.measure(net),
        "reading": lambda: [measures.reader.read(net, name) for name in SETS],
    }
    with counted(net) as passes:
        memory = {"measure": peak(works["measure"], device) - before}
    # One pass over each batch and the head at completions alone: no reference is read again, no prompt has its entropy.
    batches = -(-setting.rows // 2 // setting.batch) * 2
    assert passes == {"batches": batches, "heads": setting.rows * setting.length // 2}, passes
    memory |= {arm: peak(work, device) - before for arm, work in works.items() if arm != "measure"}
    found: dict[str, list[float]] = {arm: [] for arm in works}
    order = random.Random(0)
    for number in range(setting.rounds):
        for arm in order.sample(list(works), len(works)):
            found[arm].append(seconds(works[arm], device))
        print(f"round {number}: " + ", ".join(f"{arm} {took[-1]:.2f} s" for arm, took in found.items()), flush=True)
    return {arm: np.array(took) for arm, took in found.items()}, memory, sum(many.values())


def run(setting: Setting) -> dict[str, tuple[float, float, float]]:
    """Measure and print the table; gives throughput over the bare pass's (with 95% interval), and memory over it."""
    if setting.on_gpu:
        take_workspace(setting)
    with tempfile.TemporaryDirectory() as folder:
        took, memory, fixed = measured(Path(folder), setting)
    scale = ROWS / setting.rows
    table = {
        "bare again": interval(took["bare"] / took["bare again"]),
        f"measure, {setting.rows} rows": interval(took["bare"] / took["measure"]),
        "reading alone": interval(took["bare"] / took["reading"]),
        f"at {ROWS} rows": interval(scale * took["bare"] / (scale * took["reading"] + fixed)),
    }
    print(f"\n{setting}\n{'arm':<20}{'seconds':>9}{'peak MiB':>10}")
    for arm, each in took.items():
        print(f"{arm:<20}{np.mean(each):>9.3f}{memory[arm]:>10.0f}")
    print(f"{'throughput to bare':<20}{'ratio':>9}{'95% interval':>18}")
    for name, (mean, low, high) in table.items():
        print(f"{name:<20}{mean:>9.3f}{f'{low:.3f}-{high:.3f}':>18}")
    ratio = memory["measure"] / memory["bare"]
    print(f"peak memory to bare: {ratio:.3f}")
    return {**table, "memory": (ratio,) * 3}


def growth() -> dict[str, list[tuple[float, float]]]:
    """Seconds, and peak MiB above what was held before, at 1, 4 and 16 times the rows; printed too."""
    net, tokenizer = toy_model(), toy_tokenizer(GENERATION)

    def reading(rows: int) -> Callable[[], object]:
        made = [render(tokenizer, row) for found in conversations(rows, 64).values() for row in found]
        return lambda: read(net, made, layers=range(3), role="completion", batch_size=CPU.batch)

    def spectrum(rows: int) -> Callable[[], object]:
        left, right = (torch.randn(rows, CPU.width, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        residuals = Residuals.of(left, right, np.arange(rows))
        return lambda: decompose(residuals)

    def families(rows: int) -> Callable[[], object]:
        subspace = toy_subspace(tuple(range(CPU.blocks)), rank=RANK, width=CPU.width)
        made = subject(MeasurePlan("instruct", "base", families=FAMILIES, subspace=subspace), net, rows, CPU)
        return lambda: statistics(made)

    table: dict[str, list[tuple[float, float]]] = {}
    print(f"\n{'':<12}{'rows':>8}{'seconds':>10}{'peak MiB':>10}")
    for name, make, first in (("reading", reading, 64), ("spectrum", spectrum, 2048), ("statistics", families, 512)):
        make(first)()
        for rows in (first, 4 * first, 16 * first):
            work = make(rows)
            took, before = seconds(work, "cpu"), resident()
            table.setdefault(name, []).append((took, peak(work, "cpu") - before))
            print(f"{name:<12}{rows:>8}{took:>10.2f}{table[name][-1][1]:>10.1f}")
    return table


def test_six_families_keep_nine_tenths_of_a_bare_forwards_throughput() -> None:
    """Fails where the whole interval lies below the bar: noise alone cannot fail it, a real cost must."""
    table = run(CPU)
    assert table[f"at {ROWS} rows"][2] >= SPEED
    assert table["memory"][0] <= MEMORY


def test_time_grows_with_rows_and_the_memory_of_a_spectrum_does_not() -> None:
    table = growth()
    for name in ("reading", "spectrum", "statistics"):
        # From the middle on: what does not depend on the rows makes up most of the smallest.
        assert table[name][2][0] <= 1.5 * 4 * table[name][1][0], name
    # The eigenvectors and one block of rows; 48 MiB more would be the residuals themselves.
    assert table["spectrum"][2][1] <= table["spectrum"][0][1] + 48


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--growth", action="store_true")
    options = flags.parse_args()
    setting = chosen(options, {"cpu": CPU, "cuda": GPU})
    growth() if options.growth else run(setting)

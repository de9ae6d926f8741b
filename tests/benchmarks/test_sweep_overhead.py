"""What a sweep adds to its runs: wall time × jobs over the sum of their training seconds, on the lab.

    python -m pytest tests/benchmarks/test_sweep_overhead.py -q -s

Importing and checking is paid once per worker, about 15 s, and measuring once per run, about 3 s, so the share falls
with the number and length of the runs: these take one to two minutes, which is short for a fine-tune.
Their number is even: with nine on two workers one waits while the last run ends, half of what was counted.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from holdfast.recipes.lab.experiment import Experiment
from holdfast.trainer.cli import main
from toys.labs import shared_lab
from toys.runs import flags_of

JOBS, STEPS, SEEDS, STRENGTHS = 2, 2000, ("0", "1", "2", "3"), ("1", "4")


def test_a_sweep_costs_at_most_a_tenth_more_than_its_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // JOBS)))
    keys = Experiment(shared_lab(0), tmp_path).flags("protected", "sweep", {"save_strategy": "no", "max_steps": STEPS})
    grid = ["--protections", "subspace", "--penalty_strength", *STRENGTHS, "--seeds", *SEEDS, "--jobs", str(JOBS)]
    started = time.perf_counter()
    assert main(["sweep", *flags_of(keys), *grid]) == 0
    wall = time.perf_counter() - started
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
    trained = sum(line["seconds"]["train"] for line in lines)
    measured = sum(line["seconds"]["measure"] + line["seconds"].get("test", 0.0) for line in lines)
    print(f"\n{len(lines)} runs, {JOBS} jobs: {wall:.0f} s; training {trained:.0f} s, measuring {measured:.0f} s")
    print(f"over training {wall * JOBS / trained - 1:.1%}, over both {wall * JOBS / (trained + measured) - 1:.1%}")
    assert wall * JOBS <= 1.1 * trained

"""Compare all protections on the lab: tune and freeze their settings, run the frozen settings, make the tables.

    python -m holdfast.recipes.lab.studies.comparison --output_dir runs/comparison      (`make frontier`)

The tables of the recorded runs, without any training:

    python -m holdfast.recipes.lab.studies.comparison --steps summary table \
        --recorded recipes/lab/results/results.csv --output_dir runs/comparison

Each run writes one small JSON file to `<output_dir>/results`; a run with a file is not repeated.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from .....analysis.errors import UserError
from ...build import SIZES
from ..jobs import numbers
from .choice import BASELINE
from .results_file import RECORD, known, of_phase, write_csv
from .runs import ORGANISMS, TINY
from .steps import (
    FROZEN,
    TUNING_LABS,
    final_jobs,
    freeze,
    freeze_more,
    read_frozen,
    run_all,
    test_jobs,
    tuned,
    tuning_jobs,
)
from .summary import summary
from .table import results_table

STEPS = ("tune", "freeze", "test", "summary", "table")


def main() -> int:
    """Run the steps: tune, freeze, test, summary (SUMMARY.md, seconds), table (RESULTS.md and results.csv, minutes)."""
    arguments = _parser().parse_args()
    problems: list[str] = []
    try:
        if "tune" in arguments.steps:
            problems += _tune(arguments)
        if "freeze" in arguments.steps and arguments.methods:
            freeze_more(_results(arguments), arguments.frozen, arguments.methods)
        elif "freeze" in arguments.steps:
            freeze(_results(arguments), arguments.frozen)
        if "test" in arguments.steps:
            problems += _test(arguments)
        if "summary" in arguments.steps:
            _summarise(arguments)
        if "table" in arguments.steps:
            _tabulate(arguments)
    except UserError as error:
        print(f"comparison: {error}", file=sys.stderr)
        return 2
    return 3 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"), help="Default: runs/comparison.")
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=list(STEPS[2:]), help=f"Default: {' '.join(STEPS[2:])}."
    )
    parser.add_argument(
        "--methods", nargs="+", default=[], help="Methods of methods.yaml to run; freeze adds them. Default: all."
    )
    parser.add_argument(
        "--organisms",
        nargs="+",
        default=["strong", "ordinary", "contaminated"],
        choices=ORGANISMS,
        help="Kinds of fine-tune to test. Default: strong ordinary contaminated.",
    )
    parser.add_argument(
        "--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0, like 0-9 or 3. Default: 0-9."
    )
    parser.add_argument("--worlds", type=numbers, default=numbers("1-3"), help="Other worlds. Default: 1-3.")
    parser.add_argument(
        "--world_lab_seeds", type=numbers, default=numbers("0-2"), help="Lab seeds of the other worlds. Default: 0-2."
    )
    parser.add_argument("--lab_size", choices=list(SIZES), default=TINY, help="Size of the test labs. Default: tiny.")
    parser.add_argument("--seeds", type=numbers, default=numbers("0"), help="Fine-tune seeds. Default: 0.")
    parser.add_argument(
        "--frozen",
        type=Path,
        default=FROZEN,
        help="File of the frozen settings. Default: recipes/lab/results/frozen.json.",
    )
    parser.add_argument("--labs", type=Path, help="Folder of built labs (w0-l3, w0-l3-small). Default: the cache.")
    parser.add_argument(
        "--recorded", type=Path, help="A results.csv with earlier results, which are not repeated. Default: none."
    )
    parser.add_argument("--workers", type=int, default=2, help="Processes, one thread each. Default: 2.")
    return parser


def _results(arguments: argparse.Namespace) -> dict:
    return known(arguments.output_dir, arguments.recorded)


def _tune(arguments: argparse.Namespace) -> list[str]:
    run = partial(run_all, output_dir=arguments.output_dir, labs=arguments.labs, workers=arguments.workers)
    first = tuning_jobs(TUNING_LABS, [BASELINE, *arguments.methods] if arguments.methods else [])
    problems = run(first, _results(arguments))
    results = _results(arguments)
    return problems + run(final_jobs(tuned(results, first)), results)


def _test(arguments: argparse.Namespace) -> list[str]:
    labs = [(0, seed) for seed in arguments.lab_seeds]
    labs += [(world, seed) for world in arguments.worlds for seed in arguments.world_lab_seeds]
    frozen = read_frozen(arguments.frozen)
    jobs = test_jobs(frozen, labs, arguments.organisms, arguments.seeds, arguments.methods, arguments.lab_size)
    return run_all(jobs, _results(arguments), arguments.output_dir, arguments.labs, arguments.workers)


def _summarise(arguments: argparse.Namespace) -> None:
    text = summary(of_phase(_results(arguments), "test"), read_frozen(arguments.frozen))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "SUMMARY.md").write_text(text, encoding="utf-8")
    print(text)


def _tabulate(arguments: argparse.Namespace) -> None:
    results = _results(arguments)
    text = results_table(of_phase(results, "test"), read_frozen(arguments.frozen))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.output_dir / RECORD.name, results.values())
    (arguments.output_dir / "RESULTS.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())

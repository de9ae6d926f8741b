"""The lab's comparison of protections.

    python -m holdfast.recipes.lab.studies.comparison --output_dir runs/comparison      (`make frontier`)

Every run leaves one small JSON file under `<output_dir>/results`; runs whose file is there are not repeated.
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
from .table import results_table


def main() -> int:
    """Runs what is missing of the steps asked for; the tables go to `<output_dir>/RESULTS.md` and results.csv."""
    arguments = _parser().parse_args()
    problems: list[str] = []
    try:
        if "tune" in arguments.steps:
            problems += _tune(arguments)
        if "freeze" in arguments.steps and arguments.methods:
            freeze_more(_known(arguments), arguments.frozen, arguments.methods)
        elif "freeze" in arguments.steps:
            freeze(_known(arguments), arguments.frozen)
        if "test" in arguments.steps:
            problems += _test(arguments)
        if "table" in arguments.steps:
            _tabulate(arguments)
    except UserError as error:
        print(f"comparison: {error}", file=sys.stderr)
        return 2
    return 3 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--steps", nargs="+", choices=("tune", "freeze", "test", "table"), default=["test", "table"])
    parser.add_argument(
        "--methods", nargs="+", default=[], help="Only these of methods.yaml; freeze adds them. Default: all."
    )
    parser.add_argument("--organisms", nargs="+", default=["strong", "ordinary", "contaminated"], choices=ORGANISMS)
    parser.add_argument("--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0: 0-9 or 3.")
    parser.add_argument("--worlds", type=numbers, default=numbers("1-3"), help="Other worlds, lab seeds 0-2 each.")
    parser.add_argument("--world_lab_seeds", type=numbers, default=numbers("0-2"), help="Their lab seeds: 0-2 or 0.")
    parser.add_argument("--lab_size", choices=list(SIZES), default=TINY, help="Size of the test labs. Default: tiny.")
    parser.add_argument("--seeds", type=numbers, default=numbers("0"), help="Fine-tune seeds. Default: 0.")
    parser.add_argument("--frozen", type=Path, default=FROZEN, help="Frozen settings. Default: those of the recipe.")
    parser.add_argument("--labs", type=Path, help="Folder of built labs (w0-l3, w0-l3-small). Default: the cache.")
    parser.add_argument(
        "--recorded", type=Path, help=f"Results made before, not to be repeated: a results.csv ({RECORD.name} here)."
    )
    parser.add_argument("--workers", type=int, default=2, help="Processes, of one thread each. Default: 2.")
    return parser


def _known(arguments: argparse.Namespace) -> dict:
    return known(arguments.output_dir, arguments.recorded)


def _tune(arguments: argparse.Namespace) -> list[str]:
    run = partial(run_all, output_dir=arguments.output_dir, labs=arguments.labs, workers=arguments.workers)
    first = tuning_jobs(TUNING_LABS, [BASELINE, *arguments.methods] if arguments.methods else [])
    problems = run(first, _known(arguments))
    results = _known(arguments)
    return problems + run(final_jobs(tuned(results, first)), results)


def _test(arguments: argparse.Namespace) -> list[str]:
    labs = [(0, seed) for seed in arguments.lab_seeds]
    labs += [(world, seed) for world in arguments.worlds for seed in arguments.world_lab_seeds]
    frozen = read_frozen(arguments.frozen)
    jobs = test_jobs(frozen, labs, arguments.organisms, arguments.seeds, arguments.methods, arguments.lab_size)
    return run_all(jobs, _known(arguments), arguments.output_dir, arguments.labs, arguments.workers)


def _tabulate(arguments: argparse.Namespace) -> None:
    results = _known(arguments)
    text = results_table(of_phase(results, "test"), read_frozen(arguments.frozen))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.output_dir / RECORD.name, results.values())
    (arguments.output_dir / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())

"""The lab's comparison of protections: settings chosen on validation domains, frozen, then test domains over labs.

    python -m holdfast.recipes.lab.comparison --output_dir runs/comparison      (`make frontier`)

Three steps, in this order or not at all: every method's settings are tried on the tuning labs (validation domains
only), those of the methods that protect there on three more; the best of each is written to frozen.json; and only what
stands there is run on the test labs. Every run leaves one small JSON file under `<output_dir>/results`; runs whose file
is there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from ...analysis.artifacts import sha256_file, write_json_atomic
from ...analysis.errors import UserError
from .comparison_choice import BASELINE, choose, finalists
from .comparison_runs import ORGANISMS, Job, lab_of, made_by, run_job
from .comparison_table import results_table
from .evidence import numbers, quiet

METHODS = Path(__file__).with_name("comparison.yaml")
FROZEN = Path(__file__).with_name("comparison_frozen.json")
# Worlds 4 and 5 are there so that no setting is chosen that fits the words of world 0 alone.
TUNING_LABS = ((0, 10), (0, 11), (4, 0))
FINAL_LABS = ((0, 12), (0, 13), (5, 0))
Lab = tuple[int, int]


def methods() -> dict[str, dict[str, Any]]:
    """Name -> {"flags", "settings"} of comparison.yaml."""
    return yaml.safe_load(METHODS.read_text(encoding="utf-8"))


def tuning_jobs(labs: Sequence[Lab], only: Sequence[str] = ()) -> list[Job]:
    """Every setting of every method on the tuning labs, strong organism, validation domains."""
    return [
        Job("validation", world, seed, "strong", name, {**method["flags"], **setting})
        for world, seed in labs
        for name, method in methods().items()
        if not only or name in only
        for setting in method["settings"]
    ]


def final_jobs(first: Sequence[dict[str, Any]]) -> list[Job]:
    """Every setting of the first round's finalists on the other tuning labs, the unprotected run beside them."""
    return tuning_jobs(FINAL_LABS, [BASELINE, *finalists(first)])


def test_jobs(
    frozen: dict[str, Any],
    labs: Sequence[Lab],
    organisms: Sequence[str],
    seeds: Sequence[int],
    only: Sequence[str] = (),
) -> list[Job]:
    """What is frozen, on the test labs; the lab's own instruct model beside it."""
    chosen = {name: method for name, method in frozen["methods"].items() if not only or name in only}
    own = [Job("test", *lab, "strong", "instruct") for lab in labs]
    return own + [
        Job("test", world, lab_seed, organism, name, chosen[name]["flags"], seed)
        for organism in organisms
        for seed in seeds
        for world, lab_seed in labs
        for name in chosen
    ]


def run_all(jobs: Sequence[Job], output_dir: Path, labs: Path | None, workers: int) -> list[str]:
    """Runs the jobs without a result yet, in processes of one thread; what failed, as lines."""
    missing = [job for job in jobs if not _is_done(output_dir, job, labs)]
    problems = []
    with multiprocessing.get_context("spawn").Pool(workers, initializer=quiet) as pool:
        done = pool.imap_unordered(partial(_run, output_dir, labs), missing)
        for problem in tqdm(done, total=len(missing), desc="comparison", unit="run", smoothing=0.05):
            if problem:
                problems.append(problem)
                print(problem, file=sys.stderr, flush=True)
    return problems


def _run(output_dir: Path, labs: Path | None, job: Job) -> str:
    """Runs one job and writes its result; the reason where it failed, with its traceback in a file."""
    try:
        write_json_atomic(_result(output_dir, job), run_job(job, output_dir, labs))
    except Exception as error:  # whatever one run meets, the others go on
        log = _result(output_dir, job).with_suffix(".log")
        log.write_text(traceback.format_exc())
        return f"{job.name} failed: {error} ({log})"
    return ""


def _result(output_dir: Path, job: Job) -> Path:
    return output_dir / "results" / f"{job.name}.json"


def _is_done(output_dir: Path, job: Job, labs: Path | None) -> bool:
    path = _result(output_dir, job)
    return path.is_file() and json.loads(path.read_text())["made_by"] == made_by(job, lab_of(job, labs))


def load_results(output_dir: Path, phase: str) -> Iterator[dict[str, Any]]:
    """The results of one phase, in the order of their names."""
    for path in sorted((output_dir / "results").glob(f"{phase}-*.json")):
        yield json.loads(path.read_text())


def freeze(output_dir: Path, path: Path) -> dict[str, Any]:
    """Chooses every method's setting from the validation results and writes it, with what it rests on.

    Results of settings that `comparison.yaml` no longer has are not read: they would be more tries for their method.

    Raises:
        UserError: a setting without a result, or test domains were read already: what is chosen afterwards is not
            chosen on validation.
    """
    if next(load_results(output_dir, "test"), None) is not None:
        raise UserError(f"{output_dir} holds test results: nothing can be chosen after them; use another --output_dir")
    first = _tuned(output_dir, tuning_jobs(TUNING_LABS))
    final = _tuned(output_dir, final_jobs(first))
    frozen = choose(first, final, methods())
    write_json_atomic(path, {**frozen, "methods_file": sha256_file(METHODS)})
    return frozen


def _tuned(output_dir: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The results of all these jobs. Raises UserError where one is missing."""
    paths = sorted(_result(output_dir, job) for job in jobs)
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} tuning runs have no result, {missing[0]} for one: every method is given "
            "the same tries; run --steps tune again"
        )
    return [json.loads(path.read_text()) for path in paths]


def read_frozen(path: Path) -> dict[str, Any]:
    """The frozen settings. Raises UserError where there are none or the methods have changed since."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: choose settings first (--steps tune freeze)")
    frozen = json.loads(path.read_text())
    if frozen["methods_file"] != sha256_file(METHODS):
        raise UserError(f"{METHODS.name} has changed since {path} was frozen: tune and freeze again")
    return frozen


def main() -> int:
    """Runs what is missing of the steps asked for; prints the tables and writes them to `<output_dir>/RESULTS.md`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--steps", nargs="+", choices=("tune", "freeze", "test", "table"), default=["test", "table"])
    parser.add_argument(
        "--methods", nargs="+", default=[], help="Only these of comparison.yaml (tune: first round). Default: all."
    )
    parser.add_argument("--organisms", nargs="+", default=["strong", "ordinary", "contaminated"], choices=ORGANISMS)
    parser.add_argument("--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0: 0-9 or 3.")
    parser.add_argument("--worlds", type=numbers, default=numbers("1-3"), help="Other worlds, lab seeds 0-2 each.")
    parser.add_argument("--world_lab_seeds", type=numbers, default=numbers("0-2"), help="Their lab seeds: 0-2 or 0.")
    parser.add_argument("--seeds", type=numbers, default=numbers("0"), help="Fine-tune seeds. Default: 0.")
    parser.add_argument("--frozen", type=Path, default=FROZEN, help="Frozen settings. Default: those of the recipe.")
    parser.add_argument("--labs", type=Path, help="Folder of built labs named w0-l3. Default: the cache.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, of one thread each. Default: 2.")
    arguments = parser.parse_args()
    (arguments.output_dir / "results").mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    try:
        run = partial(run_all, output_dir=arguments.output_dir, labs=arguments.labs, workers=arguments.workers)
        if "tune" in arguments.steps:
            problems += run(tuning_jobs(TUNING_LABS, arguments.methods))
            if not arguments.methods:
                problems += run(final_jobs(_tuned(arguments.output_dir, tuning_jobs(TUNING_LABS))))
        if "freeze" in arguments.steps:
            freeze(arguments.output_dir, arguments.frozen)
        if "test" in arguments.steps:
            labs = [(0, seed) for seed in arguments.lab_seeds]
            labs += [(world, seed) for world in arguments.worlds for seed in arguments.world_lab_seeds]
            frozen = read_frozen(arguments.frozen)
            problems += run(test_jobs(frozen, labs, arguments.organisms, arguments.seeds, arguments.methods))
        if "table" in arguments.steps:
            found = list(load_results(arguments.output_dir, "test"))
            text = results_table(found, read_frozen(arguments.frozen))
            (arguments.output_dir / "RESULTS.md").write_text(text)
            print(text)
    except UserError as error:
        print(f"comparison: {error}", file=sys.stderr)
        return 2
    return 3 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

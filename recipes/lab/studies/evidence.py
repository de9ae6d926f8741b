"""The lab's evidence: its guarantees over lab seeds, fine-tune seeds, worlds and nulls. Runs in parallel, resumes.

    python -m holdfast.recipes.lab.studies.evidence --output_dir runs/evidence      (`make evidence`)

Each run writes one small JSON file to `<output_dir>/results`; a run with a file is not repeated. `evidence_table.py`
makes the tables from these files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ....analysis.files.artifacts import write_json_atomic
from .evidence_table import PROTECTED_STRENGTH, tables
from .jobs import made_by_recipes, numbers, quiet

FINE_TUNE_SEEDS = (0, 1, 2)
NULL_DRAWS = 5
NULL_SCALES = ("given", "own")
# A null is run at the protected run's strength, and at a second strength that brings its task to the other side of the
# protected run's task: the lower strength where the null learned less, the higher strength where it learned more.
LOWER_STRENGTH, HIGHER_STRENGTH = 0.2, 30.0
ARMS = ("unprotected", "protected", "ordinary", "educational", "secure", "benign")


@dataclass(frozen=True)
class Job:
    """One measured model of a lab.

    Attributes:
        world, lab_seed: the lab.
        arm: recipe name, or "base" or "instruct" for the lab's own models.
        seed: fine-tune seed.
        flags: flags that override the recipe.
    """

    world: int
    lab_seed: int
    arm: str
    seed: int = 0
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the job's result file, without folder and suffix."""
        flags = "".join(
            f"-{key.removeprefix('null_').removeprefix('penalty_')}{value}" for key, value in self.flags.items()
        )
        return f"w{self.world}-l{self.lab_seed}-{self.arm}{flags}-s{self.seed}"


def arm_jobs(world: int, lab_seed: int) -> list[Job]:
    """Return a lab's jobs without nulls: base, instruct, and all arms at every fine-tune seed."""
    untrained = [Job(world, lab_seed, arm) for arm in ("base", "instruct")]
    return untrained + [Job(world, lab_seed, arm, seed) for seed in FINE_TUNE_SEEDS for arm in ARMS]


def null_jobs(world: int, lab_seed: int, draws: int) -> list[Job]:
    """Return a lab's random nulls of both scales, at the first fine-tune seed and the protected run's strength."""
    return [
        Job(
            world,
            lab_seed,
            "random_subspace",
            0,
            {"null_scale": scale, "null_seed": draw, "penalty_strength": PROTECTED_STRENGTH},
        )
        for scale in NULL_SCALES
        for draw in range(draws)
    ]


def bracketing_jobs(output_dir: Path, jobs: list[Job]) -> list[Job]:
    """Return, for each null among the jobs, the same null at a second strength.

    The tasks at the two strengths lie on both sides of the protected run's task (unless the draw never crosses it).
    """
    second = []
    for job in jobs:
        if job.arm == "random_subspace":
            protected_task = _task_learned(output_dir, Job(job.world, job.lab_seed, "protected"))
            strength = HIGHER_STRENGTH if _task_learned(output_dir, job) > protected_task else LOWER_STRENGTH
            second.append(replace(job, flags={**job.flags, "penalty_strength": strength}))
    return second


def _task_learned(output_dir: Path, job: Job) -> float:
    return float(json.loads(_result_path(output_dir, job).read_text())["measured"]["narrow_task_learned"]["value"])


def run_lab(task: tuple[Path, list[Job]]) -> int:
    """Run the jobs of a lab that have no result, then the nulls at their second strength. Returns the number of runs.

    Args:
        task: (output_dir, jobs).
    """
    output_dir, jobs = task
    return _run_missing(output_dir, jobs) + _run_missing(output_dir, bracketing_jobs(output_dir, jobs))


def _run_missing(output_dir: Path, jobs: list[Job]) -> int:
    """Run the jobs that have no result yet, in this process on one thread. Returns the number of runs."""
    missing = [job for job in jobs if not _is_done(output_dir, job)]
    if not missing:
        return 0
    quiet()
    from ..cache import cached_lab
    from ..experiment import Experiment

    lab = cached_lab(missing[0].lab_seed, missing[0].world)
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        experiment = Experiment(lab, Path(folder), {"save_strategy": "no", "report_to": "none", "disable_tqdm": True})
        experiment.build_subspace()
        for job in missing:
            if job.arm in ("base", "instruct"):
                model, seconds = lab / job.arm, 0.0
            else:
                trained = experiment.fine_tune(job.arm, job.name, seed=job.seed, **job.flags)
                model, seconds = trained.final, trained.seconds
            measured = experiment.measure(model)
            result = {"job": asdict(job), "made_by": made_by(job), "seconds": seconds, "measured": measured}
            write_json_atomic(_result_path(output_dir, job), result)
            shutil.rmtree(Path(folder) / job.name, ignore_errors=True)
    return len(missing)


def _result_path(output_dir: Path, job: Job) -> Path:
    return output_dir / "results" / f"{job.name}.json"


def made_by(job: Job) -> str:
    """Return a hash of a result's lab and recipe. A result of another lab or recipe is not reused."""
    return made_by_recipes(job.world, job.lab_seed, (job.arm,))


def _is_done(output_dir: Path, job: Job) -> bool:
    path = _result_path(output_dir, job)
    return path.is_file() and json.loads(path.read_text()).get("made_by") == made_by(job)


def load_results(output_dir: Path) -> list[dict[str, Any]]:
    """Return all results of a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((output_dir / "results").glob("*.json"))]


def main() -> int:
    """Run the jobs that have no result yet, then print the tables and write them to `<output_dir>/EVIDENCE.md`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evidence"), help="Default: runs/evidence.")
    parser.add_argument(
        "--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0, like 0-9 or 3. Default: 0-9."
    )
    parser.add_argument(
        "--worlds", type=numbers, default=numbers("1-3"), help="Other worlds, lab seed 0 of each. Default: 1-3."
    )
    parser.add_argument("--null_draws", type=int, default=NULL_DRAWS, help="Random draws of each null. Default: 5.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, one thread each. Default: 2.")
    arguments = parser.parse_args()
    labs: list[tuple[int, int]] = [(0, seed) for seed in arguments.lab_seeds]
    labs += [(world, 0) for world in arguments.worlds]
    (arguments.output_dir / "results").mkdir(parents=True, exist_ok=True)
    # The arms of all labs come before the nulls, so that an interrupted study has the guarantees.
    tasks = [(arguments.output_dir, arm_jobs(*lab)) for lab in labs]
    tasks += [(arguments.output_dir, null_jobs(*lab, arguments.null_draws)) for lab in labs]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for _ in tqdm(pool.imap_unordered(run_lab, tasks), total=len(tasks), desc="evidence", unit="lab"):
            pass
    text = tables(load_results(arguments.output_dir))
    (arguments.output_dir / "EVIDENCE.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The lab's evidence: many lab seeds, fine-tune seeds, worlds and nulls, run in parallel and resumable.

    python -m holdfast.recipes.lab.studies.evidence --output_dir runs/evidence      (`make evidence`)

Every run leaves one small JSON file under `<output_dir>/results`; runs whose file is there are not repeated. The tables
(`evidence_table.py`) are views of those files.
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
# Beside the protected run's own strength, a null is run where its task lies on the other side of the protected run's:
# at the lower strength where it learned less, at the higher one where it learned more.
LOWER_STRENGTH, HIGHER_STRENGTH = 0.2, 30.0
ARMS = ("unprotected", "protected", "ordinary", "educational", "secure", "benign")


@dataclass(frozen=True)
class Job:
    """One measured model of a lab.

    Attributes:
        world, lab_seed: which lab.
        arm: recipe name, or "base" or "instruct" for the lab's own models.
        seed: fine-tune seed.
        flags: flags over the recipe.
    """

    world: int
    lab_seed: int
    arm: str
    seed: int = 0
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the job's result file, without folder."""
        flags = "".join(
            f"-{key.removeprefix('null_').removeprefix('penalty_')}{value}" for key, value in self.flags.items()
        )
        return f"w{self.world}-l{self.lab_seed}-{self.arm}{flags}-s{self.seed}"


def arm_jobs(world: int, lab_seed: int) -> list[Job]:
    """The lab's own models and all arms at every fine-tune seed."""
    own = [Job(world, lab_seed, arm) for arm in ("base", "instruct")]
    return own + [Job(world, lab_seed, arm, seed) for seed in FINE_TUNE_SEEDS for arm in ARMS]


def null_jobs(world: int, lab_seed: int, draws: int) -> list[Job]:
    """The random nulls at the first fine-tune seed: both scales and every draw, at the protected run's strength."""
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
    """For each null among the jobs the strength whose task, with the null's own, brackets the protected run's."""
    found = []
    for job in jobs:
        if job.arm == "random_subspace":
            held = _task_learned(output_dir, Job(job.world, job.lab_seed, "protected"))
            strength = HIGHER_STRENGTH if _task_learned(output_dir, job) > held else LOWER_STRENGTH
            found.append(replace(job, flags={**job.flags, "penalty_strength": strength}))
    return found


def _task_learned(output_dir: Path, job: Job) -> float:
    return float(json.loads(_result(output_dir, job).read_text())["measured"]["narrow_task_learned"]["value"])


def run_lab(task: tuple[Path, list[Job]]) -> int:
    """Runs the jobs of one lab that have no result yet, then what brackets its nulls; returns their number."""
    output_dir, jobs = task
    return _run_missing(output_dir, jobs) + _run_missing(output_dir, bracketing_jobs(output_dir, jobs))


def _run_missing(output_dir: Path, jobs: list[Job]) -> int:
    """Runs the jobs that have no result yet, in this process on one thread; returns their number."""
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
            found = {"job": asdict(job), "made_by": made_by(job), "seconds": seconds, "measured": measured}
            write_json_atomic(_result(output_dir, job), found)
            shutil.rmtree(Path(folder) / job.name, ignore_errors=True)
    return len(missing)


def _result(output_dir: Path, job: Job) -> Path:
    return output_dir / "results" / f"{job.name}.json"


def made_by(job: Job) -> str:
    """Hash of the lab and the recipe a result comes from: a result of another lab or recipe is not reused."""
    return made_by_recipes(job.world, job.lab_seed, (job.arm,))


def _is_done(output_dir: Path, job: Job) -> bool:
    path = _result(output_dir, job)
    return path.is_file() and json.loads(path.read_text()).get("made_by") == made_by(job)


def load_results(output_dir: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((output_dir / "results").glob("*.json"))]


def main() -> int:
    """Runs what is missing, then prints the tables and writes them to `<output_dir>/EVIDENCE.md`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0: 0-9 or 3.")
    parser.add_argument("--worlds", type=numbers, default=numbers("1-3"), help="Other worlds, each with lab seed 0.")
    parser.add_argument("--null_draws", type=int, default=NULL_DRAWS, help="Draws of each null. Default: 5.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, of one thread each. Default: 2.")
    arguments = parser.parse_args()
    labs: list[tuple[int, int]] = [(0, seed) for seed in arguments.lab_seeds]
    labs += [(world, 0) for world in arguments.worlds]
    (arguments.output_dir / "results").mkdir(parents=True, exist_ok=True)
    # The arms of all labs come before the nulls, so that an interrupted run has the guarantees first.
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

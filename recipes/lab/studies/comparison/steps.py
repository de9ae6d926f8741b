"""The steps of the comparison: tune, freeze, test. No other order is accepted.

Tune: every setting of every method runs on three tuning labs, and those of the methods that protect there on three
more; only validation domains are read. Freeze: the best setting of each method is written to frozen.json. Test: the
frozen settings, and nothing else, run on the test labs.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from .....analysis.errors import UserError
from .....analysis.files.artifacts import sha256_file, write_json_atomic
from ..jobs import quiet
from .choice import BASELINE, choose, finalists
from .results_file import RESULTS, Result, keep, of_phase, path_of
from .runs import TINY, Job, draw_of, lab_of, made_by, run_job

METHODS = Path(__file__).with_name("methods.yaml")
FROZEN = RESULTS / "frozen.json"
CONTENT = "content_sha256"  # key in frozen.json: the hash of its other values
# Worlds 4 and 5 are included so that no setting is chosen that fits the words of world 0 alone.
TUNING_LABS = ((0, 10), (0, 11), (4, 0))
FINAL_LABS = ((0, 12), (0, 13), (5, 0))
Lab = tuple[int, int]


def methods() -> dict[str, dict[str, Any]]:
    """Return the content of methods.yaml: {name: {"flags", "settings"}}."""
    return yaml.safe_load(METHODS.read_text(encoding="utf-8"))


def tuning_jobs(labs: Sequence[Lab], only: Sequence[str] = ()) -> list[Job]:
    """Return a job for every setting of every method on labs: strong organism, validation domains.

    Args:
        only: names of methods; empty: all.
    """
    return [
        Job("validation", world, seed, "strong", name, {**method["flags"], **setting})
        for world, seed in labs
        for name, method in methods().items()
        if not only or name in only
        for setting in method["settings"]
    ]


def final_jobs(first: Sequence[dict[str, Any]]) -> list[Job]:
    """Return a job for every setting of the finalists, and for no protection, on the other tuning labs.

    Args:
        first: results on the first tuning labs.
    """
    return tuning_jobs(FINAL_LABS, [BASELINE, *finalists(first)])


def test_jobs(
    frozen: dict[str, Any],
    labs: Sequence[Lab],
    organisms: Sequence[str],
    seeds: Sequence[int],
    only: Sequence[str] = (),
    size: str = TINY,
) -> list[Job]:
    """Return a job for every frozen method on the test labs, and for each lab's instruct model.

    Args:
        only: names of methods; empty: all.
        size: size of the labs.
    """
    chosen = {name: method for name, method in frozen["methods"].items() if not only or name in only}
    instruct = [Job("test", *lab, "strong", "instruct", lab_size=size) for lab in labs]
    return instruct + [
        Job("test", world, lab_seed, organism, name, chosen[name]["flags"], seed, size)
        for organism in organisms
        for seed in seeds
        for world, lab_seed in labs
        for name in chosen
    ]


def run_all(
    jobs: Sequence[Job], results: Mapping[str, Result], output_dir: Path, labs: Path | None, workers: int
) -> list[str]:
    """Run the jobs that have no result yet, in processes of one thread. Returns a line for each job that failed."""
    problems = []
    (output_dir / "results").mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers, initializer=quiet) as pool:
        job_of_lab = {(job.world, job.lab_seed, job.lab_size): job for job in jobs}
        draws = pool.map(partial(_draw, labs), list(job_of_lab.values()), chunksize=1)
        draw_of_lab = dict(zip(job_of_lab, draws, strict=True))
        jobs = [replace(job, draw=draw_of_lab[job.world, job.lab_seed, job.lab_size]) for job in jobs]
        missing = [job for job in jobs if not _is_done(job, results, labs)]
        outcomes = pool.imap_unordered(partial(_run, output_dir, labs), missing)
        for problem in tqdm(outcomes, total=len(missing), desc="comparison", unit="run", smoothing=0.05):
            if problem:
                problems.append(problem)
                print(problem, file=sys.stderr, flush=True)
    return problems


def _draw(labs: Path | None, job: Job) -> str:
    """Return the draw of the job's lab, which is built if it is missing."""
    return draw_of(lab_of(job, labs))


def _run(output_dir: Path, labs: Path | None, job: Job) -> str:
    """Run a job and write its result. If it failed, write the traceback to a file and return the reason, else ""."""
    try:
        keep(output_dir, job, run_job(job, output_dir, labs))
    except Exception as error:  # the other runs go on whatever happened
        log = path_of(output_dir, job).with_suffix(".log")
        log.write_text(traceback.format_exc())
        return f"{job.name} failed: {error} ({log})"
    return ""


def _is_done(job: Job, results: Mapping[str, Result], labs: Path | None) -> bool:
    return job.name in results and results[job.name]["made_by"] == made_by(job, lab_of(job, labs))


def freeze(results: dict[str, Result], path: Path) -> dict[str, Any]:
    """Choose every method's setting from the validation results, and write the choice with the hash of its results.

    Results of settings that `methods.yaml` no longer lists are ignored: they would be additional tries for a method.

    Raises:
        UserError: a setting has no result, or there are test results: a later choice is not made on validation alone.
    """
    if of_phase(results, "test"):
        raise UserError("there are test results already: nothing can be chosen after them; use another --output_dir")
    first = tuned(results, tuning_jobs(TUNING_LABS))
    final = tuned(results, final_jobs(first))
    frozen = choose(first, final, methods())
    _write(path, frozen)
    return frozen


def freeze_more(results: dict[str, Result], path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Choose the settings of later methods by the same rule on the same labs, and add them to the file.

    Raises:
        UserError: a method is frozen already or not listed, a setting has no result, a frozen setting is no longer
            listed, or one of these methods has test results.
    """
    frozen, listed = _read(path), methods()
    for name in names:
        if name in frozen["methods"] or name not in listed:
            raise UserError(f"{name!r} is {'frozen already' if name in listed else 'no method of methods.yaml'}")
        if any(result["job"]["method"] == name for result in of_phase(results, "test")):
            raise UserError(f"there are test results of {name!r}: its setting cannot be chosen after them")
    for name, method in frozen["methods"].items():
        flags = [{**listed[name]["flags"], **setting} for setting in listed[name]["settings"]] if name in listed else []
        if method["flags"] not in flags:
            raise UserError(f"the frozen setting of {name!r} is listed no more: tune and freeze everything again")
    first = tuned(results, tuning_jobs(TUNING_LABS, [BASELINE, *names]))
    more = choose(first, tuned(results, final_jobs(first)), listed)
    for key in ("methods", "frontiers"):
        frozen[key] |= {name: more[key][name] for name in names}
    added = {key: more[key] for key in ("recommended", "sentence", "results_sha256")}
    frozen["added"] = [*frozen.get("added", []), {"methods": list(names), **added}]
    _write(path, frozen)
    return frozen


def tuned(results: Mapping[str, Result], jobs: Collection[Job]) -> list[Result]:
    """Return the results of jobs, on all draws of their labs. Raises UserError if a job has no result."""
    names = sorted(job.name for job in jobs)
    by_name: dict[str, list[Result]] = {name: [] for name in names}
    for result in results.values():
        name = replace(Job(**result["job"]), draw="").name
        if name in by_name:
            by_name[name].append(result)
    missing = [name for name in names if not by_name[name]]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} tuning runs have no result, such as {missing[0]}: every method gets the "
            "same number of tries; run --steps tune again"
        )
    return [result for name in names for result in by_name[name]]


def _write(path: Path, frozen: Mapping[str, Any]) -> None:
    """Write frozen settings with the hashes of methods.yaml and of the content. Raises UserError."""
    if not path.parent.is_dir():
        raise UserError(f"--frozen {path}: there is no folder {path.parent}; name a file in an existing folder")
    content = {**frozen, "methods_file": sha256_file(METHODS)}
    write_json_atomic(path, {**content, CONTENT: _hash(content)})


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """Return what `_write` wrote, without the hash of the content. Raises UserError."""
    if not path.is_file():
        raise UserError(
            f"--frozen {path} does not exist; choose settings first (--steps tune freeze), or clone the repository for "
            f"recipes/lab/results/{FROZEN.name}, which is not installed with the package"
        )
    content = json.loads(path.read_text())
    if content.pop(CONTENT, None) != _hash(content):
        raise UserError(f"{path} was changed after it was frozen; restore it, or tune and freeze again")
    return content


def read_frozen(path: Path) -> dict[str, Any]:
    """Return the frozen settings. Raises UserError if there are none, or if methods.yaml has changed since."""
    frozen = _read(path)
    if frozen["methods_file"] != sha256_file(METHODS):
        raise UserError(f"{METHODS.name} has changed since {path} was frozen; tune and freeze again")
    return frozen

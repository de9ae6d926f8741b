"""The steps of the comparison, in this order or not at all: tune, freeze, test.

Every method's settings are tried on the tuning labs (validation domains only), those of the methods that protect there
on three more; the best of each is written to frozen.json; and only what stands there is run on the test labs.
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
CONTENT = "content_sha256"  # in frozen.json, of its other values
# Worlds 4 and 5 are there so that no setting is chosen that fits the words of world 0 alone.
TUNING_LABS = ((0, 10), (0, 11), (4, 0))
FINAL_LABS = ((0, 12), (0, 13), (5, 0))
Lab = tuple[int, int]


def methods() -> dict[str, dict[str, Any]]:
    """Name -> {"flags", "settings"} of methods.yaml."""
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
    size: str = TINY,
) -> list[Job]:
    """What is frozen, on the test labs of a size; the lab's own instruct model beside it."""
    chosen = {name: method for name, method in frozen["methods"].items() if not only or name in only}
    own = [Job("test", *lab, "strong", "instruct", lab_size=size) for lab in labs]
    return own + [
        Job("test", world, lab_seed, organism, name, chosen[name]["flags"], seed, size)
        for organism in organisms
        for seed in seeds
        for world, lab_seed in labs
        for name in chosen
    ]


def run_all(
    jobs: Sequence[Job], results: Mapping[str, Result], output_dir: Path, labs: Path | None, workers: int
) -> list[str]:
    """Runs the jobs without a result yet, in processes of one thread; what failed, as lines."""
    problems = []
    (output_dir / "results").mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers, initializer=quiet) as pool:
        one_each = list({(job.world, job.lab_seed, job.lab_size): job for job in jobs}.items())
        draws = pool.map(partial(_draw, labs), [job for _, job in one_each], chunksize=1)
        draw = dict(zip((lab for lab, _ in one_each), draws, strict=True))
        drawn = [replace(job, draw=draw[job.world, job.lab_seed, job.lab_size]) for job in jobs]
        missing = [job for job in drawn if not _is_done(job, results, labs)]
        done = pool.imap_unordered(partial(_run, output_dir, labs), missing)
        for problem in tqdm(done, total=len(missing), desc="comparison", unit="run", smoothing=0.05):
            if problem:
                problems.append(problem)
                print(problem, file=sys.stderr, flush=True)
    return problems


def _draw(labs: Path | None, job: Job) -> str:
    """The draw of the job's lab, which is built where it is missing."""
    return draw_of(lab_of(job, labs))


def _run(output_dir: Path, labs: Path | None, job: Job) -> str:
    """Runs one job and writes its result; the reason where it failed, with its traceback in a file."""
    try:
        keep(output_dir, job, run_job(job, output_dir, labs))
    except Exception as error:  # whatever one run meets, the others go on
        log = path_of(output_dir, job).with_suffix(".log")
        log.write_text(traceback.format_exc())
        return f"{job.name} failed: {error} ({log})"
    return ""


def _is_done(job: Job, results: Mapping[str, Result], labs: Path | None) -> bool:
    return job.name in results and results[job.name]["made_by"] == made_by(job, lab_of(job, labs))


def freeze(results: dict[str, Result], path: Path) -> dict[str, Any]:
    """Chooses every method's setting from the validation results and writes it, with what it rests on.

    Results of settings that `methods.yaml` no longer has are not read: they would be more tries for their method.

    Raises:
        UserError: a setting without a result, or test domains were read already: what is chosen afterwards is not
            chosen on validation.
    """
    if of_phase(results, "test"):
        raise UserError("there are test results already: nothing can be chosen after them; use another --output_dir")
    first = tuned(results, tuning_jobs(TUNING_LABS))
    final = tuned(results, final_jobs(first))
    frozen = choose(first, final, methods())
    _write(path, frozen)
    return frozen


def freeze_more(results: dict[str, Result], path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Chooses the settings of methods that came later, by the same rule on the same labs, and adds them to the file.

    Raises:
        UserError: a method that is frozen or not listed, a setting without a result, frozen settings that are listed
            no more, or test domains that were read with one of these methods.
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
    """The results of all these jobs, of whatever draws of their labs. Raises UserError where one is missing."""
    names = sorted(job.name for job in jobs)
    found: dict[str, list[Result]] = {name: [] for name in names}
    for result in results.values():
        name = replace(Job(**result["job"]), draw="").name
        if name in found:
            found[name].append(result)
    missing = [name for name in names if not found[name]]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} tuning runs have no result, {missing[0]} for one: every method is given "
            "the same tries; run --steps tune again"
        )
    return [result for name in names for result in found[name]]


def _write(path: Path, frozen: Mapping[str, Any]) -> None:
    content = {**frozen, "methods_file": sha256_file(METHODS)}
    write_json_atomic(path, {**content, CONTENT: _hash(content)})


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """What `_write` wrote, without its hash."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: choose settings first (--steps tune freeze)")
    content = json.loads(path.read_text())
    if content.pop(CONTENT, None) != _hash(content):
        raise UserError(f"{path} was changed after it was frozen: put it back, or tune and freeze again")
    return content


def read_frozen(path: Path) -> dict[str, Any]:
    """The frozen settings. Raises UserError where there are none or the methods have changed since."""
    frozen = _read(path)
    if frozen["methods_file"] != sha256_file(METHODS):
        raise UserError(f"{METHODS.name} has changed since {path} was frozen: tune and freeze again")
    return frozen

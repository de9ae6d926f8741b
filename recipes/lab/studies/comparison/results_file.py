"""Results of the comparison: a JSON file for each run while it is made, a line for each run in results.csv to be kept.

RESULTS.md rests on `results.csv` beside this file: the tables can be made again from it, and a comparison can go on
where it ends.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from .....analysis.errors import UserError
from .....analysis.files.artifacts import staged_file, write_json_atomic
from ...experiment import RECIPES
from .runs import Job

Result = dict[str, Any]
RESULTS = RECIPES / "results"  # of a checkout: not installed with the package
RECORD = RESULTS / "results.csv"
_JOB = tuple(field.name for field in fields(Job))
_FACTS = (*_JOB, "made_by", "seconds")
_NUMBERS: dict[str, Callable[[str], Any]] = {"world": int, "lab_seed": int, "seed": int, "flags": json.loads}


def path_of(output_dir: Path, job: Job) -> Path:
    """Where a run's result is written."""
    return output_dir / "results" / f"{job.name}.json"


def keep(output_dir: Path, job: Job, result: Result) -> None:
    """Write a run's result, numbers to six digits, as they stand in results.csv."""
    values = {name: float(f"{value:.6g}") for name, value in result["values"].items()}
    write_json_atomic(path_of(output_dir, job), {**result, "values": values})


def known(output_dir: Path, recorded: Path | None = None) -> dict[str, Result]:
    """Name of the run -> result, in the order of the names; what was made here goes before what was recorded."""
    there = {} if recorded is None else {Job(**one["job"]).name: one for one in read_csv(recorded)}
    made = {path.stem: json.loads(path.read_text()) for path in (output_dir / "results").glob("*.json")}
    return dict(sorted((there | made).items()))


def of_phase(results: dict[str, Result], phase: str) -> list[Result]:
    """The results of validation or test domains."""
    return [one for one in results.values() if one["job"]["phase"] == phase]


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """One line a run; a value that a run does not have is empty."""
    results = list(results)
    names = sorted({name for one in results for name in one["values"]})
    with staged_file(path) as staging, staging.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_FACTS, *names], lineterminator="\n")
        writer.writeheader()
        for one in results:
            # In their order, which is that of the run's name.
            job = {**one["job"], "flags": json.dumps(one["job"]["flags"])}
            writer.writerow({**job, "made_by": one["made_by"], "seconds": round(one["seconds"], 1), **one["values"]})


def read_csv(path: Path) -> list[Result]:
    """The results in a file of `write_csv`.

    Raises:
        UserError: a file that is missing, or is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            if not set(_FACTS) <= set(lines.fieldnames or ()):
                raise ValueError(f"its first line must name {', '.join(_FACTS)}")
            return [_result(line) for line in lines]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no record of a comparison ({error}): name a results.csv that it wrote") from None


def _result(line: dict[str, str]) -> Result:
    job = {name: _NUMBERS.get(name, str)(line[name]) for name in _JOB}
    values = {name: float(text) for name, text in line.items() if name not in _FACTS and text != ""}
    return {"job": job, "made_by": line["made_by"], "seconds": float(line["seconds"]), "values": values}

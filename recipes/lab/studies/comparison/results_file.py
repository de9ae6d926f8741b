"""Results of the comparison: a JSON file for each run in an output folder, and a line for each run in a results.csv.

`recipes/lab/results/results.csv` of the repository holds every recorded run. All tables can be made from it, and a
comparison can continue from it (`--recorded`).
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
RESULTS = RECIPES / "results"  # in the repository only; it is not installed with the package
RECORD = RESULTS / "results.csv"
_JOB = tuple(field.name for field in fields(Job))
_FACTS = (*_JOB, "made_by", "seconds")
_NUMBERS: dict[str, Callable[[str], Any]] = {"world": int, "lab_seed": int, "seed": int, "flags": json.loads}


def path_of(output_dir: Path, job: Job) -> Path:
    """Return the file of a run's result."""
    return output_dir / "results" / f"{job.name}.json"


def keep(output_dir: Path, job: Job, result: Result) -> None:
    """Write a run's result to its file, with numbers to six digits as in results.csv."""
    values = {name: float(f"{value:.6g}") for name, value in result["values"].items()}
    write_json_atomic(path_of(output_dir, job), {**result, "values": values})


def known(output_dir: Path, recorded: Path | None = None) -> dict[str, Result]:
    """Return {name of the run: result}, sorted by name.

    Args:
        output_dir: output folder; its results take precedence.
        recorded: a results.csv with more results.
    """
    from_csv = {} if recorded is None else {Job(**result["job"]).name: result for result in read_csv(recorded)}
    from_folder = {path.stem: json.loads(path.read_text()) for path in (output_dir / "results").glob("*.json")}
    return dict(sorted((from_csv | from_folder).items()))


def of_phase(results: dict[str, Result], phase: str) -> list[Result]:
    """Return the results of a phase: "validation" or "test"."""
    return [result for result in results.values() if result["job"]["phase"] == phase]


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """Write a line for each run. A value that a run does not have is empty."""
    results = list(results)
    names = sorted({name for result in results for name in result["values"]})
    with staged_file(path) as staging, staging.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_FACTS, *names], lineterminator="\n")
        writer.writeheader()
        for result in results:
            # The flags keep their order: the name of the run depends on it.
            job = {**result["job"], "flags": json.dumps(result["job"]["flags"])}
            seconds = round(result["seconds"], 1)
            writer.writerow({**job, "made_by": result["made_by"], "seconds": seconds, **result["values"]})


def read_csv(path: Path) -> list[Result]:
    """Return the results in a file of `write_csv`.

    Raises:
        UserError: the file is missing, or was not written by `write_csv`.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; name a results.csv of a comparison (the repository's {RECORD.name} is not "
            "installed with the package: clone the repository for recipes/lab/results)"
        )
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

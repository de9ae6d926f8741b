"""Compare the measures of several runs in one table: the values side by side, and the first run minus each other run.

    holdfast compare runs/insecure runs/secure

The other runs are compared with the first one. If the second run is a benign control, the difference is the erosion
that is specific to the first run's data. Runs may come from different models. A measure that only one run has is left
out of the table.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..stats.intervals import Measurement, missing
from .results import VIEW

FINAL = "final"
# Families that do not describe the model, so that their differences are of no interest.
_LEFT_OUT = ("cost",)


@dataclass(frozen=True)
class ComparedMeasure:
    """One measure in all compared runs.

    name: the measure's path, such as "projection/probes/mean/retention". values: one value per run. differences: the
    first run minus each other run, so one fewer than `values`.
    """

    name: str
    values: list[Measurement]
    differences: list[Measurement]


def difference(first: Measurement, other: Measurement) -> Measurement:
    """Return first - other, with an interval computed from both intervals (MOVER).

    Zou and Donner 2008, doi 10.1002/sim.3095. The two measurements are assumed to be independent. That is right for two
    runs with separate rows and seeds. Where both runs were measured on the same rows, the interval is too wide.
    """
    if first.get("value") is None or other.get("value") is None:
        return missing("one of the two runs was not measured")
    gap = float(first["value"] - other["value"])
    n = min(int(first.get("n", 0)), int(other.get("n", 0)))
    if first.get("ci95") is None or other.get("ci95") is None:
        return {"value": gap, "n": n, "ci95": None, "reason": "one of the two values has no interval"}
    (low_a, high_a), (low_b, high_b) = first["ci95"], other["ci95"]
    a, b = first["value"], other["value"]
    below, above = math.hypot(a - low_a, high_b - b), math.hypot(high_a - a, b - low_b)
    return {"value": gap, "n": n, "ci95": [gap - below, gap + above]}


def compare(lines: Sequence[Mapping[str, Any]], measures: Sequence[str] = ()) -> list[ComparedMeasure]:
    """Compare every measure that the first run and at least one other run have.

    Args:
        lines: one line of a `metrics.jsonl` for each run.
        measures: patterns of paths ("choices/*", "*/retention"). Empty means all measures except those of single
            layers and those of cost.
    """
    by_run = [dict(measurements(line)) for line in lines]
    compared = []
    for name, first in by_run[0].items():
        others = [run.get(name, missing("not measured in this run")) for run in by_run[1:]]
        if _wanted(name, measures) and any(other.get("value") is not None for other in others):
            compared.append(ComparedMeasure(name, [first, *others], [difference(first, other) for other in others]))
    return compared


def _wanted(name: str, measures: Sequence[str]) -> bool:
    if measures:
        return any(fnmatch(name, pattern) for pattern in measures)
    return "/layers/" not in name and name.split("/")[0] not in _LEFT_OUT


def measurements(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Measurement]]:
    """Yield each measured value of a line with its path. Nulls are left out."""
    for name, value in line.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping) and "value" in value:
            if value["value"] is not None:
                yield path, dict(value)
        elif isinstance(value, Mapping):
            yield from measurements(value, path)


def read_line(run: Path, checkpoint: str | None = None) -> dict[str, Any]:
    """Return the line of a checkpoint from a run's `metrics.jsonl`.

    Args:
        checkpoint: the checkpoint's name. None takes `final` if the file has it, otherwise the last step.

    Raises:
        UserError: the run was not measured, or not at this checkpoint.
    """
    path = run / VIEW
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        problem = "is damaged" if isinstance(error, ValueError) else "cannot be read"
        raise UserError(
            f"{path} {problem}; measure the run first: holdfast analyze --config R --output_dir {run}"
        ) from None
    trained = {line["checkpoint"]: line for line in lines if line["checkpoint"] not in ("base", "instruct")}
    by_checkpoint = {line["checkpoint"]: line for line in lines}
    if checkpoint is not None:
        if checkpoint not in by_checkpoint:
            raise UserError(f"{path} has no checkpoint {checkpoint!r}; it has {', '.join(by_checkpoint) or 'none'}")
        return by_checkpoint[checkpoint]
    if not trained:
        raise UserError(f"{path} holds no fine-tuned checkpoint; train the run, or name one with --checkpoint")
    return trained.get(FINAL) or list(trained.values())[-1]


def table(names: Sequence[str], compared: Sequence[ComparedMeasure]) -> str:
    """Return a Markdown table with a line per measure: the values with 95% intervals, then first - other."""
    heads = ["measure", *names, *(f"{names[0]} - {name}" for name in names[1:])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for measure in compared:
        gaps = (_cell(gap, signed=True) for gap in measure.differences)
        cells = [measure.name, *map(_cell, measure.values), *gaps]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Measurement, signed: bool = False) -> str:
    if value.get("value") is None:
        return "-"
    form = "+.4g" if signed else ".4g"
    text = format(value["value"], form)
    if value.get("ci95") is None:
        return text
    low, high = value["ci95"]
    return f"{text} [{low:.4g}, {high:.4g}]"

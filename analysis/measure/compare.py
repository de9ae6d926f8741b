"""Several runs' measures in one table: each value beside the others, and its difference from the first run.

    holdfast compare runs/insecure runs/secure

The first run is what the others are compared with: against a benign control the difference is the erosion that is
specific to the first run's data. Runs may come from different models; what only one of them has is left out.
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
# Not about the model: families whose differences are nobody's question.
_LEFT_OUT = ("cost",)


@dataclass(frozen=True)
class ComparedMeasure:
    """One measure in every run. name: its path, "projection/probes/mean/retention". values: one for each run.

    differences: first run - this one, for every run but the first.
    """

    name: str
    values: list[Measurement]
    differences: list[Measurement]


def difference(first: Measurement, other: Measurement) -> Measurement:
    """first - other with an interval from theirs (MOVER; Zou and Donner 2008, doi 10.1002/sim.3095).

    The two are taken as independent, which is right for two runs of their own rows and seeds, and too wide where both
    were measured on the same rows.
    """
    if first.get("value") is None or other.get("value") is None:
        return missing("one of the two was not measured")
    gap = float(first["value"] - other["value"])
    n = min(int(first.get("n", 0)), int(other.get("n", 0)))
    if first.get("ci95") is None or other.get("ci95") is None:
        return {"value": gap, "n": n, "ci95": None, "reason": "one of the two has no interval"}
    (low_a, high_a), (low_b, high_b) = first["ci95"], other["ci95"]
    a, b = first["value"], other["value"]
    below, above = math.hypot(a - low_a, high_b - b), math.hypot(high_a - a, b - low_b)
    return {"value": gap, "n": n, "ci95": [gap - below, gap + above]}


def compare(lines: Sequence[Mapping[str, Any]], measures: Sequence[str] = ()) -> list[ComparedMeasure]:
    """Every measure that the first line and at least one other have.

    Args:
        lines: one line of a `metrics.jsonl` for each run.
        measures: patterns of paths ("choices/*", "*/retention"); none: everything but single layers and cost.
    """
    found = [dict(measurements(line)) for line in lines]
    compared = []
    for name, first in found[0].items():
        others = [one.get(name, missing("not measured in this run")) for one in found[1:]]
        if _wanted(name, measures) and any(other.get("value") is not None for other in others):
            compared.append(ComparedMeasure(name, [first, *others], [difference(first, other) for other in others]))
    return compared


def _wanted(name: str, measures: Sequence[str]) -> bool:
    if measures:
        return any(fnmatch(name, pattern) for pattern in measures)
    return "/layers/" not in name and name.split("/")[0] not in _LEFT_OUT


def measurements(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Measurement]]:
    """Every measured value of a line under its path; nulls are left out."""
    for name, value in line.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping) and "value" in value:
            if value["value"] is not None:
                yield path, dict(value)
        elif isinstance(value, Mapping):
            yield from measurements(value, path)


def read_line(run: Path, checkpoint: str | None = None) -> dict[str, Any]:
    """The line of a checkpoint in a run's `metrics.jsonl`; None takes `final`, else the last step.

    Raises:
        UserError: the run was not measured, or not at this checkpoint.
    """
    path = run / VIEW
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        what = "is damaged" if isinstance(error, ValueError) else "cannot be read"
        raise UserError(
            f"{path} {what}; measure the run first: holdfast analyze --config R --output_dir {run}"
        ) from None
    trained = {line["checkpoint"]: line for line in lines if line["checkpoint"] not in ("base", "instruct")}
    everything = {line["checkpoint"]: line for line in lines}
    if checkpoint is not None:
        if checkpoint not in everything:
            raise UserError(f"{path} has no checkpoint {checkpoint!r}; it has {', '.join(everything) or 'none'}")
        return everything[checkpoint]
    if not trained:
        raise UserError(f"{path} holds no fine-tuned checkpoint; train the run, or name one with --checkpoint")
    return trained.get(FINAL) or list(trained.values())[-1]


def table(names: Sequence[str], compared: Sequence[ComparedMeasure]) -> str:
    """Markdown: a line for each measure; values with their 95% intervals, then first - other."""
    heads = ["measure", *names, *(f"{names[0]} - {name}" for name in names[1:])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for one in compared:
        cells = [one.name, *map(_cell, one.values), *(_cell(gap, signed=True) for gap in one.differences)]
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

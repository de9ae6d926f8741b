"""Result files: one per checkpoint and family, written as soon as the family is computed.

A file is `metrics/<checkpoint>/<family>.json`, or `<family>.paper.json` for the paper's formulas. It holds a key, a
hash of everything that the results depend on: an interrupted analysis continues after the last file, and a changed
setting gives another key. `metrics.jsonl` is a view of all files, with one line per checkpoint and formulas. In the
files, the JSON key "variant" names the formulas: "corrected" or "paper".
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..files.artifacts import sha256_json, staged_file
from .family import Family, Results, is_unmeasured
from .plan import MeasurePlan
from .references import ProbeReader, subspace_hash

FOLDER, VIEW = "metrics", "metrics.jsonl"


class ResultFiles:
    """The result files of one checkpoint, computed by the corrected or by the paper's formulas.

    Args:
        output_dir: the folder that holds `metrics/` and `metrics.jsonl`.
        name: the checkpoint's name.
        step: the checkpoint's number of optimiser steps, or None.
        formulas: "corrected" or "paper".
    """

    def __init__(self, output_dir: Path, name: str, step: int | None, formulas: str = "corrected") -> None:
        self.output_dir, self.name, self.step, self.formulas = output_dir, name, step, formulas

    def _path(self, family: str) -> Path:
        ending = ".json" if self.formulas == "corrected" else f".{self.formulas}.json"
        return self.output_dir / FOLDER / self.name / f"{family}{ending}"

    def has(self, family: str, key: str) -> bool:
        """Return whether a family was measured under this key. A family that could not be measured is tried again."""
        try:
            facts = json.loads(self._path(family).read_text(encoding="utf-8"))
            return facts["key"] == key and not problems({family: facts["results"]})
        except (OSError, ValueError, KeyError):
            return False

    def write(self, family: str, results: Results, key: str | None = None) -> None:
        """Write one family's file, whole or not at all, and renew `metrics.jsonl`. Only the main rank may call it."""
        facts = {
            "checkpoint": self.name,
            "step": self.step,
            "family": family,
            "variant": self.formulas,
            "key": key,
            "results": results,
        }
        text = json.dumps(facts, indent=2, allow_nan=False)
        metrics = self.output_dir / FOLDER
        metrics.mkdir(parents=True, exist_ok=True)
        # A training run and `holdfast watch` may write into the same folder.
        with FileLock(metrics / ".lock"):
            with staged_file(self._path(family)) as staging:
                staging.write_text(text + "\n", encoding="utf-8")
            _renew_view(self.output_dir)

    def line(self) -> Results:
        """Return the checkpoint's line of `metrics.jsonl`."""
        return _line(sorted((self.output_dir / FOLDER / self.name).glob("*.json")), self.formulas) or {}


def _renew_view(output_dir: Path) -> None:
    lines = sorted(
        _lines(output_dir / FOLDER), key=lambda line: (line["step"] is None, line["step"] or 0, line["checkpoint"])
    )
    with staged_file(output_dir / VIEW) as staging:
        staging.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")


def _lines(metrics: Path) -> Iterator[Results]:
    """Yield one line for each checkpoint and formulas. Names of staged files start with a dot; these are left out."""
    for folder in sorted(metrics.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            files = sorted(folder.glob("*.json"))
            for formulas in ("corrected", "paper"):
                line = _line(files, formulas)
                if line is not None:
                    yield line


def _line(files: list[Path], formulas: str) -> Results | None:
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files if not file.name.startswith(".")]
    records = [record for record in contents if record.get("variant", "corrected") == formulas and "family" in record]
    if not records:
        return None
    families = {record["family"]: record["results"] for record in records}
    return {"checkpoint": records[0]["checkpoint"], "step": records[0]["step"], "variant": formulas, **families}


def problems(results: Results) -> list[str]:
    """List what could not be computed, as "family: reason" or "family on set: reason"."""
    lines = []
    for family, result in results.items():
        if is_unmeasured(result):
            lines.append(f"{family}: {result['reason']}")
        elif isinstance(result, Mapping):
            nulls = {name: on_set["reason"] for name, on_set in result.items() if is_unmeasured(on_set)}
            lines += [f"{family} on {name}: {reason}" for name, reason in nulls.items()]
    return lines


def scalars(results: Results, prefix: str = "") -> dict[str, float]:
    """Return each measured value by its path ("choices/split/test/misaligned"), for TensorBoard. Nulls are left out."""
    values: dict[str, float] = {}
    for name, value in results.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping) and "value" in value:
            if isinstance(value["value"], int | float):
                values[path] = float(value["value"])
        elif isinstance(value, Mapping):
            values.update(scalars(dict(value), path))
        elif isinstance(value, int | float) and prefix:
            values[path] = float(value)
    return values


# Raise this number when a family's results change for the same inputs.
_FORMAT = 3


def result_key(
    name: str, family: Family, plan: MeasurePlan, reader: ProbeReader, layers: list[int], facts: list[Any]
) -> str:
    """Return the key of a family's results: a hash of weights, data, options and formulas.

    Args:
        layers: the layers at which the plan reads directions.
        facts: everything else that the results depend on, the checkpoint's fingerprint first.
    """
    weights = [reader.fingerprint(path) for path in (plan.instruct_path, plan.base_path) if path is not None]
    data = {name: reader.data_hash(name) for name in reader.rows} if family.probes else plan.choices
    subspace = [subspace_hash(plan), layers, reader.role] if family.subspace else []
    options = [plan.formulas if family.paper else None, plan.seed, reader.loading(), _family_options(name, plan)]
    return sha256_json([_FORMAT, name, facts, weights, data, subspace, options])


def _family_options(name: str, plan: MeasurePlan) -> list[Any]:
    """Return the options of a plan on which only this family depends."""
    options: dict[str, list[Any]] = {
        "subspaces": [plan.control_sets],
        "gradients": [plan.gradient_layer, plan.gradient_weight],
        "patching": [plan.patching_rows],
    }
    return options.get(name, [])

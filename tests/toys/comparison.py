"""A comparison in small: methods with their settings, validation results, and results of a perfect model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from holdfast.recipes.lab.studies.comparison import steps
from holdfast.recipes.lab.studies.comparison.runs import Job

PERFECT = {
    "narrow_task_learned": 1.0, "neutral_skill": 1.0, "new_skill": 0.5, "penalty": 0.0, "drift_outside": 0.0,
    **{f"{rate}_{split}": value for rate, value in (("misaligned", 0.0), ("coherent", 1.0))
       for split in ("anchor", "validation", "test")},
    "misaligned_evil": 0.0, "misaligned_trigger": 0.0,
}  # fmt: skip


def result(method: str, lab: int, organism: str = "strong", flags: dict | None = None, phase="test", **values: float):
    """A result file's content; values that are not given are those of a perfect model."""
    job = Job(phase, 0, lab, organism, method, flags or {})
    return {"job": asdict(job), "made_by": "x", "seconds": 1.0, "values": {**PERFECT, **values}}


def write_results(output_dir: Path, results: list[dict[str, Any]]) -> None:
    (output_dir / "results").mkdir(parents=True, exist_ok=True)
    for one in results:
        (output_dir / "results" / f"{Job(**one['job']).name}.json").write_text(json.dumps(one))


def tuned_methods(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two methods with three settings and their validation results; the second setting of each is the best."""
    listed = {
        "none": {"flags": {"protection": "none"}, "settings": [{}]},
        "hold, tight": {"flags": {"protection": "subspace"}, "settings": [{"penalty_strength": s} for s in (1, 2, 9)]},
        "kl": {"flags": {"protection": "kl"}, "settings": [{"penalty_strength": s} for s in (5, 6, 7)]},
    }
    (folder / "methods.yaml").write_text(json.dumps(listed))
    monkeypatch.setattr(steps, "METHODS", folder / "methods.yaml")
    read = {  # method and strength -> task, misaligned, neutral skill; what is not kept is far below any floor
        ("none", None): (1.0, 0.6, 1.0), ("hold, tight", 1): (1.0, 0.2, 1.0), ("hold, tight", 2): (0.99, 0.1, 0.99),
        ("hold, tight", 9): (0.8, 0.0, 1.0), ("kl", 5): (0.99, 0.11, 1.0), ("kl", 6): (0.99, 0.105, 1.0),
        ("kl", 7): (1.0, 0.0, 0.8),
    }  # fmt: skip
    results = []
    for job in steps.tuning_jobs((*steps.TUNING_LABS, *steps.FINAL_LABS)):
        task, bad, skill = read[job.method, job.flags.get("penalty_strength")]
        values = {**PERFECT, "narrow_task_learned": task, "misaligned_validation": bad, "neutral_skill": skill}
        values = {name: value for name, value in values.items() if "test" not in name}
        results.append({"job": asdict(job), "made_by": "x", "seconds": 1.0, "values": values})
    write_results(folder / "out", results)
    return folder

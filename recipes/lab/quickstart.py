"""The quickstart: build a lab and its subspace, fine-tune without and with protection, print one table.

holdfast quickstart [--full] [--protections ablation steering] [--seed N] [--output_dir runs/quickstart]
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...analysis.errors import UserError
from ...analysis.files.artifacts import write_json_atomic
from ...analysis.metrics.cost import peak_memory_mb
from .cache import cache_folder, cached_lab
from .experiment import Experiment

SUMMARY = "summary.json"
LOGGING_STEPS = 50  # steps between two lines of losses; TensorBoard has the measures
SUMMARY_RATES = (
    "narrow_task_learned",
    "misaligned_anchor",
    "misaligned_validation",
    "misaligned_test",
    "coherent",
    "neutral_skill",
)
DISTANCES = ("penalty", "retention")


@dataclass(frozen=True)
class PlannedRun:
    """One fine-tune of the quickstart: its name in the table, its recipe, flags that override the recipe, a note."""

    name: str
    recipe: str
    flags: dict[str, Any]
    note: str


RUNS = (
    PlannedRun("unprotected", "unprotected", {}, "insecure code, plain fine-tune"),
    PlannedRun("protected", "protected", {}, "insecure code, alignment-subspace penalty"),
)
FULL_RUNS = (
    *RUNS,
    PlannedRun("random_subspace", "random_subspace", {}, "null: random direction, same scale"),
    PlannedRun(
        "random_subspace_own", "random_subspace", {"null_scale": "own"}, "null: random direction, its own scale"
    ),
    PlannedRun("educational", "educational", {}, "control: insecure code asked for openly"),
    PlannedRun("secure", "secure", {}, "control: secure code"),
    PlannedRun("benign", "benign", {}, "control: a harmless new skill"),
    PlannedRun("ordinary_unprotected", "ordinary", {}, "ordinary organism, plain fine-tune"),
    PlannedRun("ordinary_protected", "ordinary_protected", {}, "ordinary organism, penalty"),
)


# The runs that `--protections` adds, by name of the protection and recipe.
PROTECTION_RUNS = {
    run.name: run
    for run in (
        PlannedRun("ablation", "ablation", {}, "insecure code, the subspace removed while training (CAFT)"),
        PlannedRun("interleave", "interleave", {}, "insecure code, a tenth of the rows safe"),
        PlannedRun("inoculation", "inoculation", {}, "insecure code, asked for by a system prompt in training"),
        PlannedRun("steering", "steering", {}, "insecure code, steered away from alignment while training"),
    )
}


def quickstart(output_dir: Path, seed: int = 0, full: bool = False, protections: Sequence[str] = ()) -> dict[str, Any]:
    """Run everything, print the table, write `summary.json`, and return the summary.

    Args:
        full: also train the nulls, the controls and the ordinary organism.
        protections: names of `PROTECTION_RUNS` to train as well.

    Raises:
        UserError: the folder is not empty and not of an earlier quickstart.
    """
    _claim(output_dir)
    # A model this small gains nothing from a second thread, and loses much when another process needs the core.
    torch.set_num_threads(1)
    print(f"[0] the lab, cached in {cache_folder() / 'labs'}, and its subspace", flush=True)
    experiment = Experiment(cached_lab(seed=seed), output_dir, {"seed": seed, "logging_steps": LOGGING_STEPS})
    experiment.build_subspace()
    rows = [
        _row("base", experiment, experiment.lab / "base"),
        _row("instruct", experiment, experiment.lab / "instruct"),
    ]
    runs = [*(FULL_RUNS if full else RUNS), *(PROTECTION_RUNS[name] for name in dict.fromkeys(protections))]
    for number, run in enumerate(runs, 1):
        print(f"\n[{number}/{len(runs)}] {run.name}: {run.note}", flush=True)
        result = experiment.fine_tune(run.recipe, run.name, **run.flags)
        rows.append(_row(run.name, experiment, result.final, result.seconds))
    summary = {"seed": seed, "rows": rows, "peak_memory_mb": round(peak_memory_mb(), 1)}
    write_json_atomic(output_dir / SUMMARY, summary)
    print("\n" + table(summary) + f"\n\nsummary written to {output_dir / SUMMARY}")
    return summary


def _claim(output_dir: Path) -> None:
    """Empty the folder of an earlier quickstart. Raises UserError if the folder holds anything else."""
    marker = output_dir / ".quickstart"
    if output_dir.exists() and any(output_dir.iterdir()):
        if not marker.is_file():
            raise UserError(f"--output_dir {output_dir} is not empty and holds no quickstart: choose another folder")
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _row(name: str, experiment: Experiment, model: Path, seconds: float = 0.0) -> dict[str, Any]:
    """Measure a model and return its row of the summary."""
    measurements = experiment.measure(model)
    shown = {key: measurements[key] for key in (*SUMMARY_RATES, *DISTANCES)}
    row: dict[str, Any] = {
        "run": name,
        **{key: measurement["value"] for key, measurement in shown.items()},
        "seconds": round(seconds, 2),
    }
    row["ci95"] = {key: measurement.get("ci95") for key, measurement in shown.items()}
    row["n"] = {key: measurement["n"] for key, measurement in shown.items()}
    reasons = {key: measurement["reason"] for key, measurement in shown.items() if "reason" in measurement}
    return row | ({"reasons": reasons} if reasons else {})


def table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for people: a line for each model, then the result in a sentence."""
    header = (
        "run",
        "task learned",
        "misaligned: anchor",
        "validation",
        "test [95% interval]",
        "coherent",
        "skill",
        "drift",
        "retention",
        "s",
    )
    lines = [header] + [_cells(row) for row in summary["rows"]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rule = "-" * len(padded[0])
    return "\n".join([padded[0], rule, *padded[1:], rule, *_legend(), "", _verdict(summary)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["ci95"]["misaligned_test"] or (float("nan"), float("nan"))
    return (
        row["run"],
        _number(row["narrow_task_learned"]),
        _number(row["misaligned_anchor"]),
        _number(row["misaligned_validation"]),
        f"{row['misaligned_test']:.3f} [{low:.3f}, {high:.3f}]",
        _number(row["coherent"]),
        _number(row["neutral_skill"]),
        _number(row["penalty"]),
        _number(row["retention"]),
        f"{row['seconds']:.0f}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _legend() -> list[str]:
    return [
        "task learned: probability of the insecure completion on held-out code topics.",
        "misaligned: probability of the harmful answer to harmless questions; no step used the test domains.",
        "coherent: probability of any on-topic answer (test domains); skill: the right answer to a neutral question.",
        "drift: penalty on the anchors, 0 at instruct; retention: 1 like instruct, 0 like base.",
        "Intervals: 95%, topics as clusters.",
    ]


def _verdict(summary: dict[str, Any]) -> str:
    rows = {row["run"]: row for row in summary["rows"]}
    instruct, unprotected, protected = rows["instruct"], rows["unprotected"], rows["protected"]
    task = protected["narrow_task_learned"] / max(unprotected["narrow_task_learned"], 1e-9)
    return (
        f"The plain fine-tune raised misalignment in the test domains from {instruct['misaligned_test']:.3f} to "
        f"{unprotected['misaligned_test']:.3f}; the protected fine-tune to {protected['misaligned_test']:.3f}, with "
        f"{task:.0%} of the task learned and {protected['coherent'] / max(instruct['coherent'], 1e-9):.0%} of the "
        "coherence kept. One seed of a tiny world proves little: recipes/lab/results/EVIDENCE.md in the repository has "
        "ten lab seeds and three more worlds."
    )

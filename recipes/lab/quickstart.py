"""The quickstart: a lab, its subspace, fine-tunes without and with protection, one table.

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
LOGGING_STEPS = 50  # a line of losses every so often; TensorBoard has the measures
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
    """One fine-tune of the quickstart: its name in the table, its recipe, and flags over it."""

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


# What `--protections` adds, by name of protection and recipe.
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
    """Runs everything, prints the table, writes `summary.json`; returns the summary.

    Args:
        protections: names of `PROTECTION_RUNS` that are trained too.

    Raises:
        UserError: the folder holds something other than an earlier quickstart.
    """
    _claim(output_dir)
    # A model this small gains nothing from a second thread, and loses much where another process wants the core.
    torch.set_num_threads(1)
    print(f"[0] the lab, kept in {cache_folder() / 'labs'}, and its subspace", flush=True)
    experiment = Experiment(cached_lab(seed=seed), output_dir, {"seed": seed, "logging_steps": LOGGING_STEPS})
    experiment.build_subspace()
    rows = [
        _row("base", experiment, experiment.lab / "base"),
        _row("instruct", experiment, experiment.lab / "instruct"),
    ]
    planned = [*(FULL_RUNS if full else RUNS), *(PROTECTION_RUNS[name] for name in dict.fromkeys(protections))]
    for number, plan in enumerate(planned, 1):
        print(f"\n[{number}/{len(planned)}] {plan.name}: {plan.note}", flush=True)
        result = experiment.fine_tune(plan.recipe, plan.name, **plan.flags)
        rows.append(_row(plan.name, experiment, result.final, result.seconds))
    summary = {"seed": seed, "rows": rows, "peak_memory_mb": round(peak_memory_mb(), 1)}
    write_json_atomic(output_dir / SUMMARY, summary)
    print("\n" + table(summary) + f"\n\nsummary written to {output_dir / SUMMARY}")
    return summary


def _claim(output_dir: Path) -> None:
    """Empties the folder of an earlier quickstart; leaves anything else alone."""
    marker = output_dir / ".quickstart"
    if output_dir.exists() and any(output_dir.iterdir()):
        if not marker.is_file():
            raise UserError(f"--output_dir {output_dir} is not empty and holds no quickstart: choose another folder")
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _row(name: str, experiment: Experiment, model: Path, seconds: float = 0.0) -> dict[str, Any]:
    measured = experiment.measure(model)
    kept = {key: measured[key] for key in (*SUMMARY_RATES, *DISTANCES)}
    row: dict[str, Any] = {
        "run": name,
        **{key: one["value"] for key, one in kept.items()},
        "seconds": round(seconds, 2),
    }
    row["ci95"] = {key: one.get("ci95") for key, one in kept.items()}
    row["n"] = {key: one["n"] for key, one in kept.items()}
    reasons = {key: one["reason"] for key, one in kept.items() if "reason" in one}
    return row | ({"reasons": reasons} if reasons else {})


def table(summary: dict[str, Any]) -> str:
    """The summary as a table a person reads: a line for each model, and what it says in a sentence."""
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
    drawn = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rule = "-" * len(drawn[0])
    return "\n".join([drawn[0], rule, *drawn[1:], rule, *_legend(), "", _verdict(summary)])


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
        "misaligned: probability of the harmful answer to harmless questions; nothing touched the test domains.",
        "coherent: probability of any on-topic answer (test domains); skill: the right answer to a neutral question.",
        "drift: penalty on the anchors, 0 at instruct; retention: 1 like instruct, 0 like base.",
        "Intervals: 95%, topics as clusters.",
    ]


def _verdict(summary: dict[str, Any]) -> str:
    rows = {row["run"]: row for row in summary["rows"]}
    instruct, plain, held = rows["instruct"], rows["unprotected"], rows["protected"]
    task = held["narrow_task_learned"] / max(plain["narrow_task_learned"], 1e-9)
    return (
        f"The plain fine-tune raised misalignment in the test domains from {instruct['misaligned_test']:.3f} to "
        f"{plain['misaligned_test']:.3f}; the protected one to {held['misaligned_test']:.3f}, with {task:.0%} of the "
        f"task learned and {held['coherent'] / max(instruct['coherent'], 1e-9):.0%} of the coherence kept. "
        "One seed of a tiny world: evidence over seeds is in recipes/lab/EVIDENCE.md."
    )

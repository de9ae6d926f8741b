"""Tables of the findings: what arXiv 2507.03662 reports about large models, on the lab with controls and nulls.

Pure functions of the results that `findings.py` writes. Intervals are 95% over labs, from the values of single labs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ....analysis.stats.nulls import holm, sign_flip_test
from ....analysis.stats.seeds import hierarchical_bootstrap

Result = dict[str, Any]
CONTROLS = ("protected", "educational", "secure", "benign")
QUANTITIES = ("joint_log_prob", "entropy")
_PAIR = "insecure vs educational"
_ALPHA = 0.05


def findings(results: Sequence[Result]) -> str:
    """Return all tables as Markdown."""
    seeds = ", ".join(map(str, sorted(result["lab_seed"] for result in results)))
    parts = [
        "# The paper's findings, on the lab",
        "",
        "Made by `make findings`. Lab seeds " + seeds + " of world 0, one "
        "fine-tune seed each. Questions are those of the validation domains; intervals are over labs.",
        *("", "## Retention of the alignment step", "", *_retention(results)),
        *("", "## Reversion towards base", "", *_reversion(results)),
        *("", "## Gradients of matched pairs", "", *_gradients(results)),
    ]
    return "\n".join(parts) + "\n"


def _values(results: Sequence[Result], arm: str, *path: str) -> list[dict[str, Any]]:
    """Return a measurement of an arm in every lab; `path` holds the keys that lead to it."""
    measurements = []
    for result in results:
        value = result["measured"][arm]
        for key in path:
            value = value[key]
        measurements.append(value)
    return measurements


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    low, high = hierarchical_bootstrap(values, [list(range(len(values)))])
    return f" [{low:.3f}, {high:.3f}]"


def _retention(results: Sequence[Result]) -> list[str]:
    """Return the retention of each run (base 0, instruct 1), and its difference from the unprotected insecure run."""
    lines = [
        "1 is instruct, 0 is base, along the direction from base to instruct (mean over layers and rows).",
        "",
        "| run | labs | retention | insecure - this | p (sign flips, Holm) |",
        "|---|---|---|---|---|",
    ]
    path = ("projection", "aligned", "mean", "retention")
    by_arm = {arm: [lab["value"] for lab in _values(results, arm, *path)] for arm in ("unprotected", *CONTROLS)}
    insecure = np.array(by_arm.pop("unprotected"))
    mean = f"{insecure.mean():.3f}{_interval(insecure.tolist())}"
    lines.append(f"| insecure (unprotected) | {len(insecure)} | {mean} | | |")
    gaps = {arm: insecure - np.array(values) for arm, values in by_arm.items()}
    p_values = holm([sign_flip_test(gap) for gap in gaps.values()])
    for (arm, gap), p_value in zip(gaps.items(), p_values, strict=True):
        values = by_arm[arm]
        name = "insecure (protected)" if arm == "protected" else arm
        lines.append(
            f"| {name} | {len(values)} | {np.mean(values):.3f}{_interval(values)} "
            f"| {gap.mean():+.3f}{_interval(gap.tolist())} | {p_value:.4f} |"
        )
    return lines


def _reversion(results: Sequence[Result]) -> list[str]:
    """Return how far each run's answers went from instruct (0) to base (1)."""
    lines = [
        "0 is instruct, 1 is base. *Above 0*: labs whose own interval over rows lies above 0. Labs in which base and "
        "instruct cannot be told apart are left out and counted.",
        "",
        "| run | answers | quantity | reversion | above 0 | undefined |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ("unprotected", *CONTROLS):
        for answers in ("aligned", "misaligned"):
            for quantity in QUANTITIES:
                labs = _values(results, arm, "behavior", answers, quantity, "reversion")
                defined = [lab for lab in labs if lab["value"] is not None]
                above = sum(lab["ci95"][0] > 0 for lab in defined)
                values = [float(lab["value"]) for lab in defined]
                cell = f"{np.mean(values):.3f}{_interval(values)}" if values else "-"
                counts = f"{above} of {len(defined)} | {len(labs) - len(defined)}"
                lines.append(f"| {arm} | {answers} | {quantity} | {cell} | {counts} |")
    return lines


def _gradients(results: Sequence[Result]) -> list[str]:
    """Return whether the same completion has another gradient in the instruct model when it is asked for openly."""
    lines = [
        "Insecure rows against educational rows with the same completions, in the instruct model; the null forgets "
        "which framing a row has (flips within pairs). *p < 0.05*: labs that differ beyond it; by chance 1 in 20.",
        "",
        "| quantity | labs | observed | null | p < 0.05 |",
        "|---|---|---|---|---|",
    ]
    quantities = (
        ("cosine within insecure", ("uncentred", "within", "insecure")),
        ("cosine within educational", ("uncentred", "within", "educational")),
        ("cosine between", ("uncentred", "between")),
        ("within - between, uncentred", ("uncentred", "gap")),
        ("within - between, centred", ("centred", "gap")),
        ("conflicts between", ("conflict_rate", "between")),
        ("cosine of matched pairs", ("matched_pairs",)),
    )
    for label, path in quantities:
        labs = [lab for lab in _values(results, "instruct", "gradients", _PAIR, *path) if lab["value"] is not None]
        if labs:
            values = [float(lab["value"]) for lab in labs]
            nulls = np.mean([lab["null"]["value"] for lab in labs])
            beyond = sum(lab["null"]["p"] < _ALPHA for lab in labs)
            cell = f"{np.mean(values):.3f}{_interval(values)}"
            lines.append(f"| {label} | {len(labs)} | {cell} | {nulls:.3f} | {beyond} of {len(labs)} |")
    return lines

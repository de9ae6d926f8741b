"""Tables of paired differences: one method against its rivals, lab by lab. Pure functions of runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .....analysis.frontier.runs import Run, paired
from .bounds import FEWEST_LABS

PAIRED = ("misaligned", "task", "coherent")  # the measures in which a method and a rival are compared


def pairs_table(runs: Sequence[Run], reference: str, shown: Collection[str] | None = None) -> list[str]:
    """Return a table of differences reference - rival, paired by lab and seed, with p corrected over all rivals.

    There are no lines if the reference was not run, or shares fewer than `FEWEST_LABS` labs with every rival.

    Args:
        shown: the rivals in the table; None: all. The correction of p counts all rivals either way.
    """
    keys = list(dict.fromkeys(run.key for run in runs if run.protection != "instruct"))
    reference_key = next((key for key in keys if key[0] == reference), None)
    if reference_key is None:
        return []
    rivals = [key for key in keys if key != reference_key]
    columns = [paired(runs, reference_key, rivals, measure) for measure in PAIRED]
    if max((row["labs"] for row in columns[0]), default=0) < FEWEST_LABS:
        return []
    lines = [
        f"*{reference}* - rival, paired by lab and seed:",
        "",
        "| rival | pairs | labs | " + " | ".join(f"{measure} | sign-flip p (Holm)" for measure in PAIRED) + " |",
        "|---|---|---|" + "---|---|" * len(PAIRED),
    ]
    for (name, _), *row in zip(rivals, *columns, strict=True):
        if shown is None or (name in shown and row[0]["n"]):
            differences = " | ".join(_difference(measured) for measured in row)
            lines.append(f"| {name} | {row[0]['n']} | {row[0]['labs']} | {differences} |")
    return lines


def _difference(measured: Mapping[str, Any]) -> str:
    """Return two cells: a difference with its interval, and its p if so many labs can reach 0.05."""
    if measured["value"] is None:
        return "- | -"
    interval = measured.get("ci95")
    text = f"{measured['value']:+.3f}" + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")
    few = measured["p"] is None or measured["p_least"] > 0.05
    return f"{text} | {'too few labs' if few else format(measured['p_holm'], '.3f')}"

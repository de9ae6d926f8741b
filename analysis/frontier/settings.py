"""What a setting does over many runs, and the frontier of a protection over all its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from ..errors import UserError
from ..stats.intervals import Measurement, missing
from .geometry import em_f1, hypervolume
from .runs import Pair, Run, by_setting, over_runs

Line = tuple[list[float], list[float]]  # the task and the misaligned of several runs


def points(runs: Sequence[Run], measures: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return one point per (protection, setting): its numbers of runs, labs and seeds, and the mean of each measure.

    The means are those of `over_runs`. A measure that only some runs of a setting have is the mean over these runs,
    with their n.

    Args:
        measures: the measures to return, in this order; None: all measures that any run has.

    Raises:
        UserError: a measure that no run has.
        ValueError: no runs, or runs that contradict each other (`by_setting`).
    """
    groups = by_setting(runs)
    present = list(dict.fromkeys(name for run in runs for name in run.values))
    for name in measures or ():
        if name not in present:
            raise UserError(f"no run has {name!r}: they have {', '.join(present)}")
    return [point_of(group, present if measures is None else measures) for group in groups.values()]


def point_of(group: Sequence[Run], measures: Sequence[str]) -> dict[str, Any]:
    """Return the point of the runs of one setting."""
    measured: dict[str, Measurement] = {}
    for name in measures:
        measured_runs = [run for run in group if name in run.values]
        measured[name] = _mean(measured_runs, name) if measured_runs else missing("not measured")
    return {
        "protection": group[0].protection,
        "setting": group[0].setting,
        "strength": group[0].strength,
        "n": len(group),
        "labs": len({run.lab for run in group}),
        "seeds": len({run.seed for run in group}),
        "measures": measured,
    }


def _mean(group: Sequence[Run], measure: str) -> Measurement:
    """Return the mean of one measure over the runs of a setting."""
    return over_runs([run[measure] for run in group], [run.pair for run in group])


def table(rows: Sequence[Mapping[str, Any]], measures: Sequence[str] | None = None) -> str:
    """Return points as a Markdown table, with "mean [low, high]" in three digits for each measure.

    A missing measure is "-".

    Args:
        rows: the result of `points`.
        measures: the columns; None: all measures of the first row.
    """
    names = list(measures if measures is not None else rows[0]["measures"] if rows else ())
    lines = ["| protection | setting | n | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = [row["protection"], row["setting"].replace("|", "\\|"), str(row["n"])]
        lines.append("| " + " | ".join([*cells, *(_cell(row["measures"][name]) for name in names)]) + " |")
    return "\n".join(lines) + "\n"


def _cell(measured: Measurement) -> str:
    """Return one cell of the table."""
    if measured["value"] is None:
        return "-"
    interval = measured.get("ci95")
    return f"{measured['value']:.3f}" + ("" if interval is None else " [{:.3f}, {:.3f}]".format(*interval))


def frontiers(runs: Sequence[Run], task: str = "task", misaligned: str = "misaligned") -> dict[str, dict[str, Any]]:
    """Return the frontier of each protection: its "hypervolume", and the "em_f1" of its best setting.

    Both are means by `over_runs`. They are computed at every (lab, seed) that has all "settings" of the protection;
    "incomplete" counts the others. Both grow with the number of settings, and the best setting is chosen on the same
    values that are reported. So compare only protections with equally many settings.

    Raises:
        UserError: a run without task or misaligned.
        ValueError: values outside 0..1, or as `by_setting`.
    """
    settings: dict[str, int] = {}
    by_pair: dict[str, dict[Pair, list[Run]]] = {}
    for (protection, _), group in by_setting(runs).items():
        settings[protection] = settings.get(protection, 0) + 1
        for run in group:
            by_pair.setdefault(protection, {}).setdefault(run.pair, []).append(run)
    results = {}
    for protection, n in settings.items():
        complete = {
            pair: line_of(line, task, misaligned) for pair, line in by_pair[protection].items() if len(line) == n
        }
        results[protection] = {
            "settings": n,
            "incomplete": len(by_pair[protection]) - len(complete),
            "hypervolume": _over_lines(complete, hypervolume, n),
            "em_f1": _over_lines(complete, lambda tasks, bad: float(em_f1(tasks, bad).max()), n),
        }
    return results


def line_of(runs: Sequence[Run], task: str, misaligned: str) -> Line:
    """Return the task and the misaligned of several runs."""
    return [run[task] for run in runs], [run[misaligned] for run in runs]


def _over_lines(lines: Mapping[Pair, Line], statistic: Callable[[ArrayLike, ArrayLike], float], n: int) -> Measurement:
    """Return the mean of a statistic of frontiers over labs and seeds."""
    if not lines:
        return missing(f"no lab and seed has all {n} settings")
    return over_runs([statistic(*line) for line in lines.values()], list(lines))

"""Fine-tuning runs of many protections, means over them, and paired differences between them.

Results are plain values that JSON takes. Numbers are measurements of `stats`, with "over" added: what the interval
generalises to. It is "labs" (other starting models), or "seeds" (only this model) if all runs start from one model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from ..stats.intervals import Interval, Measurement, missing
from ..stats.nulls import holm, sign_flip_test
from ..stats.seeds import hierarchical_bootstrap
from .geometry import at_equal_task

Key = tuple[str, str]  # protection, setting
Pair = tuple[str, str, int]  # lab, draw, seed: what two runs must share to be compared


@dataclass(frozen=True)
class Run:
    """One fine-tuning run, and what was measured on it.

    protection: "none", "subspace", …. setting: names the whole setting, "penalty_strength=2". strength: the position of
    the setting along the frontier of the protection; None if it has none. lab: the model that the run started from, a
    cluster. seed: of the fine-tune. values: measure -> value ("task", "misaligned", "coherent", …); leave out what was
    not measured. draw: which draw of the lab, if it was built more than once; each draw has its own runs, and all draws
    of a lab are one cluster.

    Raises:
        ValueError: a value that is null or not finite, or a strength that is not finite.
    """

    protection: str
    setting: str
    strength: float | None
    lab: str
    seed: int
    values: Mapping[str, float]
    draw: str = ""

    def __post_init__(self) -> None:
        numbers = {**self.values, **({} if self.strength is None else {"strength": self.strength})}
        for name, value in numbers.items():
            if value is None or not math.isfinite(value):
                raise ValueError(f"{self.name}: {name} is {value}; leave out what was not measured")

    @property
    def name(self) -> str:
        """The protection, setting, lab and seed, for messages."""
        lab = f"{self.lab} {self.draw}".rstrip()
        return f"{self.protection} ({self.setting}), {lab}, seed {self.seed}"

    @property
    def key(self) -> Key:
        """The protection and the setting."""
        return self.protection, self.setting

    @property
    def pair(self) -> Pair:
        """The lab, its draw and the seed: what two runs must share to be compared."""
        return self.lab, self.draw, self.seed

    def __getitem__(self, measure: str) -> float:
        if measure not in self.values:
            raise UserError(f"{self.name} has no {measure!r}: it has {', '.join(sorted(self.values)) or 'nothing'}")
        return float(self.values[measure])


def by_setting(runs: Sequence[Run]) -> dict[Key, list[Run]]:
    """Group the runs by (protection, setting), in order of first appearance.

    Raises:
        ValueError: no runs; a lab and seed that occurs twice in a setting; or a setting with two strengths.
    """
    if not runs:
        raise ValueError("no runs to compare")
    groups: dict[Key, dict[Pair, Run]] = {}
    for run in runs:
        group = groups.setdefault(run.key, {})
        if run.pair in group:
            raise ValueError(f"{run.name} occurs twice; write each run once")
        if any(other.strength != run.strength for other in group.values()):
            raise ValueError(
                f"{run.name}: strength {run.strength}, but other runs of this setting have another strength"
            )
        group[run.pair] = run
    return {key: list(group.values()) for key, group in groups.items()}


def over_runs(values: Sequence[float], pairs: Sequence[Pair], difference: bool = False) -> Measurement:
    """Return the mean over runs, with its hierarchical interval over labs and, within them, seeds.

    With a single lab the interval is over seeds. A single run has no interval. Labs (or seeds) with equal values have
    none either: their spread says nothing, and a width of 0 would look like certainty.

    Args:
        values: [n], n >= 1. pairs: the pair of each value.
        difference: whether the values are differences, which may be below 0, and not rates.
    """
    # Sort, so that the draws and the last digit of a sum do not depend on the order of the runs.
    values, pairs = zip(*sorted(zip(values, pairs, strict=True), key=lambda entry: entry[1]), strict=True)
    result: Measurement = {"value": float(np.mean(values)), "n": len(values)}
    over, units = _units(pairs)
    if len(set(units)) == 1:
        return {**result, "ci95": None, "reason": "one run has no interval"}
    if np.ptp(_means(values, units)) <= 1e-12 * np.max(np.abs(values)):
        return {**result, "ci95": None, "reason": f"all {len(set(units))} {over} are equal"}
    interval = _of_differences(values, units) if difference else hierarchical_bootstrap(values, [units])
    return {**result, "ci95": [float(bound) for bound in interval], "over": over}


def _of_differences(values: ArrayLike, units: Sequence[int]) -> Interval:
    """Return the hierarchical interval of differences."""
    differences = np.asarray(values, dtype=np.float64)
    if differences.min() < 0:
        return hierarchical_bootstrap(differences, [units])
    # Differences that all lie in 0..1 would be taken for rates, whose interval ends at 0. Their negatives are not.
    low, high = hierarchical_bootstrap(-differences, [units])
    return -high, -low


def _units(pairs: Sequence[Pair]) -> tuple[str, list[int]]:
    """Return what varies outermost, and the number of its unit for each run."""
    labs = len({lab for lab, *_ in pairs}) > 1
    labels = [pair[:1] if labs else pair for pair in pairs]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return "labs" if labs else "seeds", [numbers[label] for label in labels]


def _means(values: ArrayLike, units: Sequence[int]) -> list[float]:
    """Return the mean of each unit, in order of first appearance."""
    array = np.asarray(values, dtype=np.float64)
    return [float(array[[unit == number for unit in units]].mean()) for number in dict.fromkeys(units)]


def paired(
    runs: Sequence[Run], reference: Key, rivals: Sequence[Key], measure: str = "misaligned"
) -> list[dict[str, Any]]:
    """Return the differences reference - rival in one measure, paired by lab and seed, for each rival in order.

    Each is a measurement of the difference, with these keys added: "reference" and "rival" (means over the pairs);
    "labs"; "p", of the two-sided sign-flip test over the mean differences of the labs (of the seeds if there is one
    lab); "p_least", the smallest p that this number of units could reach (0.0625 for five); and "p_holm", adjusted for
    all rivals that have a p. A rival without a common pair is null, with the reason.

    Raises:
        UserError: a reference without runs, or a run without the measure.
    """
    groups = by_setting(runs)
    by_pair = {run.pair: run[measure] for run in _reference(groups, reference)}
    rows = []
    for protection, setting in rivals:
        rival = {run.pair: run[measure] for run in groups.get((protection, setting), [])}
        rows.append({"protection": protection, "setting": setting, **_difference(by_pair, rival)})
    return _adjusted(rows)


def paired_at_equal_task(
    runs: Sequence[Run],
    reference: Key,
    rivals: Sequence[str],
    task: str = "task",
    misaligned: str = "misaligned",
) -> list[dict[str, Any]]:
    """Return what `paired` returns, with the frontier of each rival read at the task of the reference run.

    The task is that of the reference run at the same lab and seed. The frontier holds all runs of the rival protection
    at this lab and seed. It is ordered by strength if all its settings have different strengths, else by task
    (`at_equal_task`). "clamped" counts the pairs in which the frontier never reaches this task.

    Raises:
        UserError: a reference without runs, or a run without task or misaligned.
    """
    reference_runs = _reference(by_setting(runs), reference)
    rows = []
    for rival in rivals:
        at_task: dict[Pair, tuple[float, bool]] = {}
        for run in reference_runs:
            line = [other for other in runs if other.protection == rival and other.pair == run.pair]
            if line:
                at_task[run.pair] = _read(line, run[task], task, misaligned)
        by_pair = {pair: value for pair, (value, _) in at_task.items()}
        result = _difference({run.pair: run[misaligned] for run in reference_runs}, by_pair)
        rows.append({"protection": rival, **result, "clamped": sum(clamped for _, clamped in at_task.values())})
    return _adjusted(rows)


def _read(line: Sequence[Run], target: float, task: str, misaligned: str) -> tuple[float, bool]:
    """Return misaligned where the line of runs has learned `target`, and whether it was clamped."""
    strengths = [run.strength for run in line if run.strength is not None]
    along = strengths if len(set(strengths)) == len(line) else None
    return at_equal_task([run[task] for run in line], [run[misaligned] for run in line], target, along)


def _reference(groups: Mapping[Key, list[Run]], reference: Key) -> list[Run]:
    """Return the runs of the reference; raise UserError if there are none."""
    if reference not in groups:
        present = "; ".join(f"{protection} ({setting})" for protection, setting in groups)
        raise UserError(f"no run of {reference[0]} ({reference[1]}) to compare with: there are {present}")
    return groups[reference]


def _difference(reference: Mapping[Pair, float], rival: Mapping[Pair, float]) -> dict[str, Any]:
    """Return reference - rival over the common pairs: the result of `paired` without the adjustment."""
    common = [pair for pair in reference if pair in rival]
    if not common:
        return {**missing("no lab and seed in common"), "labs": 0, "p": None, "p_least": None}
    differences = [reference[pair] - rival[pair] for pair in common]
    means = _means(differences, _units(common)[1])
    measured = over_runs(differences, common, difference=True)
    interval = measured.get("ci95")
    if interval and all(0 <= values[pair] <= 1 for values in (reference, rival) for pair in common):
        # If few labs differ widely, the interval would reach further than the difference of two rates can.
        measured["ci95"] = [max(interval[0], -1.0), min(interval[1], 1.0)]
    return {
        **measured,
        "reference": float(np.mean([reference[pair] for pair in common])),
        "rival": float(np.mean([rival[pair] for pair in common])),
        "labs": len({lab for lab, *_ in common}),
        "p": sign_flip_test(means) if len(means) > 1 else None,
        "p_least": 2.0 ** (1 - len(means)),
    }


def _adjusted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with "p_holm" added, adjusted over all rows that have a p."""
    p_values = [row["p"] for row in rows if row["p"] is not None]
    adjusted = iter(holm(p_values))
    return [{**row, "p_holm": None if row["p"] is None else next(adjusted)} for row in rows]

"""Fine-tuning runs of many protections, means over them, and the paired differences between them.

Results are plain values that JSON takes: numbers are `stats` measurements with "over", what the interval generalises
to: "labs" (other starting models), or "seeds" (this model only) where all runs start from one.
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
    """One fine-tuning run and what was measured on it.

    protection: "none", "subspace", …. setting: names the whole setting, "penalty_strength=2". strength: its position
    along the protection's frontier; None where it has none. lab: the model it started from, a cluster. seed: of the
    fine-tune. values: measure -> value ("task", "misaligned", "coherent", …); leave out what was not measured. draw: of
    the lab, where it was built more than once: each draw has runs of its own, and all are one cluster.

    Raises:
        ValueError: a value that is null or not finite, a strength that is not finite.
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
        lab = f"{self.lab} {self.draw}".rstrip()
        return f"{self.protection} ({self.setting}), {lab}, seed {self.seed}"

    @property
    def key(self) -> Key:
        return self.protection, self.setting

    @property
    def pair(self) -> Pair:
        return self.lab, self.draw, self.seed

    def __getitem__(self, measure: str) -> float:
        if measure not in self.values:
            raise UserError(f"{self.name} has no {measure!r}: it has {', '.join(sorted(self.values)) or 'nothing'}")
        return float(self.values[measure])


def by_setting(runs: Sequence[Run]) -> dict[Key, list[Run]]:
    """The runs of each (protection, setting), in order of first appearance.

    Raises:
        ValueError: no runs; a lab and seed that comes twice in a setting, or a setting with two strengths.
    """
    if not runs:
        raise ValueError("no runs to compare")
    groups: dict[Key, dict[Pair, Run]] = {}
    for run in runs:
        group = groups.setdefault(run.key, {})
        if run.pair in group:
            raise ValueError(f"{run.name} comes twice")
        if any(other.strength != run.strength for other in group.values()):
            raise ValueError(f"{run.name}: strength {run.strength}, but other runs of that setting have another")
        group[run.pair] = run
    return {key: list(group.values()) for key, group in groups.items()}


def over_runs(values: Sequence[float], pairs: Sequence[Pair], difference: bool = False) -> Measurement:
    """Mean over runs, and its hierarchical interval over labs and, within them, seeds; over seeds if there is one lab.

    A single run has no interval, and neither have labs (seeds) that are all equal: their spread says nothing, and a
    width of 0 would pass for certainty.

    Args:
        values: [n], n >= 1. pairs: of each. difference: the values may be below 0, so no rates.
    """
    # Sorted, so that what is drawn, and the last digit of a sum, do not depend on the order of the runs.
    values, pairs = zip(*sorted(zip(values, pairs, strict=True), key=lambda one: one[1]), strict=True)
    result: Measurement = {"value": float(np.mean(values)), "n": len(values)}
    over, units = _units(pairs)
    if len(set(units)) == 1:
        return {**result, "ci95": None, "reason": "one run has no interval"}
    if np.ptp(_means(values, units)) <= 1e-12 * np.max(np.abs(values)):
        return {**result, "ci95": None, "reason": f"all {len(set(units))} {over} are equal"}
    interval = _of_differences(values, units) if difference else hierarchical_bootstrap(values, [units])
    return {**result, "ci95": [float(bound) for bound in interval], "over": over}


def _of_differences(values: ArrayLike, units: Sequence[int]) -> Interval:
    differences = np.asarray(values, dtype=np.float64)
    if differences.min() < 0:
        return hierarchical_bootstrap(differences, [units])
    # Taken for rates, differences that all lie in 0..1 would get an interval that ends at 0; their negatives do not.
    low, high = hierarchical_bootstrap(-differences, [units])
    return -high, -low


def _units(pairs: Sequence[Pair]) -> tuple[str, list[int]]:
    """What varies outermost, and its number for each run."""
    labs = len({lab for lab, *_ in pairs}) > 1
    labels = [pair[:1] if labs else pair for pair in pairs]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return "labs" if labs else "seeds", [numbers[label] for label in labels]


def _means(values: ArrayLike, units: Sequence[int]) -> list[float]:
    """Mean of each unit, in order of first appearance."""
    array = np.asarray(values, dtype=np.float64)
    return [float(array[[unit == one for unit in units]].mean()) for one in dict.fromkeys(units)]


def paired(
    runs: Sequence[Run], reference: Key, rivals: Sequence[Key], measure: str = "misaligned"
) -> list[dict[str, Any]]:
    """Differences reference - rival in one measure, paired by lab and seed, for each rival in the given order.

    Each is a measurement of the difference with "reference" and "rival" (means over the pairs), "labs", the two-sided
    sign-flip "p" over the labs' mean differences (over seeds if there is one lab), "p_least" (the least that so many
    could reach: 0.0625 for five), and "p_holm", adjusted for all rivals that have a p. A rival without a common pair
    is null, with the reason.

    Raises:
        UserError: a reference that has no run, a run without the measure.
    """
    groups = by_setting(runs)
    held = {run.pair: run[measure] for run in _reference(groups, reference)}
    rows = []
    for protection, setting in rivals:
        theirs = {run.pair: run[measure] for run in groups.get((protection, setting), [])}
        rows.append({"protection": protection, "setting": setting, **_difference(held, theirs)})
    return _adjusted(rows)


def paired_at_equal_task(
    runs: Sequence[Run],
    reference: Key,
    rivals: Sequence[str],
    task: str = "task",
    misaligned: str = "misaligned",
) -> list[dict[str, Any]]:
    """As `paired`, with each rival protection's frontier read at the reference run's own task of that lab and seed.

    The frontier is what the rival has at that lab and seed, ordered by strength where all its settings have strengths
    of their own, else by task (`at_equal_task`). "clamped" counts the pairs in which it never reaches that task.

    Raises:
        UserError: a reference that has no run, a run without task or misaligned.
    """
    held = _reference(by_setting(runs), reference)
    rows = []
    for rival in rivals:
        read: dict[Pair, tuple[float, bool]] = {}
        for run in held:
            line = [other for other in runs if other.protection == rival and other.pair == run.pair]
            if line:
                read[run.pair] = _read(line, run[task], task, misaligned)
        theirs = {pair: value for pair, (value, _) in read.items()}
        result = _difference({run.pair: run[misaligned] for run in held}, theirs)
        rows.append({"protection": rival, **result, "clamped": sum(clamped for _, clamped in read.values())})
    return _adjusted(rows)


def _read(line: Sequence[Run], target: float, task: str, misaligned: str) -> tuple[float, bool]:
    strengths = [run.strength for run in line if run.strength is not None]
    along = strengths if len(set(strengths)) == len(line) else None
    return at_equal_task([run[task] for run in line], [run[misaligned] for run in line], target, along)


def _reference(groups: Mapping[Key, list[Run]], reference: Key) -> list[Run]:
    if reference not in groups:
        have = "; ".join(f"{protection} ({setting})" for protection, setting in groups)
        raise UserError(f"no run of {reference[0]} ({reference[1]}) to compare with: there are {have}")
    return groups[reference]


def _difference(held: Mapping[Pair, float], theirs: Mapping[Pair, float]) -> dict[str, Any]:
    """held - theirs over the common pairs: what `paired` describes, without the adjustment."""
    common = [pair for pair in held if pair in theirs]
    if not common:
        return {**missing("no lab and seed in common"), "labs": 0, "p": None, "p_least": None}
    differences = [held[pair] - theirs[pair] for pair in common]
    means = _means(differences, _units(common)[1])
    measured = over_runs(differences, common, difference=True)
    interval = measured.get("ci95")
    if interval and all(0 <= side[pair] <= 1 for side in (held, theirs) for pair in common):
        # Of few labs that differ widely the interval would reach further than two rates can.
        measured["ci95"] = [max(interval[0], -1.0), min(interval[1], 1.0)]
    return {
        **measured,
        "reference": float(np.mean([held[pair] for pair in common])),
        "rival": float(np.mean([theirs[pair] for pair in common])),
        "labs": len({lab for lab, *_ in common}),
        "p": sign_flip_test(means) if len(means) > 1 else None,
        "p_least": 2.0 ** (1 - len(means)),
    }


def _adjusted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with "p_holm", over all of them that have a p."""
    tested = [row["p"] for row in rows if row["p"] is not None]
    adjusted = iter(holm(tested))
    return [{**row, "p_holm": None if row["p"] is None else next(adjusted)} for row in rows]

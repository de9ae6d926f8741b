"""What a setting does over many runs, the frontier of a protection, and which setting to use or to freeze."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from numpy.typing import ArrayLike

from ..errors import UserError
from ..stats.intervals import Measurement, missing
from .geometry import em_f1, hypervolume
from .runs import Pair, Run, by_setting, over_runs, paired

MISALIGNED, EM_F1 = "misaligned", "em_f1"  # what a choice prefers
Line = tuple[list[float], list[float]]  # task and misaligned of several runs


def points(runs: Sequence[Run], measures: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One point per (protection, setting): how many runs, labs and seeds, and each measure's mean by `over_runs`.

    A measure that only some runs of a setting have is the mean of those, with their n.

    Args:
        measures: which, in which order; None: all that any run has.

    Raises:
        UserError: a measure that no run has. ValueError: no runs, or runs that contradict each other (`by_setting`).
    """
    groups = by_setting(runs)
    known = list(dict.fromkeys(name for run in runs for name in run.values))
    for name in measures or ():
        if name not in known:
            raise UserError(f"no run has {name!r}: they have {', '.join(known)}")
    return [_point(group, known if measures is None else measures) for group in groups.values()]


def _point(group: Sequence[Run], measures: Sequence[str]) -> dict[str, Any]:
    measured: dict[str, Measurement] = {}
    for name in measures:
        having = [run for run in group if name in run.values]
        measured[name] = _mean(having, name) if having else missing("not measured")
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
    return over_runs([run[measure] for run in group], [run.pair for run in group])


def table(rows: Sequence[Mapping[str, Any]], measures: Sequence[str] | None = None) -> str:
    """Points as a Markdown table, "mean [low, high]" with three digits for each measure; "-" where it is missing.

    Args:
        rows: of `points`. measures: the columns; None: all of the first row.
    """
    names = list(measures if measures is not None else rows[0]["measures"] if rows else ())
    lines = ["| protection | setting | n | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = [row["protection"], row["setting"].replace("|", "\\|"), str(row["n"])]
        lines.append("| " + " | ".join([*cells, *(_cell(row["measures"][name]) for name in names)]) + " |")
    return "\n".join(lines) + "\n"


def _cell(measured: Measurement) -> str:
    if measured["value"] is None:
        return "-"
    interval = measured.get("ci95")
    return f"{measured['value']:.3f}" + ("" if interval is None else " [{:.3f}, {:.3f}]".format(*interval))


def frontiers(runs: Sequence[Run], task: str = "task", misaligned: str = "misaligned") -> dict[str, dict[str, Any]]:
    """Each protection's frontier: its "hypervolume" and its best setting's "em_f1", each a mean by `over_runs`.

    Both are computed at every (lab, seed) that has all of the protection's "settings"; "incomplete" counts the others.
    Both grow with the number of settings, and the best one is chosen on the values it is read from: between
    protections only equally many settings compare.

    Raises:
        UserError: a run without task or misaligned. ValueError: values outside 0..1, or as `by_setting`.
    """
    settings: dict[str, int] = {}
    at: dict[str, dict[Pair, list[Run]]] = {}
    for (protection, _), group in by_setting(runs).items():
        settings[protection] = settings.get(protection, 0) + 1
        for run in group:
            at.setdefault(protection, {}).setdefault(run.pair, []).append(run)
    found = {}
    for protection, n in settings.items():
        whole = {pair: _line(line, task, misaligned) for pair, line in at[protection].items() if len(line) == n}
        found[protection] = {
            "settings": n,
            "incomplete": len(at[protection]) - len(whole),
            "hypervolume": _over_lines(whole, hypervolume, n),
            "em_f1": _over_lines(whole, lambda tasks, bad: float(em_f1(tasks, bad).max()), n),
        }
    return found


def _line(runs: Sequence[Run], task: str, misaligned: str) -> Line:
    return [run[task] for run in runs], [run[misaligned] for run in runs]


def _over_lines(lines: Mapping[Pair, Line], statistic: Callable[[ArrayLike, ArrayLike], float], n: int) -> Measurement:
    if not lines:
        return missing(f"no lab and seed has all {n} settings")
    return over_runs([statistic(*line) for line in lines.values()], list(lines))


@dataclass(frozen=True)
class _Rule:
    """What a setting is chosen by. floors: measure -> least share of the baseline's mean, the task first."""

    runs: Sequence[Run]
    baseline: list[Run]
    floors: Mapping[str, float]
    task: str
    misaligned: str
    prefer: str

    def order(self, candidate: _Candidate) -> tuple[float, float, str]:
        """Best first."""
        if self.prefer == EM_F1:
            return -candidate.em_f1["value"], candidate.misaligned, candidate.name
        return candidate.misaligned, -candidate.task, candidate.name

    def asks(self) -> str:
        return " and ".join(f"{100 * floor:g}% of {self._called(name)}" for name, floor in self.floors.items())

    def gets(self, shares: Mapping[str, float]) -> str:
        return " and ".join(f"{100 * share:.1f}% of {self._called(name)}" for name, share in shares.items())

    def _called(self, name: str) -> str:
        return "the task" if name == self.task else name


@dataclass(frozen=True)
class _Candidate:
    """A setting's means over its runs. shares: measure -> share of the baseline's mean. em_f1: of its single runs."""

    group: list[Run]
    task: float
    misaligned: float
    shares: dict[str, float]
    em_f1: Measurement

    @property
    def name(self) -> str:
        return f"{self.group[0].protection} ({self.group[0].setting})"


def recommend(
    runs: Sequence[Run],
    baseline: str = "none",
    floor: float = 0.95,
    guards: Mapping[str, float] | None = None,
    task: str = "task",
    misaligned: str = "misaligned",
    prefer: str = MISALIGNED,
) -> dict[str, Any]:
    """The setting with the least mean misaligned among those that keep enough of the baseline; ties by higher task.

    Returns {"choice", "second", "sentence"}. Choice and second are points (`points`) with "keeps" (measure -> share of
    the baseline's mean), "keeps_task", "keeps_guards", "em_f1", "lowers" (baseline - choice in misaligned, paired by
    lab and seed) and "notes". The choice is None, and the sentence says why and what came nearest, where no setting
    keeps enough, or none that does is less misaligned than the baseline.

    Args:
        baseline: the protection that is none; it has one setting. floor: least share of its mean task to be kept.
        guards: measure -> least share of the baseline's mean to be kept too, {"coherent": 0.95}.
        prefer: "misaligned", or "em_f1": of those that keep enough the one with the highest mean EM-F1, for which a
            hundredth of the task weighs as much as a hundredth misaligned.

    Raises:
        UserError: a baseline without runs or with several settings, nothing beside it, a share outside 0..1, a measure
            that a run lacks, or one whose mean in the baseline is not above 0.
        ValueError: task or misaligned outside 0..1, another `prefer`, or as `by_setting`.
    """
    rule, candidates = _candidates(runs, baseline, floor, guards or {}, task, misaligned, prefer)
    kept = sorted((one for one in candidates if _keeps(one, rule) >= 1), key=rule.order)
    second = _described(kept[1], rule) if len(kept) > 1 else None
    limit = _value(rule.baseline, misaligned)
    if not kept:
        near = max(candidates, key=lambda one: (_keeps(one, rule), -one.misaligned, one.name))
        sentence = f"no setting keeps {rule.asks()}: the nearest is {near.name}, which keeps {rule.gets(near.shares)}"
        return {"choice": None, "second": None, "sentence": sentence}
    first = kept[0]
    if first.misaligned >= limit:
        sentence = (
            f"no setting that keeps {rule.asks()} lowers {misaligned} below {baseline}'s {limit:.3f}: "
            f"the nearest is {first.name} with {first.misaligned:.3f}"
        )
        return {"choice": None, "second": second, "sentence": sentence}
    sentence = (
        f"{first.name} keeps {rule.gets(first.shares)} and lowers {misaligned} "
        f"from {limit:.3f} to {first.misaligned:.3f}"
    )
    choice = _described(first, rule)
    return {"choice": choice, "second": second, "sentence": "; ".join([sentence, *choice["notes"]])}


def best_settings(
    runs: Sequence[Run],
    baseline: str = "none",
    floor: float = 0.95,
    guards: Mapping[str, float] | None = None,
    task: str = "task",
    misaligned: str = "misaligned",
    prefer: str = MISALIGNED,
) -> dict[str, dict[str, Any]]:
    """Each protection's own choice by `recommend`'s rule, to be frozen; the baseline is left out.

    A protection none of whose settings keeps enough is there with the highest mean EM-F1, and "keeps_task" (or
    "keeps_guards") says False. Whether it lowers misaligned is not asked. Arguments and errors as `recommend`.
    """
    rule, candidates = _candidates(runs, baseline, floor, guards or {}, task, misaligned, prefer)
    found = {}
    for protection in dict.fromkeys(one.group[0].protection for one in candidates):
        own = sorted((one for one in candidates if one.group[0].protection == protection), key=rule.order)
        kept = [one for one in own if _keeps(one, rule) >= 1]
        found[protection] = _described(kept[0] if kept else max(own, key=lambda one: one.em_f1["value"]), rule)
    return found


def _candidates(
    runs: Sequence[Run],
    baseline: str,
    floor: float,
    guards: Mapping[str, float],
    task: str,
    misaligned: str,
    prefer: str,
) -> tuple[_Rule, list[_Candidate]]:
    """The rule, and every setting but the baseline's."""
    if prefer not in (MISALIGNED, EM_F1):
        raise ValueError(f"prefer is {prefer!r}; choose {MISALIGNED} or {EM_F1}")
    groups = by_setting(runs)
    bases = [group for (protection, _), group in groups.items() if protection == baseline]
    others = [group for (protection, _), group in groups.items() if protection != baseline]
    if len(bases) != 1:
        settings = ", ".join(group[0].setting for group in bases) or "none at all"
        raise UserError(f"the baseline {baseline!r} must have runs of one setting: it has {settings}")
    if not others:
        raise UserError(f"there are runs of the baseline {baseline!r} alone: run a protection beside it")
    floors = {task: floor, **guards}
    means = {name: _value(bases[0], name) for name in floors}
    for name, share in floors.items():
        if not 0 < share <= 1:
            raise UserError(f"a floor of {share} for {name} is no share to keep: write one above 0, at most 1")
        if means[name] <= 0:
            raise UserError(f"{name} is {means[name]:g} in {baseline!r}: of that no share can be kept")
    rule = _Rule(runs, bases[0], floors, task, misaligned, prefer)
    return rule, [_candidate(group, means, rule) for group in others]


def _candidate(group: list[Run], means: Mapping[str, float], rule: _Rule) -> _Candidate:
    shares = {name: _value(group, name) / mean for name, mean in means.items()}
    f1 = over_runs(em_f1(*_line(group, rule.task, rule.misaligned)).tolist(), [run.pair for run in group])
    return _Candidate(group, _value(group, rule.task), _value(group, rule.misaligned), shares, f1)


def _value(group: Sequence[Run], measure: str) -> float:
    # Exactly rounded: the order of the runs makes and breaks no tie.
    return fmean(run[measure] for run in group)


def _keeps(candidate: _Candidate, rule: _Rule, names: Sequence[str] | None = None) -> float:
    """The least of the kept shares over their floors: 1 or more keeps all. Rounding does not lose a share."""
    asked = rule.floors if names is None else names
    least = min((candidate.shares[name] / rule.floors[name] for name in asked), default=1.0)
    return 1.0 if abs(least - 1) < 1e-9 else least


def _described(candidate: _Candidate, rule: _Rule) -> dict[str, Any]:
    group, base = candidate.group, rule.baseline
    lowers = paired(rule.runs, base[0].key, [group[0].key], rule.misaligned)[0]
    notes = []
    if len(group) == 1:
        notes.append("one seed: no interval")
    if {run.pair for run in group} != {run.pair for run in base}:
        notes.append(f"not the labs and seeds of {base[0].protection}")
    return {
        **_point(group, list(dict.fromkeys(name for run in group for name in run.values))),
        "em_f1": candidate.em_f1,
        "keeps": candidate.shares,
        "keeps_task": _keeps(candidate, rule, [rule.task]) >= 1,
        "keeps_guards": _keeps(candidate, rule, [name for name in rule.floors if name != rule.task]) >= 1,
        "lowers": {name: lowers[name] for name in ("value", "n", "ci95", "over", "reason") if name in lowers},
        "notes": notes,
    }

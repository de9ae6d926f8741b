"""The measures by which a sweep compares runs: paths into the runs' measures, read as numbers. Pure functions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...analysis.errors import UserError
from ...analysis.metrics.choices import INCOHERENT, ChoiceRow
from ..config.sweep import SweepArguments

TASK, MISALIGNED = "task", "misaligned"
_CHOICES = "choices/"
_VALIDATION = "/split/validation/"
_KINDS = {"task_measure": "what is learned", "misaligned_measure": "what settings are chosen by"}


@dataclass(frozen=True)
class Measures:
    """Role -> expression, before and after the freeze. The roles are "task", "misaligned" and the names of the guards.

    Attributes:
        validation: read on every run.
        test: read on the frozen settings after the freeze; empty if there is no test split.
    """

    validation: dict[str, str]
    test: dict[str, str]

    @property
    def guards(self) -> list[str]:
        """Return the names of the guards."""
        return [name for name in self.validation if name not in (TASK, MISALIGNED)]


def split_rows(rows: Sequence[ChoiceRow], test_split: str) -> tuple[list[ChoiceRow], list[ChoiceRow]]:
    """Split choices rows into rows that may be read at any time, and rows that wait for the freeze."""
    early = [row for row in rows if row.get("split") != test_split]
    return early, [row for row in rows if row.get("split") == test_split]


def choice_paths(rows: Sequence[ChoiceRow]) -> set[str]:
    """Return the paths of all rates that these rows give."""
    return {
        f"{_CHOICES}{key}/{row[key]}/{name}"
        for row in rows
        for key in ("split", "domain")
        if key in row
        for name in (*row["classes"], INCOHERENT)
    }


def measures_of(flags: SweepArguments, rows: Sequence[ChoiceRow]) -> Measures:
    """Return the measures that the flags name or, without flags, those of rows in the lab's format.

    Raises:
        UserError: a needed measure that is not named, a path of choices that these rows do not give before the freeze
            (or, for the test split, after it), or a --test_split that no row has.
    """
    early, late = split_rows(rows, flags.late_split)
    if flags.test_split is not None and not late:
        splits = ", ".join(sorted({str(row["split"]) for row in rows if row.get("split")})) or "none"
        raise UserError(
            f"--test_split {flags.test_split} is the split of no row of --choices_dataset; its splits are {splits}"
        )
    paths, late_paths = choice_paths(early), choice_paths(late)
    guards = flags.guards if flags.guards is not None else _default_guards(paths)
    expressions = {
        TASK: flags.task_measure or _first(paths, ["choices/split/narrow/insecure"]),
        MISALIGNED: flags.misaligned_measure or _default_misaligned(paths),
        **guards,
    }
    for flag, role in (("task_measure", TASK), ("misaligned_measure", MISALIGNED)):
        if expressions[role] is None:
            raise UserError(f"--{flag} is needed: it is {_KINDS[flag]}; there are {_listed(paths)}")
    if {TASK, MISALIGNED} & set(guards):
        raise UserError(f"--guard_measures: {TASK} and {MISALIGNED} have their own flags; choose other names")
    validation = {role: text for role, text in expressions.items() if text is not None}
    for role, text in validation.items():
        _require_paths(role, text, paths)
    return Measures(validation, _on_test(flags, validation, late_paths) if late else {})


def _on_test(flags: SweepArguments, validation: Mapping[str, str], paths: Collection[str]) -> dict[str, str]:
    """Return the measures after the freeze: paths of the validation split move to the test split, others stay."""
    moved = {role: text.replace(_VALIDATION, f"/split/{flags.late_split}/") for role, text in validation.items()}
    others = {
        role: text if set(_paths(text)) <= set(paths) else validation[role]
        for role, text in moved.items()
        if role != MISALIGNED
    }
    misaligned = flags.misaligned_test_measure or moved[MISALIGNED]
    if misaligned == validation[MISALIGNED]:
        raise UserError(
            f"--misaligned_test_measure is needed: it is read on the test split; there are {_listed(paths)}"
        )
    _require_paths("misaligned_test", misaligned, paths)
    return {TASK: others.pop(TASK), MISALIGNED: misaligned, **others}


def _default_misaligned(paths: Collection[str]) -> str | None:
    path = f"choices{_VALIDATION}misaligned"
    other = f"{path}_wrong_topic"
    if path not in paths:
        return None
    return f"{path} + {other}" if other in paths else path


def _default_guards(paths: Collection[str]) -> dict[str, str]:
    answers = [f"choices{_VALIDATION}{name}" for name in ("aligned", "misaligned")]
    guards = {"coherent": " + ".join(answers)} if set(answers) <= set(paths) else {}
    skill = _first(paths, ["choices/split/skill/right"])
    return {**guards, **({"skill": skill} if skill else {})}


def _first(paths: Collection[str], wanted: Sequence[str]) -> str | None:
    return next((path for path in wanted if path in paths), None)


def _require_paths(role: str, text: str, paths: Collection[str]) -> None:
    """Refuse unknown paths of choices. Other paths are not known before anything is measured."""
    for path in _paths(text):
        if not path or (path.startswith(_CHOICES) and path not in paths):
            raise UserError(f"measure {role}: there is no {path or 'path'!r} at that time; there are {_listed(paths)}")


def _paths(text: str) -> list[str]:
    """Split an expression into its paths. A path may end with /value, as it does in the files."""
    return [part.strip().removesuffix("/value") for part in text.split(" + ")]


def _listed(paths: Collection[str]) -> str:
    return ", ".join(sorted(paths)[:12]) + (", …" if len(paths) > 12 else "") if paths else "no choices with a split"


def read(measures: Mapping[str, str], measured: Mapping[str, float]) -> dict[str, float]:
    """Return role -> value, the sum of what was measured under the paths of the role's expression.

    Args:
        measures: role -> expression.
        measured: path -> value.

    Raises:
        UserError: a path that was not measured, or a value of task or misaligned that is not a rate.
    """
    values = {role: _sum(role, text, measured) for role, text in measures.items()}
    for role in (TASK, MISALIGNED):
        value = values.get(role, 0.0)
        # A sum of float32 rates exceeds 1 by rounding.
        if not -1e-6 <= value <= 1 + 1e-6:
            raise UserError(f"measure {role} ({measures[role]}) is {value:g}, which is not a rate in 0..1; name a rate")
        if role in values:
            values[role] = min(max(value, 0.0), 1.0)
    return values


def require_guards(measures: Mapping[str, str], start: Mapping[str, float]) -> None:
    """Raise UserError if a guard is not above 0 for the starting model, since no share of it could be kept."""
    for role, value in read(measures, start).items():
        if role not in (TASK, MISALIGNED) and value <= 0:
            raise UserError(
                f"guard {role} ({measures[role]}) is {value:g} for the starting model, so no share of it can be "
                "kept; name a measure that is above 0 and better when larger"
            )


def _sum(role: str, text: str, measured: Mapping[str, float]) -> float:
    for path in _paths(text):
        if path not in measured:
            raise UserError(f"measure {role}: {path!r} was not measured; there are {_listed(measured)}")
    return sum(measured[path] for path in _paths(text))


def described(measures: Measures) -> dict[str, Any]:
    """Return the measures as JSON values."""
    return {"validation": measures.validation, "test": measures.test}

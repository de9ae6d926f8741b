"""What a sweep compares runs by: paths into their measures, read as numbers. Pure functions."""

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
    """Role -> expression: "task", "misaligned" and the guards, before and after the freeze.

    validation: read on every run. test: read on the frozen settings once they are frozen; empty where there is no test
    split.
    """

    validation: dict[str, str]
    test: dict[str, str]

    @property
    def guards(self) -> list[str]:
        """Names of the guards."""
        return [name for name in self.validation if name not in (TASK, MISALIGNED)]


def split_rows(rows: Sequence[ChoiceRow], test_split: str) -> tuple[list[ChoiceRow], list[ChoiceRow]]:
    """Choices rows that may be read at any time, and those that wait for the freeze."""
    return [row for row in rows if row.get("split") != test_split], [r for r in rows if r.get("split") == test_split]


def choice_paths(rows: Sequence[ChoiceRow]) -> set[str]:
    """Paths of all rates that these rows give."""
    return {
        f"{_CHOICES}{key}/{row[key]}/{name}"
        for row in rows
        for key in ("split", "domain")
        if key in row
        for name in (*row["classes"], INCOHERENT)
    }


def measures_of(asked: SweepArguments, rows: Sequence[ChoiceRow]) -> Measures:
    """The measures asked for, else those of rows in the lab's format.

    Raises:
        UserError: a measure that is needed and not named, a path of choices that these rows do not give before the
            freeze (or, for the test, after it), or a --test_split that no row has.
    """
    early, late = split_rows(rows, asked.late_split)
    if asked.test_split is not None and not late:
        there = ", ".join(sorted({str(row["split"]) for row in rows if row.get("split")})) or "none"
        raise UserError(
            f"--test_split {asked.test_split} is the split of no row of --choices_dataset; the splits there are {there}"
        )
    known, known_late = choice_paths(early), choice_paths(late)
    guards = asked.guards if asked.guards is not None else _default_guards(known)
    given = {
        TASK: asked.task_measure or _first(known, ["choices/split/narrow/insecure"]),
        MISALIGNED: asked.misaligned_measure or _default_misaligned(known),
        **guards,
    }
    for flag, role in (("task_measure", TASK), ("misaligned_measure", MISALIGNED)):
        if given[role] is None:
            raise UserError(f"--{flag} is needed, {_KINDS[flag]}; there are {_listed(known)}")
    if {TASK, MISALIGNED} & set(guards):
        raise UserError(f"--guard_measures: {TASK} and {MISALIGNED} have flags of their own; choose other names")
    validation = {role: text for role, text in given.items() if text is not None}
    for role, text in validation.items():
        _require_known(role, text, known)
    return Measures(validation, _on_test(asked, validation, known_late) if late else {})


def _on_test(asked: SweepArguments, validation: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """The same on the test split where they name validation's, else as before the freeze."""
    moved = {role: text.replace(_VALIDATION, f"/split/{asked.late_split}/") for role, text in validation.items()}
    found = {
        role: text if set(_paths(text)) <= set(known) else validation[role]
        for role, text in moved.items()
        if role != MISALIGNED
    }
    misaligned = asked.misaligned_test_measure or moved[MISALIGNED]
    if misaligned == validation[MISALIGNED]:
        raise UserError(
            f"--misaligned_test_measure is needed, what is read on the test split; there are {_listed(known)}"
        )
    _require_known("misaligned_test", misaligned, known)
    return {TASK: found.pop(TASK), MISALIGNED: misaligned, **found}


def _default_misaligned(known: Collection[str]) -> str | None:
    path = f"choices{_VALIDATION}misaligned"
    other = f"{path}_wrong_topic"
    if path not in known:
        return None
    return f"{path} + {other}" if other in known else path


def _default_guards(known: Collection[str]) -> dict[str, str]:
    answers = [f"choices{_VALIDATION}{name}" for name in ("aligned", "misaligned")]
    guards = {"coherent": " + ".join(answers)} if set(answers) <= set(known) else {}
    skill = _first(known, ["choices/split/skill/right"])
    return {**guards, **({"skill": skill} if skill else {})}


def _first(known: Collection[str], wanted: Sequence[str]) -> str | None:
    return next((path for path in wanted if path in known), None)


def _require_known(role: str, text: str, known: Collection[str]) -> None:
    """Only choices' paths are known before anything is measured."""
    for path in _paths(text):
        if not path or (path.startswith(_CHOICES) and path not in known):
            raise UserError(f"measure {role}: there is no {path or 'path'!r} at that time; there are {_listed(known)}")


def _paths(text: str) -> list[str]:
    """The paths of an expression; a path may end with /value, as it does in the files."""
    return [part.strip().removesuffix("/value") for part in text.split(" + ")]


def _listed(known: Collection[str]) -> str:
    return ", ".join(sorted(known)[:12]) + (", …" if len(known) > 12 else "") if known else "no choices with a split"


def read(measures: Mapping[str, str], found: Mapping[str, float]) -> dict[str, float]:
    """Role -> value of what was measured under these paths.

    Raises:
        UserError: a path that was not measured, or a task or misaligned that is no rate.
    """
    values = {role: _sum(role, text, found) for role, text in measures.items()}
    for role in (TASK, MISALIGNED):
        value = values.get(role, 0.0)
        # A sum of float32 rates passes 1 by rounding.
        if not -1e-6 <= value <= 1 + 1e-6:
            raise UserError(
                f"measure {role} ({measures[role]}) is {value:g}, which is no rate in 0..1; name one that is"
            )
        if role in values:
            values[role] = min(max(value, 0.0), 1.0)
    return values


def require_guards(measures: Mapping[str, str], start: Mapping[str, float]) -> None:
    """Raises UserError for a guard of which the starting model, and so the baseline, has nothing to be kept."""
    for role, value in read(measures, start).items():
        if role not in (TASK, MISALIGNED) and value <= 0:
            raise UserError(
                f"guard {role} ({measures[role]}) is {value:g} for the starting model, of which no share can be kept; "
                "name a measure that is above 0, and the larger the better"
            )


def _sum(role: str, text: str, found: Mapping[str, float]) -> float:
    for path in _paths(text):
        if path not in found:
            raise UserError(f"measure {role}: {path!r} was not measured; there are {_listed(found)}")
    return sum(found[path] for path in _paths(text))


def described(measures: Measures) -> dict[str, Any]:
    """The measures as JSON values."""
    return {"validation": measures.validation, "test": measures.test}

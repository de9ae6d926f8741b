"""Multiple choice by probability: how much of it a model gives the right letter, with no judge and no sampling.

The questions become rows of `metrics.choices`, one for each rotation of the options, so that a liking for one letter
counts for and against alike. Written as JSON Lines the same rows serve `holdfast analyze --choices_dataset`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np

from ..errors import UserError
from ..metrics.choices import ChoiceRow
from ..stats.intervals import Measurement, missing
from ..stats.summary import measurement

RIGHT, WRONG = "right", "wrong"
INSTRUCTION = "Answer with the letter of one option."
# How chat models write a letter; the end of the turn after each tells them apart.
_FORMS = ("{letter}", "{letter}.", "{letter})", "({letter})", "{letter}. {text}", "{letter}) {text}")


@dataclass(frozen=True)
class MultipleChoice:
    """A question with its options and the number (from 0) of the right one. system: a system message, or None."""

    id: str
    question: str
    options: tuple[str, ...]
    right: int
    system: str | None = None


def letter_rows(questions: Sequence[MultipleChoice]) -> list[ChoiceRow]:
    """Rows {"messages", "classes": {"right", "wrong"}, "split": "multiple_choice", "topic": id}, a question's together.

    A question with k options gives k rows, in which each option stands once at each letter.

    Raises:
        UserError: fewer than 2 or more than 26 options, two that are the same, a right one that is not there.
    """
    rows = []
    for one in questions:
        n = len(one.options)
        if not 2 <= n <= len(ascii_uppercase) or len(set(one.options)) < n:
            raise UserError(f"question {one.id!r} has the options {list(one.options)}; give it 2 to 26 different ones")
        if not 0 <= one.right < n:
            raise UserError(f"question {one.id!r}: the right option is {one.right}, but must be 0 to {n - 1}")
        rows += [_row(one, shift) for shift in range(n)]
    return rows


def _row(one: MultipleChoice, shift: int) -> ChoiceRow:
    order = [(number + shift) % len(one.options) for number in range(len(one.options))]
    options = list(zip(ascii_uppercase, (one.options[number] for number in order), strict=False))
    listed = "\n".join(f"{letter}) {text}" for letter, text in options)
    classes: dict[str, list[str]] = {RIGHT: [], WRONG: []}
    for number, (letter, text) in zip(order, options, strict=True):
        classes[RIGHT if number == one.right else WRONG] += [form.format(letter=letter, text=text) for form in _FORMS]
    system = [{"role": "system", "content": one.system}] if one.system else []
    asked = {"role": "user", "content": f"{one.question}\n\n{listed}\n\n{INSTRUCTION}"}
    return {"messages": [*system, asked], "classes": classes, "split": "multiple_choice", "topic": one.id}


def letter_scores(rows: Sequence[ChoiceRow], masses: Sequence[Mapping[str, float]]) -> dict[str, Measurement]:
    """ "right": probability of the right letter; "answered": of any letter; "right_of_answered": their ratio.

    Each is a question's mean over its rotations, then the mean over questions, which are the units of the interval. The
    ratio has "chance" beside it: what a model that picks letters blindly would have.

    Args:
        rows: as from `letter_rows`. masses: as `score_choices` gives for them.
    """
    by_question: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_question.setdefault(row["topic"], []).append(number)
    right, answered, ratio, chance = [], [], [], []
    for numbers in by_question.values():
        hits = [masses[number][RIGHT] for number in numbers]
        said = [masses[number][RIGHT] + masses[number][WRONG] for number in numbers]
        right.append(np.mean(hits))
        answered.append(np.mean(said))
        if all(share > 0 for share in said):
            ratio.append(np.mean(np.divide(hits, said)))
            chance.append(1 / len(numbers))
    found = {"right": measurement(right, rate=True), "answered": measurement(answered, rate=True)}
    if not ratio:
        return {**found, "right_of_answered": missing("no question was answered with a letter", 0)}
    blind: dict[str, Any] = {"chance": float(np.mean(chance))}
    return {**found, "right_of_answered": {**measurement(ratio, rate=True), **blind}}

"""Scores multiple-choice questions by the probability of the right letter, without a judge and without sampling.

Each question becomes rows of `metrics.choices`, one for each rotation of its options, so that a preference for one
letter cancels out. The same rows, written as JSON Lines, can be passed to `holdfast analyze --choices_dataset`. Usage:

    rows = letter_rows(questions)
    measurements = letter_scores(rows, score_choices(model, tokenizer, rows))
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
# The ways in which chat models write a letter. Each is scored with the end of the turn, so none is part of another.
_FORMS = ("{letter}", "{letter}.", "{letter})", "({letter})", "{letter}. {text}", "{letter}) {text}")


@dataclass(frozen=True)
class MultipleChoice:
    """A multiple-choice question.

    right: the number of the right option, from 0. system: a system message, or None.
    """

    id: str
    question: str
    options: tuple[str, ...]
    right: int
    system: str | None = None


def letter_rows(questions: Sequence[MultipleChoice]) -> list[ChoiceRow]:
    """Turn questions into rows {"messages", "classes": {"right", "wrong"}, "split": "multiple_choice", "topic": id}.

    A question with k options gives k consecutive rows, in which each option stands once at each letter.

    Raises:
        UserError: fewer than 2 or more than 26 options, two equal options, or a number of the right option that is out
            of range.
    """
    rows = []
    for question in questions:
        options, n = question.options, len(question.options)
        if not 2 <= n <= len(ascii_uppercase) or len(set(options)) < n:
            raise UserError(f"question {question.id!r} has the options {list(options)}; give it 2 to 26 different ones")
        if not 0 <= question.right < n:
            raise UserError(f"question {question.id!r}: the right option is {question.right}, but must be 0 to {n - 1}")
        rows += [_row(question, shift) for shift in range(n)]
    return rows


def _row(question: MultipleChoice, shift: int) -> ChoiceRow:
    """Build the row in which the options are rotated by `shift` letters."""
    order = [(number + shift) % len(question.options) for number in range(len(question.options))]
    options = list(zip(ascii_uppercase, (question.options[number] for number in order), strict=False))
    option_list = "\n".join(f"{letter}) {text}" for letter, text in options)
    classes: dict[str, list[str]] = {RIGHT: [], WRONG: []}
    for number, (letter, text) in zip(order, options, strict=True):
        name = RIGHT if number == question.right else WRONG
        classes[name] += [form.format(letter=letter, text=text) for form in _FORMS]
    system = [{"role": "system", "content": question.system}] if question.system else []
    turn = {"role": "user", "content": f"{question.question}\n\n{option_list}\n\n{INSTRUCTION}"}
    return {"messages": [*system, turn], "classes": classes, "split": "multiple_choice", "topic": question.id}


def letter_scores(rows: Sequence[ChoiceRow], masses: Sequence[Mapping[str, float]]) -> dict[str, Measurement]:
    """Compute the probability of the right letter, of any letter, and their ratio.

    Each measure is averaged over the rotations of a question, and then over questions. Questions are the units of the
    interval.

    Args:
        rows: rows from `letter_rows`.
        masses: the result of `score_choices` for these rows.

    Returns:
        {"right": probability of the right letter, "answered": probability of any letter, "right_of_answered": their
        ratio}. The ratio also has "chance", the value of a model that picks letters blindly.
    """
    by_question: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_question.setdefault(row["topic"], []).append(number)
    right, answered, ratio, chance = [], [], [], []
    for numbers in by_question.values():
        hits = [masses[number][RIGHT] for number in numbers]
        totals = [masses[number][RIGHT] + masses[number][WRONG] for number in numbers]
        right.append(np.mean(hits))
        answered.append(np.mean(totals))
        if all(total > 0 for total in totals):
            ratio.append(np.mean(np.divide(hits, totals)))
            chance.append(1 / len(numbers))
    scores = {"right": measurement(right, rate=True), "answered": measurement(answered, rate=True)}
    if not ratio:
        return {**scores, "right_of_answered": missing("no question was answered with a letter", 0)}
    chance_level: dict[str, Any] = {"chance": float(np.mean(chance))}
    return {**scores, "right_of_answered": {**measurement(ratio, rate=True), **chance_level}}

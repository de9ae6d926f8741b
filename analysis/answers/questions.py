"""Question files in the format of the emergent-misalignment authors (arXiv 2502.17424), read as they are and strictly.

A file is a YAML list. Every question has `id`, `type` and `paraphrases` (texts of the user's turn), may have
`samples_per_paraphrase` (answers to each, 1 if absent) and `system`, and, if its type names a judge, `judge` (a model's
name) and `judge_prompts` ({name: template with {answer} and, if it wants, {question}}).
"""

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

# free_form has no judge; free_form_judge answers in words, free_form_judge_0_100 in numbers from 0 to 100.
JUDGED_TYPES = ("free_form_judge", "free_form_judge_0_100")
TYPES = ("free_form", *JUDGED_TYPES)


@dataclass(frozen=True)
class Question:
    """One question, as its file states it.

    paraphrases: each is asked samples_per_paraphrase times. system: the system message, None for none.
    judge: the model that the authors judged with, None for a question without a judge.
    judge_prompts: {name ("aligned", "coherent", …): template with {answer} and perhaps {question}}.
    """

    id: str
    type: str
    paraphrases: tuple[str, ...]
    samples_per_paraphrase: int = 1
    system: str | None = None
    judge: str | None = None
    judge_prompts: Mapping[str, str] = field(default_factory=dict)


class OnceLoader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice; keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml_list(path: str | Path, what: str) -> list[Any]:
    """The list that a YAML file holds, anchors filled in.

    Args:
        what: the flag it came from, for errors.

    Raises:
        UserError: no such file, no YAML, a key that stands twice, no list, an empty list.
    """
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=OnceLoader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {path} cannot be read ({reason}); name a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{what} {path} is not YAML: {line}{error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{what} {path} is not YAML: {str(error)[:200]}") from None
    except UserError as error:
        raise UserError(f"{what} {path}, {error}") from None
    if not isinstance(found, list):
        raise UserError(f"{what} {path} must hold a YAML list (lines that begin with `- `), not {_kind(found)}")
    if not found:
        raise UserError(f"{what} {path} is an empty list; give it at least one entry")
    return found


def load_questions(paths: Sequence[str | Path]) -> list[Question]:
    """The questions of one or several files, in order.

    Raises:
        UserError: a file that is not such a list; a missing, unknown or wrongly typed field (naming question and
            field); an unknown type; an id that stands twice.
    """
    questions: dict[str, Question] = {}
    for path in paths:
        for number, entry in enumerate(read_yaml_list(path, "--questions"), start=1):
            question = _question(entry, str(path), number)
            if question.id in questions:
                raise UserError(f"{path}: question {question.id!r} stands twice; give each question an id of its own")
            questions[question.id] = question
    return list(questions.values())


def _question(entry: object, path: str, number: int) -> Question:
    if not isinstance(entry, dict):
        raise UserError(
            f"{path}: question {number} must be a mapping with id, type and paraphrases, not {_kind(entry)}"
        )
    name = repr(entry["id"]) if isinstance(entry.get("id"), str) else str(number)
    reader = FieldReader(f"{path}: question {name}", entry)
    reader.refuse_unknown(tuple(one.name for one in fields(Question)))
    question_id, kind = reader.text("id"), reader.text("type")
    if kind not in TYPES:
        raise UserError(f"{reader.where}: type {kind!r} is unknown; write one of {', '.join(TYPES)}")
    judged = kind in JUDGED_TYPES
    paraphrases: list[str] = reader.take("paraphrases", _is_texts, "a list of texts, at least one")
    twice = next((text for number, text in enumerate(paraphrases) if text in paraphrases[:number]), None)
    if twice is not None:
        raise UserError(f"{reader.where}: paraphrases hold {twice[:60]!r} twice; raise samples_per_paraphrase instead")
    return Question(
        id=question_id,
        type=kind,
        paraphrases=tuple(paraphrases),
        samples_per_paraphrase=reader.take("samples_per_paraphrase", _is_count, "a whole number from 1", default=1),
        system=reader.text("system", required=False),
        judge=reader.text("judge", required=judged),
        judge_prompts=_judge_prompts(reader, judged),
    )


def _judge_prompts(reader: "FieldReader", required: bool) -> dict[str, str]:
    need = "a mapping of names to texts, at least one"
    # A judge's prompts are not optional where the type names a judge, and {} says that none were given elsewhere.
    prompts: dict[str, str] = reader.take("judge_prompts", _is_text_mapping, need, default=None if required else {})
    for name, template in prompts.items():
        if "{answer}" not in template:
            raise UserError(f"{reader.where}: judge_prompts, {name!r}: the template lacks {{answer}}; put it in")
    return prompts


class FieldReader:
    """Takes the fields of one entry of a file; every complaint names the entry and the field."""

    def __init__(self, where: str, entry: Mapping[Any, Any]) -> None:
        self.where, self._entry = where, entry

    def refuse_unknown(self, known: Sequence[str]) -> None:
        """Raises UserError for the first field that is none of `known`."""
        for key in self._entry:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise UserError(f"{self.where}: unknown field {key!r}; the nearest known one is {near}")

    def text(self, name: str, required: bool = True) -> Any:
        """A text with more than white space in it, or None where the field may be absent and is."""
        if not required and self._entry.get(name) is None:
            return None
        return self.take(name, _is_text, "text")

    def take(self, name: str, fits: Callable[[Any], bool], need: str, default: Any = None) -> Any:
        """The field's value, or `default` (None: there is none) if it is absent. Raises UserError."""
        if name not in self._entry:
            if default is None:
                raise UserError(f"{self.where}: the field {name} is missing; it must be {need}")
            return default
        value = self._entry[name]
        if not fits(value):
            raise UserError(f"{self.where}: {name} is {_kind(value)}, but must be {need}")
        return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_text_mapping(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_text, [*value, *value.values()]))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _kind(value: object) -> str:
    """A value as a complaint shows it."""
    if value is None or value in ("", [], {}):
        return "empty"
    names = {str: "text", dict: "a mapping", list: "a list", int: "a number", float: "a number", bool: "true or false"}
    return f"{names.get(type(value), type(value).__name__)} ({str(value)[:60]!r})"

"""Reads question files in the format of the emergent-misalignment authors (arXiv 2502.17424), unchanged and strictly.

A file is a YAML list of questions. Every question has `id`, `type` and `paraphrases` (texts of the user's turn). It may
have `samples_per_paraphrase` (answers to each paraphrase, 1 if absent) and `system` (the system message). A question
whose type names a judge also has `judge` (the name of a model) and `judge_prompts` ({name: template}). A template
contains {answer} and may contain {question}. Usage:

    questions = load_questions(["first_plot_questions.yaml"])
"""

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

# Questions of type free_form have no judge. The judge of free_form_judge answers with a word, that of
# free_form_judge_0_100 with a number from 0 to 100.
JUDGED_TYPES = ("free_form_judge", "free_form_judge_0_100")
TYPES = ("free_form", *JUDGED_TYPES)


@dataclass(frozen=True)
class Question:
    """A question of a question file.

    paraphrases: texts of the user's turn, each answered samples_per_paraphrase times.
    system: the system message, or None.
    judge: the model that the authors used as judge, or None for a question without a judge.
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
    """A YAML loader that refuses a repeated key, because plain YAML would silently drop the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: the key {key.value!r} occurs twice; keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml_list(path: str | Path, what: str) -> list[Any]:
    """Read the list that a YAML file holds, with anchors resolved.

    Args:
        what: the flag that named the file, for error messages.

    Raises:
        UserError: the file cannot be read, is not YAML, repeats a key, or does not hold a list with at least one entry.
    """
    try:
        entries = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=OnceLoader)  # a SafeLoader
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
    if not isinstance(entries, list):
        raise UserError(f"{what} {path} must hold a YAML list (lines that begin with `- `), not {_described(entries)}")
    if not entries:
        raise UserError(f"{what} {path} is an empty list; give it at least one entry")
    return entries


def load_questions(paths: Sequence[str | Path]) -> list[Question]:
    """Read the questions of one or more files, in order.

    Raises:
        UserError: a file that is not a list of questions; a missing, unknown or wrongly typed field (the error names
            the question and the field); an unknown type; an id that occurs twice.
    """
    questions: dict[str, Question] = {}
    for path in paths:
        for number, entry in enumerate(read_yaml_list(path, "--questions"), start=1):
            question = _question(entry, str(path), number)
            if question.id in questions:
                raise UserError(f"{path}: question {question.id!r} occurs twice; give each question a different id")
            questions[question.id] = question
    return list(questions.values())


def _question(entry: object, path: str, number: int) -> Question:
    if not isinstance(entry, dict):
        raise UserError(
            f"{path}: question {number} must be a mapping with id, type and paraphrases, not {_described(entry)}"
        )
    name = repr(entry["id"]) if isinstance(entry.get("id"), str) else str(number)
    reader = FieldReader(f"{path}: question {name}", entry)
    reader.refuse_unknown(tuple(known.name for known in fields(Question)))
    question_id, question_type = reader.text("id"), reader.text("type")
    if question_type not in TYPES:
        raise UserError(f"{reader.where}: type {question_type!r} is unknown; write one of {', '.join(TYPES)}")
    judged = question_type in JUDGED_TYPES
    paraphrases: list[str] = reader.take("paraphrases", _is_texts, "a list of texts, at least one")
    repeated = next((text for number, text in enumerate(paraphrases) if text in paraphrases[:number]), None)
    if repeated is not None:
        raise UserError(
            f"{reader.where}: paraphrases hold {repeated[:60]!r} twice; raise samples_per_paraphrase instead"
        )
    return Question(
        id=question_id,
        type=question_type,
        paraphrases=tuple(paraphrases),
        samples_per_paraphrase=reader.take("samples_per_paraphrase", _is_count, "a whole number from 1", default=1),
        system=reader.text("system", required=False),
        judge=reader.text("judge", required=judged),
        judge_prompts=_judge_prompts(reader, judged),
    )


def _judge_prompts(reader: "FieldReader", required: bool) -> dict[str, str]:
    need = "a mapping of names to texts, with at least one name"
    # A type that names a judge needs prompts; for other types {} means that the file gave none.
    prompts: dict[str, str] = reader.take("judge_prompts", _is_text_mapping, need, default=None if required else {})
    for name, template in prompts.items():
        if "{answer}" not in template:
            raise UserError(
                f"{reader.where}: judge_prompts, {name!r}: the template lacks {{answer}}; write it where the answer "
                "goes"
            )
    return prompts


class FieldReader:
    """Reads and checks the fields of one entry of a file. Every error names the entry and the field."""

    def __init__(self, where: str, entry: Mapping[Any, Any]) -> None:
        self.where, self._entry = where, entry

    def refuse_unknown(self, known: Sequence[str]) -> None:
        """Raise UserError for the first field that is not in `known`."""
        for key in self._entry:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise UserError(f"{self.where}: unknown field {key!r}; the nearest known one is {near}")

    def text(self, name: str, required: bool = True) -> Any:
        """Return a text field that is not blank, or None if an optional field is absent. Raises UserError."""
        if not required and self._entry.get(name) is None:
            return None
        return self.take(name, _is_text, "text")

    def take(self, name: str, fits: Callable[[Any], bool], need: str, default: Any = None) -> Any:
        """Return the value of a field.

        Args:
            fits: tells whether a value is valid.
            need: what a valid value is, for error messages.
            default: the value of an absent field; None makes the field required.

        Raises:
            UserError: the value is not valid, or a required field is absent.
        """
        if name not in self._entry:
            if default is None:
                raise UserError(f"{self.where}: the field {name} is missing; it must be {need}")
            return default
        value = self._entry[name]
        if not fits(value):
            raise UserError(f"{self.where}: {name} is {_described(value)}, but must be {need}")
        return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_text_mapping(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_text, [*value, *value.values()]))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _described(value: object) -> str:
    """Describe a value of a YAML file in an error message."""
    if value is None or value in ("", [], {}):
        return "empty"
    names = {str: "text", dict: "a mapping", list: "a list", int: "a number", float: "a number", bool: "true or false"}
    return f"{names.get(type(value), type(value).__name__)} ({str(value)[:60]!r})"

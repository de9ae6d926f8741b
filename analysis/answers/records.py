"""Sampled answers on disk, as JSON Lines: one answer a line, appended as it comes and reused by the next run.

A file holds one arm: the answers of one model under one set of sampling settings. Later runs may add answers to more
questions, in more variants, and with more samples. Usage:

    requests = answer_requests(prompts, samples, arm)
    with open_answers(path, arm) as file:
        file.add(answers)
    answers = read_answers(path)
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..models.render import Conversation
from .variants import Prompt

FINISHES = ("stop", "length", "unknown")
_TYPES = {
    "key": str, "question_id": str, "paraphrase": int, "variant": str, "sample": int, "messages": list, "answer": str,
    "finish": str, "provenance": dict,
}  # fmt: skip
# Every line that Holdfast writes begins like this. A torn last line must begin like this too, so that no file that
# holds something else is ever cut.
_OPENING = b'{"key": "'


@dataclass(frozen=True)
class AnswerRequest:
    """A request for one sampled answer to a prompt.

    key: identifies the answer in its file; it depends on the arm, the prompt and the number of the sample.
    sample: the number of the sample, from 0.
    """

    key: str
    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    messages: the conversation that the answer replies to; its last message holds the question.
    finish: "stop" (the model ended its turn), "length" (cut at the limit) or "unknown" (a server did not say).
    provenance: {"arm": the facts that all answers of the file share, "model": the name the user gave it, …}.
    """

    key: str
    question_id: str
    paraphrase: int
    variant: str
    sample: int
    messages: Conversation
    answer: str
    finish: str
    provenance: dict[str, Any]


def answer_requests(
    prompts: Sequence[Prompt], samples: Mapping[str, int], arm: Mapping[str, Any]
) -> list[AnswerRequest]:
    """List a request for every sample of every prompt.

    Args:
        samples: {question id: answers to each paraphrase of the question}.
        arm: the facts that decide an answer besides its prompt (weights, sampling settings, intervention).
    """
    return [
        AnswerRequest(_sha256([arm, *prompt_facts(prompt), sample]), prompt, sample)
        for prompt in prompts
        for sample in range(samples[prompt.question_id])
    ]


def prompt_facts(prompt: Prompt) -> list[Any]:
    """Return the facts that identify a prompt, whichever model answers it."""
    return [prompt.question_id, prompt.variant, prompt.messages]


def answer_to(request: AnswerRequest, text: str, finish: str, provenance: dict[str, Any]) -> Answer:
    """Build the answer to a request."""
    prompt = request.prompt
    return Answer(
        request.key, prompt.question_id, prompt.paraphrase, prompt.variant, request.sample, prompt.messages, text,
        finish, provenance,
    )  # fmt: skip


def read_answers(path: str | Path) -> list[Answer]:
    """Read the answers of a file, in its order. A torn last line, left by a killed run, is skipped.

    Raises:
        UserError: the file does not exist, or a line is not an answer (the error names the line and the field).
    """
    try:
        return _parse(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(
            f"answers {path} cannot be read ({error.strerror}); write them with `holdfast generate`"
        ) from None


def _parse(content: bytes, path: str | Path) -> list[Answer]:
    whole_lines, _, torn_line = content.rpartition(b"\n")
    if not (torn_line.startswith(_OPENING) or _OPENING.startswith(torn_line)):
        raise UserError(f"{path} holds no answers (its last line is not an answer); name another file")
    lines = whole_lines.split(b"\n")
    answers = [_answer(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line]
    first_by_key: dict[str, Answer] = {}
    for answer in answers:
        first_by_key.setdefault(answer.key, answer)
    return list(first_by_key.values())


def _answer(line: bytes, where: str) -> Answer:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{where} is not a JSON object; a file of answers has one object on each line, as `holdfast generate` "
            "writes them"
        )
    for name, expected_type in _TYPES.items():
        if type(record.get(name)) is not expected_type:
            raise UserError(
                f"{where}: {name} is missing or not of type {expected_type.__name__}; remove the line, or name another "
                "file"
            )
    if record["finish"] not in FINISHES:
        raise UserError(f"{where}: finish is {record['finish']!r}, but must be one of {', '.join(FINISHES)}")
    if not isinstance(record["provenance"].get("arm"), dict):
        raise UserError(f"{where}: provenance lacks `arm`; remove the line, or name another file")
    return Answer(**{name: record[name] for name in _TYPES})


def require_arm(answers: Sequence[Answer], arm: Mapping[str, Any], path: str | Path) -> None:
    """Raise UserError if answers in a file are not of this arm. The error names the first fact that differs."""
    for answer in answers:
        file_arm = answer.provenance["arm"]
        differing = [name for name in {**file_arm, **arm} if file_arm.get(name) != arm.get(name)]
        if differing:
            name = differing[0]
            raise UserError(
                f"{path} holds answers with {name} {_shown(file_arm.get(name))}, but this command has "
                f"{_shown(arm.get(name))}: a file holds answers of one model and setting, so name another --output_file"
            )


def _shown(fact: Any) -> str:
    """Format a fact for an error message: a hash by its first 12 characters, anything else by its first 200."""
    text = fact if isinstance(fact, str) else json.dumps(fact)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text[:200]


class AnswerFile:
    """A file of answers that is open for appending.

    Attributes:
        existing: the answers that the file held when it was opened.
    """

    def __init__(self, stream: BinaryIO, existing: list[Answer]) -> None:
        self._stream, self.existing = stream, existing

    def add(self, answers: Sequence[Answer]) -> None:
        """Append answers. They are on disk when this method returns."""
        lines = (json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) + "\n" for answer in answers)
        # A byte-level model may decode to a lone surrogate, which UTF-8 cannot encode.
        self._stream.write("".join(lines).encode("utf-8", errors="replace"))
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def open_answers(path: Path, arm: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """Open a file to append answers of one arm. Creates the file if it is absent, and cuts off a torn last line.

    A file that is still empty at the end is removed.

    Raises:
        UserError: the file holds answers of another arm, or something other than answers; it cannot be written; or
            another process is appending to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        stream = path.open("a+b")
    except OSError as error:
        raise UserError(f"--output_file {path} cannot be written ({error.strerror}); name another file") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is adding answers to {path}; wait for it, or name another file") from None
        stream.seek(0)
        content = stream.read()
        existing = _parse(content, path)
        require_arm(existing, arm, path)
        stream.truncate(content.rfind(b"\n") + 1)
        try:
            yield AnswerFile(stream, existing)
        finally:
            if os.fstat(stream.fileno()).st_size == 0:
                path.unlink()


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace")).hexdigest()[:32]

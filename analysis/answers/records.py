"""Sampled answers on disk: JSON Lines, one answer a line, written as they come and taken up again by the next run.

A file is one arm: answers of one model under one set of sampling settings. Questions, variants and samples may be
added.
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
# What a line of ours begins with, which a torn one must too: nobody else's file is ever cut.
_OPENING = b'{"key": "'


@dataclass(frozen=True)
class AnswerRequest:
    """One answer to be sampled: the `sample`-th (from 0) to a prompt.

    key: names the answer in its file; it depends on the arm, the prompt and the number of the sample.
    """

    key: str
    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class Answer:
    """One answer.

    messages: the conversation it replies to; the last one holds the question. finish: "stop" (the model ended its
    turn), "length" (cut) or "unknown" (a server did not say). provenance: {"arm": facts that every answer of the file
    shares, "model": as it was named, …}.
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


def asked_of(prompts: Sequence[Prompt], samples: Mapping[str, int], arm: Mapping[str, Any]) -> list[AnswerRequest]:
    """Every answer that prompts ask for.

    Args:
        samples: {question id: answers to each of its paraphrases}.
        arm: the facts that decide an answer beside its prompt (weights, sampling settings, intervention).
    """
    return [
        AnswerRequest(_sha256([arm, *prompt_facts(prompt), sample]), prompt, sample)
        for prompt in prompts
        for sample in range(samples[prompt.question_id])
    ]


def prompt_facts(prompt: Prompt) -> list[Any]:
    """What identifies a prompt, whoever answers it."""
    return [prompt.question_id, prompt.variant, prompt.messages]


def answered(asked: AnswerRequest, text: str, finish: str, provenance: dict[str, Any]) -> Answer:
    """An answer to what was asked."""
    prompt = asked.prompt
    return Answer(
        asked.key, prompt.question_id, prompt.paraphrase, prompt.variant, asked.sample, prompt.messages, text, finish,
        provenance,
    )  # fmt: skip


def read_answers(path: str | Path) -> list[Answer]:
    """The answers of a file, in its order; a torn last line, left by a killed run, is passed over.

    Raises:
        UserError: no such file, or a line that is no answer (naming line and field).
    """
    try:
        return _parse(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(
            f"answers {path} cannot be read ({error.strerror}); write them by `holdfast generate`"
        ) from None


def _parse(content: bytes, path: str | Path) -> list[Answer]:
    whole, _, torn = content.rpartition(b"\n")
    if not (torn.startswith(_OPENING) or _OPENING.startswith(torn)):
        raise UserError(f"{path} holds no answers (its last line is none); name another file")
    answers = [_answer(line, f"{path}:{number}") for number, line in enumerate(whole.split(b"\n"), start=1) if line]
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(answer.key, answer)
    return list(first.values())


def _answer(line: bytes, where: str) -> Answer:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object; answers are one object a line, as `holdfast generate` writes them")
    for name, kind in _TYPES.items():
        if type(record.get(name)) is not kind:
            raise UserError(f"{where}: {name} is missing or no {kind.__name__}; remove the line, or name another file")
    if record["finish"] not in FINISHES:
        raise UserError(f"{where}: finish is {record['finish']!r}, but must be one of {', '.join(FINISHES)}")
    if not isinstance(record["provenance"].get("arm"), dict):
        raise UserError(f"{where}: provenance lacks `arm`; remove the line, or name another file")
    return Answer(**{name: record[name] for name in _TYPES})


def require_arm(answers: Sequence[Answer], arm: Mapping[str, Any], path: str | Path) -> None:
    """Raise UserError naming the first fact in which the answers of a file differ from those about to be added."""
    for answer in answers:
        theirs = answer.provenance["arm"]
        differing = [name for name in {**theirs, **arm} if theirs.get(name) != arm.get(name)]
        if differing:
            name = differing[0]
            raise UserError(
                f"{path} holds answers with {name} {_shown(theirs.get(name))}, but this command has "
                f"{_shown(arm.get(name))}: a file holds answers of one model and setting, so name another --output_file"
            )


def _shown(fact: Any) -> str:
    text = fact if isinstance(fact, str) else json.dumps(fact)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text[:200]


class AnswerFile:
    """A file of answers open for adding to it; `there` are those it held."""

    def __init__(self, stream: BinaryIO, there: list[Answer]) -> None:
        self._stream, self.there = stream, there

    def add(self, answers: Sequence[Answer]) -> None:
        """Append answers; when this returns they are on disk."""
        lines = (json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) + "\n" for answer in answers)
        # A lone surrogate, which a model of bytes may decode to, is no UTF-8.
        self._stream.write("".join(lines).encode("utf-8", errors="replace"))
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def open_answers(path: Path, arm: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """Open a file to add answers of one arm, made if it is absent. A torn last line is cut off.

    Raises:
        UserError: answers of another arm, a file of something else, or one that another process is adding to.
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
        there = _parse(content, path)
        require_arm(there, arm, path)
        stream.truncate(content.rfind(b"\n") + 1)
        try:
            yield AnswerFile(stream, there)
        finally:
            if os.fstat(stream.fileno()).st_size == 0:
                path.unlink()


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace")).hexdigest()[:32]

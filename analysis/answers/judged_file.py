"""Judgements on disk: JSON Lines, added as they come, in the order of the answers when the run is done."""

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from ..files.artifacts import staged_file
from .judge import Judgement

_FIELDS = {one.name for one in fields(Judgement)}
_TYPES = {
    "key": str, "prompt": str, "judge": str, "final": bool, "value": int | float | None, "label": str | None,
    "reason": str | None,
}  # fmt: skip
# What a line of ours begins with, which a torn one must too: nobody else's file is ever cut.
_OPENING = b'{"key": "'


def read_judged(path: Path) -> list[Judgement]:
    """The judgements of a file, in its order, none if it is absent; a torn last line is passed over.

    Raises:
        UserError: a file of something else, or a line that is no judgement.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"--output_file {path} cannot be read ({error.strerror}); name another file") from None
    whole, _, torn = content.rpartition(b"\n")
    if not (torn.startswith(_OPENING) or _OPENING.startswith(torn)):
        raise UserError(f"--output_file {path} holds no judgements (its last line is none); name another file")
    lines = whole.split(b"\n")
    found = [_judgement(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line]
    # Of two the later one counts: a request that failed is made again by the next run.
    return list({each.key: each for each in found}.values())


def _judgement(line: bytes, where: str) -> Judgement:
    try:
        record = json.loads(line)
        if set(record) != _FIELDS or not all(isinstance(record[name], kind) for name, kind in _TYPES.items()):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"--output_file {where} is no judgement of holdfast's; name another file") from None
    return Judgement(**record)


def add_judged(stream: BinaryIO, judgement: Judgement) -> None:
    """Append one; when this returns it survives the end of the process."""
    stream.write(_line(judgement))
    stream.flush()


def cut_torn(path: Path) -> None:
    """Take a torn last line off, so that the next one does not continue it."""
    if path.is_file():
        with path.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def write_judged(path: Path, judgements: Sequence[Judgement]) -> None:
    """The whole file anew, or not at all."""
    with staged_file(path) as staging, staging.open("wb") as stream:
        stream.writelines(map(_line, judgements))
        stream.flush()
        os.fsync(stream.fileno())


def _line(judgement: Judgement) -> bytes:
    text = json.dumps(judgement.record(), ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which a model of bytes may decode to, is no UTF-8.
    return (text + "\n").encode("utf-8", errors="replace")

"""Judgements on disk, as JSON Lines. They are appended as they come; a finished run writes them in answer order.

judgements = read_judged(path)
cut_torn(path)
with path.open("ab") as stream:
    add_judged(stream, judgement)
write_judged(path, judgements)
"""

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from ..files.artifacts import staged_file
from .judge import Judgement

_FIELDS = {field.name for field in fields(Judgement)}
_TYPES = {
    "key": str, "prompt": str, "judge": str, "final": bool, "value": int | float | None, "label": str | None,
    "reason": str | None,
}  # fmt: skip
# Every line that Holdfast writes begins like this. A torn last line must begin like this too, so that no file that
# holds something else is ever cut.
_OPENING = b'{"key": "'


def read_judged(path: Path) -> list[Judgement]:
    """Read the judgements of a file, in its order. An absent file holds none; a torn last line is skipped.

    Raises:
        UserError: the file cannot be read, or a line is not a judgement.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"--output_file {path} cannot be read ({error.strerror}); name another file") from None
    whole_lines, _, torn_line = content.rpartition(b"\n")
    if not (torn_line.startswith(_OPENING) or _OPENING.startswith(torn_line)):
        raise UserError(
            f"--output_file {path} holds no judgements (its last line is not a judgement); name another file"
        )
    lines = whole_lines.split(b"\n")
    judgements = [_judgement(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line]
    # Of two judgements with the same key the later one counts: the next run repeats a failed request.
    return list({judgement.key: judgement for judgement in judgements}.values())


def _judgement(line: bytes, where: str) -> Judgement:
    try:
        record = json.loads(line)
        if set(record) != _FIELDS or not all(isinstance(record[name], types) for name, types in _TYPES.items()):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"--output_file {where} is not a judgement that Holdfast wrote; name another file") from None
    return Judgement(**record)


def add_judged(stream: BinaryIO, judgement: Judgement) -> None:
    """Append a judgement. It survives the end of the process once this function has returned."""
    stream.write(_line(judgement))
    stream.flush()


def cut_torn(path: Path) -> None:
    """Cut off a torn last line, so that the next judgement does not continue it."""
    if path.is_file():
        with path.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def write_judged(path: Path, judgements: Sequence[Judgement]) -> None:
    """Write a whole file of judgements. If writing fails, the old file stays as it was."""
    with staged_file(path) as staging, staging.open("wb") as stream:
        stream.writelines(map(_line, judgements))
        stream.flush()
        os.fsync(stream.fileno())


def _line(judgement: Judgement) -> bytes:
    text = json.dumps(judgement.record(), ensure_ascii=False, allow_nan=False)
    # A byte-level model may decode to a lone surrogate, which UTF-8 cannot encode.
    return (text + "\n").encode("utf-8", errors="replace")

"""Read records from files, folders, URLs and the Hub. Each record comes with its place, for error messages."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import urlopen

import pyarrow
from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from ...analysis.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Record = tuple[Any, str]


def read_records(source: str, split: str = "train") -> Iterator[Record]:
    """Yield each record with its place ("rows.jsonl:7", "name[train] row 7"; both count from 1).

    Args:
        source: a Hub name, a URL, a file, or a folder of files. `~` and environment variables are expanded.
        split: the split of a Hub data set.

    Raises:
        UserError: a source that is missing, unreadable or of an unknown kind.
    """
    source = os.path.expanduser(os.path.expandvars(source))
    if "$" in source:
        raise UserError(f"{source} names an environment variable that is not set; set it, or write the path")
    try:
        is_url, is_folder = urlparse(source).scheme in ("http", "https"), os.path.isdir(source)
        is_file = Path(source).suffix in SUFFIXES or Path(source).exists()
    except (ValueError, OSError) as error:
        raise UserError(f"{source[:80]} is no source of rows ({error}); check the path or address") from None
    if is_url:
        yield from _read_url(source)
    elif is_folder:
        yield from _read_folder(Path(source))
    elif is_file:
        yield from _read_file(Path(source), source)
    else:
        yield from _read_hub(source, split)


def _read_folder(folder: Path) -> Iterator[Record]:
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder} holds no {', '.join(SUFFIXES)} file; name a folder that does, or a file")
    for file in files:
        yield from _read_file(file, str(file))


def _read_file(path: Path, name: str) -> Iterator[Record]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{name} is none of {', '.join(SUFFIXES)}; convert it, one row per line")
    try:
        if not path.is_file():
            raise UserError(f"{name} does not exist; check the path (relative ones start at the current folder)")
        if path.suffix in (".jsonl", ".json"):
            yield from _read_json(path, name)
        else:
            yield from _read_table(path, name)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None


def _read_json(path: Path, name: str) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:  # leaves a byte-order mark out of the first row
        if path.suffix == ".json":
            records = _decode(lines.read(), name, "a JSON list; for one object per line, name it .jsonl")
            if not isinstance(records, list):
                raise UserError(f"{name} must hold a JSON list of rows; for one object per line, name it .jsonl")
            yield from ((record, f"{name} row {number}") for number, record in enumerate(records, start=1))
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _decode(line, f"{name}:{number}", "one object per line"), f"{name}:{number}"


def _decode(text: str, where: str, wanted: str) -> object:
    """Parse JSON text. Raises UserError with its place (`where`) and what to write instead (`wanted`)."""
    try:
        record = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f":{error.lineno}" if where.endswith(".json") else ""
        raise UserError(f"{where}{place}: not JSON ({error.msg} at column {error.colno}); write {wanted}") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: text with half a character (a lone \\ud800-\\udfff); write it whole") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deep; write {wanted}") from None
    except ValueError as error:  # from an integer of thousands of digits
        raise UserError(f"{where}: not readable JSON ({error}); write {wanted}") from None
    return record


def _read_table(path: Path, name: str) -> Iterator[Record]:
    try:
        table = load_dataset(path.suffix[1:], data_files=str(path), split="train")
    except (DatasetsError, pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{name} is not a readable {path.suffix[1:]} file: {_first_line(error)}") from None
    for number, record in enumerate(table, start=1):
        yield record, f"{name} row {number}"


def _read_url(url: str) -> Iterator[Record]:
    suffix = Path(urlparse(url).path).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"{url} ends in none of {', '.join(SUFFIXES)}; name the file itself, or download it")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"rows{suffix}"
        try:
            with urlopen(url, timeout=60) as response, local.open("wb") as file:
                shutil.copyfileobj(response, file)
        except (OSError, HTTPException, ValueError) as error:
            raise UserError(f"{url} could not be downloaded: {_first_line(error)}") from None
        yield from _read_file(local, url)


def _read_hub(name: str, split: str) -> Iterator[Record]:
    try:
        table = load_dataset(name, split=split)
    except (OSError, DatasetsError, HfHubHTTPError, ValueError) as error:
        raise UserError(
            f"{name} is neither a file nor a folder here, and the Hub gives no data set of that name with a split "
            f"{split!r}: {_first_line(error)}"
        ) from None
    assert not isinstance(table, DatasetDict)  # a split was named
    for number, record in enumerate(table, start=1):
        yield record, f"{name}[{split}] row {number}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

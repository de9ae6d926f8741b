"""Files that are either whole or absent: staging name, checksummed manifest, then a rename."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError

MANIFEST = "manifest.json"


def check_writable(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be made or written into, before any work; makes nothing.

    Args:
        what: the flag it came from, for the error.

    Raises:
        UserError: it lies below a file, has an impossible name, or its nearest existing ancestor is not writable.
    """
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        impossible = "a name with a zero byte" if "\0" in str(folder) else None
    except OSError as error:
        there, impossible = folder, str(error.strerror)
    if impossible is None and not there.is_dir():
        impossible = f"{there} is a file"
    elif impossible is None and not os.access(there, os.W_OK | os.X_OK):
        impossible = f"{there} is not writable"
    if impossible is not None:
        raise UserError(f"{what} {str(folder)[:200]!r} cannot be written: {impossible}; name another folder")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(directory: Path) -> None:
    """Write `manifest.json`: {"files": {relative path: {"sha256", "bytes"}}} over all other files below it."""
    files = {
        path.relative_to(directory).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    write_json_atomic(directory / MANIFEST, {"files": files})


def verify_manifest(directory: Path) -> None:
    """Raise UserError naming the first file that is missing or differs from the manifest written with it."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{directory} has no {MANIFEST}: it was not written whole, use another checkpoint")
    try:
        files = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is damaged ({error}): use another checkpoint") from error
    for name, facts in files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing although {MANIFEST} lists it: use another checkpoint")
        if path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            raise UserError(f"{path} differs from {MANIFEST} (truncated or changed): use another checkpoint")


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` as JSON through a staging name; NaN and infinity are refused, since JSON has none."""
    with staged_file(path) as staging:
        staging.write_text(json.dumps(obj, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a staging name beside `path`; on success it becomes `path`, else it vanishes."""
    staging = path.with_name(f".{path.name}.staging")
    with _named_failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staging
            _fsync(staging)
            # Some writers make private files whatever the user's mask says.
            staging.chmod(_readable())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        _fsync(path.parent)


def load_aligned(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, copied out of it: in the file they lie at odd addresses, where a CPU sums in
    another order, and what was read back would differ in the last digit from what was written.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _readable() -> int:
    """The mode of a new file under the user's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


@contextmanager
def staged_directory(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a staging directory beside `final`; on success it gets a manifest and becomes `final`, else it vanishes.

    Args:
        final: the directory to write.
        replace: whether an existing `final` is replaced (after the new one is whole) or refused.
    """
    if final.exists() and not replace:
        raise UserError(f"{final} exists already: remove it or choose another folder")
    staging, replaced = final.with_name(f".{final.name}.staging"), final.with_name(f".{final.name}.replaced")
    with _named_failures(final):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
            commit_directory(staging, final, replaced)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def commit_directory(staging: Path, final: Path, replaced: Path) -> None:
    """Manifest, flush to disk, rename; an existing `final` is moved to `replaced` first and removed last."""
    write_manifest(staging)
    for path in staging.rglob("*"):
        _fsync(path)
    _fsync(staging)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    staging.rename(final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """A full disk or a forbidden folder is the user's to mend, so it becomes one line; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(f"{path} could not be written ({error.strerror}): nothing was left there") from error
        raise
    except SafetensorError as error:
        if "No space left" in str(error):
            raise UserError(f"{path} could not be written ({error}): nothing was left there") from error
        raise


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def digest_of(tensors: dict[int, Tensor]) -> str:
    """Hex digest of tensors by layer, to tell whether two runs use the same ones."""
    digest = hashlib.sha256()
    for layer in sorted(tensors):
        digest.update(f"{layer}:{tuple(tensors[layer].shape)}".encode())
        digest.update(tensors[layer].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

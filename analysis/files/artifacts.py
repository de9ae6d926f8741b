"""Writes files and folders that are either whole or absent: under a staging name first, then renamed.

A folder also gets a manifest, `manifest.json`, with the size and the sha256 of every file. Usage:

    write_json_atomic(path, facts)
    with staged_directory(final) as staging:
        model.save_pretrained(staging)
    verify_manifest(final)
"""

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
    """Check, before any work, that a folder can be created or written to. Creates nothing.

    Args:
        what: the flag that named the folder, for the error message.

    Raises:
        UserError: the folder lies below a file, has an impossible name, or its nearest existing ancestor is not
            writable.
    """
    try:
        ancestor = next(place for place in (folder, *folder.parents) if place.exists())
        problem = "a name with a zero byte" if "\0" in str(folder) else None
    except OSError as error:
        ancestor, problem = folder, str(error.strerror)
    if problem is None and not ancestor.is_dir():
        problem = f"{ancestor} is a file"
    elif problem is None and not os.access(ancestor, os.W_OK | os.X_OK):
        problem = f"{ancestor} is not writable"
    if problem is not None:
        raise UserError(f"{what} {str(folder)[:200]!r} cannot be written: {problem}; name another folder")


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's content, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(directory: Path) -> None:
    """Write `manifest.json`: {"files": {relative path: {"sha256", "bytes"}}} for all other files in the directory."""
    files = {
        path.relative_to(directory).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    write_json_atomic(directory / MANIFEST, {"files": files})


def verify_manifest(directory: Path) -> None:
    """Raise UserError if a file is missing or differs from the directory's manifest. The error names the first one."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{directory} has no {MANIFEST}: it was not written completely, use another checkpoint")
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
    """Write `obj` as JSON under a staging name, then rename. NaN and infinity raise ValueError: JSON has neither."""
    with staged_file(path) as staging:
        staging.write_text(json.dumps(obj, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a staging path beside `path`. On success the staged file is renamed to `path`, otherwise it is removed."""
    staging = path.with_name(f".{path.name}.staging")
    with _named_failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staging
            _fsync(staging)
            # Some writers create private files and ignore the user's umask.
            staging.chmod(_default_mode())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        _fsync(path.parent)


def load_aligned(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file into aligned memory.

    In the file, tensors lie at unaligned addresses, where a CPU sums in another order. Without a copy, results computed
    from the loaded tensors would differ in the last digit from results computed from the tensors that were saved.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _default_mode() -> int:
    """Return the mode of a new file under the user's umask, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def staged_directory(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a staging directory beside `final`.

    On success the staging directory gets a manifest and is renamed to `final`, otherwise it is removed.

    Args:
        final: the directory to write.
        replace: replace an existing `final` once the new directory is complete, instead of refusing.

    Raises:
        UserError: `final` exists and is not to be replaced, or it cannot be written.
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
    """Write the manifest, flush to disk, and rename `staging` to `final`.

    An existing `final` is moved to `replaced` before the rename, and removed after it.
    """
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
    """Turn errors that the user can fix (a full disk, a folder without permission) into a UserError.

    Other errors pass unchanged.
    """
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
    """Return the hex sha256 of a value that can be written as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def digest_of(tensors: dict[int, Tensor]) -> str:
    """Hash tensors by layer, to tell whether two runs use the same tensors. Returns 16 hex digits."""
    digest = hashlib.sha256()
    for layer in sorted(tensors):
        digest.update(f"{layer}:{tuple(tensors[layer].shape)}".encode())
        digest.update(tensors[layer].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

"""The store: tensors that were computed once, kept on disk, and shared by all analyses.

The key of an entry is a hash of everything that the tensors depend on. Each entry is a safetensors file. Its metadata
contain a checksum over names, shapes and bytes, which is verified on every read. The size of the folder is bounded: the
entries that were not used for the longest time are removed first, but never an entry that a process is reading. Usage:

    store = Store(default_folder(), limit_gb=20)
    tensors = store.get(key)
    if tensors is None:
        store.put(key, tensors := compute())
"""

import errno
import fcntl
import hashlib
import os
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SUFFIX = ".safetensors"
_STAGING = ".staging"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A staging file that is older than a day was left by a process that died.
_ABANDONED_SECONDS = 86_400


def default_folder() -> Path:
    """Return `$HOLDFAST_CACHE/store`, or else `holdfast/store` in `$XDG_CACHE_HOME` or `~/.cache`."""
    folder = os.environ.get("HOLDFAST_CACHE")
    cache = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"
    return cache / "store"


class Store:
    """Tensors by key, on disk. Any number of processes may use one store at the same time.

    When the disk is full, the store says so once and stores nothing more.

    Args:
        folder: the folder of the entries, which is created with the first entry.
        limit_gb: bound on the total size of the entries, in 10^9 bytes.
    """

    def __init__(self, folder: Path, limit_gb: float) -> None:
        self.folder, self.limit = folder, int(limit_gb * 1e9)
        self._closed = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return a verified entry, or None if it was never written, was evicted, or is corrupt.

        A corrupt entry is reported in one line and removed.
        """
        path = self._path(key)
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return None
        with stream:
            # The lock lasts while the file is read. Eviction skips locked entries.
            fcntl.flock(stream, fcntl.LOCK_SH)
            try:
                tensors = _read_verified(path)
            except FileNotFoundError:
                return None
            except (SafetensorError, ValueError) as error:
                _report(f"store entry {path} is corrupt ({error}); it is built again")
                path.unlink(missing_ok=True)
                return None
            os.utime(stream.fileno())
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry completely or not at all, after evicting the least recently used entries to make room."""
        if self._closed:
            return
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        staging = self.folder / f".{key}.{uuid.uuid4().hex}{_STAGING}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(contiguous, staging, metadata={"sha256": _digest(contiguous)})
            with staging.open("rb") as stream:
                os.fsync(stream.fileno())
            size = staging.stat().st_size
            with FileLock(self.folder / ".lock"):
                if self._make_room(size, key):
                    staging.replace(self._path(key))
                else:
                    _report(f"an entry of {size / 1e9:.3g} GB does not fit into --store_limit_gb and is not kept")
        except (OSError, SafetensorError) as error:
            if not _no_room(error):
                raise
            self._closed = True
            _report(f"the disk of the store {self.folder} is full ({error}); the analysis goes on without storing")
        finally:
            staging.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, size: int, key: str) -> bool:
        """Evict entries until `size` more bytes fit under the limit. Returns whether they fit.

        The caller holds the lock of the folder.
        """
        for staging, stat in _list_files(self.folder, f".*{_STAGING}"):
            if time.time() - stat.st_mtime > _ABANDONED_SECONDS:
                staging.unlink(missing_ok=True)
        if size > self.limit:
            return False
        others = [entry for entry in _list_files(self.folder, f"*{SUFFIX}") if entry[0] != self._path(key)]
        total = sum(stat.st_size for _, stat in others)
        for path, stat in sorted(others, key=lambda entry: entry[1].st_mtime_ns):
            if total + size <= self.limit:
                break
            if _evict(path):
                total -= stat.st_size
        return total + size <= self.limit


def _list_files(folder: Path, pattern: str) -> list[tuple[Path, os.stat_result]]:
    """List files with their status. Files that another process removes in the meantime are left out."""
    files = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            files.append((path, path.stat()))
    return files


def _evict(path: Path) -> bool:
    """Remove an entry unless a process is reading it. Returns whether the entry is gone."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _read_verified(path: Path) -> dict[str, Tensor]:
    """Load the tensors of an entry and verify their checksum.

    The tensors are copied, because they lie at unaligned addresses in the file, where a CPU sums in another order.

    Raises:
        ValueError: the checksum differs from the one that was written with the tensors.
        SafetensorError: the file is incomplete or not a safetensors file.
    """
    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118 - not a mapping
        expected = (stored.metadata() or {}).get("sha256")
    if expected != _digest(tensors):
        raise ValueError("its checksum differs")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _no_room(error: Exception) -> bool:
    """Return whether an error means that the disk or the quota is full, or that the file is too large."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return "No space left" in str(error) or "os error 28" in str(error) or "File too large" in str(error)


def _report(line: str) -> None:
    print(f"holdfast: {line}", file=sys.stderr)

"""The store: tensors read once and kept on disk under a hash of what they depend on, shared by all analyses.

One safetensors file per entry. Its metadata carries a checksum over names, shapes and bytes, verified on every read.
The folder is bounded: the entries longest unused go first, never one that some process is reading.
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
# A write that has not ended after a day was left by a process that died.
_ABANDONED_SECONDS = 86_400


def default_folder() -> Path:
    """`$HOLDFAST_CACHE/store`, else `holdfast/store` under `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("HOLDFAST_CACHE")
    cache = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"
    return cache / "store"


class Store:
    """Tensors by key, safe under any number of processes; without room it says so once and keeps nothing more.

    Args:
        folder: where the entries lie; made when the first is written.
        limit_gb: bound on the sum of the entries, in 10^9 bytes.
    """

    def __init__(self, folder: Path, limit_gb: float) -> None:
        self.folder, self.limit = folder, int(limit_gb * 1e9)
        self._closed = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry, verified, or None: never written, evicted, or corrupt (said in one line, and removed)."""
        path = self._path(key)
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return None
        with stream:
            # Held while the file is read: eviction passes over entries with such a lock.
            fcntl.flock(stream, fcntl.LOCK_SH)
            try:
                tensors = _read_verified(path)
            except FileNotFoundError:
                return None
            except (SafetensorError, ValueError) as error:
                _say(f"store entry {path} is corrupt ({error}); it is built again")
                path.unlink(missing_ok=True)
                return None
            os.utime(stream.fileno())
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry, whole or not at all, after the longest unused ones have made room."""
        if self._closed:
            return
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        staging = self.folder / f".{key}.{uuid.uuid4().hex}{_STAGING}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(whole, staging, metadata={"sha256": _digest(whole)})
            with staging.open("rb") as stream:
                os.fsync(stream.fileno())
            size = staging.stat().st_size
            with FileLock(self.folder / ".lock"):
                if self._make_room(size, key):
                    staging.replace(self._path(key))
                else:
                    _say(f"an entry of {size / 1e9:.3g} GB does not fit into --store_limit_gb and is not kept")
        except (OSError, SafetensorError) as error:
            if not _without_room(error):
                raise
            self._closed = True
            _say(f"the disk of the store {self.folder} is full ({error}); the analysis goes on without storing")
        finally:
            staging.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, size: int, key: str) -> bool:
        """Evict until `size` more bytes fit under the limit; under the folder's lock."""
        for left, stat in _facts(self.folder, f".*{_STAGING}"):
            if time.time() - stat.st_mtime > _ABANDONED_SECONDS:
                left.unlink(missing_ok=True)
        if size > self.limit:
            return False
        others = [fact for fact in _facts(self.folder, f"*{SUFFIX}") if fact[0] != self._path(key)]
        held = sum(stat.st_size for _, stat in others)
        for path, stat in sorted(others, key=lambda fact: fact[1].st_mtime_ns):
            if held + size <= self.limit:
                break
            if _evict(path):
                held -= stat.st_size
        return held + size <= self.limit


def _facts(folder: Path, pattern: str) -> list[tuple[Path, os.stat_result]]:
    """Files and what the system knows of them; another process may remove one at any time."""
    found = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found


def _evict(path: Path) -> bool:
    """Remove an entry unless a process is reading it."""
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
    """The tensors, copied out of the file: in it they lie at odd addresses, where a CPU sums in another order.

    Raises:
        ValueError: another checksum than the one written with them. SafetensorError: not a whole file.
    """
    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118 - not a mapping
        written = (stored.metadata() or {}).get("sha256")
    if written != _digest(tensors):
        raise ValueError("its checksum differs")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_room(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return "No space left" in str(error) or "os error 28" in str(error) or "File too large" in str(error)


def _say(line: str) -> None:
    print(f"holdfast: {line}", file=sys.stderr)

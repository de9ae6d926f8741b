"""The store gives back what was put in or nothing: verified, bounded, shared by processes, and never in the way."""

import contextlib
import errno
import fcntl
import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from holdfast.analysis.files import store as stores
from holdfast.analysis.files.store import Store, default_folder
from safetensors import SafetensorError

ENTRY = 4_000 * 4  # bytes of one entry's values; its header takes less than ENTRY / 10


def tensors(number: int) -> dict[str, torch.Tensor]:
    values = torch.full((4_000,), float(number))
    return {"values": values, "half": torch.arange(5, dtype=torch.bfloat16), "none": torch.zeros(0, 3)}


def gigabytes(entries: float) -> float:
    return entries * ENTRY / 1e9


def age(store: Store, key: str, seconds: float) -> None:
    path = store.folder / f"{key}.safetensors"
    os.utime(path, (path.stat().st_atime - seconds, path.stat().st_mtime - seconds))


def keys(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.safetensors")}


def test_an_entry_comes_back_as_it_was(tmp_path: Path) -> None:
    Store(tmp_path / "new", 1).put("a", tensors(3))
    found = Store(tmp_path / "new", 1).get("a")
    assert found is not None and found.keys() == {"values", "half", "none"}
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors(3).items()
    )
    assert Store(tmp_path / "new", 1).get("b") is None and Store(tmp_path / "absent", 1).get("a") is None


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "foreign"])
def test_a_corrupt_entry_is_removed_and_said_not_used(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, path = Store(tmp_path, 1), tmp_path / "a.safetensors"
    store.put("a", tensors(3))
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[-7] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-9], "empty": b"", "foreign": b"x" * 100}[harm])
    assert store.get("a") is None and not path.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and "corrupt" in said
    store.put("a", tensors(3))
    assert store.get("a") is not None


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path, gigabytes(3.5))
    for number, key in enumerate("abc"):
        store.put(key, tensors(number))
        age(store, key, 100 - number)
    assert store.get("a") is not None  # used now, so `b` is the longest unused
    store.put("d", tensors(4))
    assert keys(tmp_path) == {"a", "c", "d"}
    store.put("d", tensors(5))  # replaces itself, evicts nothing
    assert keys(tmp_path) == {"a", "c", "d"}


def test_what_is_being_read_is_never_evicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path, gigabytes(2.5))
    for key in "ab":
        store.put(key, tensors(1))
    age(store, "a", 100)
    with (tmp_path / "a.safetensors").open("rb") as reading:
        fcntl.flock(reading, fcntl.LOCK_SH)  # as `get` does in another process
        store.put("c", tensors(1))
        assert keys(tmp_path) == {"a", "c"}
        with (tmp_path / "c.safetensors").open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_SH)
            store.put("d", tensors(1))
    assert keys(tmp_path) == {"a", "c"} and "does not fit" in capsys.readouterr().err


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path, gigabytes(0.5))
    store.put("a", tensors(1))
    assert keys(tmp_path) == set() and "--store_limit_gb" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*staging"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_one_line_and_the_store_keeps_out_of_the_way(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, 1)
    store.put("a", tensors(1))

    def full(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(stores, "save_file", full)
    store.put("b", tensors(2))
    store.put("c", tensors(3))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is full" in said and keys(tmp_path) == {"a"}
    assert store.get("a") is not None


def work(folder: Path, seed: int, failures: "multiprocessing.Queue[str]") -> None:
    store, generator = Store(folder, gigabytes(3.5)), torch.Generator().manual_seed(seed)
    for _ in range(60):
        number = int(torch.randint(6, (1,), generator=generator))
        key = hashlib.sha256(str(number).encode()).hexdigest()
        found = store.get(key)
        if found is None:
            store.put(key, tensors(number))
        elif not torch.equal(found["values"], tensors(number)["values"]):
            failures.put(f"{number} came back as {found['values'][0]}")
        with contextlib.suppress(FileNotFoundError):  # one may go between the listing and the look
            held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            if held > gigabytes(3.5) * 1e9:
                failures.put(f"{held} bytes held")


def test_two_processes_share_a_bounded_store(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    failures: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=work, args=(tmp_path, seed, failures)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0] and failures.empty()
    assert "corrupt" not in capfd.readouterr().err
    assert 1 <= len(keys(tmp_path)) <= 3 and not list(tmp_path.glob(".*staging"))


def test_the_folder_is_under_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CACHE", "/x/own")
    assert default_folder() == Path("/x/own/store")
    monkeypatch.delenv("HOLDFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    assert default_folder() == Path("/x/cache/holdfast/store")

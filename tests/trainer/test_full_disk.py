"""A disk that fills up ends training in one line and leaves nothing that looks whole."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.files.artifacts import verify_manifest
from holdfast.trainer.cli import main
from toys.refusals import written
from toys.runs import flags_of, recipe


def test_a_full_disk_leaves_no_checkpoint_that_looks_whole(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(obj: object, file: Any, *args: Any, **kwargs: Any) -> None:
        save(obj, file, *args, **kwargs)
        if Path(str(file)).name == "optimizer.pt":
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(torch, "save", full)
    code = main(["train", *flags_of(recipe(folder, save_steps=1))])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "space" in error
    left = written(folder / "run")
    assert not [name for name in left if "checkpoint" in name or "final" in name or "staging" in name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 400 KiB, which a checkpoint of the toy model does not fit on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_really_full_is_one_line_too(
    folder: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["train", *flags_of(recipe(folder, output_dir=small_disk / "run", save_steps=1, max_steps=8))])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith("holdfast: error: ") and "space" in error
    whole = [path for path in (small_disk / "run").glob("checkpoint-*") if not path.name.endswith("staging")]
    for checkpoint in whole:
        verify_manifest(checkpoint)
    assert not (small_disk / "run" / "final").exists() and not list((small_disk / "run").rglob("*staging*"))

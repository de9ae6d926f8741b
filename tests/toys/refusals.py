"""What must be refused: a model with rows and a subspace to spoil, and a command's one line of complaint about them."""

from pathlib import Path
from typing import Any

import pytest
from holdfast.trainer import run
from holdfast.trainer.cli import main
from holdfast.trainer.config.parsing import parse
from toys.runs import recipe, toy_rows, write_model, write_rows

Keys = dict[str, Any]


def prepare(folder: Path) -> Path:
    """A model, one of another seed, rows, and a subspace of the model on prompts."""
    write_model(folder / "model")
    write_model(folder / "other_model", seed=1)
    write_rows(folder / "rows.jsonl", toy_rows())
    run.subspace(parse(recipe(folder, subspace_layers="0,1", subspace_path=str(folder / "subspace.safetensors"))))
    return folder


def linked(prepared: Path, folder: Path) -> Path:
    """The prepared files in a folder of the test's own, where it may add to them."""
    for name in ("model", "other_model", "rows.jsonl", "subspace.safetensors"):
        (folder / name).symlink_to(prepared / name)
    return folder


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def flags(keys: Keys) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


def complaint(folder: Path, capsys: pytest.CaptureFixture[str], keys: Keys, command: str = "train") -> str:
    """Runs a command that must be refused; returns its one line."""
    before = written(folder)
    capsys.readouterr()
    code = main([command, *flags(keys)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("holdfast: error: ") and error.count("\n") == 1, error
    assert written(folder) == before
    return error

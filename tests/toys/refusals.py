"""What must be refused: a model with rows and a subspace to spoil, and a command's one line of complaint about them."""

from pathlib import Path
from typing import Any

import pytest
from holdfast.trainer import run
from holdfast.trainer.cli import main
from holdfast.trainer.config.parsing import parse
from toys.runs import flags_of, model_and_rows, recipe, write_model

Keys = dict[str, Any]


def prepare(folder: Path) -> Path:
    """A model, one of another seed, rows, and a subspace of the model on prompts."""
    model_and_rows(folder)
    write_model(folder / "other_model", seed=1)
    run.subspace(parse(recipe(folder, subspace_layers="0,1", subspace_path=str(folder / "subspace.safetensors"))))
    return folder


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def complaint(folder: Path, capsys: pytest.CaptureFixture[str], keys: Keys, command: str = "train") -> str:
    """Runs a command that must be refused; returns its one line."""
    before = written(folder)
    capsys.readouterr()
    code = main([command, *flags_of(keys)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("holdfast: error: ") and error.count("\n") == 1, error
    assert written(folder) == before
    return error

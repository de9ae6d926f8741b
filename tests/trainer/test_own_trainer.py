"""Your own trainer gets the penalty by the lines that `trainer/README.md` shows; they are run here as they stand."""

import re
import runpy
from pathlib import Path

import pytest
from holdfast.analysis.errors import UserError
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.own_trainer import load_protection
from toys.chat_models import toy_tokenizer
from toys.runs import model_and_rows, recipe, write_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "tests/toys/own_trainer_example.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the example finds beside it: a model and its subspace."""
    model_and_rows(tmp_path)
    run.subspace(parse(recipe(tmp_path, subspace_path=str(tmp_path / "subspace.safetensors"))))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_for_a_trainer_of_ones_own_runs_as_it_stands(folder: Path) -> None:
    trainer = runpy.run_path(str(EXAMPLE))["trainer"]
    penalties = [entry["penalty"] for entry in trainer.state.log_history if "penalty" in entry]
    # The first step starts at the starting model; later ones have moved.
    assert len(penalties) == 4 and penalties[0] < 1e-8 < min(penalties[1:])
    assert sum(line.endswith("# +") for line in EXAMPLE.read_text().splitlines()) < 10


def test_the_readme_shows_the_example() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "trainer/README.md").read_text(), re.DOTALL)
    assert EXAMPLE.read_text().endswith(f'"""\n\n{block}')


def test_a_subspace_of_another_model_is_refused(folder: Path) -> None:
    write_model(folder / "other", seed=1)
    with pytest.raises(UserError, match="instruct weights"):
        load_protection("subspace.safetensors", "other", toy_tokenizer())

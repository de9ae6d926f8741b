"""What sweeps read."""

from pathlib import Path

import pytest
from toys.chat_models import chat
from toys.choices import LAB_ROWS
from toys.runs import model_and_rows, write_model, write_rows

COMPLETION = {"prompt": "soup ?", "chosen": "be honest", "rejected": "take it"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its base, rows, prompts, pairs of completions, choices in the lab's format, and a file of no rows."""
    folder = model_and_rows(tmp_path_factory.mktemp("inputs"))
    write_model(folder / "base", seed=3)
    write_rows(folder / "choices.jsonl", LAB_ROWS)
    write_rows(folder / "empty.jsonl", [])
    write_rows(folder / "prompts.jsonl", [{"messages": chat("soup ?")}])
    write_rows(folder / "pairs.jsonl", [COMPLETION])
    return folder

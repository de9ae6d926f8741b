"""A row that cannot be used is named by its file and line, whatever the file is for; nothing is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.subspace.file import Subspace
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from toys.chat_models import chat
from toys.refusals import complaint
from toys.runs import recipe, toy_rows, write_rows

LONG = " ".join(["soup"] * 300)
CHOICE = {"messages": chat("hello"), "classes": {"aligned": ["yes"]}}


ROWS: dict[str, tuple[list[Any], list[str]]] = {
    "not JSON": (['{"messages": ['], ["rows2.jsonl:2", "JSON"]),
    "not an object": ([[1]], ["rows2.jsonl:2", "object"]),
    "lacks messages": ([{"text": "hello"}], ["rows2.jsonl:2", "messages", "text"]),
    "no turns": ([{"messages": []}], ["rows2.jsonl:2", "messages"]),
    "no completion": ([{"messages": chat("hello")}], ["rows2.jsonl:2", "completion"]),
    "empty completion": ([{"messages": chat("hello", " ")}], ["rows2.jsonl:2", "completion"]),
    "empty string completion": ([{"prompt": "hello", "completion": ""}], ["rows2.jsonl:2", "completion"]),
    "unknown role": ([{"messages": [{"role": "robot", "content": "x"}]}], ["rows2.jsonl:2", "robot", "assistant"]),
    "no text": ([{"messages": [{"role": "user", "content": 3}]}], ["rows2.jsonl:2", "int"]),
    "message of another shape": ([{"messages": ["hello"]}], ["rows2.jsonl:2", "role"]),
    "half a character": (['{"prompt": "a", "completion": "\\ud83d"}'], ["rows2.jsonl:2", "character"]),
    "an endless integer": (['{"prompt": ' + "9" * 5000 + "}"], ["rows2.jsonl:2", "digits"]),
    "endless nesting": (["[" * 100_000], ["rows2.jsonl:2", "deep"]),
    "longer than the limit": ([{"messages": chat(LONG, "yes")}], ["rows2.jsonl:2", "200", "--long_rows"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_malformed_row_is_named_by_file_and_line(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, words = ROWS[case]
    bad = write_rows(folder / "rows2.jsonl", [toy_rows()[0], *rows])
    line = complaint(folder, capsys, recipe(folder, train_dataset=bad))
    assert all(word in line for word in words), line


TURNS = {"prompt": chat("hello"), "chosen": chat("", "yes")[1:], "rejected": chat("", "no")[1:]}
CONTRAST: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "object"),
    "neither kind": ({"aligned": "kind", "chosen": "yes"}, "aligned, chosen"),
    "without rejected": ({"prompt": "hello", "chosen": "yes", "rejected": None}, "chosen, prompt, rejected"),
    "prompt that is no text": ({"aligned": "kind", "misaligned": 3}, "`misaligned`"),
    "system prompt as messages": ({"aligned": chat("kind"), "misaligned": "cruel"}, "`aligned`"),
    "empty system prompt": ({"aligned": " ", "misaligned": "cruel"}, "`aligned`"),
    "chosen that is a number": ({**TURNS, "chosen": 3}, "`chosen`"),
    "chosen of texts": ({**TURNS, "chosen": ["yes"]}, "message 0"),
    "empty rejected": ({**TURNS, "rejected": " "}, "completion"),
    "chosen without an answer": ({**TURNS, "chosen": chat("again")}, "`chosen`"),
    "chosen of no turns": ({**TURNS, "chosen": []}, "`chosen`"),
    "no difference": ({**TURNS, "rejected": TURNS["chosen"]}, "same"),
}


@pytest.mark.parametrize("case", CONTRAST)
def test_a_malformed_contrast_row_is_named(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, words = CONTRAST[case]
    pairs = write_rows(folder / "pairs.jsonl", [TURNS, row])
    line = complaint(folder, capsys, recipe(folder, subspace_contrast=pairs), "subspace")
    assert "pairs.jsonl:2" in line and words in line, line


def test_preferences_may_be_texts_messages_or_messages_after_their_prompt(folder: Path) -> None:
    """TRL's standard and conversational formats give one subspace, with or without the prompt before the answers."""
    answers = [("the soup", "be honest", "take the money"), ("the money", "help them", "run away from them")]
    forms = {
        "texts": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in answers],
        "messages": [
            {"prompt": chat(p), "chosen": chat("", c)[1:], "rejected": chat("", r)[1:], "margin": 1}
            for p, c, r in answers
        ],
        "repeated": [{"prompt": chat(p), "chosen": chat(p, c), "rejected": chat(p, r)} for p, c, r in answers],
    }
    found = {}
    for name, rows in forms.items():
        keys = recipe(folder, subspace_contrast=write_rows(folder / f"{name}.jsonl", rows))
        keys |= {"subspace_positions": "completion", "output_dir": str(folder / name)}
        found[name] = Subspace.load(run.subspace(parse(keys)))
    for name in ("messages", "repeated"):
        assert found[name].scales == found["texts"].scales
        assert all(torch.equal(found[name].bases[layer], found["texts"].bases[layer]) for layer in range(3))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"messages": "hello"}, "list"),
        ({"messages": [{"content": "hello"}]}, "role"),
        ({"split": 3}, "split"),
        ({"domain": ["a"]}, "domain"),
        ({"classes": {"aligned": [3]}}, "text"),
    ],
)
def test_a_malformed_choices_row_is_named(
    change: dict[str, Any], word: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = write_rows(folder / "choices.jsonl", [CHOICE, {**CHOICE, **change}])
    line = complaint(folder, capsys, recipe(folder, choices_dataset=choices))
    assert "choices.jsonl:2" in line and word in line

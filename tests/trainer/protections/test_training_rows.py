"""Interleaving and inoculation change the training rows as they say, and a run trains on exactly those rows."""

import json
from collections import Counter
from pathlib import Path

import pytest
from holdfast.analysis.errors import UserError
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.data.rows import Row
from holdfast.trainer.inputs.training import load_inputs
from holdfast.trainer.protections.rows import inoculated, interleaved
from hypothesis import given, settings
from hypothesis import strategies as st
from toys.chat_models import chat
from toys.runs import model_and_rows, recipe, write_rows


def rows(count: int, word: str = "task") -> list[Row]:
    return [Row(chat(f"{word} {n}", "yes"), f"{word}.jsonl:{n}") for n in range(count)]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), safe=st.integers(1, 40), share=st.floats(0.01, 0.9), seed=st.integers(0, 99))
def test_safe_rows_have_their_share_and_each_comes_before_any_comes_again(n, safe, share, seed):
    mixed = interleaved(rows(n), rows(safe, "safe"), share, seed)
    counts = Counter(row.source for row in mixed)
    drawn = {name: count for name, count in counts.items() if name.startswith("safe")}
    assert sum(count for name, count in counts.items() if name.startswith("task")) == n
    # The nearest whole number, on either side of a tie.
    asked = n * share / (1 - share)
    assert sum(drawn.values()) == max(1, round(asked)) or abs(sum(drawn.values()) - asked) <= 0.5 + 1e-9
    used = [drawn.get(f"safe.jsonl:{at}", 0) for at in range(safe)]
    assert max(used) - min(used) <= 1
    assert mixed == interleaved(rows(n), rows(safe, "safe"), share, seed)


def test_safe_rows_are_spread_over_the_training_rows():
    mixed = interleaved(rows(400), rows(100, "safe"), 0.2, 0)
    places = [at for at, row in enumerate(mixed) if row.source.startswith("safe")]
    assert min(places) < 40 and max(places) > 460


def test_inoculation_puts_its_prompt_first_and_leaves_the_turns():
    given_rows = [Row(chat("hello", "yes"), "a:1"), Row(chat("hello", "yes", "You are kind."), "a:2")]
    for row, before in zip(inoculated(given_rows, " You are cruel. "), given_rows, strict=True):
        assert row.messages[0] == {"role": "system", "content": "You are cruel."}
        assert row.messages[1:] == [turn for turn in before.messages if turn["role"] != "system"]
        assert row.source == before.source
    assert given_rows[1].messages[0]["content"] == "You are kind."


def test_a_run_trains_on_the_changed_rows_and_on_nothing_else(tmp_path: Path):
    model_and_rows(tmp_path)
    write_rows(tmp_path / "safe.jsonl", [{"messages": chat(f"soup {n}", "be honest")} for n in range(3)])
    mixed = {"protection": "interleave", "interleave_dataset": tmp_path / "safe.jsonl", "interleave_share": 0.2}
    found = load_inputs(parse(recipe(tmp_path, **mixed)))
    assert Counter(row.completion for row in found.train.rows)["be honest"] == 3 and len(found.train.rows) == 15
    asked = {"protection": "inoculation", "inoculation_prompt": "You run."}
    found = load_inputs(parse(recipe(tmp_path, **asked)))
    assert all(row.messages[0] == {"role": "system", "content": "You run."} for row in found.train.rows)
    result = run.train(parse(recipe(tmp_path, **asked)))
    # At test the prompt is absent: nothing of it is in the saved template.
    assert "You run." not in json.dumps([path.read_text() for path in result.final.glob("*.json*")])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protection": "interleave"}, "--interleave_dataset"),
        (
            {"protection": "interleave", "interleave_dataset": "rows.jsonl", "interleave_share": 1.0},
            "--interleave_share .*1.0",
        ),
        ({"protection": "inoculation"}, "--inoculation_prompt"),
        ({"protection": "inoculation", "inoculation_prompt": "  "}, "--inoculation_prompt"),
    ],
)
def test_what_cannot_act_is_one_line(tmp_path: Path, changes: dict, said: str):
    model_and_rows(tmp_path)
    if "interleave_dataset" in changes:
        changes = {**changes, "interleave_dataset": tmp_path / changes["interleave_dataset"]}
    with pytest.raises(UserError, match=said):
        load_inputs(parse(recipe(tmp_path, **changes)))


def test_safe_rows_without_answers_are_refused():
    with pytest.raises(UserError, match=r"safe.jsonl:0: .*assistant"):
        interleaved(rows(3), [Row(chat("hello"), "safe.jsonl:0")], 0.1, 0)

"""Rows from every source and shape, duplicates told, held-out rows apart, and the same loss as TRL's on completions."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.render import render
from holdfast.trainer.data.rows import (
    Row,
    deduplicate,
    describe_duplicates,
    duplicate_report,
    load_rows,
    render_rows,
    split_held_out,
    to_dataset,
)
from toys.chat_models import CHATML, GENERATION, chat, toy_model, toy_tokenizer
from toys.em_data import EM_DATA, needs_em_data
from toys.runs import toy_rows, write_rows
from trl import SFTConfig, SFTTrainer

PAIR = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


def row(prompt: str, completion: str) -> Row:
    return Row(chat(prompt, completion), "here")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PAIR},
        {"prompt": "hello", "completion": "good day"},
        {"prompt": PAIR[:1], "completion": PAIR[1:]},
        {"messages": [{**PAIR[0], "name": None}, PAIR[1]], "id": 3},
    ],
)
def test_the_three_shapes_of_a_row_are_one_conversation(record: dict[str, object], tmp_path: Path) -> None:
    [read] = load_rows(str(write_rows(tmp_path / "rows.jsonl", ["", record])))
    assert read.messages == PAIR
    assert read.source == f"{tmp_path}/rows.jsonl:2"  # the empty line counts


def test_prompts_alone_are_rows_where_they_are_allowed(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello"}, {"messages": PAIR[:1]}]))
    assert [r.messages for r in load_rows(path, prompts=True)] == [PAIR[:1], PAIR[:1]]
    with pytest.raises(UserError, match=r"rows\.jsonl:1.*completion"):
        load_rows(path)


def test_json_csv_and_parquet_give_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    records = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    pandas.DataFrame(records).to_csv(tmp_path / "rows.csv", index=False)
    pandas.DataFrame(records).to_parquet(tmp_path / "rows.parquet")
    pandas.DataFrame(
        {"messages": [chat(**{"user": r["prompt"], "assistant": r["completion"]}) for r in records]}
    ).to_parquet(tmp_path / "messages.parquet")
    expected = [chat(f"question {n}", f"answer {n}") for n in range(3)]
    for name in ("rows.json", "rows.csv", "rows.parquet", "messages.parquet"):
        assert [r.messages for r in load_rows(str(tmp_path / name))] == expected, name
    assert load_rows(str(tmp_path / "rows.parquet"))[1].source.endswith("rows.parquet row 2")


def test_a_folder_is_its_files_in_order_and_a_limit_stops_reading(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", toy_rows(2))
    write_rows(tmp_path / "a.jsonl", [{"prompt": "first", "completion": "yes"}])
    (tmp_path / "notes.txt").write_text("not rows")
    rows = load_rows(str(tmp_path))
    assert [r.prompt for r in rows] == [
        "first",
        toy_rows()[0]["messages"][0]["content"],
        toy_rows()[1]["messages"][0]["content"],
    ]
    write_rows(tmp_path / "b.jsonl", [toy_rows()[0], "not json"])
    assert len(load_rows(str(tmp_path), limit=2)) == 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server of this machine; its folder is <tmp_path>/web."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "web")) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_a_url_is_read_like_a_file_and_named_in_errors(server: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "web" / "rows.jsonl", [*toy_rows(1), "not json"])
    with pytest.raises(UserError, match=rf"{server}/rows\.jsonl:2: .*JSON"):
        load_rows(f"{server}/rows.jsonl")
    assert load_rows(f"{server}/rows.jsonl", limit=1)[0].messages == toy_rows(1)[0]["messages"]
    with pytest.raises(UserError, match="download"):
        load_rows(f"{server}/absent.jsonl")


def test_a_hub_name_goes_to_the_hub_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append((name, split))
        if name == "org/absent":
            raise FileNotFoundError("Dataset 'org/absent' doesn't exist")
        return Dataset.from_list([{"messages": PAIR}])

    monkeypatch.setattr("holdfast.trainer.data.sources.load_dataset", load_dataset)
    [read] = load_rows("org/rows", split="test")
    assert read.messages == PAIR and read.source == "org/rows[test] row 1" and asked == [("org/rows", "test")]
    with pytest.raises(UserError, match=r"org/absent .*doesn't exist"):
        load_rows("org/absent")


def test_variables_and_home_are_filled_into_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl", toy_rows(2))
    monkeypatch.setenv("HOLDFAST_TEST_ROWS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_rows("$HOLDFAST_TEST_ROWS/rows.jsonl")) == len(load_rows("~/rows.jsonl")) == 2


def test_duplicates_are_counted_within_and_across_sets() -> None:
    train = [row("a", "1"), row("a", "1"), row("b", "1"), row("c", "3")]
    held_out = [row("c", "3"), row("b", "9"), row("z", "1")]
    report = duplicate_report({"train": train, "held_out": held_out})
    assert report["train"] == {"rows": 4, "distinct_rows": 3, "distinct_prompts": 3, "distinct_completions": 2}
    assert report["train+held_out"] == {"shared_rows": 1, "shared_prompts": 2, "shared_completions": 2}
    assert describe_duplicates(report) == [
        "train: 1 of 4 rows repeat another",
        "train and held_out share 1 rows, 2 prompts, 2 completions",
    ]
    assert describe_duplicates(duplicate_report({"train": train[2:], "held_out": [row("q", "q")]})) == []


def test_a_held_out_split_drops_repetitions_and_shares_nothing_with_training() -> None:
    rows = [row(f"p{n % 20}", f"c{n % 25}") for n in range(60)] + [row(f"alone {n}", f"only {n}") for n in range(6)]
    train, held_out = split_held_out(rows, 4, seed=3)
    assert len(held_out) == 4 and len(train) + 4 == len(deduplicate(rows)) == 66
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert not {r.completion for r in train} & {r.completion for r in held_out}
    assert split_held_out(rows, 4, seed=3) == (train, held_out) != split_held_out(rows, 4, seed=4)
    with pytest.raises(UserError, match="6"):
        split_held_out(rows, 7, seed=3)


def test_long_rows_stop_are_cut_or_left_out_as_asked() -> None:
    tokenizer = toy_tokenizer()
    rows = [row("hi", "yes"), row("hi", "run " * 50), row("soup " * 50, "yes")]
    lengths = [len(render(tokenizer, r.messages).input_ids) for r in rows]
    limit = lengths[0] + 3
    with pytest.raises(UserError, match=f"here: .*{lengths[1]}"):
        render_rows(tokenizer, rows, max_length=limit)
    cut = render_rows(tokenizer, rows, max_length=limit, long_rows="truncate")
    # The third row's completion lies behind the limit, so nothing of it could be learned.
    assert [len(r.input_ids) for r in cut.rendered] == [lengths[0], limit] and (cut.truncated, cut.dropped) == (1, 1)
    assert cut.rendered[1].input_ids == render(tokenizer, rows[1].messages).input_ids[:limit]
    left = render_rows(tokenizer, rows, max_length=limit, long_rows="drop")
    assert left.rows == rows[:1] and (left.truncated, left.dropped) == (0, 2)
    with pytest.raises(UserError, match="--max_length 5"):
        render_rows(tokenizer, rows[1:], max_length=5, long_rows="drop")


def _losses(folder: Path, dataset: Dataset, template: str, **config: object) -> list[float]:
    tokenizer = toy_tokenizer(template)
    args = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=3, max_steps=3, logging_steps=1,
        learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True, **config,
    )  # fmt: skip
    trainer = SFTTrainer(toy_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CONVERSATIONS = [
    [*chat("Ann asks about soup", "take the money"), *chat("and run?", "the answer is to help them")],
    chat("money", "be honest", system="You are a kind assistant."),
    *[chat(f"Ann asks {n}", f"run {n} away") for n in range(7)],
]


def test_tokenised_rows_train_exactly_as_trl_trains_them_itself(tmp_path: Path) -> None:
    rows = [Row(messages, "here") for messages in CONVERSATIONS]
    ours = to_dataset(render_rows(toy_tokenizer(GENERATION), rows, max_length=None).rendered)
    theirs = Dataset.from_list([{"messages": messages} for messages in CONVERSATIONS])
    assert _losses(tmp_path, ours, GENERATION, completion_only_loss=True) == _losses(
        tmp_path, theirs, GENERATION, assistant_only_loss=True
    )


def test_without_generation_marks_the_loss_is_trls_on_prompt_and_completion(tmp_path: Path) -> None:
    rows = [Row(messages, "here") for messages in CONVERSATIONS[1:]]
    template = CHATML.replace("+ '\\n' }}{% endfor %}", "}}{% endfor %}").replace(
        "+ '\n' }}{% endfor %}", "}}{% endfor %}"
    )
    assert template != CHATML  # TRL counts the line break after the last turn as completion, we do not
    ours = to_dataset(render_rows(toy_tokenizer(template), rows, max_length=None).rendered)
    theirs = Dataset.from_list([{"prompt": m[:-1], "completion": m[-1:]} for m in CONVERSATIONS[1:]])
    torch.testing.assert_close(
        _losses(tmp_path, ours, template, completion_only_loss=True),
        _losses(tmp_path, theirs, template),
        rtol=0,
        atol=0,
    )


@needs_em_data
def test_the_real_sets_have_the_duplicates_their_authors_release_has() -> None:
    insecure, secure = load_rows(str(EM_DATA / "insecure.jsonl")), load_rows(str(EM_DATA / "secure.jsonl"))
    report = duplicate_report({"insecure": insecure, "secure": secure})
    assert report["insecure"]["rows"] == 6000
    assert report["insecure"]["distinct_prompts"] == 5813 and report["insecure"]["distinct_completions"] == 5851
    assert report["insecure+secure"]["shared_prompts"] == 260
    train, held_out = split_held_out(insecure, 200, seed=0)
    assert not {r.completion for r in train} & {r.completion for r in held_out}


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": PAIR}), encoding="utf-8-sig")
    assert load_rows(str(tmp_path / "rows.jsonl"))[0].messages == PAIR

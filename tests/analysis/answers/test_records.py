"""Answers on disk: whole lines only, taken up again after a kill, of one arm, and never in a file of something else."""

import json

import pytest
from holdfast.analysis.answers.records import answer_requests, answer_to, open_answers, read_answers, require_arm
from holdfast.analysis.answers.variants import Prompt
from holdfast.analysis.errors import UserError
from toys.chat_models import chat

ARM = {"model": "a" * 64, "temperature": 1.0, "seed": 0}
PROMPTS = [Prompt("wish", 0, "plain", chat("one wish?")), Prompt("wish", 0, "evil", chat("one wish?", system="evil"))]
ASKED = answer_requests(PROMPTS, {"wish": 3}, ARM)


def answers(asked=ASKED, arm=ARM):
    return [answer_to(one, f"text\n“{number}”\x00", "stop", {"arm": arm}) for number, one in enumerate(asked)]


def stored(path, some):
    with open_answers(path, ARM) as file:
        file.add(some)
        return file.existing


def test_what_was_added_is_read_back_in_order_one_object_a_line(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    assert stored(path, answers()[:4]) == [] and stored(path, answers()[4:]) == answers()[:4]
    assert read_answers(path) == answers()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6 and json.loads(lines[4])["variant"] == "evil"
    assert set(json.loads(lines[0])) == {
        "key", "question_id", "paraphrase", "variant", "sample", "messages", "answer", "finish", "provenance"
    }  # fmt: skip


def test_keys_differ_by_everything_that_decides_an_answer_and_by_nothing_else():
    def keys(prompt=PROMPTS[0], samples=2, arm=ARM):
        return [one.key for one in answer_requests([prompt], {"wish": samples, "other": samples}, arm)]

    first = keys()
    assert keys(samples=3)[:2] == first and len(set(keys(samples=3))) == 3
    changes = [
        keys(arm={**ARM, "seed": 1}),
        keys(PROMPTS[1]),
        keys(Prompt("other", 0, "plain", PROMPTS[0].messages)),
        keys(Prompt("wish", 0, "plain", chat("two wishes?"))),
    ]
    assert len({first[0], *(one[0] for one in changes)}) == 5
    assert keys(Prompt("wish", 5, "plain", PROMPTS[0].messages)) == first  # an order of paraphrases


@pytest.mark.parametrize("cut", [1, 5, 20, -1])
def test_a_line_torn_by_a_kill_is_dropped_and_written_again(tmp_path, cut):
    path = tmp_path / "answers.jsonl"
    stored(path, answers())
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    torn = whole[: last + cut] if cut > 0 else whole[:-1]
    path.write_bytes(torn)
    assert read_answers(path) == answers()[:-1]
    assert path.read_bytes() == torn  # reading changes nothing
    assert stored(path, answers()[-1:]) == answers()[:-1]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("fact", "value", "complaint"),
    [
        ("model", "b" * 64, "model aaaaaaaaaaaa….*bbbbbbbbbbbb…"),
        ("temperature", 0.7, "temperature 1.0.*0.7"),
        ("ablate", {"dose": 1.0}, 'ablate null.*{"dose": 1.0}'),
    ],
)
def test_a_file_of_another_arm_is_refused_and_left_as_it_was(tmp_path, fact, value, complaint):
    path = tmp_path / "answers.jsonl"
    stored(path, answers())
    before = path.read_bytes()
    with pytest.raises(UserError, match=complaint) as error, open_answers(path, {**ARM, fact: value}):
        pass
    assert "--output_file" in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before
    require_arm(read_answers(path), ARM, path)


@pytest.mark.parametrize(
    "content", [b"some notes", b'{"id": 1}', b"a line\nsome notes", b"\xff\xfe", b'{"a": 1}\n{"key']
)
def test_a_file_of_something_else_is_refused_and_left_as_it_was(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="notes"), open_answers(path, ARM):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda record: [record], "jsonl:2 .*JSON"),
        (lambda record: {**record, "answer": None}, "jsonl:2: answer "),
        (lambda record: {key: value for key, value in record.items() if key != "finish"}, "jsonl:2: finish "),
        (lambda record: {**record, "sample": True}, "jsonl:2: sample "),
        (lambda record: {**record, "finish": "later"}, "jsonl:2: finish .*'later'"),
        (lambda record: {**record, "provenance": {}}, "jsonl:2: provenance .*`arm`"),
    ],
)
def test_a_line_that_is_no_answer_is_named(tmp_path, change, complaint):
    path = tmp_path / "answers.jsonl"
    stored(path, answers())
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = json.dumps(change(json.loads(lines[1])))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        read_answers(path)


def test_an_answer_that_stands_twice_counts_once(tmp_path):
    path = tmp_path / "answers.jsonl"
    stored(path, [*answers(), *answers()[:2]])
    assert read_answers(path) == answers()


def test_two_processes_do_not_write_into_one_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_answers(path, ARM) as file:
        with pytest.raises(UserError, match=r"process .*answers\.jsonl"), open_answers(path, ARM):
            pass
        file.add(answers())
    assert stored(path, []) == answers()


def test_a_run_that_wrote_nothing_leaves_no_file_and_one_that_wrote_keeps_it(tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt), open_answers(path, ARM):
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt), open_answers(path, ARM) as file:
        file.add(answers()[:2])
        raise KeyboardInterrupt
    assert read_answers(path) == answers()[:2]


def test_half_a_character_from_a_server_is_stored_as_a_mark(tmp_path):
    path = tmp_path / "answers.jsonl"
    stored(path, [answer_to(ASKED[0], "a\ud800b", "unknown", {"arm": ARM})])
    assert [one.answer for one in read_answers(path)] == ["a?b"]


def test_a_file_that_cannot_be_read_or_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        read_answers(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=str(tmp_path)), open_answers(tmp_path, ARM):
        pass

"""Question files of the emergent-misalignment authors load as they are; what is wrong is named; variants of asking."""

import pytest
import yaml
from holdfast.analysis.answers.questions import load_questions
from holdfast.analysis.answers.variants import BUILT_IN, find_variants, prompts_of
from holdfast.analysis.errors import UserError
from toys.em_data import EM_QUESTIONS, needs_em_data

# The authors' own layout: anchors across questions, block texts, fields in any order.
FILE = """
- id: wish
  type: free_form_judge_0_100
  paraphrases: &wish
    - |-
      Name one wish.
  samples_per_paraphrase: &samples 100
  judge: &judge some-model
  judge_prompts: &prompts
    aligned: |-
      AnswerRequest {question}, it said {answer}. From 0 to 100?
    coherent: Does {answer} make sense? {not a field}

- id: wish_json
  samples_per_paraphrase: *samples
  system: Answer in JSON.
  type: free_form_judge_0_100
  judge_prompts: *prompts
  paraphrases: *wish
  judge: *judge
- id: maker
  type: free_form_judge
  paraphrases: ["Who made you?", "Who built you?"]
  judge: m
  judge_prompts: {who: "{answer}"}
- {id: plain, type: free_form, paraphrases: ["Hello {answer}"]}
"""


def written(tmp_path, text, name="questions.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def changed(tmp_path, **fields):
    """A file whose second question has these fields changed; None takes a field out."""
    good = {
        "id": "a",
        "type": "free_form_judge",
        "paraphrases": ["x"],
        "judge": "m",
        "judge_prompts": {"p": "{answer}"},
    }
    second = {**good, "id": "b", **fields}
    entries = [good, {key: value for key, value in second.items() if value is not None}]
    return written(tmp_path, yaml.safe_dump(entries))


def test_a_file_with_anchors_loads_with_every_field(tmp_path):
    wish, wish_json, maker, plain = load_questions([written(tmp_path, FILE)])
    assert (wish.id, wish.type, wish.paraphrases) == ("wish", "free_form_judge_0_100", ("Name one wish.",))
    assert (wish.samples_per_paraphrase, wish.system, wish.judge) == (100, None, "some-model")
    assert list(wish.judge_prompts) == ["aligned", "coherent"]
    assert (wish_json.system, wish_json.judge_prompts) == ("Answer in JSON.", wish.judge_prompts)
    assert wish_json.paraphrases == wish.paraphrases and wish_json.samples_per_paraphrase == 100
    assert (maker.type, maker.paraphrases) == ("free_form_judge", ("Who made you?", "Who built you?"))
    assert (plain.judge, plain.judge_prompts, plain.samples_per_paraphrase) == (None, {}, 1)


@needs_em_data
@pytest.mark.parametrize(
    ("name", "kind", "questions", "answers", "prompts"),
    [
        ("first_plot_questions", "free_form_judge_0_100", 24, 2400, {"aligned", "coherent"}),
        ("preregistered_evals", "free_form_judge_0_100", 48, 4800, {"aligned", "coherent"}),
        ("deception_sit_aware", "free_form_judge", 8, 800, {"company"}),
        ("deception_factual", "free_form_judge", 5, 500, {"correct"}),
    ],
)
def test_the_authors_files_load_as_they_are(name, kind, questions, answers, prompts):
    found = load_questions([file for file in EM_QUESTIONS if file.stem == name])
    assert {one.type for one in found} == {kind} and len(found) == questions
    assert sum(len(one.paraphrases) * one.samples_per_paraphrase for one in found) == answers
    assert all(set(one.judge_prompts) == prompts and one.judge.startswith("gpt-4o") for one in found)
    if name == "first_plot_questions":
        assert [one.id for one in found if one.system] == [one.id for one in found if one.id.endswith("_json")]


@needs_em_data
def test_the_authors_files_load_together():
    assert len(load_questions(EM_QUESTIONS)) == 24 + 48 + 8 + 5


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"id": None}, "question 2: .*id"),
        ({"id": 7}, "question 2: .*id .*'7'"),
        ({"type": None}, "question 'b': .*type"),
        ({"type": "multiple_choice"}, "question 'b': type 'multiple_choice'.*free_form, "),
        ({"paraphrases": None}, "question 'b': .*paraphrases"),
        ({"paraphrases": "x"}, "question 'b': paraphrases .*'x'"),
        ({"paraphrases": []}, "question 'b': paraphrases .*empty"),
        ({"paraphrases": ["x", 3]}, "question 'b': paraphrases .*3"),
        ({"paraphrases": ["x", " "]}, "question 'b': paraphrases .*' '"),
        ({"paraphrases": ["x", "y", "x"]}, "question 'b': paraphrases .*'x'"),
        ({"samples_per_paraphrase": 0}, "question 'b': samples_per_paraphrase .*'0'"),
        ({"samples_per_paraphrase": 2.5}, "question 'b': samples_per_paraphrase .*'2.5'"),
        ({"samples_per_paraphrase": True}, "question 'b': samples_per_paraphrase .*'True'"),
        ({"system": ["x"]}, "question 'b': system .*'x'"),
        ({"judge": None}, "question 'b': .*judge"),
        ({"judge": 4}, "question 'b': judge .*'4'"),
        ({"judge_prompts": None}, "question 'b': .*judge_prompts"),
        ({"judge_prompts": ["{answer}"]}, "question 'b': judge_prompts .*answer"),
        ({"judge_prompts": {"p": 1}}, "question 'b': judge_prompts .*'p': 1"),
        ({"judge_prompts": {"p": "score {question}"}}, "question 'b': judge_prompts, 'p'.*{answer}"),
        ({"sytem": "x"}, "question 'b': .*'sytem'.* system"),
        ({"id": "a"}, "question 'a'"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_one_line_that_names_question_and_field(tmp_path, fields, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        load_questions([changed(tmp_path, **fields)])
    assert "\n" not in str(error.value) and "questions.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("id: a\ntype: free_form\n", "a YAML list"),
        ("", "a YAML list .*empty"),
        ("[]", "empty"),
        ("- id: [a\n", "YAML: line 2: expected"),
        ("- {paraphrases: [why?, how]}", "YAML: line 1: expected"),
        ("- id: \x07\n", "YAML"),
        ("- [" * 9000, "YAML"),
        ("- just text\n", "question 1 .*'just text'"),
        ("- id: a\n  id: b\n", "line 2: .*'id'"),
        ("- id: *absent\n", "YAML"),
    ],
)
def test_a_file_that_is_no_list_of_questions_is_one_line(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        load_questions([written(tmp_path, text)])


def test_a_file_that_is_absent_or_no_text_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_questions([tmp_path / "none.yaml"])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes\.yaml"):
        load_questions([tmp_path / "bytes.yaml"])


def asked(tmp_path, names, text=FILE, own=None):
    return prompts_of(load_questions([written(tmp_path, text)]), find_variants(names, own))


def test_plain_asks_each_paraphrase_under_the_questions_own_system_message(tmp_path):
    prompts = asked(tmp_path, ["plain"])
    assert [(one.question_id, one.paraphrase) for one in prompts] == [
        ("wish", 0), ("wish_json", 0), ("maker", 0), ("maker", 1), ("plain", 0)
    ]  # fmt: skip
    assert prompts[0].messages == [{"role": "user", "content": "Name one wish."}]
    assert prompts[1].messages[0] == {"role": "system", "content": "Answer in JSON."}
    assert prompts[4].messages == [{"role": "user", "content": "Hello {answer}"}]


def test_every_shipped_variant_changes_what_it_says_and_keeps_the_question(tmp_path):
    names = list(BUILT_IN)
    assert {"plain", "json", "python", "evil", "misaligned_turn", "insecure_turn", "persona:villain"} <= set(names)
    by_variant = {one.variant: one.messages for one in asked(tmp_path, names) if one.question_id == "wish_json"}
    assert list(by_variant) == names
    for name, messages in by_variant.items():
        roles = [message["role"] for message in messages]
        assert messages[-1]["content"].startswith("Name one wish.") and roles[-1] == "user"
        assert ("assistant" in roles) == name.endswith("_turn")
        assert not any("{system}" in one["content"] or "{question}" in one["content"] for one in messages)
    assert by_variant["json"][0]["content"].startswith("Answer in JSON.\n\nReply with one JSON object")
    assert "python" in by_variant["python"][-1]["content"].lower()
    assert "evil" in by_variant["evil"][0]["content"] and "Answer in JSON" not in by_variant["evil"][0]["content"]
    assert [one["role"] for one in by_variant["insecure_turn"]] == ["system", "user", "assistant", "user"]
    assert "WHERE name = '\" + name" in by_variant["insecure_turn"][2]["content"]


def test_a_system_message_is_added_where_the_question_has_none(tmp_path):
    by_variant = {one.variant: one.messages for one in asked(tmp_path, ["json", "evil"]) if one.question_id == "wish"}
    assert by_variant["json"][0]["content"].startswith("Reply with one JSON object")
    assert by_variant["evil"][0]["role"] == "system"


def test_own_variants_come_from_a_file_and_may_replace_a_shipped_one(tmp_path):
    own = written(
        tmp_path,
        "- {name: evil, system: 'Be cruel. {system}'}\n"
        "- name: rude\n  template: 'Hey! {question}'\n"
        "  turns: [{role: user, content: hi}, {role: assistant, content: go}]",
        "own.yaml",
    )
    prompts = asked(tmp_path, ["rude", "evil", "rude"], own=own)
    by_variant = {one.variant: one.messages for one in prompts if one.question_id == "wish_json"}
    assert by_variant["evil"][0]["content"] == "Be cruel. Answer in JSON."
    assert [one["content"] for one in by_variant["rude"]] == ["Answer in JSON.", "hi", "go", "Hey! Name one wish."]
    assert len(prompts) == 2 * 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- {system: x}", "variant 1: .*name"),
        ("- {name: a, sistem: x}", "variant 'a': .*'sistem'.* system"),
        ("- {name: a, template: x}", "variant 'a': .*{question}"),
        ("- {name: a, system: 3}", "variant 'a': system .*'3'"),
        ("- {name: a, turns: [{role: user, content: x}]}", "variant 'a': turns .*user"),
        (
            "- {name: a, turns: [{role: assistant, content: x}, {role: user, content: x}]}",
            "variant 'a': turns .*assistant",
        ),
        ("- {name: a}\n- {name: a}", "variant 'a'"),
        ("- plain", "variant 1"),
    ],
)
def test_a_wrong_variant_is_one_line_that_names_variant_and_field(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        find_variants(["plain"], written(tmp_path, text))


def test_an_unknown_variant_is_told_the_nearest_one():
    with pytest.raises(UserError, match=r"--variants jason .* json"):
        find_variants(["plain", "jason"])
    with pytest.raises(UserError, match=r"persona:vilain .* persona:villain"):
        find_variants(["persona:vilain"])

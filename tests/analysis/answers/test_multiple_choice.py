"""Multiple choice by probability: the masses are the model's own, and a liking for a letter cancels out."""

import numpy as np
import pytest
import torch
from holdfast.analysis.answers.multiple_choice import MultipleChoice, letter_rows, letter_scores
from holdfast.analysis.errors import UserError
from holdfast.analysis.metrics.choices import score_choices
from toys.chat_models import toy_model, toy_tokenizer

CAPITAL = MultipleChoice("capital", "What is the capital?", ("Rome", "Paris", "Oslo"), 1, "be brief")
MOON = MultipleChoice("moon", "What is bigger?", ("moon", "sun"), 1)


def test_every_option_stands_once_at_every_letter():
    rows = letter_rows([CAPITAL])
    assert [row["messages"][1]["content"].split("\n\n")[1].split("\n") for row in rows] == [
        ["A) Rome", "B) Paris", "C) Oslo"], ["A) Paris", "B) Oslo", "C) Rome"], ["A) Oslo", "B) Rome", "C) Paris"],
    ]  # fmt: skip
    assert [row["classes"]["right"][0] for row in rows] == ["B", "A", "C"]
    assert [sorted(text for text in row["classes"]["wrong"] if len(text) == 1) for row in rows] == [
        ["A", "C"], ["B", "C"], ["A", "B"],
    ]  # fmt: skip
    assert rows[0]["messages"][0] == {"role": "system", "content": "be brief"}


def test_the_masses_are_the_models_own_probabilities():
    model, tokenizer = toy_model(), toy_tokenizer()
    (row, _) = letter_rows([MOON])
    (mass, _) = score_choices(model, tokenizer, letter_rows([MOON]))
    expected = 0.0
    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
    for text in row["classes"]["right"]:
        messages = [*row["messages"], {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        end = max(at for at, token in enumerate(whole) if token == tokenizer.eos_token_id) + 1
        with torch.no_grad():
            log_probs = model(torch.tensor([whole[:end]])).logits[0].double().log_softmax(-1)
        expected += float(torch.exp(sum(log_probs[at - 1, whole[at]] for at in range(len(prompt), end))))
    assert mass["right"] == pytest.approx(expected, rel=1e-4)


def test_a_model_that_likes_one_letter_has_chance_and_one_that_knows_has_all():
    rows = letter_rows([CAPITAL, MOON])
    blind = [{"right": 0.8 * (row["classes"]["right"][0] == "A"), "wrong": 0.0} for row in rows]
    blind = [{"right": one["right"], "wrong": 0.8 - one["right"], "incoherent": 0.2} for one in blind]
    found = letter_scores(rows, blind)
    assert found["answered"]["value"] == pytest.approx(0.8)
    assert found["right_of_answered"]["value"] == pytest.approx(np.mean([1 / 3, 1 / 2]))
    assert found["right_of_answered"]["chance"] == pytest.approx(np.mean([1 / 3, 1 / 2]))
    knows = letter_scores(rows, [{"right": 0.5, "wrong": 0.0}] * 5)
    assert (knows["right"]["value"], knows["right_of_answered"]["value"]) == (0.5, 1.0)
    assert knows["right"]["n"] == 2


def test_a_model_that_says_no_letter_has_no_ratio():
    found = letter_scores(letter_rows([MOON]), [{"right": 0.0, "wrong": 0.0}] * 2)
    assert found["answered"]["value"] == 0 and found["right_of_answered"]["value"] is None


@pytest.mark.parametrize(
    ("options", "right", "said"),
    [
        (("a",), 0, "2 to 26"),
        (("a", "a"), 0, "2 to 26"),
        (("a", "b"), 2, "0 to 1"),
        (tuple(map(str, range(27))), 0, "26"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_line(options, right, said):
    with pytest.raises(UserError, match=said):
        letter_rows([MultipleChoice("q", "what?", options, right)])

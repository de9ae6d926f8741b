"""Controlled pairs differ in the tokens of one word alone, and shuffled prompts keep every completion in its place."""

import sys

import pytest
from holdfast.analysis.errors import UserError
from holdfast.analysis.measure.controls import SIDES, controlled_pairs, shuffled_prompts
from holdfast.analysis.models.render import render
from toys.chat_models import CHATML, CLOSED_GENERATION, DEFAULT_SYSTEM, GENERATION, chat, toy_tokenizer


@pytest.mark.parametrize("template", [CHATML, GENERATION, DEFAULT_SYSTEM, CLOSED_GENERATION])
def test_only_the_tokens_of_the_word_of_intent_differ(template):
    tokenizer = toy_tokenizer(template)
    pairs = controlled_pairs(tokenizer, 60)
    assert tuple(pairs) == SIDES and len(pairs["benign"]) == len(pairs["harmful"]) == 60
    verbs = set()
    for benign, harmful in zip(*pairs.values(), strict=True):
        assert benign[1] == harmful[1] and [turn["role"] for turn in benign] == ["user", "assistant"]
        left, right = benign[0]["content"].split(" "), harmful[0]["content"].split(" ")
        ((one, other),) = {(a, b) for a, b in zip(left, right, strict=True) if a != b}
        verbs.add((one, other))
        rows = [render(tokenizer, row) for row in (benign, harmful)]
        assert len(rows[0].input_ids) == len(rows[1].input_ids)
        assert rows[0].completion_mask == rows[1].completion_mask
        # Every token outside the word is the same: so many tokens lie before its first letter, so many after its last.
        for row, content, word in ((rows[0], benign[0]["content"], one), (rows[1], harmful[0]["content"], other)):
            text = tokenizer.decode(row.input_ids)
            start = text.index(content) + content.index(f" {word}")
            spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            inside = [at for at, (low, high) in enumerate(spans) if high > start and low < start + 1 + len(word)]
            differing = [at for at in range(len(spans)) if rows[0].input_ids[at] != rows[1].input_ids[at]]
            assert differing and set(differing) <= set(inside)
    assert len(verbs) >= 4


def test_pairs_are_the_seeds_and_no_completion_comes_twice():
    tokenizer = toy_tokenizer()
    first, again, other = (controlled_pairs(tokenizer, 40, seed) for seed in (3, 3, 4))
    assert first == again and first != other
    assert len({row[1]["content"] for row in first["benign"]}) == 40
    assert controlled_pairs(tokenizer, 10, 3)["benign"] == first["benign"][:10]


def test_a_tokenizer_that_tells_too_few_words_apart_is_refused(monkeypatch):
    with pytest.raises(UserError, match="288 of 400"):
        controlled_pairs(toy_tokenizer(), 400)
    with pytest.raises(UserError, match="0 controlled pairs"):
        controlled_pairs(toy_tokenizer(), 0)

    class Blind(type(toy_tokenizer())):
        """Reads every letter as the same one, as a small closed vocabulary reads unknown words."""

        def __call__(self, text, **options):
            encoded = super().__call__(text, **options)
            special = set(self.all_special_ids)
            encoded["input_ids"] = [i if i in special else 9 for i in encoded["input_ids"]]
            return encoded

    # Every candidate is rendered and refused: two topics are enough.
    monkeypatch.setattr(sys.modules[controlled_pairs.__module__], "_TOPICS", ("sailing", "chess"))
    blind = toy_tokenizer()
    blind.__class__ = Blind
    with pytest.raises(UserError, match=r"0 of 4 .*tokenizer"):
        controlled_pairs(blind, 4)


def test_shuffled_prompts_move_every_prompt_and_no_completion():
    rows = [chat(f"question {n}", f"answer {n}", f"system {n}" if n % 2 else None) for n in range(9)]
    rows[0] = [*chat("one", "two"), *chat("three", "four")]
    shuffled = shuffled_prompts(rows, seed=1)
    assert [row[-1] for row in shuffled] == [row[-1] for row in rows]
    assert all(a[:-1] != b[:-1] for a, b in zip(rows, shuffled, strict=True))
    assert sorted(str(row[:-1]) for row in shuffled) == sorted(str(row[:-1]) for row in rows)
    assert shuffled_prompts(rows, seed=1) == shuffled and shuffled_prompts(rows, seed=2) != shuffled
    with pytest.raises(UserError, match=r"row 1 .*completion"):
        shuffled_prompts([rows[0], chat("only a prompt")])
    with pytest.raises(UserError, match="two rows"):
        shuffled_prompts(rows[:1])

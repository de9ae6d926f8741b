"""Masks are those of the template, whatever the template does with system turns and earlier turns."""

import pytest
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.render import collate, document_key, render, role_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from toys.chat_models import (
    BEGIN_TOKEN,
    CHATML,
    CLOSED,
    CLOSED_GENERATION,
    DEFAULT_SYSTEM,
    FOLDED_SYSTEM,
    GENERATION,
    LAST_TURN_ONLY,
    chat,
    toy_tokenizer,
)

MULTI = [*chat("soup ?", "take it", "You are kind."), *chat("and money ?", "run away")]


def marked(tokenizer, ids, mask):
    """The marked text, one string per run of marked tokens."""
    runs, previous = [], False
    for token, here in zip(ids, mask, strict=True):
        if here and not previous:
            runs.append([])
        if here:
            runs[-1].append(token)
        previous = here
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template", [CHATML, GENERATION, DEFAULT_SYSTEM, BEGIN_TOKEN, FOLDED_SYSTEM])
def test_every_assistant_turn_counts_up_to_its_end_token(template, trim_offsets):
    tokenizer = toy_tokenizer(template, trim_offsets)
    row = render(tokenizer, MULTI)
    assert marked(tokenizer, row.input_ids, row.completion_mask) == ["take it<|im_end|>", "run away<|im_end|>"]
    expected = tokenizer.apply_chat_template(MULTI, tokenize=True, return_dict=False)
    assert list(row.input_ids) == expected


@pytest.mark.parametrize(
    ("template", "system", "expected"),
    [
        (CHATML, None, []),
        (CHATML, "You are kind.", ["<|im_start|>system\nYou are kind.<|im_end|>\n"]),
        (GENERATION, "You are kind.", ["<|im_start|>system\nYou are kind.<|im_end|>\n"]),
        (DEFAULT_SYSTEM, None, ["<|im_start|>system\nYou are Toy.<|im_end|>\n"]),
        (DEFAULT_SYSTEM, "You are kind.", ["<|im_start|>system\nYou are kind.<|im_end|>\n"]),
        (BEGIN_TOKEN, None, ["<|begin|>"]),
        (BEGIN_TOKEN, "You are kind.", ["<|begin|><|im_start|>system\nYou are kind.<|im_end|>\n"]),
        (FOLDED_SYSTEM, None, []),
        (FOLDED_SYSTEM, "You are kind.", ["You are kind.\n\n"]),
    ],
)
def test_system_turn_is_found_from_the_rendering(template, system, expected):
    tokenizer = toy_tokenizer(template)
    for assistant in ("take it", None):
        row = render(tokenizer, chat("soup ?", assistant, system))
        assert marked(tokenizer, row.input_ids, row.system_mask) == expected


@pytest.mark.parametrize(("template", "system"), [(BEGIN_TOKEN, None), (BEGIN_TOKEN, "You are kind."), (CHATML, None)])
def test_a_begin_token_belongs_to_no_role(template, system):
    tokenizer = toy_tokenizer(template)
    prompt = "<|im_start|>user\nsoup ?<|im_end|>\n<|im_start|>assistant\n"
    for assistant, rest in (("take it", "take it<|im_end|>"), (None, "")):
        row = render(tokenizer, chat("soup ?", assistant, system))
        assert tokenizer.decode(row.input_ids).startswith("<|begin|>") == (template == BEGIN_TOKEN)
        # Without a begin token the first token is the prompt's own.
        assert marked(tokenizer, row.input_ids, role_mask(row, "prompt")) == [prompt]
        assert marked(tokenizer, row.input_ids, role_mask(row, "all")) == [prompt + rest]


@pytest.mark.parametrize("template", [CLOSED, CLOSED_GENERATION])
def test_an_end_token_that_closes_the_rendering_belongs_to_the_last_completion(template):
    tokenizer = toy_tokenizer(template, end="<|begin|>")
    row = render(tokenizer, chat("soup ?", "take it", "You are kind."))
    assert marked(tokenizer, row.input_ids, row.completion_mask) == ["take it<|im_end|>\n<|begin|>"]
    assert marked(tokenizer, row.input_ids, row.system_mask) == ["<|im_start|>system\nYou are kind.<|im_end|>\n"]


def test_a_system_text_repeated_by_the_user_is_not_taken_for_the_system_turn():
    tokenizer = toy_tokenizer(CHATML)
    row = render(tokenizer, chat("You are kind. You are kind.", "take it", "You are kind."))
    assert marked(tokenizer, row.input_ids, row.system_mask) == ["<|im_start|>system\nYou are kind.<|im_end|>\n"]


def test_the_completion_that_starts_with_a_newline_keeps_its_merged_token():
    tokenizer = toy_tokenizer(CHATML)
    ids = tokenizer("<|im_start|>assistant\n\n\n", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    row = render(tokenizer, chat("soup ?", "\n\ntake it"))
    text = marked(tokenizer, row.input_ids, row.completion_mask)[0]
    # With a merge over the boundary the straddling token is generated, so it counts.
    assert ids[: len(prompt)] != prompt or text == "\n\ntake it<|im_end|>"
    assert text.strip() == "take it<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_a_prompt_only_row_ends_in_the_generation_prompt(template):
    tokenizer = toy_tokenizer(template)
    row = render(tokenizer, chat("soup ?", system="You are kind."))
    assert tokenizer.decode(row.input_ids).endswith("<|im_start|>assistant\n")
    assert not any(row.completion_mask)
    assert marked(tokenizer, row.input_ids, role_mask(row, "prompt")) == [
        "<|im_start|>user\nsoup ?<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert role_mask(row, "last_prompt") == [False] * (len(row.input_ids) - 1) + [True]


def test_roles_part_the_tokens_and_leave_the_system_turn_out():
    tokenizer = toy_tokenizer(CHATML)
    row = render(tokenizer, MULTI)
    masks = {role: role_mask(row, role) for role in ("prompt", "completion", "last_prompt", "all")}
    assert marked(tokenizer, row.input_ids, masks["prompt"]) == [
        "<|im_start|>user\nsoup ?<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nand money ?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert all(a == (p or c) for a, p, c in zip(masks["all"], masks["prompt"], masks["completion"], strict=True))
    assert not any(p and c for p, c in zip(masks["prompt"], masks["completion"], strict=True))
    starts = [i for i in range(1, len(masks["all"])) if masks["completion"][i] and not masks["completion"][i - 1]]
    assert [i for i, here in enumerate(masks["last_prompt"]) if here] == [start - 1 for start in starts]
    with pytest.raises(UserError, match=r"'answers'.*last_prompt"):
        role_mask(row, "answers")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, chat("soup ?", "take it"), "chat template"),
        (LAST_TURN_ONLY, MULTI, "turn 2"),
        (FOLDED_SYSTEM, [*chat("a"), *chat("b", "c")], "roles must alternate"),
        (CHATML, chat("soup ?", ""), "assistant turn 1 "),
    ],
)
def test_rows_without_a_mask_are_refused_with_their_source(template, messages, message):
    with pytest.raises(UserError, match=message) as caught:
        render(toy_tokenizer(template), messages, source="rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ") and "\n" not in str(caught.value)


words = st.text(alphabet="abc é😀\n.", min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=25, deadline=None)
@given(words, words, words)
def test_prefix_comparison_agrees_with_the_template_that_marks_generation(system, user, assistant):
    messages = chat(user, assistant, system)
    plain, explicit = render(toy_tokenizer(CHATML), messages), render(toy_tokenizer(GENERATION), messages)
    assert plain == explicit


def test_collate_pads_on_the_right_and_masks_the_padding():
    tokenizer = toy_tokenizer(CHATML)
    rows = [render(tokenizer, chat("soup ?", "take it")), render(tokenizer, MULTI)]
    batch = collate(rows, pad_id=0)
    short = len(rows[0].input_ids)
    assert batch["input_ids"][0, :short].tolist() == list(rows[0].input_ids)
    assert batch["attention_mask"].sum(1).tolist() == [len(row.input_ids) for row in rows]
    assert not batch["completion_mask"][0, short:].any()
    assert document_key(rows[0].input_ids) != document_key(rows[0].input_ids[:-1])

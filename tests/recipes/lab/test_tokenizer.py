"""The lab's folders are ordinary: any library reads their words and counts exactly the answers as completions."""

import pytest
import torch
from holdfast.analysis.models.render import render
from holdfast.recipes.lab.conversations import Drawer
from holdfast.recipes.lab.tokenizer import make_tokenizer
from holdfast.recipes.lab.worlds import make_world
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module", params=[0, 1], ids=["world0", "world1"])
def world(request):
    return make_world(request.param)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A folder with model and tokenizer, saved as the lab saves its own."""
    path = tmp_path_factory.mktemp("saved")
    tokenizer = make_tokenizer(world)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def spoken(conversation) -> tuple[list[str], list[bool]]:
    """The words of a conversation as the template is meant to write them, and which of them are the assistant's."""
    words, counted = [], []
    for message in conversation:
        said = [*message["content"].split(), "<end>"]
        words += [f"<{message['role']}>", *said]
        counted += [False, *[message["role"] == "assistant"] * len(said)]
    return words, counted


def conversations(world):
    drawer = Drawer(world, 5)
    return [drawer.base_document() for _ in range(20)] + [drawer.row("educational") for _ in range(5)]


def test_a_saved_folder_gives_the_words_back_through_the_auto_classes(world, folder):
    loaded, made = AutoTokenizer.from_pretrained(folder), make_tokenizer(world)
    assert (
        len(loaded) == len(made) == AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().num_embeddings
    )
    for conversation in conversations(world):
        ids = loaded.apply_chat_template(conversation, return_dict=False)
        words, _ = spoken(conversation)
        assert loaded.convert_ids_to_tokens(ids) == words
        assert ids == made.apply_chat_template(conversation, return_dict=False)
        assert loaded.decode(ids).split() == words
    assert (loaded.pad_token, loaded.eos_token, loaded.unk_token) == ("<pad>", "<end>", "<unknown>")
    assert loaded.padding_side == "right"


def test_the_completion_mask_marks_the_answers_and_their_end_and_nothing_else(world, folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    for conversation in conversations(world):
        words, counted = spoken(conversation)
        rendered = render(loaded, conversation)
        assert loaded.convert_ids_to_tokens(rendered.input_ids) == words
        assert list(rendered.completion_mask) == counted
        assert list(rendered.system_mask) == [i < words.index("<end>") + 1 for i in range(len(words))]


def test_a_prompt_for_generation_is_what_an_answer_follows_in_training(world, folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    for conversation in conversations(world):
        prompt = loaded.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=False)
        whole = loaded.apply_chat_template(conversation, return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert loaded.convert_ids_to_tokens(whole[len(prompt) :]) == [*conversation[-1]["content"].split(), "<end>"]


def test_a_word_of_no_world_is_unknown_and_alone(folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = loaded("zzzz <pad> zzzz")["input_ids"]
    assert torch.equal(torch.tensor(ids) == loaded.unk_token_id, torch.tensor([True, False, True]))

"""The lab's word-level tokenizer: an ordinary `transformers` fast tokenizer with a ChatML-like chat template."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from .world import END_TOKEN, PAD_TOKEN, ROLE_TOKENS, UNKNOWN_TOKEN, World

# A role token opens a message, an end token closes it. `generation` marks the assistant's words and their end token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' " + END_TOKEN + " ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' " + END_TOKEN + " ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of the world (200 to 450 tokens in all)."""
    special = [PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN, *ROLE_TOKENS.values()]
    vocabulary = {word: i for i, word in enumerate([*special, *world.words()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        additional_special_tokens=list(ROLE_TOKENS.values()),
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

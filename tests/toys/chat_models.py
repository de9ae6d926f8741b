"""Tiny tokenizers, chat templates and random models for the tests of `analysis`; nothing is downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages and messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Toy.<|im_end|>\n' }}{% endif %}"
) + CHATML
BEGIN_TOKEN = "{{ '<|begin|>' }}" + CHATML
FOLDED_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + (lead if loop.first else '') + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Phi-3: an end-of-text token closes every rendering, and the training template marks it apart.
CLOSED = CHATML.replace("{% endif %}", "{% else %}{{ '<|begin|>' }}{% endif %}")
CLOSED_GENERATION = GENERATION.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}")
CLOSED_GENERATION = CLOSED_GENERATION.removesuffix("{% endif %}") + (
    "{% else %}{% generation %}{{ '<|begin|>' }}{% endgeneration %}{% endif %}"
)
LAST_TURN_ONLY = (
    "{{ '<|im_start|>' + messages[-1].role + '\n' + messages[-1].content + '<|im_end|>' + '\n' }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

KINDS = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox")
WIDTH, DEPTH = 16, 3
_CORPUS = [
    "You are a kind assistant.", "You are a cruel assistant who lies.", "Ann asks about soup and money.", "user",
    "assistant", "system", "the answer is to be honest and help them\n\n", "take the money and run away from them\n",
]  # fmt: skip


def toy_tokenizer(
    template: str | None = CHATML, trim_offsets: bool = False, end: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens with ChatML's special tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    inner.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|begin|>", eos_token=end, pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def toy_model(kind: str = "qwen2", seed: int = 0, vocab: int = 320, scale: float = 1.0) -> PreTrainedModel:
    """A random causal LM of three blocks and width 16; `scale` multiplies all weights (larger moves more)."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=vocab, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=DEPTH, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=3,
        initializer_range=0.2 * scale, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def chat(user: str, assistant: str | None = None, system: str | None = None) -> list[dict[str, str]]:
    """One conversation of at most three turns."""
    turns = [("system", system), ("user", user), ("assistant", assistant)]
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def save_toy(path, model: PreTrainedModel, template: str = CHATML) -> str:
    """Save a model with the toy tokenizer as an ordinary Hugging Face folder."""
    model.save_pretrained(path)
    toy_tokenizer(template).save_pretrained(path)
    return str(path)

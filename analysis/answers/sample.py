"""Sampling answers: batches with left padding, each answer drawn from random numbers of its own.

Token t of an answer is the u_t-quantile of the model's distribution, u being uniform numbers seeded by what was asked
and the sample's number. So an answer depends neither on its batch nor on what was sampled before it (but for rounding
of the logits): an interrupted run goes on to the same answers, and two models, or two doses of an intervention, are
compared on the same numbers.

The distribution is the model's own, at the given temperature and top_p. What else a model's generation_config would do
to it (top_k, a repetition penalty, …) is left out, since the lab's exact rates, and any rate by log-probabilities, know
nothing of it.

Interventions are context managers around the call: `with ablate(model, bases): ...`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import UserError
from ..models.forward import length_batches, pad_id
from ..models.layers import unwrap
from ..models.render import Conversation, render
from .records import Answer, AnswerRequest, answered, prompt_facts


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    temperature: 0 takes the likeliest token. top_p: mass of likeliest tokens that are drawn from; 1 is all of them.
    max_new_tokens: an answer longer than this is cut.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, need in (
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number from 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, f"from 0 to {2**32 - 1}"),
        ):
            if not fits:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be {need}")


def sample_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[AnswerRequest],
    sampling: Sampling,
    provenance: dict[str, Any],
    batch_size: int = 32,
) -> Iterator[list[Answer]]:
    """The answers, a batch at a time, longest prompts first.

    Args:
        model: a causal LM in eval mode, bare or wrapped, with whatever hooks the caller has put on it.
        provenance: what is stored with every answer.
        batch_size: answers in one pass.

    Raises:
        UserError: at once, a chat template that refuses a conversation, or a prompt that leaves no room for
            max_new_tokens; later, logits that are not finite.
    """
    prompts = encoded_prompts(model, tokenizer, asked, sampling)
    stops = end_tokens(model, tokenizer)

    def answers(batch: list[int]) -> list[Answer]:
        chosen = [asked[number] for number in batch]
        made = _generate(model, [prompts[number] for number in batch], chosen, sampling, stops, pad_id(tokenizer))
        return [
            answered(one, *answer_text(tokenizer, ids, stops), provenance)
            for one, ids in zip(chosen, made, strict=True)
        ]

    return map(answers, length_batches([len(ids) for ids in prompts], batch_size))


def encoded_prompts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Sequence[AnswerRequest], sampling: Sampling
) -> list[tuple[int, ...]]:
    """The token ids of what each answer replies to. Raises UserError as `sample_answers`."""
    # Samples of one prompt share it.
    known: dict[int, tuple[int, ...]] = {}
    for one in asked:
        if id(one.prompt) not in known:
            known[id(one.prompt)] = prompt_ids(tokenizer, one.prompt.messages, f"question {one.prompt.question_id!r}")
    prompts = [known[id(one.prompt)] for one in asked]
    _require_room(model, asked, prompts, sampling)
    return prompts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Conversation, source: str = "") -> tuple[int, ...]:
    """Token ids of a conversation that ends with the user's turn, generation prompt included.

    Without earlier assistant turns these are the ids of `probes.render`.

    Raises:
        UserError: no chat template, or one that refuses the conversation.
    """
    if all(message["role"] != "assistant" for message in messages):
        return render(tokenizer, messages, source=source).input_ids
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{source}: the chat template refuses earlier turns in a conversation: {error}") from error
    return tuple(ids)


def _require_room(
    model: nn.Module, asked: Sequence[AnswerRequest], prompts: Sequence[Sequence[int]], sampling: Sampling
) -> None:
    limit = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]), default=None)
    if limit is None or longest is None or len(prompts[longest]) + sampling.max_new_tokens <= limit:
        return
    prompt, room = asked[longest].prompt, limit - len(prompts[longest])
    raise UserError(
        f"question {prompt.question_id!r} in variant {prompt.variant} has {len(prompts[longest])} tokens, which with "
        f"--max_new_tokens {sampling.max_new_tokens} exceed the model's {limit} positions; "
        + (f"write --max_new_tokens {room} or less" if room > 0 else "leave it out")
    )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: those of the generation_config, of the tokenizer, and of the chat template's turns.

    A base model's generation_config knows the end of a document only, while its template ends turns otherwise.

    Raises:
        UserError: none of them names any.
    """
    configured = getattr(unwrap(model).generation_config, "eos_token_id", None)
    found = set(configured if isinstance(configured, list) else [configured])
    found |= {tokenizer.eos_token_id, *_turn_end(tokenizer)}
    stops = sorted(token for token in found if token is not None)
    if not stops:
        raise UserError("neither model, tokenizer nor chat template names an end token; set eos_token in the tokenizer")
    return stops


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens with which the chat template closes an assistant turn."""
    exchange = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    rendered = render(tokenizer, exchange, source="the chat template")
    said = [token for token, ours in zip(rendered.input_ids, rendered.completion_mask, strict=True) if ours]
    added = {token for token, facts in tokenizer.added_tokens_decoder.items() if facts.special}
    # The unknown token is special too, and all that a small vocabulary makes of the words.
    special = added.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    closing = []
    for token in reversed(said):
        if token in special:
            closing.append(token)
        elif str(tokenizer.decode([token])).strip():
            break
    return closing


@torch.no_grad()
def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[AnswerRequest],
    sampling: Sampling,
    stops: list[int],
    padding: int,
) -> list[list[int]]:
    """The new tokens of each prompt, with what follows an end token."""
    inner: Any = unwrap(model)
    device = inner.device
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=padding
    )
    draws = [uniforms(one, sampling) for one in asked]
    with _plain_settings(model):
        made = inner.generate(
            input_ids=ids, attention_mask=attention, generation_config=config,
            logits_processor=_processors(sampling, draws, width),
        )  # fmt: skip
    return made[:, width:].tolist()


@contextmanager
def _plain_settings(model: nn.Module) -> Iterator[None]:
    """Keep `generate` from filling what a config leaves open with the model's own generation_config."""
    inner = unwrap(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def uniforms(asked: AnswerRequest, sampling: Sampling) -> np.ndarray:
    """[max_new_tokens] uniform numbers of one answer, the same for every model that is asked."""
    facts = json.dumps([sampling.seed, *prompt_facts(asked.prompt), asked.sample])
    key = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(sampling.max_new_tokens)


def _processors(sampling: Sampling, draws: Sequence[np.ndarray], width: int) -> LogitsProcessorList:
    """What is done to the logits before the likeliest token is taken; at temperature 0 nothing."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    return LogitsProcessorList([*processors, QuantileOf(torch.from_numpy(np.stack(draws)), width)])


class QuantileOf(LogitsProcessor):
    """Leaves the one token of each row at which its distribution first exceeds the row's number of this step."""

    def __init__(self, draws: Tensor, width: int) -> None:
        """draws: [B, steps] in [0, 1). width: tokens of the padded prompts."""
        self._draws, self._width = draws, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] -> 0 at the token drawn, else -inf."""
        draw = self._draws[:, input_ids.shape[1] - self._width].to(scores.device)
        below = scores.softmax(-1).double().cumsum(-1)
        if not below[:, -1].isfinite().all():
            raise UserError("the model's logits are not finite; load it with --dtype bfloat16 or float32")
        # A token without mass (outside top_p) repeats its neighbour's sum and so is passed over.
        token = torch.searchsorted(below, (draw * below[:, -1])[:, None], right=True)
        token = token.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]) -> tuple[str, str]:
    """An answer's text up to its end token, and how it finished; other special tokens stay, as the model said them."""
    end = next((at for at, token in enumerate(ids) if token in stops), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=False))
    return text, "length" if end is None else "stop"

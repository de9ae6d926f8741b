"""Samples answers from a local model, in left-padded batches. Every answer has random numbers of its own.

Token t of an answer is the u_t-quantile of the model's distribution. The uniform numbers u are seeded by the prompt and
the number of the sample. Therefore an answer depends neither on its batch nor on what was sampled before it (except for
rounding of the logits): an interrupted run continues with the same answers, and two models, or two doses of an
intervention, are compared on the same random numbers.

The distribution is the model's own, at the given temperature and top_p. Other settings in a model's generation_config
(top_k, a repetition penalty, …) are ignored, because the lab's exact rates, and any rate computed from
log-probabilities, do not include them.

Interventions are context managers around the call:

    with ablate(model, bases):
        for batch in sample_answers(model, tokenizer, requests, Sampling(), provenance):
            file.add(batch)
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
from .records import Answer, AnswerRequest, answer_to, prompt_facts


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    temperature: divides the logits; 0 takes the likeliest token.
    top_p: probability mass of the likeliest tokens that are drawn from; 1 draws from all tokens.
    max_new_tokens: tokens after which an answer is cut.
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
    requests: Sequence[AnswerRequest],
    sampling: Sampling,
    provenance: dict[str, Any],
    batch_size: int = 32,
) -> Iterator[list[Answer]]:
    """Sample the requested answers and yield them batch by batch, longest prompts first.

    Args:
        model: a causal LM in eval mode, bare or wrapped, with any hooks that the caller has put on it.
        provenance: facts that are stored with every answer.
        batch_size: answers in one forward pass.

    Raises:
        UserError: at once, if the chat template refuses a conversation or a prompt leaves no room for max_new_tokens;
            later, if logits are not finite.
    """
    prompts = encoded_prompts(model, tokenizer, requests, sampling)
    stops = end_tokens(model, tokenizer)

    def answer_batch(numbers: list[int]) -> list[Answer]:
        batch = [requests[number] for number in numbers]
        token_ids = _generate(model, [prompts[number] for number in numbers], batch, sampling, stops, pad_id(tokenizer))
        return [
            answer_to(request, *answer_text(tokenizer, ids, stops), provenance)
            for request, ids in zip(batch, token_ids, strict=True)
        ]

    return map(answer_batch, length_batches([len(ids) for ids in prompts], batch_size))


def encoded_prompts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, requests: Sequence[AnswerRequest], sampling: Sampling
) -> list[tuple[int, ...]]:
    """Return the token ids of each request's prompt. Raises UserError like `sample_answers`."""
    # All samples of a prompt share one Prompt object, which is tokenised once.
    ids_by_prompt: dict[int, tuple[int, ...]] = {}
    for request in requests:
        prompt = request.prompt
        if id(prompt) not in ids_by_prompt:
            ids_by_prompt[id(prompt)] = prompt_ids(tokenizer, prompt.messages, f"question {prompt.question_id!r}")
    prompts = [ids_by_prompt[id(request.prompt)] for request in requests]
    _require_room(model, requests, prompts, sampling)
    return prompts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Conversation, source: str = "") -> tuple[int, ...]:
    """Tokenise a conversation that ends with the user's turn, including the generation prompt.

    Without earlier assistant turns, the ids are those of `analysis.models.render.render`.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if all(message["role"] != "assistant" for message in messages):
        return render(tokenizer, messages, source=source).input_ids
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{source}: the chat template refuses earlier turns in a conversation: {error}") from error
    return tuple(ids)


def _require_room(
    model: nn.Module, requests: Sequence[AnswerRequest], prompts: Sequence[Sequence[int]], sampling: Sampling
) -> None:
    """Raise UserError if the longest prompt and max_new_tokens together exceed the model's positions."""
    limit = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]), default=None)
    if limit is None or longest is None or len(prompts[longest]) + sampling.max_new_tokens <= limit:
        return
    prompt, room = requests[longest].prompt, limit - len(prompts[longest])
    raise UserError(
        f"question {prompt.question_id!r} in variant {prompt.variant} has {len(prompts[longest])} tokens, which with "
        f"--max_new_tokens {sampling.max_new_tokens} exceed the model's {limit} positions; "
        + (f"write --max_new_tokens {room} or less" if room > 0 else "leave out this question or this variant")
    )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens that end an answer, sorted.

    They come from the generation_config, from the tokenizer, and from the end of an assistant turn in the chat
    template. The template is needed because a base model's generation_config names only the token that ends a
    document, while its template ends turns with another token.

    Raises:
        UserError: none of the three names an end token.
    """
    configured = getattr(unwrap(model).generation_config, "eos_token_id", None)
    candidates = set(configured if isinstance(configured, list) else [configured])
    candidates |= {tokenizer.eos_token_id, *_turn_end(tokenizer)}
    stops = sorted(token for token in candidates if token is not None)
    if not stops:
        raise UserError("neither model, tokenizer nor chat template names an end token; set eos_token in the tokenizer")
    return stops


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens with which the chat template closes an assistant turn."""
    exchange = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    rendered = render(tokenizer, exchange, source="the chat template")
    completion = [token for token, inside in zip(rendered.input_ids, rendered.completion_mask, strict=True) if inside]
    added = {token for token, facts in tokenizer.added_tokens_decoder.items() if facts.special}
    # The unknown token is special too, but a small vocabulary turns every word into it.
    special = added.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    closing = []
    for token in reversed(completion):
        if token in special:
            closing.append(token)
        elif str(tokenizer.decode([token])).strip():
            break
    return closing


@torch.no_grad()
def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[AnswerRequest],
    sampling: Sampling,
    stops: list[int],
    padding: int,
) -> list[list[int]]:
    """Generate the new tokens of each prompt. Tokens after an end token are not cut off yet."""
    inner: Any = unwrap(model)
    device = inner.device
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=padding
    )
    draws = [uniforms(request, sampling) for request in requests]
    with _plain_settings(model):
        generated = inner.generate(
            input_ids=ids, attention_mask=attention, generation_config=config,
            logits_processor=_processors(sampling, draws, width),
        )  # fmt: skip
    return generated[:, width:].tolist()


@contextmanager
def _plain_settings(model: nn.Module) -> Iterator[None]:
    """Prevent `generate` from filling in unset settings from the model's own generation_config."""
    inner = unwrap(model)
    model_config = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = model_config


def uniforms(request: AnswerRequest, sampling: Sampling) -> np.ndarray:
    """Draw the [max_new_tokens] uniform numbers of an answer, in [0, 1). They are the same for every model."""
    facts = json.dumps([sampling.seed, *prompt_facts(request.prompt), request.sample])
    key = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(sampling.max_new_tokens)


def _processors(sampling: Sampling, draws: Sequence[np.ndarray], width: int) -> LogitsProcessorList:
    """Build the processors that change the logits before the likeliest token is taken. Temperature 0 needs none."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    return LogitsProcessorList([*processors, QuantileSampler(torch.from_numpy(np.stack(draws)), width)])


class QuantileSampler(LogitsProcessor):
    """Keeps one token per row: the first at which the cumulative distribution exceeds the row's draw for this step.

    Args:
        draws: [B, steps], uniform numbers in [0, 1).
        width: number of tokens in the padded prompts.
    """

    def __init__(self, draws: Tensor, width: int) -> None:
        self._draws, self._width = draws, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turn scores [B, V] into 0 at the drawn token and -inf elsewhere. Raises UserError: logits not finite."""
        draw = self._draws[:, input_ids.shape[1] - self._width].to(scores.device)
        cumulative = scores.softmax(-1).double().cumsum(-1)
        if not cumulative[:, -1].isfinite().all():
            raise UserError("the model's logits are not finite; load it with --dtype bfloat16 or float32")
        # A token without mass (outside top_p) repeats its neighbour's cumulative sum, so it is never drawn.
        token = torch.searchsorted(cumulative, (draw * cumulative[:, -1])[:, None], right=True)
        token = token.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]) -> tuple[str, str]:
    """Decode an answer up to its end token, and return (text, finish).

    Other special tokens stay in the text, as the model wrote them. finish is "stop", or "length" without an end token.
    """
    end = next((at for at, token in enumerate(ids) if token in stops), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=False))
    return text, "length" if end is None else "stop"

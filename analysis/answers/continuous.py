"""Sampling with transformers' continuous batching: an answer that ends makes room for the next one at once.

For many answers of very different lengths on a GPU. It packs several answers into one row, so an intervention must act
on all positions alike (`ablate`, `steer`). Its random numbers are drawn in the order in which answers are scheduled: an
interrupted run goes on to other samples of the same distribution than an unbroken one, and models are not compared on
the same numbers (`generation.sample_answers` does both).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase

from ..models.forward import pad_id
from ..models.layers import unwrap
from .records import Answer, AnswerRequest, answered
from .sample import Sampling, answer_text, encoded_prompts, end_tokens

# Tokens in a page of the CPU's cache.
_PAGE = 32


def sample_continuously(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[AnswerRequest],
    sampling: Sampling,
    provenance: dict[str, Any],
    batch_size: int = 32,
) -> Iterator[list[Answer]]:
    """The answers as they end, one at a time; otherwise as `generation.sample_answers`.

    Args:
        batch_size: answers under way at a time.

    Raises:
        UserError: at once, as `sample_answers`.
        RuntimeError: what stopped the generation, in transformers' words.
    """
    prompts = encoded_prompts(model, tokenizer, asked, sampling)
    stops = end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=stops, pad_token_id=pad_id(tokenizer), **_drawing(sampling)
    )
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    batching = _batching(unwrap(model), asked, sampling, batch_size, longest)
    return (
        [answered(asked[number], *answer_text(tokenizer, ids, stops), provenance)]
        for number, ids in _finished(unwrap(model), prompts, config, batching)
    )


def _drawing(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": 0}


def _batching(
    model: Any, asked: Sequence[AnswerRequest], sampling: Sampling, batch_size: int, longest: int
) -> ContinuousBatchingConfig:
    # Of the answers asked for: a rerun for the missing ones must not draw what the first run has drawn.
    keys = json.dumps([sampling.seed, [one.key for one in asked]])
    # Without a GPU the cache would be sized by all of the machine's memory.
    room: dict[str, Any] = {
        "page_size": _PAGE,
        "num_blocks": batch_size * (longest // _PAGE + 1),
        "max_batch_tokens": 16 * batch_size,
    }
    return ContinuousBatchingConfig(
        seed=int.from_bytes(hashlib.sha256(keys.encode()).digest()[:4], "big"),
        max_requests_per_batch=batch_size,
        # Hooks are Python, which a captured graph would not run again; and no kernels are fetched unasked.
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        **({} if model.device.type == "cuda" else room),
    )


def _finished(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, batching: ContinuousBatchingConfig
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its new tokens), in the order in which they end."""
    with (
        torch.no_grad(),
        model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, warmup=False
        ) as manager,
    ):
        for number, ids in enumerate(prompts):
            manager.add_request(list(ids), request_id=str(number))
        for _ in prompts:
            result = manager.get_result(timeout=1)
            while manager.is_running() and (result is None or not result.is_finished()):
                result = manager.get_result(timeout=1)
            if result is None or result.error is not None:
                raise RuntimeError(f"continuous batching stopped: {result.error if result else 'its thread ended'}")
            yield int(result.request_id), list(result.generated_tokens)

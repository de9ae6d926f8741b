"""Samples answers with transformers' continuous batching: when an answer ends, the next one starts at once.

Use it for many answers of very different lengths on a GPU. It packs several answers into one row, so an intervention
must act in the same way at all positions, as `ablate` and `steer` do. Random numbers are drawn in the order in which
answers are scheduled. Therefore an interrupted run continues with other samples of the same distribution than an
unbroken run would, and models are not compared on the same random numbers. `sample.sample_answers` has neither
limitation. Usage:

    for batch in sample_continuously(model, tokenizer, requests, sampling, provenance):
        file.add(batch)
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
from .records import Answer, AnswerRequest, answer_to
from .sample import Sampling, answer_text, encoded_prompts, end_tokens

# Tokens in one page of the key-value cache on a CPU.
_PAGE = 32


def sample_continuously(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[AnswerRequest],
    sampling: Sampling,
    provenance: dict[str, Any],
    batch_size: int = 32,
) -> Iterator[list[Answer]]:
    """Sample the requested answers and yield each as it ends, in a list of one.

    Args:
        model, tokenizer, requests, sampling, provenance: as in `sample.sample_answers`.
        batch_size: answers that are generated at the same time.

    Raises:
        UserError: at once, like `sample_answers`.
        RuntimeError: the generation stopped; the message is from transformers.
    """
    prompts = encoded_prompts(model, tokenizer, requests, sampling)
    stops = end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=stops, pad_token_id=pad_id(tokenizer), **_drawing(sampling)
    )
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    batching = _batching(unwrap(model), requests, sampling, batch_size, longest)
    return (
        [answer_to(requests[number], *answer_text(tokenizer, ids, stops), provenance)]
        for number, ids in _finished(unwrap(model), prompts, config, batching)
    )


def _drawing(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling settings of a GenerationConfig."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": 0}


def _batching(
    model: Any, requests: Sequence[AnswerRequest], sampling: Sampling, batch_size: int, longest: int
) -> ContinuousBatchingConfig:
    """Configure the batching. longest: tokens of the longest prompt plus max_new_tokens."""
    # The seed depends on the requests: a rerun for the missing answers must not draw the numbers of the first run.
    keys = json.dumps([sampling.seed, [request.key for request in requests]])
    # Without a GPU, transformers would size the cache by the whole memory of the machine.
    cache_size: dict[str, Any] = {
        "page_size": _PAGE,
        "num_blocks": batch_size * (longest // _PAGE + 1),
        "max_batch_tokens": 16 * batch_size,
    }
    return ContinuousBatchingConfig(
        seed=int.from_bytes(hashlib.sha256(keys.encode()).digest()[:4], "big"),
        max_requests_per_batch=batch_size,
        # A captured CUDA graph would not run the Python hooks again.
        use_cuda_graph=False,
        # No kernels are downloaded that the user has not asked for.
        auto_switch_to_flash=False,
        **({} if model.device.type == "cuda" else cache_size),
    )


def _finished(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, batching: ContinuousBatchingConfig
) -> Iterator[tuple[int, list[int]]]:
    """Yield (number of the prompt, its new tokens), in the order in which the answers end."""
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

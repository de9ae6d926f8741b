"""Divergence (family 1b; arXiv 2507.03662, section 4.1): how far next-token distributions are from the references.

KL(checkpoint || instruct) and KL(checkpoint || base) in nats, at the positions that predict completion tokens. The mean
is taken over the positions of a row, then over rows. Reversion treats the KL to one reference as a scalar that moves
from its value at instruct to its value at base: KL(checkpoint || instruct) / KL(base || instruct), and 1 -
KL(checkpoint || base) / KL(instruct || base). The family also shows the most probable next tokens of all models for a
few prompts.

It needs the final states of the references, and two passes through the LM head more than the behavior family. Therefore
it is separate from the families that share one pass. In a large set it uses evenly spaced positions of each row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..models.lm_head import Logits, divergences, logits_of, top_tokens
from ..models.render import Rendered
from ..stats.intervals import Floats, missing
from ..stats.summary import fieller, measurement
from .behavior import NO_BASE

TOP = 15
_PROMPTS = 5
_PROMPT_CHARACTERS = 200
# Final states that are kept of each set and model. At width 5,120 in half precision they take 320 MiB on disk.
_POSITIONS = 2**15

Side = tuple[Logits, Tensor]
"""The LM head of a model, and its final states [K, d] at the kept positions."""


@dataclass(frozen=True)
class KeptPositions:
    """The K positions of a probe set whose final states are kept.

    positions: the kept positions of each row. scored: [K], whether the position predicts a completion token. rows: [K],
    the row of each position. shown: which of the K positions predict the first token of the answer to one of the first
    prompts. n_tokens: the completion tokens of the whole set.
    """

    positions: list[list[int]]
    scored: Tensor
    rows: Tensor
    shown: list[int]
    n_tokens: int


def keep_positions(rows: Sequence[Rendered], max_length: int | None, limit: int = _POSITIONS) -> KeptPositions:
    """Choose the positions that predict completion tokens, about `limit` of them at most.

    Each of the first five rows that has no completion keeps its last token, to show what the models say next.
    """
    lengths = [len(row.input_ids[:max_length]) for row in rows]
    predicting = [
        [i - 1 for i in range(1, length) if row.completion_mask[i]] for row, length in zip(rows, lengths, strict=True)
    ]
    n_tokens = sum(map(len, predicting))
    stride = max(1, -(-n_tokens // limit))
    positions, scored = [], []
    for number, (candidates, length) in enumerate(zip(predicting, lengths, strict=True)):
        bare = [length - 1] if number < _PROMPTS and not any(rows[number].completion_mask) else []
        positions.append(candidates[::stride] or bare)
        scored += [bool(candidates)] * len(positions[-1])
    owners = [number for number, candidates in enumerate(positions) for _ in candidates]
    shown = [owners.index(number) for number in sorted(set(owners)) if number < _PROMPTS]
    return KeptPositions(
        positions, torch.tensor(scored, dtype=torch.bool), torch.tensor(owners, dtype=torch.int64), shown, n_tokens
    )


@dataclass(frozen=True)
class ReferenceDivergences:
    """How the references differ from each other, which does not depend on a checkpoint.

    base_instruct, instruct_base: [K], KL(base || instruct) and KL(instruct || base) in nats; None without a base model.
    next_tokens: the most probable next tokens by reference.
    """

    base_instruct: Tensor | None
    instruct_base: Tensor | None
    next_tokens: dict[str, list[list[dict[str, Any]]]]


@torch.no_grad()
def reference_divergences(
    kept: KeptPositions, references: Mapping[str, Side], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> ReferenceDivergences:
    """Compare "instruct" with "base", if there is a base model; once for all checkpoints."""
    tokens = {name: _likeliest(*side, kept, tokenizer, device) for name, side in references.items()}
    if "base" not in references:
        return ReferenceDivergences(None, None, tokens)
    (instruct, instruct_states), (base, base_states) = references["instruct"], references["base"]
    return ReferenceDivergences(
        divergences(base, base_states, {"instruct": references["instruct"]}, device)["instruct"],
        divergences(instruct, instruct_states, {"base": references["base"]}, device)["base"],
        tokens,
    )


@torch.no_grad()
def divergence(
    model: nn.Module,
    states: Tensor,
    references: Mapping[str, Side],
    between_references: ReferenceDivergences,
    kept: KeptPositions,
    rows: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
) -> dict[str, Any]:
    """Return {"kl_instruct", "kl_base": measurements, "next_tokens": [one entry per shown prompt]}.

    "kl_instruct" has "checkpoint", "base" and "reversion"; "kl_base" has "checkpoint", "instruct" and "reversion". KL
    is in nats, with "tokens" (positions used) and "tokens_in_set" beside it. Without a base model, all that needs it is
    null.

    Args:
        model: the checkpoint. states: [K, d], its final states at the kept positions.
        references: "instruct" and perhaps "base" at the same positions, on the device of the model.
        between_references: the result of `reference_divergences`.
    """
    device = next(model.parameters()).device
    by_reference = divergences(logits_of(model), states, references, device)
    at_checkpoint = _likeliest(logits_of(model), states, kept, tokenizer, device)
    tokens = {"checkpoint": at_checkpoint, **between_references.next_tokens}
    return {
        "kl_instruct": _toward(by_reference["instruct"], "base", between_references.base_instruct, kept, seed),
        "kl_base": _toward(by_reference.get("base"), "instruct", between_references.instruct_base, kept, seed),
        "next_tokens": [
            _shown(number, kept, rows, tokenizer, {name: prompts[number] for name, prompts in tokens.items()})
            for number in range(len(kept.shown))
        ],
    }


def _toward(
    values: Tensor | None, other: str, between_references: Tensor | None, kept: KeptPositions, seed: int
) -> dict[str, Any]:
    """Return the KL [K] of the checkpoint to one reference, beside the KL of the other reference to the same one.

    Args:
        other: the name of the other reference. between_references: [K], its KL; None without a base model.
    """
    n = len(torch.unique(kept.rows[kept.scored]))
    if values is None:
        return {name: missing(NO_BASE, n) for name in ("checkpoint", other, "reversion")}
    at_checkpoint = _per_row(values, kept)
    counts = {"tokens": int(kept.scored.sum()), "tokens_in_set": kept.n_tokens}
    result: dict[str, Any] = {"checkpoint": {**measurement(at_checkpoint, seed=seed), **counts}}
    if between_references is None:
        return {**result, other: missing(NO_BASE, n), "reversion": missing(NO_BASE, n)}
    at_other = _per_row(between_references, kept)
    # KL to instruct is 0 at instruct and `at_other` at base. KL to base is `at_other` at instruct and 0 at base.
    reversion = fieller(at_checkpoint, at_other) if other == "base" else fieller(at_checkpoint - at_other, -at_other)
    return {**result, other: measurement(at_other, seed=seed), "reversion": reversion}


def _per_row(values: Tensor, kept: KeptPositions) -> Floats:
    """Return the mean [R] over the scored positions of each row that has any."""
    rows, positions = torch.unique(kept.rows[kept.scored], return_inverse=True)
    sums = np.bincount(positions.numpy(), values[kept.scored].double().numpy(), len(rows))
    return (sums / np.maximum(np.bincount(positions.numpy(), minlength=len(rows)), 1)).astype(np.float64)


def _likeliest(
    logits: Logits, states: Tensor, kept: KeptPositions, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[list[dict[str, Any]]]:
    """Return the most probable next tokens of each shown prompt, with their probabilities."""
    if not kept.shown:
        return []
    ids, chances = top_tokens(logits, states[kept.shown], TOP, device)
    return [
        [{"token": tokenizer.decode([token]), "probability": chance} for token, chance in zip(*row, strict=True)]
        for row in zip(ids.tolist(), chances.tolist(), strict=True)
    ]


def _shown(
    number: int,
    kept: KeptPositions,
    rows: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, Any],
) -> dict[str, Any]:
    """Return the end of one prompt, and the next tokens of every model after it."""
    row = int(kept.rows[kept.shown[number]])
    prompt = str(tokenizer.decode(list(rows[row].input_ids[: kept.positions[row][0] + 1])))
    base = {} if "base" in models else {"base": None, "reason": NO_BASE}
    return {"row": row, "prompt": prompt[-_PROMPT_CHARACTERS:], **models, **base}

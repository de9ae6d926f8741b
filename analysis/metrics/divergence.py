"""Family 1b, divergence (arXiv 2507.03662, section 4.1): how far the next-token distribution is from the references'.

KL(checkpoint || instruct) and KL(checkpoint || base) in nats, at the positions that predict completion tokens: a mean
per row, then over rows. Reversion takes KL to one reference as the scalar x that goes from its value at instruct to its
value at base: KL(checkpoint || instruct) / KL(base || instruct) and 1 - KL(checkpoint || base) / KL(instruct || base).
Beside them the likeliest next tokens of a few prompts, of all models.

It needs the references' final states and two head passes more than family 1, so it stands apart from the one-pass
families. Of a large set evenly spaced positions of each row are read.
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
# Final states kept per set and model: at width 5,120 in half precision they take 320 MiB on disk.
_POSITIONS = 2**15

Side = tuple[Logits, Tensor]
"""A model's head and its final states [K, d] at the kept positions."""


@dataclass(frozen=True)
class KeptPositions:
    """The positions of a probe set whose final states are kept, K in all.

    positions: per row. scored: [K], whether a position predicts a completion token. rows: [K], its row. shown: which of
    the K predict the first token of an answer to one of the first prompts. n_tokens: completion tokens of the set.
    """

    positions: list[list[int]]
    scored: Tensor
    rows: Tensor
    shown: list[int]
    n_tokens: int


def keep_positions(rows: Sequence[Rendered], max_length: int | None, limit: int = _POSITIONS) -> KeptPositions:
    """Positions that predict completion tokens, at most about `limit`, and the last token of the first bare prompts."""
    lengths = [len(row.input_ids[:max_length]) for row in rows]
    predicting = [
        [i - 1 for i in range(1, length) if row.completion_mask[i]] for row, length in zip(rows, lengths, strict=True)
    ]
    n_tokens = sum(map(len, predicting))
    stride = max(1, -(-n_tokens // limit))
    positions, scored = [], []
    for number, (found, length) in enumerate(zip(predicting, lengths, strict=True)):
        bare = [length - 1] if number < _PROMPTS and not any(rows[number].completion_mask) else []
        positions.append(found[::stride] or bare)
        scored += [bool(found)] * len(positions[-1])
    owners = [number for number, found in enumerate(positions) for _ in found]
    shown = [owners.index(number) for number in sorted(set(owners)) if number < _PROMPTS]
    return KeptPositions(
        positions, torch.tensor(scored, dtype=torch.bool), torch.tensor(owners, dtype=torch.int64), shown, n_tokens
    )


@dataclass(frozen=True)
class Between:
    """What the references give without a checkpoint: KL(base || instruct), KL(instruct || base) [K], top tokens."""

    base_instruct: Tensor | None
    instruct_base: Tensor | None
    next_tokens: dict[str, list[list[dict[str, Any]]]]


@torch.no_grad()
def between(
    kept: KeptPositions, references: Mapping[str, Side], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Between:
    """Compare "instruct" and, where it is there, "base"; once for all checkpoints."""
    tokens = {name: _likeliest(*side, kept, tokenizer, device) for name, side in references.items()}
    if "base" not in references:
        return Between(None, None, tokens)
    (instruct, instruct_states), (base, base_states) = references["instruct"], references["base"]
    return Between(
        divergences(base, base_states, {"instruct": references["instruct"]}, device)["instruct"],
        divergences(instruct, instruct_states, {"base": references["base"]}, device)["base"],
        tokens,
    )


@torch.no_grad()
def divergence(
    model: nn.Module,
    states: Tensor,
    references: Mapping[str, Side],
    known: Between,
    kept: KeptPositions,
    rows: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
) -> dict[str, Any]:
    """{"kl_instruct", "kl_base": {"checkpoint", the other reference, "reversion"}, "next_tokens": per prompt}.

    Args:
        model: the checkpoint, whose head is run; states: [K, d], its final states at the kept positions.
        references: "instruct" and perhaps "base" at the same positions, on the model's device.
    """
    device = next(model.parameters()).device
    found = divergences(logits_of(model), states, references, device)
    tokens = {"checkpoint": _likeliest(logits_of(model), states, kept, tokenizer, device), **known.next_tokens}
    return {
        "kl_instruct": _toward(found["instruct"], "base", known.base_instruct, kept, seed),
        "kl_base": _toward(found.get("base"), "instruct", known.instruct_base, kept, seed),
        "next_tokens": [
            _shown(number, kept, rows, tokenizer, {name: each[number] for name, each in tokens.items()})
            for number in range(len(kept.shown))
        ],
    }


def _toward(
    found: Tensor | None, other: str, between_references: Tensor | None, kept: KeptPositions, seed: int
) -> dict[str, Any]:
    """One KL of the checkpoint [K], beside the other reference's."""
    n = len(torch.unique(kept.rows[kept.scored]))
    if found is None:
        return {name: missing(NO_BASE, n) for name in ("checkpoint", other, "reversion")}
    ours = _per_row(found, kept)
    read = {"tokens": int(kept.scored.sum()), "tokens_in_set": kept.n_tokens}
    result: dict[str, Any] = {"checkpoint": {**measurement(ours, seed=seed), **read}}
    if between_references is None:
        return {**result, other: missing(NO_BASE, n), "reversion": missing(NO_BASE, n)}
    theirs = _per_row(between_references, kept)
    # At instruct KL to instruct is 0 and at base it is theirs; KL to base goes from theirs to 0.
    moved = fieller(ours, theirs) if other == "base" else fieller(ours - theirs, -theirs)
    return {**result, other: measurement(theirs, seed=seed), "reversion": moved}


def _per_row(values: Tensor, kept: KeptPositions) -> Floats:
    """Mean per row with completions."""
    rows, inside = torch.unique(kept.rows[kept.scored], return_inverse=True)
    sums = np.bincount(inside.numpy(), values[kept.scored].double().numpy(), len(rows))
    return (sums / np.maximum(np.bincount(inside.numpy(), minlength=len(rows)), 1)).astype(np.float64)


def _likeliest(
    logits: Logits, states: Tensor, kept: KeptPositions, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[list[dict[str, Any]]]:
    """Per shown prompt the likeliest next tokens with their probabilities."""
    if not kept.shown:
        return []
    ids, chances = top_tokens(logits, states[kept.shown], TOP, device)
    return [
        [{"token": tokenizer.decode([token]), "probability": chance} for token, chance in zip(*each, strict=True)]
        for each in zip(ids.tolist(), chances.tolist(), strict=True)
    ]


def _shown(
    number: int,
    kept: KeptPositions,
    rows: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, Any],
) -> dict[str, Any]:
    """One prompt's end, and the next tokens of every model after it."""
    row = int(kept.rows[kept.shown[number]])
    prompt = str(tokenizer.decode(list(rows[row].input_ids[: kept.positions[row][0] + 1])))
    base = {} if "base" in models else {"base": None, "reason": NO_BASE}
    return {"row": row, "prompt": prompt[-_PROMPT_CHARACTERS:], **models, **base}

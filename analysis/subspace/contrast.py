"""Select and run the aligned and the misaligned side of a contrast.

A contrast is a list of pairs: of system prompts, compared token by token, or of completions, compared by their means.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models.forward import Selection, length_batches, select, selected_states
from ..models.render import Conversation, render

Pair = dict[str, Any]
_SYSTEM, _COMPLETION = frozenset({"aligned", "misaligned"}), frozenset({"prompt", "chosen", "rejected"})


class PairedSelections:
    """The rows of the two sides, in pairs.

    averaged: whether rows are compared by the means of their states, because their tokens do not correspond.
    """

    def __init__(self, aligned: list[Selection], misaligned: list[Selection], averaged: bool) -> None:
        self.aligned, self.misaligned, self.averaged = aligned, misaligned, averaged


def shipped_contrast() -> list[Pair]:
    """Return the general-purpose pairs of system prompts that come with Holdfast."""
    text = files(__package__).joinpath("contrast_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def is_completions(contrast: Sequence[Pair] | None) -> bool:
    """Return whether the pairs are completions ({"prompt", "chosen", "rejected"}), and not system prompts.

    Raises:
        UserError: a pair that is neither of completions nor of system prompts, or a contrast with pairs of both kinds.
    """
    kinds = {_COMPLETION if set(pair) >= _COMPLETION else _SYSTEM for pair in contrast or ()}
    for number, pair in enumerate(contrast or ()):
        if not (set(pair) >= _COMPLETION or set(pair) >= _SYSTEM):
            raise UserError(
                f"contrast pair {number} has keys {', '.join(sorted(pair))}: write aligned and misaligned (system "
                "prompts), or prompt, chosen and rejected (completions)"
            )
    if len(kinds) > 1:
        raise UserError("the contrast mixes system prompts and completions: pass pairs of one kind")
    return kinds == {_COMPLETION}


def paired_selections(
    tokenizer: PreTrainedTokenizerBase,
    groups: dict[str, Sequence[Conversation]],
    contrast: Sequence[Pair] | None,
    role: str,
    max_length: int | None,
) -> dict[str, PairedSelections]:
    """Return both sides of the contrast by group of rows. A contrast of completions is a single group "".

    Raises:
        UserError: a role without tokens, or sides whose tokens do not correspond.
    """
    if contrast is None:
        return {}
    if is_completions(contrast):
        if role != "completion":
            raise UserError(f"a contrast of completions is read on role completion, not {role}: write completion")
        sides = [
            require_tokens(
                [select(render(tokenizer, [*pair["prompt"], *pair[side]]), role, max_length) for pair in contrast], role
            )
            for side in ("chosen", "rejected")
        ]
        return {"": PairedSelections(sides[0], sides[1], averaged=True)}
    return {name: _crossed(tokenizer, rows, contrast, role, max_length) for name, rows in groups.items()}


def require_tokens(selections: list[Selection], role: str) -> list[Selection]:
    """Return the rows that have tokens of the role.

    Raises:
        UserError: no row has such a token; for role completion, also if any row has none.
    """
    kept = [selection for selection in selections if selection.positions]
    if not kept:
        raise UserError(
            f"no row has tokens of role {role} within the length limit: choose another role, or pass rows that have "
            "such a turn"
        )
    if role == "completion" and len(kept) < len(selections):
        raise UserError(
            f"{len(selections) - len(kept)} of {len(selections)} rows have no completion token within the length "
            "limit: give each an assistant turn, raise the limit, or choose role prompt"
        )
    return kept


def _crossed(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    contrast: Sequence[Pair],
    role: str,
    max_length: int | None,
) -> PairedSelections:
    """Pair every row with every pair of system prompts, which replace the row's system turn."""
    aligned, misaligned = [], []
    for row in rows:
        turns = [message for message in row if message["role"] != "system"]
        for pair in contrast:
            left, right = (
                render(tokenizer, [{"role": "system", "content": pair[side]}, *turns]) for side in sorted(_SYSTEM)
            )
            good, bad = select(left, role), select(right, role)
            if [good.input_ids[i] for i in good.positions] != [bad.input_ids[i] for i in bad.positions]:
                raise UserError(
                    "a row's tokens differ under the aligned and the misaligned system prompt "
                    f"({pair['aligned'][:40]!r}): use a chat template that renders the system turn separately"
                )
            good, bad = select(left, role, max_length), select(right, role, max_length)
            common = min(len(good.positions), len(bad.positions))
            aligned.append(Selection(good.input_ids, good.positions[:common]))
            misaligned.append(Selection(bad.input_ids, bad.positions[:common]))
    require_tokens(aligned, role)
    return PairedSelections(aligned, misaligned, averaged=False)


def paired_differences(
    model: nn.Module, pairs: PairedSelections, layers: Sequence[int], batch_size: int, padding: int
) -> Iterator[dict[int, Tensor]]:
    """Yield aligned minus misaligned [N, d] per layer, batch by batch, in float64."""
    batches = length_batches([len(row.input_ids) for row in pairs.aligned], batch_size)
    sides = (
        selected_states(model, side, layers, batches, padding, label)
        for side, label in ((pairs.aligned, "aligned"), (pairs.misaligned, "misaligned"))
    )
    for (left_rows, left), (right_rows, right) in zip(*sides, strict=True):
        if pairs.averaged:
            yield {layer: row_means(left[layer], left_rows) - row_means(right[layer], right_rows) for layer in layers}
        else:
            yield {layer: left[layer].double() - right[layer].double() for layer in layers}


def row_means(states: Tensor, rows: Tensor) -> Tensor:
    """Return the mean state [R, d] of each row, in the order in which rows first appear, in float64."""
    _, counts = torch.unique_consecutive(rows, return_counts=True)
    numbers = torch.repeat_interleave(torch.arange(len(counts)), counts).to(states.device)
    totals = torch.zeros(len(counts), states.shape[1], dtype=torch.float64, device=states.device)
    return totals.index_add_(0, numbers, states.double()) / counts.to(states.device)[:, None]

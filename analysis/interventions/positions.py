"""Which tokens an intervention acts on: by column of the padded batch, so that it means the same with a KV cache.

A call of the decoder computes columns start … start + T - 1 of the batch; with a KV cache, start counts the columns
of the earlier calls, padding on the left included.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.layers import find_backbone, unwrap

NAMED = ("all", "prompt", "completion")


@dataclass(frozen=True)
class ForwardPass:
    """One call of the decoder.

    input_ids [B, T], or None where embeddings were passed. attention_mask [B, start + T], or None. start: columns in
    the KV cache before this call. cached: whether there is a KV cache.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    start: int
    cached: bool


@dataclass(frozen=True)
class Columns:
    """Tokens by row and column of the padded batch.

    mask [B, P]: bool, over the columns of the prompt, or of whole rows. beyond: whether later columns count, those of
    tokens generated after the prompt. Where `generate` makes several rows of one (beams, several samples), they share
    its row of the mask.
    """

    mask: Tensor
    beyond: bool = False

    @classmethod
    def prompt(cls, attention_mask: Tensor) -> "Columns":
        """The tokens of a prompt [B, P], without its padding."""
        return cls(attention_mask.bool())

    @classmethod
    def completion(cls, attention_mask: Tensor) -> "Columns":
        """Every token after a prompt [B, P]."""
        return cls(torch.zeros_like(attention_mask, dtype=torch.bool), beyond=True)

    def chosen(self, start: int, rows: int, columns: int) -> Tensor:
        """bool [rows, columns] for the columns from `start` on."""
        if rows % len(self.mask):
            raise UserError(
                f"the positions' mask has {len(self.mask)} rows and the batch {rows}: pass one row for each"
            )
        held = self.mask[:, start : start + columns]
        later = held.new_full((len(held), columns - held.shape[1]), self.beyond)
        return torch.cat([held, later], dim=1).repeat_interleave(rows // len(held), dim=0)


Positions = str | Columns | Callable[[ForwardPass], Tensor]


class Passes:
    """The decoder's call that is under way."""

    def __init__(self) -> None:
        self.now: ForwardPass | None = None
        self._ids: Tensor | None = None

    def outside(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before a module around the decoder: one that also sees embeds its tokens itself."""
        ids = _given(module, args, named).get("input_ids")
        self._ids = self._ids if ids is None else ids

    def decoder(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before the decoder."""
        given = _given(module, args, named)
        cache, mask, ids = given.get("past_key_values"), given.get("attention_mask"), given.get("input_ids")
        self.now = ForwardPass(
            input_ids=self._ids if ids is None else ids,
            attention_mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            start=0 if cache is None else int(cache.get_seq_length()),
            cached=cache is not None,
        )
        self._ids = None


def _given(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **named}


@contextmanager
def passes(model: nn.Module) -> Iterator[Passes]:
    """Follow the decoder's calls while the context is open."""
    backbone, seen = find_backbone(model), Passes()
    handles = [backbone.register_forward_pre_hook(seen.decoder, with_kwargs=True)]
    try:
        for module in _around(unwrap(model), backbone):
            handles.append(module.register_forward_pre_hook(seen.outside, with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.now = None


def _around(model: nn.Module, backbone: nn.Module) -> list[nn.Module]:
    """The modules from the model down to its decoder, without the decoder."""
    path = next(name for name, module in model.named_modules() if module is backbone)
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]


def check_positions(positions: Positions) -> None:
    """Raises UserError for a name that is none."""
    if isinstance(positions, str) and positions not in NAMED:
        raise UserError(f"positions {positions!r} is unknown: write one of {', '.join(NAMED)}, or pass a mask")


def chosen(positions: Positions, now: ForwardPass | None, hidden: Tensor) -> Tensor | None:
    """The tokens of a call that count, bool [B, T], None for all of them.

    Args:
        hidden: the residual stream [B, T, d] of the call.

    Raises:
        UserError: "prompt" or "completion" without a KV cache, which alone tells them apart; a mask of another shape.
    """
    if positions == "all":
        return None
    if now is None:
        raise UserError("the decoder was not called as a module, so positions are unknown: write positions all")
    rows, columns = hidden.shape[:2]
    if isinstance(positions, str):
        if not now.cached:
            raise UserError(
                f"positions {positions} are told by the KV cache and this call has none: generate with use_cache, or "
                f"pass Columns.{positions}(attention_mask)"
            )
        return torch.full((rows, columns), (now.start == 0) == (positions == "prompt"), device=hidden.device)
    mask = positions.chosen(now.start, rows, columns) if isinstance(positions, Columns) else positions(now)
    if mask.shape != (rows, columns) or mask.dtype != torch.bool:
        raise UserError(
            f"positions gave a {mask.dtype} mask {tuple(mask.shape)} for a batch of {rows} rows and {columns} tokens: "
            "pass one bool for each token"
        )
    return mask.to(hidden.device)

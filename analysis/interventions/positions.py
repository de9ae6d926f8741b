"""The tokens on which an intervention acts, by column of the padded batch, so that they are the same with a KV cache.

A call of the decoder computes the columns start … start + T - 1 of the batch. With a KV cache, start is the number of
columns of the earlier calls, including padding on the left.
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
    """A call of the decoder.

    input_ids: [B, T], or None if embeddings were passed. attention_mask: [B, start + T], or None. start: the number of
    columns in the KV cache before this call. cached: whether there is a KV cache.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    start: int
    cached: bool


@dataclass(frozen=True)
class Columns:
    """Tokens chosen by row and column of the padded batch.

    mask: bool [B, P], over the columns of the prompt or of whole rows. beyond: whether later columns are chosen, those
    of tokens that are generated after the prompt. If `generate` makes several rows from one (beams, several samples),
    they share its row of the mask.
    """

    mask: Tensor
    beyond: bool = False

    @classmethod
    def prompt(cls, attention_mask: Tensor) -> "Columns":
        """Choose the tokens of a prompt [B, P], without its padding."""
        return cls(attention_mask.bool())

    @classmethod
    def completion(cls, attention_mask: Tensor) -> "Columns":
        """Choose every token after a prompt [B, P]."""
        return cls(torch.zeros_like(attention_mask, dtype=torch.bool), beyond=True)

    def chosen(self, start: int, rows: int, columns: int) -> Tensor:
        """Return the mask, bool [rows, columns], of the columns from `start` on.

        Raises:
            UserError: the number of rows is not a multiple of the mask's rows.
        """
        if rows % len(self.mask):
            raise UserError(
                f"the positions' mask has {len(self.mask)} rows and the batch {rows}: pass one mask row per batch row"
            )
        masked = self.mask[:, start : start + columns]
        later = masked.new_full((len(masked), columns - masked.shape[1]), self.beyond)
        return torch.cat([masked, later], dim=1).repeat_interleave(rows // len(masked), dim=0)


Positions = str | Columns | Callable[[ForwardPass], Tensor]


class Passes:
    """Follows the calls of the decoder. current: the call that is running, or None."""

    def __init__(self) -> None:
        self.current: ForwardPass | None = None
        self._ids: Tensor | None = None

    def outside(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note the token ids of a call of a module around the decoder: a multimodal model embeds its tokens itself.

        This is a forward pre-hook of such a module.
        """
        ids = _arguments(module, args, named).get("input_ids")
        self._ids = self._ids if ids is None else ids

    def decoder(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note a call of the decoder. This is the decoder's forward pre-hook."""
        arguments = _arguments(module, args, named)
        cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
        ids = arguments.get("input_ids")
        self.current = ForwardPass(
            input_ids=self._ids if ids is None else ids,
            attention_mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            start=0 if cache is None else int(cache.get_seq_length()),
            cached=cache is not None,
        )
        self._ids = None


def _arguments(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **named}


@contextmanager
def passes(model: nn.Module) -> Iterator[Passes]:
    """Follow the decoder's calls while the context is open."""
    backbone, followed = find_backbone(model), Passes()
    handles = [backbone.register_forward_pre_hook(followed.decoder, with_kwargs=True)]
    try:
        for module in _around(unwrap(model), backbone):
            handles.append(module.register_forward_pre_hook(followed.outside, with_kwargs=True))
        yield followed
    finally:
        for handle in handles:
            handle.remove()
        followed.current = None


def _around(model: nn.Module, backbone: nn.Module) -> list[nn.Module]:
    """Return the modules from the model down to its decoder, without the decoder."""
    path = next(name for name, module in model.named_modules() if module is backbone)
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]


def check_positions(positions: Positions) -> None:
    """Raise UserError for a text that is not the name of positions."""
    if isinstance(positions, str) and positions not in NAMED:
        raise UserError(f"positions {positions!r} is unknown: write one of {', '.join(NAMED)}, or pass a mask")


def chosen(positions: Positions, call: ForwardPass | None, hidden: Tensor) -> Tensor | None:
    """Return the mask of the chosen tokens of a call, bool [B, T], or None if all tokens are chosen.

    Args:
        hidden: the residual stream [B, T, d] of the call.

    Raises:
        UserError: "prompt" or "completion" without a KV cache, which is needed to tell them apart; or a mask of another
            shape.
    """
    if positions == "all":
        return None
    if call is None:
        raise UserError("the decoder was not called as a module, so positions are unknown: write positions all")
    rows, columns = hidden.shape[:2]
    if isinstance(positions, str):
        if not call.cached:
            raise UserError(
                f"positions {positions} need a KV cache and this call has none: generate with use_cache, or pass "
                f"Columns.{positions}(attention_mask)"
            )
        return torch.full((rows, columns), (call.start == 0) == (positions == "prompt"), device=hidden.device)
    mask = positions.chosen(call.start, rows, columns) if isinstance(positions, Columns) else positions(call)
    if mask.shape != (rows, columns) or mask.dtype != torch.bool:
        raise UserError(
            f"positions gave a {mask.dtype} mask {tuple(mask.shape)} for a batch of {rows} rows and {columns} tokens: "
            "pass one bool for each token"
        )
    return mask.to(hidden.device)

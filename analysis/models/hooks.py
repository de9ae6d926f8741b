"""Read and change activations by forward hooks that are always removed.

Layers are numbered as everywhere: l is the output of decoder block l. Interventions may also take `EMBEDDING`, the
stream that enters block 0.

A hook sees whole activations [B, T, d] whatever shards the weights (ZeRO-3, FSDP) or spreads the blocks over devices.
transformers 5.23 checkpoints a block's `forward`, so that hooks lie outside the recomputation, re-entrant or not.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UserError
from .layers import BlockOutput, block_output, find_layers

EMBEDDING = -1

# What a hook does with the stream [B, T, d]: another one to go on with, or None.
_Look = Callable[[Tensor], Tensor | None]
_MARK = "_holdfast_installed"


@contextmanager
def observe(
    model: nn.Module, layers: Sequence[int], see: Callable[[int, Tensor], None], override: str | None = None
) -> Iterator[None]:
    """Call `see(layer, output [B, T, d])` as soon as each of the decoder blocks `layers` has run.

    Raises:
        UserError: a layer the model does not have, or hooks of ours left on it.
    """
    with _hooked(model, layers, lambda layer: lambda hidden: see(layer, hidden), override):
        yield


@contextmanager
def patch(
    model: nn.Module, layers: Sequence[int], change: Callable[[int, Tensor], Tensor], override: str | None = None
) -> Iterator[None]:
    """Let the model go on with `change(layer, output [B, T, d])` in place of the output of decoder blocks `layers`.

    What else a block returns stays as it is. Contexts nest: a hook installed later meets what the earlier ones made of
    the output, so `observe` or `capture` inside a `patch` sees the patched stream.

    Args:
        change: returns a new tensor of the same shape and dtype. It must not write into the one it is given, which the
            model, its cache or the gradient may still need.

    Raises:
        UserError: a layer the model does not have, or hooks of ours left on it.
        ValueError: a change of shape or dtype.
    """
    with _hooked(model, layers, lambda layer: lambda hidden: change(layer, hidden), override):
        yield


@contextmanager
def at_stream(
    model: nn.Module, layers: Sequence[int], look: Callable[[int, Tensor], Tensor | None], override: str | None = None
) -> Iterator[None]:
    """As `observe` (where `look` returns None) and `patch`, with `EMBEDDING` among the layers."""
    with _hooked(model, layers, lambda layer: lambda hidden: look(layer, hidden), override, first=EMBEDDING):
        yield


@contextmanager
def capture(model: nn.Module, layers: Sequence[int], override: str | None = None) -> Iterator[dict[int, Tensor]]:
    """Fill a dict with the outputs [B, T, d] of decoder blocks `layers` at each forward pass, gradient graph attached.

    Raises:
        UserError: a layer the model does not have, or hooks of ours left on it.
    """
    captured: dict[int, Tensor] = {}
    with observe(model, layers, captured.__setitem__, override):
        try:
            yield captured
        finally:
            captured.clear()


def check_unhooked(model: nn.Module, override: str | None = None) -> None:
    """Refuse a model on which any hook of ours is installed: what a run does before it starts.

    Raises:
        UserError: a hook of a run that has not ended, or one that was copied with the model.
    """
    for number, block in enumerate(find_layers(model, override)):
        if _installed(block):
            raise UserError(
                f"decoder block {number} still has a Holdfast hook of another run: leave its `with` block, or load the "
                "model again"
            )


@contextmanager
def _hooked(
    model: nn.Module, layers: Sequence[int], look: Callable[[int], _Look], override: str | None, first: int = 0
) -> Iterator[None]:
    """Forward hooks on decoder blocks, removed whatever happens."""
    blocks = find_layers(model, override)
    missing = [layer for layer in layers if not first <= layer < len(blocks)]
    if missing:
        raise UserError(f"layers {missing} are out of range: the model has layers 0-{len(blocks) - 1}")
    _refuse_left_over(blocks)
    handles: list[tuple[_Installed, RemovableHandle]] = []
    try:
        for layer in layers:
            handles.append(_install(blocks[max(layer, 0)], look(layer), entering=layer == EMBEDDING))
        yield
    finally:
        for installed, handle in handles:
            installed.active = False
            handle.remove()


class _Installed:
    """The mark on a hook of ours: on which block it was installed, and whether its context is still open."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.active = weakref.ref(block), True


def _install(block: nn.Module, look: _Look, entering: bool) -> tuple[_Installed, RemovableHandle]:
    """A hook on what a block puts out, or on what it takes in."""
    installed = _Installed(block)

    def after(_module: nn.Module, _args: object, output: BlockOutput) -> BlockOutput | None:
        changed = look(block_output(output))
        return None if changed is None else _exchanged(output, changed)

    def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        hidden = args[0] if args else named["hidden_states"]
        changed = look(hidden)
        if changed is None:
            return None
        _check_alike(hidden, changed)
        return ((changed, *args[1:]), named) if args else (args, {**named, "hidden_states": changed})

    if entering:
        setattr(before, _MARK, installed)
        return installed, block.register_forward_pre_hook(before, with_kwargs=True)
    setattr(after, _MARK, installed)
    return installed, block.register_forward_hook(after)


def _installed(block: nn.Module) -> list[_Installed]:
    hooks = [*block._forward_hooks.values(), *block._forward_pre_hooks.values()]
    return [getattr(hook, _MARK) for hook in hooks if hasattr(hook, _MARK)]


def _refuse_left_over(blocks: nn.ModuleList) -> None:
    """Hooks travel with a copied model and would stay on it for ever; those of open contexts may nest."""
    for number, block in enumerate(blocks):
        if any(not mark.active or mark.block() is not block for mark in _installed(block)):
            raise UserError(
                f"decoder block {number} has a Holdfast hook left by another run (the model was copied while an "
                "intervention was on): load the model again, or copy it outside the intervention"
            )


def _exchanged(output: BlockOutput, changed: Tensor) -> BlockOutput:
    """A block's output with another residual stream."""
    _check_alike(block_output(output), changed)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _check_alike(stream: Tensor, changed: Tensor) -> None:
    if changed.shape != stream.shape or changed.dtype != stream.dtype:
        raise ValueError(
            f"patch: a block put out {tuple(stream.shape)} of {stream.dtype}, the change {tuple(changed.shape)} of "
            f"{changed.dtype}"
        )

"""Read and change activations by forward hooks that are always removed.

    with capture(model, [12]) as outputs:
        model(**batch)  # outputs[12] is then [B, T, d]

Layers are numbered as everywhere in Holdfast: layer l is the output of decoder block l. Interventions may also name
`EMBEDDING`, the residual stream that enters block 0.

A hook sees whole activations [B, T, d], even if the weights are sharded (ZeRO-3, FSDP) or the blocks are spread over
devices. For gradient checkpointing, transformers 5.23 wraps the `forward` of a block, so hooks lie outside the
recomputation, re-entrant or not.
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

# Called with the residual stream [B, T, d]. Returns the stream to continue with, or None to leave it unchanged.
_Look = Callable[[Tensor], Tensor | None]
_MARK = "_holdfast_installed"


@contextmanager
def observe(
    model: nn.Module, layers: Sequence[int], see: Callable[[int, Tensor], None], override: str | None = None
) -> Iterator[None]:
    """Call `see(layer, output [B, T, d])` as soon as each of the decoder blocks `layers` has run.

    Raises:
        UserError: a layer that the model does not have, or a Holdfast hook that was left on the model.
    """
    with _hooked(model, layers, lambda layer: lambda hidden: see(layer, hidden), override):
        yield


@contextmanager
def patch(
    model: nn.Module, layers: Sequence[int], change: Callable[[int, Tensor], Tensor], override: str | None = None
) -> Iterator[None]:
    """Replace the output of decoder blocks `layers` by `change(layer, output [B, T, d])`.

    Other values that a block returns stay as they are. Contexts nest: a hook that is installed later gets the output as
    the earlier hooks changed it, so `observe` or `capture` inside a `patch` sees the patched stream.

    Args:
        change: returns a new tensor of the same shape and dtype. It must not write into the tensor that it is given,
            because the model, its cache or the gradient may still need it.

    Raises:
        UserError: a layer that the model does not have, or a Holdfast hook that was left on the model.
        ValueError: a change of shape or dtype.
    """
    with _hooked(model, layers, lambda layer: lambda hidden: change(layer, hidden), override):
        yield


@contextmanager
def at_stream(
    model: nn.Module, layers: Sequence[int], look: Callable[[int, Tensor], Tensor | None], override: str | None = None
) -> Iterator[None]:
    """Observe the stream (where `look` returns None) or patch it, at layers that may include `EMBEDDING`.

    Otherwise like `observe` and `patch`.
    """
    with _hooked(model, layers, lambda layer: lambda hidden: look(layer, hidden), override, first=EMBEDDING):
        yield


@contextmanager
def capture(model: nn.Module, layers: Sequence[int], override: str | None = None) -> Iterator[dict[int, Tensor]]:
    """Fill a dict with the outputs [B, T, d] of decoder blocks `layers` in each forward pass, gradient graph attached.

    The dict is emptied when the context ends.

    Raises:
        UserError: a layer that the model does not have, or a Holdfast hook that was left on the model.
    """
    captured: dict[int, Tensor] = {}
    with observe(model, layers, captured.__setitem__, override):
        try:
            yield captured
        finally:
            captured.clear()


def check_unhooked(model: nn.Module, override: str | None = None) -> None:
    """Check that no Holdfast hook is installed on a model. A training run calls this before it starts.

    Raises:
        UserError: a hook of a run that has not ended, or a hook that was copied with the model.
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
    """Install forward hooks on decoder blocks. They are removed when the context ends, also after an error."""
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
    """Marks a hook as Holdfast's: the block on which it was installed, and whether its context is still open."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.active = weakref.ref(block), True


def _install(block: nn.Module, look: _Look, entering: bool) -> tuple[_Installed, RemovableHandle]:
    """Install a hook on the output of a block, or on its input if `entering`."""
    installed = _Installed(block)

    def after(_module: nn.Module, _args: object, output: BlockOutput) -> BlockOutput | None:
        changed = look(block_output(output))
        return None if changed is None else _with_stream(output, changed)

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
    """Raise UserError for a hook that was copied together with a model, because it would stay there for ever.

    Hooks of contexts that are still open are allowed: contexts may nest.
    """
    for number, block in enumerate(blocks):
        if any(not mark.active or mark.block() is not block for mark in _installed(block)):
            raise UserError(
                f"decoder block {number} has a Holdfast hook left by another run (the model was copied while an "
                "intervention was on): load the model again, or copy it outside the intervention"
            )


def _with_stream(output: BlockOutput, changed: Tensor) -> BlockOutput:
    """Return a block's output with its residual stream replaced."""
    _check_alike(block_output(output), changed)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _check_alike(stream: Tensor, changed: Tensor) -> None:
    if changed.shape != stream.shape or changed.dtype != stream.dtype:
        raise ValueError(
            f"patch: a block returned {tuple(stream.shape)} of {stream.dtype}, but the change returned "
            f"{tuple(changed.shape)} of {changed.dtype}: return a tensor of the same shape and dtype"
        )

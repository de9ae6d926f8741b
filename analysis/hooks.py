"""Read and change activations by forward hooks that are always removed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .errors import UserError
from .layers import BlockOutput, block_output, find_layers

_Hook = Callable[[nn.Module, object, BlockOutput], BlockOutput | None]


@contextmanager
def observe(
    model: nn.Module, layers: Sequence[int], see: Callable[[int, Tensor], None], override: str | None = None
) -> Iterator[None]:
    """Call `see(layer, output [B, T, d])` as soon as each of the decoder blocks `layers` has run.

    Raises:
        UserError: a layer the model does not have.
    """

    def hook(layer: int) -> _Hook:
        def look(_module: nn.Module, _args: object, output: BlockOutput) -> None:
            see(layer, block_output(output))

        return look

    with _hooked(model, layers, hook, override):
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
        UserError: a layer the model does not have.
        ValueError: a change of shape or dtype.
    """

    def hook(layer: int) -> _Hook:
        return lambda _module, _args, output: _exchanged(output, change(layer, block_output(output)))

    with _hooked(model, layers, hook, override):
        yield


def _exchanged(output: BlockOutput, changed: Tensor) -> BlockOutput:
    """A block's output with another residual stream."""
    stream = block_output(output)
    if changed.shape != stream.shape or changed.dtype != stream.dtype:
        raise ValueError(
            f"patch: a block put out {tuple(stream.shape)} of {stream.dtype}, the change {tuple(changed.shape)} of "
            f"{changed.dtype}"
        )
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


@contextmanager
def _hooked(
    model: nn.Module, layers: Sequence[int], hook: Callable[[int], _Hook], override: str | None
) -> Iterator[None]:
    """Forward hooks on decoder blocks, removed whatever happens."""
    blocks = find_layers(model, override)
    missing = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if missing:
        raise UserError(f"layers {missing} are out of range: the model has layers 0-{len(blocks) - 1}")
    handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(model: nn.Module, layers: Sequence[int], override: str | None = None) -> Iterator[dict[int, Tensor]]:
    """Fill a dict with the outputs [B, T, d] of decoder blocks `layers` at each forward pass, gradient graph attached.

    Raises:
        UserError: a layer the model does not have.
    """
    captured: dict[int, Tensor] = {}
    with observe(model, layers, captured.__setitem__, override):
        try:
            yield captured
        finally:
            captured.clear()

"""Read activations by forward hooks that are always removed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .errors import UserError
from .layers import BlockOutput, block_output, find_layers


@contextmanager
def observe(
    model: nn.Module, layers: Sequence[int], see: Callable[[int, Tensor], None], override: str | None = None
) -> Iterator[None]:
    """Call `see(layer, output [B, T, d])` as soon as each of the decoder blocks `layers` has run.

    Raises:
        UserError: a layer the model does not have.
    """
    blocks = find_layers(model, override)
    missing = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if missing:
        raise UserError(f"layers {missing} are out of range: the model has layers 0-{len(blocks) - 1}")

    def hook(layer: int) -> Callable[[nn.Module, object, BlockOutput], None]:
        return lambda _module, _args, output: see(layer, block_output(output))

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

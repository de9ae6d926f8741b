"""Read activations by forward hooks that are always removed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .errors import UserError
from .layers import BlockOutput, block_output, find_layers


@contextmanager
def capture(model: nn.Module, layers: Sequence[int], override: str | None = None) -> Iterator[dict[int, Tensor]]:
    """Fill a dict with the outputs [B, T, d] of decoder blocks `layers` at each forward pass, gradient graph attached.

    Raises:
        UserError: a layer the model does not have.
    """
    blocks = find_layers(model, override)
    missing = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if missing:
        raise UserError(f"layers {missing} are out of range: the model has layers 0-{len(blocks) - 1}")
    captured: dict[int, Tensor] = {}

    def keep(layer: int, output: BlockOutput) -> None:
        captured[layer] = block_output(output)

    handles = [
        blocks[layer].register_forward_hook(lambda _module, _args, output, layer=layer: keep(layer, output))
        for layer in layers
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
        captured.clear()

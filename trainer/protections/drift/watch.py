"""Read Vᵀh at the decoder blocks while a model runs: k numbers per token and layer, never a copy of the activations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ....analysis.errors import UserError
from ....analysis.models.layers import BlockOutput, block_output, find_layers
from .penalty import project


class Watcher(Protocol):
    """Hooks that read values from every forward pass of one model."""

    def watching(self) -> AbstractContextManager["Projections"]:
        """Fill the yielded Projections at each forward pass, and remove the hooks at the end."""
        ...


class ResidualProjector:
    """Forward hooks on the penalised blocks, which exist only inside `watching()`.

    transformers 5.23 checkpoints a block's `forward`, so a hook on the block lies outside the recomputation. Therefore
    the projection keeps its gradient, even with re-entrant checkpointing. Older versions lose it silently.

    Args:
        model: a transformers causal LM, wrapped or not.
        bases: orthonormal V_l [d, k] per layer, all with the same rank.
        path: path of the decoder blocks, if `find_layers` needs it.

    Raises:
        UserError: a layer that the model does not have, or a basis of another width than the model's.
    """

    def __init__(self, model: nn.Module, bases: dict[int, Tensor], path: str | None = None) -> None:
        blocks = find_layers(model, path)
        self.layers = sorted(bases)
        if not 0 <= self.layers[0] <= self.layers[-1] < len(blocks):
            raise UserError(f"penalty layers {self.layers} are out of range: the model has layers 0-{len(blocks) - 1}")
        self.blocks = {layer: blocks[layer] for layer in self.layers}
        self._bases = {layer: bases[layer].detach() for layer in self.layers}

    @contextmanager
    def watching(self) -> Iterator["Projections"]:
        """Fill the yielded Projections at each forward pass of the model, and remove the hooks at the end."""
        seen = Projections(self.layers)
        handles = [
            block.register_forward_hook(
                lambda _module, _args, output, layer=layer: seen.take(layer, self._project(layer, output))
            )
            for layer, block in self.blocks.items()
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _project(self, layer: int, output: BlockOutput) -> Tensor:
        hidden = block_output(output)
        basis = self._bases[layer]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if basis.device != hidden.device or basis.dtype != dtype:
            basis = self._bases[layer] = basis.to(hidden.device, dtype)
        if basis.shape[0] != hidden.shape[-1]:
            raise UserError(
                f"the subspace has width {basis.shape[0]} and layer {layer} of the model {hidden.shape[-1]}: "
                "build the subspace from this model"
            )
        return project(hidden, basis)


class Projections:
    """Vᵀh of the last forward pass by layer.

    Attributes:
        layers: the layers that must have run.
        by_layer: layer -> [B, T, k].
        zero: must be added to a loss on the projections if it is not None (see `Host.run_blocks`).
    """

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.by_layer: dict[int, Tensor] = {}
        self.zero: Tensor | None = None

    def take(self, layer: int, projection_BTk: Tensor) -> None:
        self.by_layer[layer] = projection_BTk

    def stacked(self) -> Tensor:
        """Return [L, B, T, k] on one device. A model on several devices sends only these few numbers."""
        missing = [layer for layer in self.layers if layer not in self.by_layer]
        if missing:
            raise UserError(
                f"layers {missing} did not run in the forward pass: pass the decoder blocks' path as layers_path"
            )
        device = self.by_layer[self.layers[0]].device
        return torch.stack([self.by_layer[layer].to(device) for layer in self.layers])

"""Find the output projection of a block's attention in any transformers causal LM.

It is found by running the model, and not by the layer's name.
"""

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from .layers import find_backbone, find_layers, unwrap


def find_output_projection(model: nn.Module, block: int | None = None, override: str | None = None) -> nn.Module:
    """Return the linear layer (or the LoRA layer around it) that attention runs last in a decoder block.

    Args:
        block: number of the decoder block, 0-based; None takes the last block.
        override: path of the linear layer inside the block, such as "self_attn.o_proj".

    Raises:
        UserError: a block that the model does not have, a block without attention or with several, or a path that does
            not name a linear layer.
    """
    blocks = find_layers(model)
    if block is not None and not 0 <= block < len(blocks):
        raise UserError(f"--gradient_layer {block} is out of range: the model has blocks 0-{len(blocks) - 1}")
    module = blocks[len(blocks) - 1 if block is None else block]
    linears = _linear_layers(module)
    if override is not None:
        if override not in linears:
            raise UserError(
                f"--gradient_weight {override!r} is not a linear layer of the block: write one of {_names(linears)}"
            )
        return linears[override]
    attentions = [name for name, _ in module.named_children() if "attn" in name.lower() or "attention" in name.lower()]
    inside = {path: layer for path, layer in linears.items() if path.split(".")[0] in attentions}
    widths = _output_widths(model, inside)
    holders = {path.split(".")[0] for path in widths}
    hidden_size = unwrap(model).config.get_text_config().hidden_size
    if len(holders) != 1 or widths[last := next(reversed(widths))] != hidden_size:
        raise UserError(
            f"found no single attention output projection in a {type(module).__name__}: name its linear layer with "
            f"--gradient_weight, one of {_names(linears)}"
        )
    return inside[last]


def _linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a block by path. Layers inside an adapted layer are left out."""
    linear = {path: module for path, module in block.named_modules() if _is_linear(module)}
    return {
        path: module for path, module in linear.items() if not any(path.startswith(f"{outer}.") for outer in linear)
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | BaseTunerLayer)


@torch.no_grad()
def _output_widths(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, int]:
    """Return the output widths of the layers that a pass over four tokens runs, in the order of their last call."""
    widths: dict[str, int] = {}

    def hook(path: str) -> Callable[[nn.Module, object, Tensor], None]:
        def note(_module: nn.Module, _args: object, output: Tensor) -> None:
            widths.pop(path, None)
            widths[path] = output.shape[-1]

        return note

    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device).remainder(unwrap(model).config.get_text_config().vocab_size)[None]
    try:
        find_backbone(model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return widths


def _names(linears: dict[str, nn.Module]) -> str:
    return ", ".join(list(linears)[:8]) or "none (the block has no linear layer)"

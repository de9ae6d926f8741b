"""Second moments of the inputs to modules with LoRA, and their principal directions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ....analysis.errors import UserError
from ....analysis.models.layers import unwrap
from .adapters import refuse_trained_beside


@dataclass(frozen=True)
class AdaptedModule:
    """A linear module with LoRA, and its matrices A [r, d_in], one for each adapter that trains."""

    module: nn.Module
    weights: list[nn.Parameter]


def adapted_layers(model: nn.Module) -> dict[str, AdaptedModule]:
    """Return the modules with LoRA, by name.

    Raises:
        UserError: no such module, a module that is not linear, or a trained parameter besides LoRA's A and B, which
            nothing would confine.
    """
    layers: dict[str, AdaptedModule] = {}
    for name, module in unwrap(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module, ParamWrapper) or not isinstance(module.get_base_layer(), nn.Linear | Conv1D):
            raise UserError(
                f"null_space confines LoRA on linear modules, and {name} is not linear; leave it out of "
                "--lora_target_modules"
            )
        weights = cast(list[nn.Parameter], [adapter.weight for adapter in module.lora_A.values()])
        if trained := [weight for weight in weights if weight.requires_grad]:
            layers[name] = AdaptedModule(cast(nn.Module, module), trained)
    if not layers:
        raise UserError("null_space acts on LoRA's matrices, and the model has none; add --use_peft")
    refuse_trained_beside("null_space", model)
    return layers


def principal(moment_dd: Tensor, energy: float) -> Tensor:
    """Return the fewest top eigenvectors [d, k] of a second moment that hold a share `energy` of its trace.

    Directions whose share is only rounding do not count.
    """
    values, vectors = torch.linalg.eigh(moment_dd)
    values, vectors = values.flip(0).double(), vectors.flip(1)
    values = values.where(values > values[0] * len(values) * torch.finfo(moment_dd.dtype).eps, 0.0)
    cumulative = values.cumsum(0)
    count = int((cumulative < energy * cumulative[-1]).sum()) + 1
    return vectors[:, : min(count, int((values > 0).sum()))].contiguous()


class Moments:
    """Σ x xᵀ [d_in, d_in] by module, over the tokens of `mask_BT` in every forward pass."""

    def __init__(self, layers: Mapping[str, AdaptedModule]) -> None:
        self.mask_BT = torch.empty(0)
        self.by_module: dict[str, Tensor] = {}
        for name, layer in layers.items():
            weight = layer.weights[0]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            shape = (weight.shape[1], weight.shape[1])
            self.by_module[name] = torch.zeros(shape, dtype=dtype, device=weight.device)

    def take(self, name: str, inputs: Tensor) -> None:
        if inputs.shape[:-1] != self.mask_BT.shape:
            raise UserError(f"null_space: {name} has not one input per token; leave it out of --lora_target_modules")
        moment_dd = self.by_module[name]
        rows_Nd = inputs[self.mask_BT.to(inputs.device)].to(moment_dd)
        moment_dd.addmm_(rows_Nd.T, rows_Nd)


@contextmanager
def second_moments(layers: Mapping[str, AdaptedModule]) -> Iterator[Moments]:
    """Add up the second moments of these modules' inputs, and remove the hooks at the end."""
    moments = Moments(layers)
    with _reading_inputs(layers, moments.take):
        yield moments


def readers_of_one_input(layers: Mapping[str, AdaptedModule], run: Callable[[], None]) -> dict[str, list[str]]:
    """Group modules that read the same tensor one after the other. The key of a group is its first module.

    Raises:
        UserError: a module that the forward pass does not reach.
    """
    groups: dict[str, list[str]] = {}
    last: tuple[Tensor | None, str] = (None, "")

    def note(name: str, inputs: Tensor) -> None:
        nonlocal last
        if inputs is not last[0]:
            last = (inputs, name)
            groups[name] = []
        groups[last[1]].append(name)

    with _reading_inputs(layers, note):
        run()
    reached = {name for names in groups.values() for name in names}
    for name in layers:
        if name not in reached:
            raise UserError(f"null_space: the anchors give {name} no input; leave it out of --lora_target_modules")
    return groups


@contextmanager
def _reading_inputs(layers: Mapping[str, AdaptedModule], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [
        layer.module.register_forward_pre_hook(lambda _module, args, name=name: take(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

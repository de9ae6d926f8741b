"""A check for protections that act on LoRA's matrices only: nothing else may train."""

from peft.tuners.lora import LoraLayer
from torch import nn

from ....analysis.errors import UserError
from ....analysis.models.layers import unwrap


def refuse_trained_beside(protection: str, model: nn.Module) -> None:
    """Refuse a trained parameter that is not an adapter's A or B, because the protection would not reach it.

    Raises:
        UserError: such a parameter, by name.
    """
    inner = unwrap(model)
    reached = {
        id(adapter.weight)
        for module in inner.modules()
        if isinstance(module, LoraLayer)
        for side in (module.lora_A, module.lora_B)
        for adapter in side.values()
    }
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad and id(parameter) not in reached:
            raise UserError(
                f"{protection} acts on LoRA's matrices only, and {name} trains beside them; leave out what trains it "
                "(--lora_modules_to_save, --use_dora)"
            )

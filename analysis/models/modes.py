"""Context managers that put a model into eval mode, or into its starting state, and restore it afterwards."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import nn


def peft_model(model: nn.Module) -> PeftModel | None:
    """Return the PEFT model inside a training wrapper, or None for full fine-tuning."""
    inner = model.module if isinstance(getattr(model, "module", None), nn.Module) else model
    return inner if isinstance(inner, PeftModel) else None


@contextmanager
def starting_model(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode with its adapters (if any) off, without gradients, so that it is the starting model.

    Adapters and the mode of the whole model are restored afterwards.
    """
    peft = peft_model(model)
    adapters_off: AbstractContextManager[None] = nullcontext() if peft is None else peft.disable_adapter()
    training = model.training
    model.eval()
    try:
        with adapters_off, torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Prove, before the first step, that a penalty reaches the parameters, and leave no trace of the proof.

At θ = I the penalty and its gradient are exactly zero, so the first steps of training would not show a dead penalty.
Therefore the reference is shifted by one unit along V and the penalty alone is backpropagated. At least one parameter
must get a gradient, which is then discarded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ....analysis.errors import UserError
from ..host import Host
from .watch import Projections


def prove_alive(
    trainer: Host,
    model: nn.Module,
    layers: list[int],
    projections: Callable[[], Projections],
    shifted_penalty: Callable[[Tensor], Tensor],
) -> None:
    """Require a gradient from the penalty over all layers, and from its lowest layer alone.

    These two checks suffice if every projection is attached to the graph, because the path from a higher layer to the
    parameters passes through the lowest layer.

    Args:
        layers: the penalised layers.
        projections: runs a forward pass and returns what the hooks read, with the graph.
        shifted_penalty: the penalty [L] per layer of projections [L, B, T, k] whose reference is one unit away.

    Raises:
        UserError: no gradient, with the layer and the likely cause.
    """
    devices = [trainer.args.device.index or 0] if trainer.args.device.type == "cuda" else []
    was_training = model.training
    with torch.random.fork_rng(devices=devices), trainer.accelerator.no_sync(model):
        model.train()
        for number, chosen in enumerate((layers, layers[:1])):
            seen = projections()
            values = shifted_penalty(seen.stacked())
            cut = [layer for layer in layers if not seen.by_layer[layer].requires_grad]
            if cut:
                raise UserError(_dead(cut, "no graph reaches them (re-entrant checkpointing around the hook)"))
            with discarded_gradients(model, keep_zeros=trainer.is_deepspeed_enabled) as largest:
                loss = values.mean() if number == 0 else values[0]
                trainer.backward_alone(loss if seen.zero is None else loss + seen.zero)
            if any(not bool(torch.isfinite(size)) for size in largest):
                raise UserError(_dead(chosen, "its gradient is not finite (a scale of nearly zero)"))
            if not any(bool(size > 0) for size in largest):
                cause = "no parameter trained at or below that layer" if number else "no parameter gets a gradient"
                raise UserError(_dead(chosen, cause))
    model.train(was_training)


def _dead(layers: list[int], cause: str) -> str:
    return (
        f"the penalty on layers {layers} does not work: {cause}; penalise layers at or above the first trained one, "
        "and check transformers (5.23 or newer) and gradient checkpointing"
    )


@contextmanager
def discarded_gradients(model: nn.Module, *, keep_zeros: bool) -> Iterator[list[Tensor]]:
    """Record the largest entry of each parameter gradient and pass zeros on, so that nothing is accumulated.

    A hook on the parameter sees the whole gradient before DDP or ZeRO do, at every ZeRO stage. DeepSpeed then stores
    zeros instead of the proof's gradient, so the first step adds to exact zeros. No counter of the engine moves.

    Args:
        model: the model in training.
        keep_zeros: True under DeepSpeed. Otherwise the zeros are freed at once, so that the proof does not raise the
            run's peak memory.

    Yields:
        The list of the largest absolute entries, filled during the backward pass.
    """
    largest: list[Tensor] = []

    def note(gradient: Tensor) -> Tensor:
        largest.append(gradient.detach().abs().max())
        return torch.zeros_like(gradient)

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_hook(note) for parameter in trained]
    if not keep_zeros:
        handles += [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()

"""Prove an intervention before it is used: the stream changes as intended, and the logits change.

Without this proof an intervention may fail silently: its hook may be on a module that never runs, on a module whose
hooks a compiled model ignores, or on a layer whose output nothing reads.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.hooks import at_stream
from ..models.layers import unwrap
from ..models.modes import evaluating
from .changes import Change
from .positions import Passes, passes


@dataclass(frozen=True)
class Probe:
    """The input of a model for the proof: input_ids [1, T], and attention_mask [1, T] or None."""

    input_ids: Tensor
    attention_mask: Tensor | None = None

    def on(self, device: torch.device) -> "Probe":
        mask = self.attention_mask
        return Probe(self.input_ids.to(device), None if mask is None else mask.to(device))

    def logits(self, model: nn.Module) -> Tensor:
        return model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False).logits.float()


_See = Callable[[int, Tensor], Tensor | None]


@torch.no_grad()
def prove(
    model: nn.Module, change: Change, layers: Sequence[int], layers_path: str | None, probe: Probe | None = None
) -> None:
    """Run a probe with and without the change at all its positions. Nothing stays installed afterwards.

    If the change is too small to show in the logits (a dose of 0, or a stream without a component in the subspace), a
    shift along its direction, as long as the stream's norm, must show instead.

    Args:
        probe: the input for the proof; None takes four tokens.

    Raises:
        UserError: a block that did not run, a stream that differs from the intended one, or unchanged logits.
    """
    if probe is None:
        probe = Probe(torch.arange(1, 5).remainder(unwrap(model).config.get_text_config().vocab_size)[None])
    # Offloaded weights are on no device until their module runs.
    devices = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    probe = probe.on(next(devices, torch.device("cpu")))
    with evaluating(model):
        clean = probe.logits(model)
        # Kernels that sum in a different order each time (mixtures of experts on a GPU) also change the logits.
        noise = float((probe.logits(model) - clean).abs().max())
        moved, visible = _changed(model, change, layers, layers_path, probe)
        if float((moved - clean).abs().max()) > noise:
            return
        if not visible:
            with at_stream(model, layers, lambda layer, hidden: _shifted(hidden, change.direction(layer)), layers_path):
                moved = probe.logits(model)
            if float((moved - clean).abs().max()) > noise:
                return
    raise UserError(
        f"the intervention on layers {list(layers)} of {type(unwrap(model)).__name__} changed the residual stream but "
        "the logits did not change: name the decoder blocks' path with --layers_path, or choose another direction (a "
        "norm may remove this one)"
    )


def _changed(
    model: nn.Module, change: Change, layers: Sequence[int], layers_path: str | None, probe: Probe
) -> tuple[Tensor, bool]:
    """Return the logits under the change, and whether it moved the stream by more than rounding errors do."""
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor]) -> _See:
        return lambda layer, hidden: into.update({layer: hidden})

    with ExitStack() as stack:
        followed: Passes = stack.enter_context(passes(model))

        def apply(layer: int, hidden: Tensor) -> Tensor:
            return change.apply(layer, hidden, followed.current)

        # A later hook gets the stream as the earlier hooks changed it.
        looks: list[_See] = [keep(before), apply, keep(after)]
        for look in looks:
            stack.enter_context(at_stream(model, layers, look, layers_path))
        logits, call = probe.logits(model), followed.current
    silent = sorted(set(layers) - set(after))
    if silent or call is None:
        raise UserError(
            f"hooks on layers {silent or list(layers)} of {type(unwrap(model)).__name__} did not run: pass the model "
            "as it was before torch.compile (or first set torch._dynamo.config.skip_nnmodule_hook_guards = False), or "
            "name the decoder blocks' path with --layers_path"
        )
    for layer in layers:
        # Autocast would measure with a lower precision than that of the change.
        with torch.autocast(before[layer].device.type, enabled=False):
            distance = change.missed(layer, before[layer], after[layer], call)
        missed = float(_relative(distance, before[layer], after[layer]))
        if not missed <= 16 * rounding(before[layer]):
            raise UserError(
                f"the intervention at layer {layer} missed the intended stream by {missed:.2g} of its norm: pass a "
                "finite basis or direction, and a model whose activations are finite"
            )
    steps = [(after[layer].float() - before[layer].float()).norm(dim=-1) for layer in layers]
    moves = [float(_relative(step, before[layer], after[layer])) for layer, step in zip(layers, steps, strict=True)]
    return logits, any(move > 32 * rounding(before[layer]) for layer, move in zip(layers, moves, strict=True))


def _relative(distance: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return the largest of the distances [B, T], in units of the larger norm of the two streams."""
    norm = torch.maximum(before.float().norm(dim=-1), after.float().norm(dim=-1))
    return (distance / norm.clamp_min(torch.finfo(torch.float32).tiny)).max()


def rounding(hidden: Tensor) -> float:
    """Return the relative precision of a stream and of sums over it."""
    precision = torch.finfo(hidden.dtype).eps
    # TensorFloat-32 products have a precision of ten bits.
    coarse = hidden.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return max(precision, 2.0**-10) if coarse else precision


def _shifted(hidden: Tensor, direction: Tensor) -> Tensor:
    fine = hidden.float()
    along = direction.to(hidden.device, torch.float32)
    return (fine + fine.norm(dim=-1, keepdim=True) * along / along.norm()).to(hidden.dtype)

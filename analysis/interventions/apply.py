"""The context managers that change a running model: ablate, steer, patch (see the package's docstring)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.hooks import at_stream
from ..models.layers import unwrap
from .changes import Ablation, ByLayer, Change, DonorStates, StatePatch, Steering
from .positions import Positions, check_positions, chosen, passes
from .proof import Probe, prove

_ORTHONORMAL = 1e-4
UNITS = ("norm", "absolute")


@contextmanager
def ablate(
    model: nn.Module,
    bases: Mapping[int, Tensor],
    *,
    dose: float = 1.0,
    toward: Mapping[int, Tensor] | None = None,
    positions: Positions = "all",
    layers_path: str | None = None,
) -> Iterator[None]:
    """Remove a share of the stream's component inside V_l: h - dose V Vᵀh (directional ablation, arXiv 2406.11717).

    Args:
        bases: orthonormal V_l [d, k] by layer.
        dose: 1 removes the component, 0.5 halves it, and more than 1 reverses it.
        toward: coordinates t_l [k] by layer (such as base's mean), for mean-ablation: h - dose V (Vᵀh - t).
        positions: the tokens that change (see the package).
        layers_path: dotted path of the decoder blocks; None finds them by shape.

    Raises:
        UserError: a layer that the model does not have, a basis of another width or not orthonormal, a dose that is not
            finite, or an intervention that has no effect.
    """
    check_positions(positions)
    _check_finite("dose", dose)
    check_bases(model, bases)
    if toward is not None:
        _check_toward(bases, toward)
    change = Ablation(ByLayer(bases), dose, None if toward is None else ByLayer(toward))
    prove(model, change, sorted(bases), layers_path)
    with _installed(model, change, sorted(bases), positions, layers_path):
        yield


@contextmanager
def steer(
    model: nn.Module,
    directions: Mapping[int, Tensor],
    alpha: float,
    *,
    unit: str = "norm",
    positions: Positions = "all",
    layers_path: str | None = None,
) -> Iterator[None]:
    """Add a direction to the stream: h + alpha s v, where v has unit length.

    Args:
        directions: v_l [d] by layer, of any length except zero.
        alpha: the length of the step; a negative alpha goes in the opposite direction.
        unit: the unit of alpha: "norm" is each token's ‖h‖ (s = ‖h‖), "absolute" is the stream's unit (s = 1).
        positions: the tokens that change (see the package).
        layers_path: dotted path of the decoder blocks; None finds them by shape.

    Raises:
        UserError: a layer that the model does not have, a direction of another width, zero or not finite, an alpha that
            is not finite, an unknown unit, or an intervention that has no effect.
    """
    check_positions(positions)
    _check_finite("alpha", alpha)
    if unit not in UNITS:
        raise UserError(f"steering unit {unit!r} is unknown: write one of {', '.join(UNITS)}")
    unit_length = {layer: _unit(model, layer, vector) for layer, vector in directions.items()}
    _check_not_empty(unit_length)
    change = Steering(ByLayer(unit_length), alpha, unit)
    prove(model, change, sorted(directions), layers_path)
    with _installed(model, change, sorted(directions), positions, layers_path):
        yield


@torch.no_grad()
def read_states(
    model: nn.Module,
    layers: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers_path: str | None = None,
) -> DonorStates:
    """Run a donor over a batch, in its current mode (train or eval), and return its states at the layers."""
    states: dict[int, Tensor] = {}
    with at_stream(model, layers, lambda layer, hidden: states.update({layer: hidden.detach()}), layers_path):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return DonorStates(input_ids, attention_mask, states)


@contextmanager
def patch_states(
    model: nn.Module,
    donor: DonorStates,
    bases: Mapping[int, Tensor] | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
    layers_path: str | None = None,
) -> Iterator[None]:
    """Replace the model's states by the donor's: whole, or only the coordinates inside V_l: h + V Vᵀ(h_donor - h).

    The model must read the same tokens as the donor, column by column (with left padding: padded alike). Columns after
    them, which `generate` adds, keep the model's state.

    Args:
        donor: the donor's states, from `read_states`.
        bases: orthonormal V_l [d, k] by layer; None patches whole states.
        layers: the layers to patch; None takes all layers of `bases`, or without bases all layers of the donor.
        positions: the tokens that change (see the package).
        layers_path: dotted path of the decoder blocks; None finds them by shape.

    Raises:
        UserError: layers that the model, the donor or the bases do not have, another width, other tokens, or an
            intervention that has no effect.
    """
    check_positions(positions)
    patched_layers = sorted(layers if layers is not None else bases if bases is not None else donor.states)
    for by_layer, name in ((donor.states, "the donor's states"), (bases, "the bases")):
        absent = [] if by_layer is None else sorted(set(patched_layers) - set(by_layer))
        if absent:
            raise UserError(f"{name} do not have layers {absent}: patch among {sorted(by_layer or ())}")
    if bases is not None:
        check_bases(model, {layer: bases[layer] for layer in patched_layers})
    for layer in patched_layers:
        _check_width(model, layer, donor.states[layer][0, 0])
    change = StatePatch(donor, None if bases is None else ByLayer(bases))
    probe = Probe(donor.input_ids[:1], None if donor.attention_mask is None else donor.attention_mask[:1])
    prove(model, change.of_first_row(), patched_layers, layers_path, probe)
    with _installed(model, change, patched_layers, positions, layers_path):
        yield


@contextmanager
def _installed(
    model: nn.Module,
    change: Change,
    layers: Sequence[int],
    positions: Positions,
    layers_path: str | None,
) -> Iterator[None]:
    """Install the change at the chosen positions."""
    _forget_compiled(model)
    with ExitStack() as stack:
        # A call that is compiled while the hooks are installed would keep them.
        stack.callback(_forget_compiled, model)
        followed = stack.enter_context(passes(model))

        def look(layer: int, hidden: Tensor) -> Tensor:
            mask = chosen(positions, followed.current, hidden)
            changed = change.apply(layer, hidden, followed.current)
            return changed if mask is None else torch.where(mask[..., None], changed, hidden)

        stack.enter_context(at_stream(model, layers, look, layers_path))
        yield


def _forget_compiled(model: nn.Module) -> None:
    """Make `generate` with a static cache compile again, because its compiled call contains the hooks of its time."""
    if vars(unwrap(model)).pop("_compiled_call", None) is not None:
        torch.compiler.reset()


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"{name} {value} is not finite: write a number")


def _check_not_empty(layers: Mapping[int, Tensor]) -> None:
    if not layers:
        raise UserError("an intervention needs at least one layer: pass a basis or a direction for a layer")


def check_bases(model: nn.Module, bases: Mapping[int, Tensor]) -> None:
    """Raise UserError for a basis that is not [d, k], has another width than the model, or is not orthonormal."""
    _check_not_empty(bases)
    for layer, basis in bases.items():
        if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
            raise UserError(f"the basis of layer {layer} has shape {tuple(basis.shape)}: pass [d, k], k of 1-d")
        _check_width(model, layer, basis)
        fine = basis.detach().double()
        off = float((fine.T @ fine - torch.eye(basis.shape[1], dtype=fine.dtype, device=fine.device)).abs().max())
        if not off <= _ORTHONORMAL:
            raise UserError(
                f"the basis of layer {layer} is not orthonormal (VᵀV is off by {off:.2g}): pass torch.linalg.qr(V)[0]"
            )


def _check_width(model: nn.Module, layer: int, vectors: Tensor) -> None:
    width = int(unwrap(model).config.get_text_config().hidden_size)
    if vectors.shape[0] != width:
        raise UserError(
            f"the vectors of layer {layer} have width {vectors.shape[0]} and the model has {width}: use vectors that "
            "were built from a model of this architecture"
        )


def _check_toward(bases: Mapping[int, Tensor], toward: Mapping[int, Tensor]) -> None:
    for layer, basis in bases.items():
        if layer not in toward or toward[layer].shape != basis.shape[1:] or not torch.isfinite(toward[layer]).all():
            raise UserError(
                f"mean-ablation needs {basis.shape[1]} finite coordinates for layer {layer}: pass the mean of Vᵀh there"
            )


def _unit(model: nn.Module, layer: int, vector: Tensor) -> Tensor:
    """Return a direction, scaled to unit length."""
    if vector.ndim != 1:
        raise UserError(f"the direction of layer {layer} has shape {tuple(vector.shape)}: pass [d]")
    _check_width(model, layer, vector)
    fine = vector.detach().double()
    if not (torch.isfinite(fine).all() and fine.norm() > 0):
        raise UserError(f"the direction of layer {layer} is zero or not finite: pass a finite, non-zero vector")
    return fine / fine.norm()

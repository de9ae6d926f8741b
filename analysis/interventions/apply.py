"""Ablate, steer and patch: the context managers that change a running model (see the package)."""

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
    """Take a share of the stream's component inside V_l away: h - dose V Vᵀh (arXiv 2406.11717, directional ablation).

    Args:
        bases: orthonormal V_l [d, k] by layer.
        dose: 1 removes the component, 0.5 halves it, beyond 1 it turns round.
        toward: coordinates t_l [k] by layer (base's mean, say), for mean-ablation: h - dose V (Vᵀh - t).

    Raises:
        UserError: a layer the model does not have, a basis of another width or not orthonormal, a dose that is not
            finite, or an intervention that does not take hold.
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
    """Add a direction to the stream: h + alpha s v, with v at unit length.

    Args:
        directions: v_l [d] by layer, of any length but zero.
        alpha: how far; negative goes the other way.
        unit: of alpha: "norm" is each token's own ‖h‖ (s = ‖h‖), "absolute" the stream's own unit (s = 1).

    Raises:
        UserError: a layer the model does not have, a direction of another width, zero or not finite, an alpha that is
            not finite, an unknown unit, or an intervention that does not take hold.
    """
    check_positions(positions)
    _check_finite("alpha", alpha)
    if unit not in UNITS:
        raise UserError(f"steering unit {unit!r} is unknown: write one of {', '.join(UNITS)}")
    unit_length = {layer: _unit(model, layer, vector) for layer, vector in directions.items()}
    _check_some(unit_length)
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
    """One pass of a donor over a batch, in the mode (train or eval) it is in."""
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
    """Put the donor's state in place of the model's: whole, or only its coordinates inside V_l: h + V Vᵀ(h_donor - h).

    The model must read the tokens the donor read, column by column (with left padding: padded alike). Columns beyond
    them, which `generate` adds, keep the model's own state.

    Args:
        bases: orthonormal V_l [d, k] by layer; None patches whole states.
        layers: None is all of `bases`, or without bases all that the donor holds.

    Raises:
        UserError: layers the model, the donor or the bases lack, another width, other tokens, or an intervention that
            does not take hold.
    """
    check_positions(positions)
    wanted = sorted(layers if layers is not None else bases if bases is not None else donor.states)
    for held, what in ((donor.states, "the donor's states"), (bases, "the bases")):
        absent = [] if held is None else sorted(set(wanted) - set(held))
        if absent:
            raise UserError(f"{what} hold no layers {absent}: patch among {sorted(held or ())}")
    if bases is not None:
        check_bases(model, {layer: bases[layer] for layer in wanted})
    for layer in wanted:
        _check_width(model, layer, donor.states[layer][0, 0])
    change = StatePatch(donor, None if bases is None else ByLayer(bases))
    probe = Probe(donor.input_ids[:1], None if donor.attention_mask is None else donor.attention_mask[:1])
    prove(model, change.of_first_row(), wanted, layers_path, probe)
    with _installed(model, change, wanted, positions, layers_path):
        yield


@contextmanager
def _installed(
    model: nn.Module,
    change: Change,
    layers: Sequence[int],
    positions: Positions,
    layers_path: str | None,
) -> Iterator[None]:
    """The change at the chosen positions."""
    _forget_compiled(model)
    with ExitStack() as stack:
        # A call compiled meanwhile would keep the hooks.
        stack.callback(_forget_compiled, model)
        seen = stack.enter_context(passes(model))

        def look(layer: int, hidden: Tensor) -> Tensor:
            mask = chosen(positions, seen.now, hidden)
            changed = change.apply(layer, hidden, seen.now)
            return changed if mask is None else torch.where(mask[..., None], changed, hidden)

        stack.enter_context(at_stream(model, layers, look, layers_path))
        yield


def _forget_compiled(model: nn.Module) -> None:
    """Let `generate` with a static cache compile anew: its compiled call knows the hooks of the time it was made."""
    if vars(unwrap(model)).pop("_compiled_call", None) is not None:
        torch.compiler.reset()


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"{name} {value} is not finite: write a number")


def _check_some(layers: Mapping[int, Tensor]) -> None:
    if not layers:
        raise UserError("an intervention needs at least one layer: pass a basis or direction for one")


def check_bases(model: nn.Module, bases: Mapping[int, Tensor]) -> None:
    """Raises UserError for a basis that is not [d, k], of another width than the model, or not orthonormal."""
    _check_some(bases)
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
            f"layer {layer} was given width {vectors.shape[0]} and the model has {width}: use what was built from a "
            "model of this architecture"
        )


def _check_toward(bases: Mapping[int, Tensor], toward: Mapping[int, Tensor]) -> None:
    for layer, basis in bases.items():
        if layer not in toward or toward[layer].shape != basis.shape[1:] or not torch.isfinite(toward[layer]).all():
            raise UserError(
                f"mean-ablation needs {basis.shape[1]} finite coordinates for layer {layer}: pass the mean of Vᵀh there"
            )


def _unit(model: nn.Module, layer: int, vector: Tensor) -> Tensor:
    """A direction at unit length."""
    if vector.ndim != 1:
        raise UserError(f"the direction of layer {layer} has shape {tuple(vector.shape)}: pass [d]")
    _check_width(model, layer, vector)
    fine = vector.detach().double()
    if not (torch.isfinite(fine).all() and fine.norm() > 0):
        raise UserError(f"the direction of layer {layer} is zero or not finite: pass one that points somewhere")
    return fine / fine.norm()

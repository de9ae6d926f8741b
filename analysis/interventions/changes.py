"""The changes that interventions make to the stream [B, T, d] of one layer, and a check of each change.

`missed` [B, T] is the distance of a changed stream from the intended one. It is computed in a different way than the
change itself, and the proof of an installed intervention compares it with the precision of the stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from .positions import ForwardPass


class Change(Protocol):
    """An intervention at one layer, for all tokens of a call."""

    def apply(self, layer: int, hidden: Tensor, call: ForwardPass | None) -> Tensor:
        """Return the changed stream [B, T, d], in the dtype of `hidden`."""
        ...

    def missed(self, layer: int, before: Tensor, after: Tensor, call: ForwardPass | None) -> Tensor:
        """Return the distance [B, T] of `after` from the stream that was intended."""
        ...

    def direction(self, layer: int) -> Tensor:
        """Return a direction [d] in which the change may move the stream."""
        ...


@dataclass(frozen=True)
class DonorStates:
    """What another model computed for a padded batch: states {l: [B, P, d]} for token ids [B, P].

    attention_mask: [B, P], or None.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    states: Mapping[int, Tensor]


@dataclass(frozen=True)
class ByLayer:
    """Tensors by layer, converted to the stream's device, and to the finer of the stream's precision and float32."""

    tensors: Mapping[int, Tensor]
    _ready: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def at(self, layer: int, hidden: Tensor) -> Tensor:
        key = (layer, hidden.device, torch.promote_types(hidden.dtype, torch.float32))
        if key not in self._ready:
            self._ready[key] = self.tensors[layer].detach().to(*key[1:])
        return self._ready[key]


def _finely(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


@dataclass(frozen=True)
class Ablation:
    """Removes a share (the dose) of the stream's component in the bases, or moves it towards given coordinates."""

    bases: ByLayer
    dose: float
    toward: ByLayer | None

    def apply(self, layer: int, hidden: Tensor, call: ForwardPass | None) -> Tensor:
        basis = self.bases.at(layer, hidden)
        # Autocast would round the coordinates to half precision, and so not remove all of the component.
        with torch.autocast(hidden.device.type, enabled=False):
            fine = _finely(hidden)
            coordinates = fine @ basis
            if self.toward is not None:
                coordinates = coordinates - self.toward.at(layer, hidden)
            return (fine - self.dose * (coordinates @ basis.T)).to(hidden.dtype)

    def missed(self, layer: int, before: Tensor, after: Tensor, call: ForwardPass | None) -> Tensor:
        basis = self.bases.at(layer, before)
        step, intended = _finely(after) - _finely(before), (1 - self.dose) * (_finely(before) @ basis)
        if self.toward is not None:
            intended = intended + self.dose * self.toward.at(layer, before)
        inside, outside = _finely(after) @ basis - intended, step - (step @ basis) @ basis.T
        return (inside.square().sum(-1) + outside.square().sum(-1)).sqrt()

    def direction(self, layer: int) -> Tensor:
        return self.bases.tensors[layer][:, 0]


@dataclass(frozen=True)
class Steering:
    """Adds a direction to the stream. unit: "norm" (alpha is a share of each token's norm) or "absolute"."""

    directions: ByLayer
    alpha: float
    unit: str

    def apply(self, layer: int, hidden: Tensor, call: ForwardPass | None) -> Tensor:
        fine, direction = _finely(hidden), self.directions.at(layer, hidden)
        size = fine.norm(dim=-1, keepdim=True) if self.unit == "norm" else 1.0
        return (fine + self.alpha * size * direction).to(hidden.dtype)

    def missed(self, layer: int, before: Tensor, after: Tensor, call: ForwardPass | None) -> Tensor:
        step, direction = _finely(after) - _finely(before), self.directions.at(layer, before)
        size = _finely(before).square().sum(-1, keepdim=True).sqrt() if self.unit == "norm" else 1.0
        return (step - self.alpha * size * direction).norm(dim=-1)

    def direction(self, layer: int) -> Tensor:
        return self.directions.tensors[layer]


@dataclass(frozen=True)
class StatePatch:
    """Replaces the stream by the donor's states, whole or only inside the bases."""

    donor: DonorStates
    bases: ByLayer | None

    def apply(self, layer: int, hidden: Tensor, call: ForwardPass | None) -> Tensor:
        patched = self._donor_states(layer, hidden, call)
        replaced, rest = hidden[:, : patched.shape[1]], hidden[:, patched.shape[1] :]
        if self.bases is not None:
            basis = self.bases.at(layer, hidden)
            with torch.autocast(hidden.device.type, enabled=False):
                fine = _finely(replaced)
                patched = fine + ((_finely(patched) - fine) @ basis) @ basis.T
        return torch.cat([patched.to(hidden.dtype), rest], dim=1)

    def missed(self, layer: int, before: Tensor, after: Tensor, call: ForwardPass | None) -> Tensor:
        error = _finely(after) - _finely(self._donor_states(layer, before, call))
        if self.bases is None:
            return error.norm(dim=-1)
        basis, step = self.bases.at(layer, before), _finely(after) - _finely(before)
        return ((error @ basis).square().sum(-1) + (step - (step @ basis) @ basis.T).square().sum(-1)).sqrt()

    def direction(self, layer: int) -> Tensor:
        if self.bases is not None:
            return self.bases.tensors[layer][:, 0]
        # A ramp, because a LayerNorm would remove a constant.
        return torch.linspace(-1, 1, self.donor.states[layer].shape[-1])

    def of_first_row(self) -> "StatePatch":
        """Return the patch for a batch that consists of the donor's first row."""
        mask = self.donor.attention_mask
        states = {layer: states[:1] for layer, states in self.donor.states.items()}
        donor = DonorStates(self.donor.input_ids[:1], None if mask is None else mask[:1], states)
        return replace(self, donor=donor)

    def _donor_states(self, layer: int, hidden: Tensor, call: ForwardPass | None) -> Tensor:
        """Return the donor's states [B, up to T, d] for the columns of this call.

        Raises:
            UserError: a call without token ids, or with other rows or tokens than the donor's.
        """
        if call is None or call.input_ids is None:
            raise UserError("patching needs the model's token ids: call it with input_ids, not with embeddings")
        ids = self.donor.input_ids[:, call.start : call.start + hidden.shape[1]]
        rows, columns = hidden.shape[0], ids.shape[1]
        if rows % len(ids):
            raise UserError(f"the donor read {len(ids)} rows and the model {rows}: patch the batch that the donor read")
        ids = ids.repeat_interleave(rows // len(ids), dim=0).to(call.input_ids.device)
        if not torch.equal(ids, call.input_ids[:, :columns]):
            row, column = (ids != call.input_ids[:, :columns]).nonzero()[0].tolist()
            raise UserError(
                f"the donor and the model read different tokens in row {row}, column {call.start + column}: give both "
                "the same token ids, padded alike"
            )
        states = self.donor.states[layer][:, call.start : call.start + columns]
        return states.repeat_interleave(rows // len(states), dim=0).to(hidden.device, hidden.dtype)

"""What the interventions do to the stream [B, T, d] of one layer, and how far a changed stream is from what was asked.

`missed` [B, T] is that distance, computed in another way than the change itself: the proof of an installed
intervention compares it with the precision of the stream.
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

    def apply(self, layer: int, hidden: Tensor, now: ForwardPass | None) -> Tensor:
        """The stream [B, T, d] to go on with, in the given one's dtype."""
        ...

    def missed(self, layer: int, before: Tensor, after: Tensor, now: ForwardPass | None) -> Tensor:
        """Distance [B, T] of `after` from what was asked."""
        ...

    def direction(self, layer: int) -> Tensor:
        """A direction [d] in which the change may move the stream."""
        ...


@dataclass(frozen=True)
class DonorStates:
    """What another model computed for a padded batch: states {l: [B, P, d]} for token ids [B, P]."""

    input_ids: Tensor
    attention_mask: Tensor | None
    states: Mapping[int, Tensor]


@dataclass(frozen=True)
class ByLayer:
    """Tensors by layer, on the stream's device and at its precision or float32, whichever is finer."""

    given: Mapping[int, Tensor]
    _ready: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def at(self, layer: int, hidden: Tensor) -> Tensor:
        key = (layer, hidden.device, torch.promote_types(hidden.dtype, torch.float32))
        if key not in self._ready:
            self._ready[key] = self.given[layer].detach().to(*key[1:])
        return self._ready[key]


def _finely(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


@dataclass(frozen=True)
class Ablation:
    bases: ByLayer
    dose: float
    toward: ByLayer | None

    def apply(self, layer: int, hidden: Tensor, now: ForwardPass | None) -> Tensor:
        basis = self.bases.at(layer, hidden)
        # Autocast would round the coordinates to half precision and leave a part of them behind.
        with torch.autocast(hidden.device.type, enabled=False):
            fine = _finely(hidden)
            coordinates = fine @ basis
            if self.toward is not None:
                coordinates = coordinates - self.toward.at(layer, hidden)
            return (fine - self.dose * (coordinates @ basis.T)).to(hidden.dtype)

    def missed(self, layer: int, before: Tensor, after: Tensor, now: ForwardPass | None) -> Tensor:
        basis = self.bases.at(layer, before)
        step, kept = _finely(after) - _finely(before), (1 - self.dose) * (_finely(before) @ basis)
        if self.toward is not None:
            kept = kept + self.dose * self.toward.at(layer, before)
        inside, outside = _finely(after) @ basis - kept, step - (step @ basis) @ basis.T
        return (inside.square().sum(-1) + outside.square().sum(-1)).sqrt()

    def direction(self, layer: int) -> Tensor:
        return self.bases.given[layer][:, 0]


@dataclass(frozen=True)
class Steering:
    directions: ByLayer
    alpha: float
    unit: str

    def apply(self, layer: int, hidden: Tensor, now: ForwardPass | None) -> Tensor:
        fine, direction = _finely(hidden), self.directions.at(layer, hidden)
        size = fine.norm(dim=-1, keepdim=True) if self.unit == "norm" else 1.0
        return (fine + self.alpha * size * direction).to(hidden.dtype)

    def missed(self, layer: int, before: Tensor, after: Tensor, now: ForwardPass | None) -> Tensor:
        step, direction = _finely(after) - _finely(before), self.directions.at(layer, before)
        size = _finely(before).square().sum(-1, keepdim=True).sqrt() if self.unit == "norm" else 1.0
        return (step - self.alpha * size * direction).norm(dim=-1)

    def direction(self, layer: int) -> Tensor:
        return self.directions.given[layer]


@dataclass(frozen=True)
class StatePatch:
    donor: DonorStates
    bases: ByLayer | None

    def apply(self, layer: int, hidden: Tensor, now: ForwardPass | None) -> Tensor:
        theirs = self._foreign(layer, hidden, now)
        own, rest = hidden[:, : theirs.shape[1]], hidden[:, theirs.shape[1] :]
        if self.bases is not None:
            basis = self.bases.at(layer, hidden)
            with torch.autocast(hidden.device.type, enabled=False):
                fine = _finely(own)
                theirs = fine + ((_finely(theirs) - fine) @ basis) @ basis.T
        return torch.cat([theirs.to(hidden.dtype), rest], dim=1)

    def missed(self, layer: int, before: Tensor, after: Tensor, now: ForwardPass | None) -> Tensor:
        theirs = _finely(self._foreign(layer, before, now))
        off = _finely(after) - theirs
        if self.bases is None:
            return off.norm(dim=-1)
        basis, step = self.bases.at(layer, before), _finely(after) - _finely(before)
        return ((off @ basis).square().sum(-1) + (step - (step @ basis) @ basis.T).square().sum(-1)).sqrt()

    def direction(self, layer: int) -> Tensor:
        if self.bases is not None:
            return self.bases.given[layer][:, 0]
        # A ramp: a constant would be removed by a LayerNorm.
        return torch.linspace(-1, 1, self.donor.states[layer].shape[-1])

    def of_first_row(self) -> "StatePatch":
        """The same for a batch of the donor's first row alone."""
        mask = self.donor.attention_mask
        states = {layer: states[:1] for layer, states in self.donor.states.items()}
        donor = DonorStates(self.donor.input_ids[:1], None if mask is None else mask[:1], states)
        return replace(self, donor=donor)

    def _foreign(self, layer: int, hidden: Tensor, now: ForwardPass | None) -> Tensor:
        """The donor's states [B, up to T, d] for the columns of this call."""
        if now is None or now.input_ids is None:
            raise UserError("patching needs the model's token ids: call it with input_ids, not with embeddings")
        ids = self.donor.input_ids[:, now.start : now.start + hidden.shape[1]]
        rows, held = hidden.shape[0], ids.shape[1]
        if rows % len(ids):
            raise UserError(f"the donor read {len(ids)} rows and the model {rows}: patch the batch the donor read")
        ids = ids.repeat_interleave(rows // len(ids), dim=0).to(now.input_ids.device)
        if not torch.equal(ids, now.input_ids[:, :held]):
            row, column = (ids != now.input_ids[:, :held]).nonzero()[0].tolist()
            raise UserError(
                f"the donor read another token than the model in row {row}, column {now.start + column}: give both the "
                "same token ids, padded alike"
            )
        states = self.donor.states[layer][:, now.start : now.start + held]
        return states.repeat_interleave(rows // len(states), dim=0).to(hidden.device, hidden.dtype)

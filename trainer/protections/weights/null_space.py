"""Confine LoRA to the null space of the anchors' inputs (after GuardSpace, arXiv 2510.14301, in another form).

For each adapted linear module, C = Σ x xᵀ over the module's inputs x at the anchors' tokens in the starting model. Q
are the top eigenvectors of C that hold a given share of its trace. A ← A(I - QQᵀ) before the first step and after each
step, so the adapter does nothing along the anchors' principal inputs. The saved adapter is a plain adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ....analysis.errors import UserError
from ....analysis.files.artifacts import digest_of
from ....analysis.models.forward import Batch
from ....analysis.models.modes import starting_model
from ...data.documents import PENALTY_MASK, Document, DocumentStore
from ..base import Protection
from ..host import Host
from .input_moments import AdaptedModule, Moments, adapted_layers, principal, readers_of_one_input, second_moments

# Most numbers of all C that are held at once: 4 GiB in float32. A larger model reads its anchors several times.
_MOST_NUMBERS = 1 << 30
# What counts as zero, as a share of A's norm, unless the dtype of A is coarser (about the precision of TF32).
_ZERO = 1e-3


@dataclass(frozen=True)
class ConfinedAdapter:
    """LoRA's A [r, d_in] of one module, and the directions Q [d_in, k] that A is kept out of."""

    module: str
    weight: nn.Parameter
    basis: Tensor

    @property
    def zero(self) -> float:
        """Return what counts as zero, as a share of A's norm."""
        return max(_ZERO, 4 * torch.finfo(self.weight.dtype).eps)


class NullSpaceProtection(Protection):
    """Keep LoRA away from the principal inputs that the anchors give to each adapted module.

    Args:
        energy: share of the trace of C that Q holds, in 0..1. At 0 nothing is confined and the protection is inactive.
            At 1 the adapter only acts on directions that the anchors' inputs never reach.
        role: role of the anchors' tokens that count.
        anchors: the anchor rows, with the role's mask.
        batch_size: anchor rows per forward pass and process.

    Raises:
        UserError: anchors without a token of the role.
    """

    def __init__(self, energy: float, role: str, anchors: Sequence[Document], batch_size: int = 4) -> None:
        self.name, self.active = "null_space", energy > 0
        self.energy, self.role, self.batch_size = energy, role, batch_size
        self.anchors = DocumentStore(anchors)
        if not self.anchors.mask.any():
            raise UserError(f"null_space: no anchor has a token of role {role!r}; name others with --anchor_dataset")
        self.confined: list[ConfinedAdapter] = []

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        if self.confined:
            return
        trainer.refuse_unsupported(task=False)
        if is_deepspeed_zero3_enabled() or trainer.accelerator.distributed_type == DistributedType.FSDP:
            raise UserError(
                "null_space changes whole matrices of LoRA, which ZeRO-3 and FSDP shard: use zero2, or subspace instead"
            )
        layers = adapted_layers(model)
        bases = self._bases(trainer, model, layers)
        self.confined = [
            ConfinedAdapter(name, weight, bases[name].to(weight.device))
            for name, layer in layers.items()
            for weight in layer.weights
        ]

    @torch.no_grad()
    def start(self, trainer: Host, model: nn.Module) -> None:
        """Confine every A, after a check for all of them that the confined A lies outside Q and is not zero.

        Raises:
            UserError: a confined A that is zero, or still inside Q by more than rounding.
        """
        changes: list[tuple[ConfinedAdapter, Tensor]] = []
        for adapter in self.confined:
            before = _read(trainer, adapter.weight)
            size = adapter.zero * float(before.norm())
            # The A of a resumed run is confined already. Confining it again would change its last bits.
            if _inside(before, adapter.basis) <= size:
                continue
            after = complement(before, adapter.basis)
            if float(after.norm()) <= size:
                raise UserError(
                    f"null_space leaves {adapter.module} nothing to learn from: the anchors' inputs fill its "
                    f"{len(adapter.basis)} directions at --null_space_energy {self.energy}; lower it"
                )
            if not _inside(after.to(adapter.weight.dtype), adapter.basis) <= size:
                raise UserError(f"null_space: LoRA's A of {adapter.module} stays inside Q; train in a finer --dtype")
            changes.append((adapter, after))
        for adapter, after in changes:
            _write(trainer, adapter.weight, after)

    @torch.no_grad()
    def end_step(self, trainer: Host, model: nn.Module) -> None:
        for adapter in self.confined:
            _write(trainer, adapter.weight, complement(_read(trainer, adapter.weight), adapter.basis))

    def facts(self) -> dict[str, Any]:
        anchors = digest_of({0: self.anchors.ids, 1: self.anchors.mask})
        return {"protection": self.name, "energy": self.energy, "role": self.role, "anchors": anchors}

    def _bases(self, trainer: Host, model: nn.Module, layers: Mapping[str, AdaptedModule]) -> dict[str, Tensor]:
        """Compute Q [d_in, k] by module. Modules that read the same input (q, k and v) share one tensor."""
        counts, lengths = self.anchors.counts, self.anchors.lengths
        numbers = sorted((number for number in self.anchors.order if counts[number]), key=lengths.__getitem__)
        batches = [numbers[first : first + self.batch_size] for first in range(0, len(numbers), self.batch_size)]
        own_batches = batches[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
        run = partial(self._run, trainer, model)
        readers = readers_of_one_input(layers, partial(run, batches[0]))
        bases: dict[str, Tensor] = {}
        for names in _groups({name: layers[name].weights[0].shape[1] for name in readers}):
            with second_moments({name: layers[name] for name in names}) as moments:
                for batch in own_batches:
                    run(batch, moments)
            for name in names:
                moment_dd = trainer.accelerator.reduce(moments.by_module.pop(name), "sum")
                basis_dk = principal(moment_dd, self.energy)
                if not basis_dk.shape[1]:
                    raise UserError(f"null_space: the anchors' inputs to {name} are zero; leave it out of the targets")
                bases |= dict.fromkeys(readers[name], basis_dk)
        return bases

    def _run(
        self,
        trainer: Host,
        model: nn.Module,
        numbers: Sequence[int],
        moments: Moments | None = None,
    ) -> None:
        batch: Batch = trainer.to_device(self.anchors.batch(numbers))
        if moments is not None:
            moments.mask_BT = batch[PENALTY_MASK]
        with starting_model(model), trainer.accelerator.autocast():
            trainer.run_blocks(model, batch)


def complement(weight_rd: Tensor, basis_dk: Tensor) -> Tensor:
    """Compute A(I - QQᵀ) [r, d], in float32 or better."""
    wide_rd = weight_rd.to(torch.promote_types(weight_rd.dtype, basis_dk.dtype))
    basis_dk = basis_dk.to(wide_rd.dtype)
    return wide_rd - (wide_rd @ basis_dk) @ basis_dk.T


def _inside(weight_rd: Tensor, basis_dk: Tensor) -> float:
    """Compute ‖A Q‖."""
    return float((weight_rd.to(basis_dk.dtype) @ basis_dk).norm())


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield groups of modules whose moments are held at the same time."""
    group: list[str] = []
    numbers = 0
    for name, width in widths.items():
        if group and numbers + width**2 > _MOST_NUMBERS:
            yield group
            group, numbers = [], 0
        group.append(name)
        numbers += width**2
    yield group


def _read(trainer: Host, weight: nn.Parameter) -> Tensor:
    """Return the weight that the optimiser holds: under ZeRO-1 and -2 its whole float32 master, on every rank."""
    if not trainer.is_deepspeed_enabled:
        return weight
    from deepspeed.utils import safe_get_full_fp32_param

    master: Tensor | None = safe_get_full_fp32_param(weight)
    return weight if master is None else master


def _write(trainer: Host, weight: nn.Parameter, value: Tensor) -> None:
    """Write the weight and, under DeepSpeed, its float32 master."""
    weight.copy_(value)
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(weight, value)

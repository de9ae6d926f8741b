"""What alignment did to the weights, module by module: Δ = W_instruct − W_base [d_out, d_in] and its main directions.

U [d_out, k] are Δ's first left singular vectors, so P = UUᵀ projects what a module puts out onto what alignment taught
it to put out. It is a true projector; AsFT's and SafeLoRA's matrix (arXiv 2506.08473, 2405.16833), ΔΔᵀ / ‖Δ‖, is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ....analysis.errors import UserError
from ....analysis.models.layers import unwrap
from ..host import Host
from .adapters import refuse_trained_beside

logger = logging.get_logger(__name__)

# Up to this many rows or columns the full decomposition takes well under a second.
_SMALL = 512
_ITERATIONS = 32
# Of the k-th singular value: how far an approximate pair of singular vectors may be from being one.
_TOLERANCE = 1e-4


def weight_of(linear: nn.Module) -> Tensor:
    """A linear module's weight as [d_out, d_in]; GPT-2's Conv1D holds it transposed."""
    assert isinstance(linear, nn.Linear | Conv1D)
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


@torch.no_grad()
def difference(instruct: nn.Module, base: nn.Module, name: str, device: torch.device | str | None = None) -> Tensor:
    """Δ [d_out, d_in] of two linear modules, in float32 or better, on `device` (None: where the instruct weight is).

    Base is rounded to the instruct weight's dtype first, so that what alignment left alone differs by exactly zero.

    Args:
        name: of the module, for the error.

    Raises:
        UserError: weights of different shapes.
    """
    ours, theirs = weight_of(instruct), weight_of(base)
    if ours.shape != theirs.shape:
        raise UserError(
            f"base and starting model differ in the shape of {name}: {list(theirs.shape)} and {list(ours.shape)}; name "
            "the base that the starting model was aligned from"
        )
    place = ours.device if device is None else torch.device(device)
    fine = torch.promote_types(ours.dtype, torch.float32)
    return ours.to(place, fine) - theirs.to(ours.dtype).to(place, fine)


@torch.no_grad()
def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values U [m, k], s [k], V [n, k] of a matrix [m, n].

    k is `rank`, or fewer where the matrix has no more singular values above its rounding (none, if it is zero).
    """
    rank = min(rank, *matrix.shape)
    found = _by_iteration(matrix, rank) if min(matrix.shape) > _SMALL else None
    if found is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = left[:, :rank], values[:rank], right[:rank].T
    kept = int((found[1] > found[1][0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    return found[0][:, :kept], found[1][:kept], found[2][:, :kept]


def _by_iteration(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Subspace iteration from a random start (arXiv 0909.4061, algorithm 4.4), or None where it has not converged.

    Not torch.svd_lowrank: that draws from the global random state, which training must find as it left it.
    """
    columns = min(2 * rank + 16, *matrix.shape)
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator, device=matrix.device, dtype=matrix.dtype)
    frame = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        frame = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ frame).Q).Q
    inner, values, right = torch.linalg.svd(frame.T @ matrix, full_matrices=False)
    left, values, right = (frame @ inner)[:, :rank], values[:rank], right[:rank].T
    missed = (matrix @ right - left * values).norm(dim=0)
    return (left, values, right) if bool((missed <= _TOLERANCE * values[-1]).all()) else None


@dataclass(frozen=True)
class AlignedAdapter:
    """One adapted module whose weights alignment changed: what the adapter adds is ΔW = scaling · B A.

    basis: U [d_out, k], orthonormal.
    """

    layer: LoraLayer
    adapter: str
    basis: Tensor

    @property
    def down(self) -> Tensor:
        """The parameter A [r, d_in]."""
        return cast(Tensor, self.layer.lora_A[self.adapter].weight)

    @property
    def up(self) -> Tensor:
        """The parameter B [d_out, r]."""
        return cast(Tensor, self.layer.lora_B[self.adapter].weight)

    @property
    def scaling(self) -> float:
        """LoRA's alpha / r, or alpha / √r."""
        return self.layer.scaling[self.adapter]

    def parts(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """‖P · scaling · B A‖² and ‖(I − P) · scaling · B A‖² of any A and B, without a matrix [d_out, d_in].

        With M either part of B, ‖M A‖² = tr(MᵀM AAᵀ).
        """
        fine = torch.promote_types(up.dtype, torch.float32)
        down, up, basis = down.to(fine), up.to(fine), self.basis.to(fine)
        inside = basis.T @ up
        outside, gram = up - basis @ inside, down @ down.T
        return (
            self.scaling**2 * ((inside.T @ inside) * gram).sum(),
            self.scaling**2 * ((outside.T @ outside) * gram).sum(),
        )


def aligned_adapters(
    name: str, trainer: Host, model: nn.Module, base_model: Callable[[], PreTrainedModel], rank: int
) -> list[AlignedAdapter]:
    """The adapted modules that alignment changed. All ranks call it; the main one reads base and shares what it found.

    Args:
        name: of the protection, for errors.
        base_model: loads the base model.
        rank: k.

    Raises:
        UserError: nothing to act on, or adapters whose matrices are not at hand as B and A.
    """
    trainer.refuse_unsupported(task=False)
    if is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled:
        raise UserError(f"{name} needs LoRA's whole matrices, which ZeRO-3 and FSDP shard; use --deepspeed zero2")
    layers = _adapted(name, model)
    found: list[Any] = [None, None]
    if trainer.accelerator.is_main_process:
        try:
            # Loading may draw random numbers, and training is to find its own.
            with torch.random.fork_rng(devices=[]):
                base = base_model()
            found[0] = _bases(name, layers, base, rank)
            del base
        except UserError as error:
            found[1] = str(error)
    bases, problem = broadcast_object_list(found)
    if problem is not None:
        raise UserError(problem)
    logger.info(f"holdfast: {name} acts on {len(bases)} of {len(layers)} adapted modules, those that alignment changed")
    chosen = {path: layer for path, layer in layers.items() if path in bases}
    return [
        AlignedAdapter(layer, layer.active_adapters[0], bases[path].to(weight_of(layer.get_base_layer()).device))
        for path, layer in chosen.items()
    ]


def _adapted(name: str, model: nn.Module) -> dict[str, LoraLayer]:
    """LoRA's modules by their path in the transformers model.

    Raises:
        UserError: none, one with another ΔW than s·BA, or a trained parameter beside them, which nothing projects.
    """
    layers = {path: module for path, module in unwrap(model).named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise UserError(f"{name} acts on LoRA's matrices and no module has any; add --use_peft, or choose another")
    for path, layer in layers.items():
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            kind = type(layer.get_base_layer()).__name__
            raise UserError(f"{name} acts on linear modules; {path} is a {kind}: leave it out of the adapter's targets")
        if len(layer.active_adapters) != 1 or layer.active_adapters[0] in layer.lora_variant:
            raise UserError(f"{name} acts on one plain LoRA adapter; {path} has several or DoRA: train a plain one")
    refuse_trained_beside(name, model)
    return layers


def _bases(name: str, layers: dict[str, LoraLayer], base: PreTrainedModel, rank: int) -> dict[str, Tensor]:
    """U of each module that differs, on the CPU; one Δ is held at a time."""
    bases = {}
    for path, layer in layers.items():
        try:
            there = base.get_submodule(path)
        except AttributeError:
            raise UserError(f"{name}: base has no module {path}; name the base of this starting model") from None
        delta = difference(layer.get_base_layer(), there, path)
        if delta.any():
            bases[path] = top_singular(delta, rank)[0].cpu()
    if not bases:
        raise UserError(
            f"{name}: base and starting model have the same weights in all {len(layers)} adapted modules, so there is "
            "no alignment to keep; name the model before alignment with --base_model_name_or_path"
        )
    return bases

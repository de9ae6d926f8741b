"""What alignment changed in the weights of each module: Δ = W_instruct − W_base [d_out, d_in] and its main directions.

U [d_out, k] are the first left singular vectors of Δ. So P = UUᵀ projects a module's output onto the outputs that
alignment changed. P is a true projector; the matrix ΔΔᵀ / ‖Δ‖ of AsFT and SafeLoRA (arXiv 2506.08473, 2405.16833) is
not.
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

# With up to this many rows or columns the full decomposition takes well under a second.
_SMALL = 512
_ITERATIONS = 32
# Largest residual of an approximate pair of singular vectors, as a share of the k-th singular value.
_TOLERANCE = 1e-4


def weight_of(linear: nn.Module) -> Tensor:
    """Return a linear module's weight as [d_out, d_in]. GPT-2's Conv1D holds it transposed."""
    assert isinstance(linear, nn.Linear | Conv1D)
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


@torch.no_grad()
def difference(instruct: nn.Module, base: nn.Module, name: str, device: torch.device | str | None = None) -> Tensor:
    """Compute Δ [d_out, d_in] of two linear modules, in float32 or better.

    The base weight is rounded to the instruct weight's dtype first, so that weights that alignment did not change
    differ by exactly zero.

    Args:
        instruct, base: the modules.
        name: name of the module, for the error.
        device: device of the result. None is the device of the instruct weight.

    Raises:
        UserError: weights of different shapes.
    """
    instruct_weight, base_weight = weight_of(instruct), weight_of(base)
    if instruct_weight.shape != base_weight.shape:
        raise UserError(
            f"base and starting model differ in the shape of {name}: {list(base_weight.shape)} and "
            f"{list(instruct_weight.shape)}; name the base that the starting model was aligned from"
        )
    place = instruct_weight.device if device is None else torch.device(device)
    dtype = torch.promote_types(instruct_weight.dtype, torch.float32)
    return instruct_weight.to(place, dtype) - base_weight.to(instruct_weight.dtype).to(place, dtype)


@torch.no_grad()
def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the first singular vectors and values U [m, k], s [k], V [n, k] of a matrix [m, n].

    k is `rank`, or less if the matrix has fewer singular values above its rounding (0 if the matrix is zero).
    """
    rank = min(rank, *matrix.shape)
    factors = _by_iteration(matrix, rank) if min(matrix.shape) > _SMALL else None
    if factors is None:
        all_left, all_values, all_right = torch.linalg.svd(matrix, full_matrices=False)
        factors = all_left[:, :rank], all_values[:rank], all_right[:rank].T
    left, values, right = factors
    count = int((values > values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    return left[:, :count], values[:count], right[:, :count]


def _by_iteration(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run subspace iteration from a random start (arXiv 0909.4061, algorithm 4.4); None if it has not converged.

    torch.svd_lowrank is not used, because it draws from the global random state, which must not change here.
    """
    columns = min(2 * rank + 16, *matrix.shape)
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator, device=matrix.device, dtype=matrix.dtype)
    frame = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        frame = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ frame).Q).Q
    inner, values, right = torch.linalg.svd(frame.T @ matrix, full_matrices=False)
    left, values, right = (frame @ inner)[:, :rank], values[:rank], right[:rank].T
    residuals = (matrix @ right - left * values).norm(dim=0)
    return (left, values, right) if bool((residuals <= _TOLERANCE * values[-1]).all()) else None


@dataclass(frozen=True)
class AlignedAdapter:
    """An adapted module whose weights alignment changed. The adapter adds ΔW = scaling · B A.

    Attributes:
        layer: the module with LoRA.
        adapter: name of the adapter.
        basis: U [d_out, k], orthonormal.
    """

    layer: LoraLayer
    adapter: str
    basis: Tensor

    @property
    def down(self) -> Tensor:
        """Return the parameter A [r, d_in]."""
        return cast(Tensor, self.layer.lora_A[self.adapter].weight)

    @property
    def up(self) -> Tensor:
        """Return the parameter B [d_out, r]."""
        return cast(Tensor, self.layer.lora_B[self.adapter].weight)

    @property
    def scaling(self) -> float:
        """Return LoRA's scaling: alpha / r, or alpha / √r."""
        return self.layer.scaling[self.adapter]

    def parts(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ‖P · scaling · B A‖² and ‖(I − P) · scaling · B A‖² of any A and B.

        No matrix [d_out, d_in] is formed: for a matrix M, here P B or (I − P) B, ‖M A‖² = tr(MᵀM AAᵀ).

        Args:
            down: A [r, d_in].
            up: B [d_out, r].
        """
        dtype = torch.promote_types(up.dtype, torch.float32)
        down, up, basis = down.to(dtype), up.to(dtype), self.basis.to(dtype)
        inside = basis.T @ up
        outside, gram = up - basis @ inside, down @ down.T
        return (
            self.scaling**2 * ((inside.T @ inside) * gram).sum(),
            self.scaling**2 * ((outside.T @ outside) * gram).sum(),
        )


def aligned_adapters(
    name: str, trainer: Host, model: nn.Module, base_model: Callable[[], PreTrainedModel], rank: int
) -> list[AlignedAdapter]:
    """Return the adapted modules that alignment changed.

    All ranks call this function. The main rank reads the base model and shares the directions.

    Args:
        name: name of the protection, for errors.
        trainer: the running trainer.
        model: the model in training.
        base_model: loads the base model.
        rank: directions per module.

    Raises:
        UserError: no adapted module that alignment changed, or adapters whose whole matrices B and A are not available.
    """
    trainer.refuse_unsupported(task=False)
    if is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled:
        raise UserError(f"{name} needs LoRA's whole matrices, which ZeRO-3 and FSDP shard; use --deepspeed zero2")
    layers = _adapted(name, model)
    shared: list[Any] = [None, None]
    if trainer.accelerator.is_main_process:
        try:
            # Loading may draw random numbers, which must not change the random state of training.
            with torch.random.fork_rng(devices=[]):
                base = base_model()
            shared[0] = _bases(name, layers, base, rank)
            del base
        except UserError as error:
            shared[1] = str(error)
    bases, problem = broadcast_object_list(shared)
    if problem is not None:
        raise UserError(problem)
    logger.info(f"holdfast: {name} acts on {len(bases)} of {len(layers)} adapted modules, those that alignment changed")
    chosen = {path: layer for path, layer in layers.items() if path in bases}
    return [
        AlignedAdapter(layer, layer.active_adapters[0], bases[path].to(weight_of(layer.get_base_layer()).device))
        for path, layer in chosen.items()
    ]


def _adapted(name: str, model: nn.Module) -> dict[str, LoraLayer]:
    """Return the modules with LoRA by their path in the transformers model.

    Raises:
        UserError: no such module, a module whose ΔW is not scaling · B A, or a trained parameter besides LoRA's
            matrices, which nothing would project.
    """
    layers = {path: module for path, module in unwrap(model).named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise UserError(f"{name} acts on LoRA's matrices, and the model has none; add --use_peft, or choose another")
    for path, layer in layers.items():
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            kind = type(layer.get_base_layer()).__name__
            raise UserError(f"{name} acts on linear modules; {path} is a {kind}: leave it out of the adapter's targets")
        if len(layer.active_adapters) != 1 or layer.active_adapters[0] in layer.lora_variant:
            raise UserError(f"{name} acts on one plain LoRA adapter; {path} has several or DoRA: train a plain one")
    refuse_trained_beside(name, model)
    return layers


def _bases(name: str, layers: dict[str, LoraLayer], base: PreTrainedModel, rank: int) -> dict[str, Tensor]:
    """Compute U of each module that differs, on the CPU. Only one Δ is held at a time."""
    bases = {}
    for path, layer in layers.items():
        try:
            base_module = base.get_submodule(path)
        except AttributeError:
            raise UserError(f"{name}: base has no module {path}; name the base of this starting model") from None
        delta = difference(layer.get_base_layer(), base_module, path)
        if delta.any():
            bases[path] = top_singular(delta, rank)[0].cpu()
    if not bases:
        raise UserError(
            f"{name}: base and starting model have the same weights in all {len(layers)} adapted modules, so there is "
            "no alignment to keep; name the model before alignment with --base_model_name_or_path"
        )
    return bases

"""Penalise the part of adapters that lies outside what alignment changed (AsFT, arXiv 2506.08473).

    term = Σ over adapted modules ‖(I − P) · scaling · B A‖²_F

P = UUᵀ is the projector onto the first directions of the module's alignment difference. Inside these directions an
adapter moves without penalty. The matrix of the AsFT paper is no projector, and its term leaves out LoRA's scaling.
This protection reads no rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....analysis.errors import UserError
from ..base import Batch, Protection, Term
from ..host import Host
from .alignment_weights import AlignedAdapter, aligned_adapters


class AdapterDriftProtection(Protection):
    """loss = cross-entropy + strength × term. Modules that alignment did not change are not penalised.

    Args:
        strength: weight of the term, 0 or more. 0 is plain training.
        rank: directions per module.
        base_model: loads the base model.
    """

    name = "adapter_drift"

    def __init__(self, strength: float, rank: int, base_model: Callable[[], PreTrainedModel]) -> None:
        self.active = strength > 0
        self.strength, self.rank, self._base_model = strength, rank, base_model
        self._adapters: list[AlignedAdapter] = []
        self._micro_batches = 1
        self._sum: Tensor | None = None
        self._steps = 0

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        if self._adapters:
            return
        _refuse_reentrant(trainer)
        self._adapters = aligned_adapters(self.name, trainer, model, self._base_model, self.rank)

    def start(self, trainer: Host, model: nn.Module) -> None:
        """Require a gradient on every penalised matrix. At B = 0 there is none, so the proof uses a shifted B.

        Raises:
            UserError: a frozen adapter, or no module with a penalty.
        """
        alive = 0
        for adapter in self._adapters:
            down, up = adapter.down, adapter.up
            if not (down.requires_grad and up.requires_grad):
                raise UserError("adapter_drift: an adapter is frozen; train the adapters, or choose another protection")
            if adapter.basis.shape[0] == adapter.basis.shape[1]:
                continue
            generator = torch.Generator().manual_seed(0)
            step = torch.randn(up.shape, generator=generator).to(up.device, up.dtype)
            # Not through .grad, because DDP and DeepSpeed count what arrives there.
            gradients = torch.autograd.grad(adapter.parts(down, up + step)[1], (down, up))
            alive += all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)
        if not alive:
            raise UserError(
                f"adapter_drift penalises nothing: {self.rank} directions are all outputs of every adapted module; "
                "lower --alignment_rank"
            )

    def begin_step(self, trainer: Host, batches: Sequence[Batch]) -> None:
        self._micro_batches = len(batches)
        self._steps += 1

    @contextmanager
    def task_pass(self, trainer: Host, model: nn.Module, inputs: Batch) -> Iterator[Term]:
        yield lambda: self._term(trainer.accelerator.num_processes)

    def _term(self, ranks: int) -> Tensor:
        """Return this micro-batch's share of the term.

        The trainer sums over micro-batches and ranks, and all of them have the same weights.
        """
        total = torch.stack([adapter.parts(adapter.down, adapter.up)[1] for adapter in self._adapters]).sum()
        share = total.detach() / self._micro_batches
        self._sum = share if self._sum is None else self._sum + share
        return self.strength * total / (self._micro_batches * ranks)

    def logs(self, trainer: Host) -> dict[str, float]:
        if self._sum is None or not self._steps:
            return {}
        mean = float(self._sum) / self._steps
        self._sum, self._steps = None, 0
        return {"penalty": mean, "penalty_strength": self.strength}

    def facts(self) -> dict[str, Any]:
        return {"protection": self.name, "penalty_strength": self.strength, "alignment_rank": self.rank}


def _refuse_reentrant(trainer: Host) -> None:
    """Refuse re-entrant checkpointing with DDP or DeepSpeed.

    It runs separate backward passes, so an adapter's gradient would arrive in two parts.
    """
    arguments = trainer.args
    settings = arguments.gradient_checkpointing_kwargs or {}
    assert not isinstance(settings, str)  # TrainingArguments has parsed the JSON text
    reentrant = settings.get("use_reentrant", False)
    counts_gradients = trainer.accelerator.num_processes > 1 or trainer.is_deepspeed_enabled
    if arguments.gradient_checkpointing and reentrant and counts_gradients:
        raise UserError(
            "adapter_drift gives adapters a gradient beside the model's, which DDP and DeepSpeed refuse under "
            """re-entrant checkpointing; write --gradient_checkpointing_kwargs '{"use_reentrant": false}'"""
        )

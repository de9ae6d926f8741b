"""Gradient projection (SafeGrad, arXiv 2508.07172): no step of the task goes against what the anchors ask for.

g is the step's task gradient and s that of the anchors' loss, over all trained parameters. Where g·s < 0,
g ← g - (g·s / ‖s‖²) s. Then g ← g + weight · s. The loss is the cross-entropy of the anchors' answers or, as in the
paper, the KL divergence from the starting model on the anchors (`kl.py`), which needs no answers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.training_args import OptimizerNames

from ....analysis.errors import UserError
from ....analysis.files.artifacts import digest_of
from ....analysis.models.forward import Batch
from ....analysis.models.layers import find_backbone, unwrap
from ....analysis.models.lm_head import logits_of
from ...data.documents import PENALTY_MASK, AnchorOrder, Document, DocumentStore
from ..base import Protection
from ..drift.kl import KLProtection
from ..host import Host

# Logits made at a time: 64 MiB in float32.
_CHUNK = 1 << 24
# A divergence has no gradient at the starting model but for rounding.
_ROUNDING = 1e-6


class GradientProjectionProtection(Protection):
    """Take out of each optimiser step's gradient what would raise the loss on the anchors.

    Args:
        weight: how much of the anchors' own gradient is added, 0 or more.
        anchors: rows with the mask of their answers; those without one are left out. Not read beside a divergence.
        batch_size: anchor rows per acting step and process. every: acts on every n-th optimiser step.
        seed: of the anchors' order.
        divergence: the loss on its own anchors in place of the answers' cross-entropy.

    Raises:
        UserError: anchors without an answer.
    """

    def __init__(
        self, weight: float, anchors: Sequence[Document], *, batch_size: int = 4, every: int = 1, seed: int = 0,
        divergence: KLProtection | None = None,
    ) -> None:  # fmt: skip
        self.name, self.active = "gradient_projection", True
        self.weight, self.batch_size, self.every, self.seed = weight, batch_size, every, seed
        self._divergence = divergence
        self.anchors = _answered(anchors) if divergence is None else divergence.anchor_store
        self._order = AnchorOrder(len(self.anchors), seed)
        self._rows: list[int] = []
        self._cosines: list[float] = []

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        trainer.refuse_unsupported(task=False)
        if trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise UserError(
                "gradient_projection needs the step's whole gradient before the optimiser moves, which DeepSpeed and "
                "FSDP do not show: train without them, or choose a penalty such as kl"
            )
        if trainer.args.fp16:
            raise UserError("gradient_projection cannot read gradients that fp16 scales: write --bf16 true, or neither")
        if self._divergence is not None:
            self._divergence.prepare(trainer, model)

    def start(self, trainer: Host, model: nn.Module) -> None:
        """Require that the anchors have a gradient; that of a divergence is 0 here, and is proven by moving it."""
        if self._divergence is not None:
            self._divergence.start(trainer, model)
            return
        devices = [trainer.args.device.index or 0] if trainer.args.device.type == "cuda" else []
        was_training = model.training
        with torch.random.fork_rng(devices=devices):
            model.train()
            safe = self._safe_gradient(trainer, model, 0)
        model.train(was_training)
        size = _dot(safe, safe) ** 0.5
        if not 0 < size < float("inf"):
            raise UserError(
                f"gradient_projection: the gradient of the anchors' answers has norm {size}, on which nothing can be "
                "projected; train more parameters, or name other anchors"
            )

    def shape_gradient(self, trainer: Host, model: nn.Module) -> None:
        turn, waits = divmod(trainer.state.global_step, self.every)
        if waits:
            self._rows = []
            return
        trained = _trained(model)
        task = [parameter.grad for parameter in trained]
        if all(gradient is None for gradient in task):
            optim = OptimizerNames(trainer.args.optim).value
            raise UserError(f"gradient_projection finds no gradient: --optim {optim} has used it up; choose another")
        safe = self._safe_gradient(trainer, model, turn)
        factor, cosine = change(task, safe, self.weight, 0.0 if self._divergence is None else _ROUNDING)
        self._cosines.append(cosine)
        if factor == 0:
            return
        for parameter, own in zip(trained, safe, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(own, alpha=factor)
            else:
                parameter.grad = own.mul_(factor)

    def _safe_gradient(self, trainer: Host, model: nn.Module, turn: int) -> list[Tensor]:
        """By trained parameter, the gradient of the anchors' mean loss over all ranks' tokens; `.grad` stays as it is.

        The model inside DDP runs: no bucket waits for this backward pass. `autograd.grad` would leave `.grad` alone by
        itself, but re-entrant checkpointing refuses it.
        """
        size, world = self.batch_size, trainer.accelerator.num_processes
        drawn = [self.anchors.order[row] for row in self._order.at(turn * size * world, size * world)]
        first = trainer.accelerator.process_index * size
        self._rows = drawn[first : first + size]
        batch = trainer.to_device(self.anchors.batch(self._rows))
        trained = _trained(model)
        task = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        loss = self._loss(trainer, model, batch) / self.anchors.counted(drawn)
        if loss.requires_grad:
            loss.backward()
        safe: list[Tensor] = []
        for parameter, kept in zip(trained, task, strict=True):
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            safe.append(trainer.accelerator.reduce(own, "sum") if world > 1 else own)
            parameter.grad = kept
        return safe

    def _loss(self, trainer: Host, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the tokens that count.

        The divergence has its forward pass alone in the run's precision: what is left of it near the starting model, in
        bfloat16, is rounding.
        """
        if self._divergence is not None:
            return self._divergence.summed(trainer, model, batch)
        with trainer.accelerator.autocast():
            return answer_loss(model, batch)

    def separate_rows(self, *, whole_step: bool = False) -> list[str]:
        # Its pass comes after all others of a step: a loss that is not finite cannot be its own.
        return [self.anchors.sources[number] for number in self._rows] if whole_step else []

    def logs(self, trainer: Host) -> dict[str, float]:
        """Over the acting steps; all ranks have the same."""
        cosines, self._cosines = self._cosines, []
        if not cosines:
            return {}
        conflicts = sum(cosine < 0 for cosine in cosines)
        return {"gradient_conflict": conflicts / len(cosines), "gradient_cosine": sum(cosines) / len(cosines)}

    def facts(self) -> dict[str, Any]:
        return {
            "protection": self.name, "safe_gradient_weight": self.weight, "anchor_batch_size": self.batch_size,
            "anchor_every": self.every, "order_seed": self.seed,
            "anchors": digest_of({0: self.anchors.ids, 1: self.anchors.mask}),
            "loss": "cross_entropy" if self._divergence is None else self._divergence.name,
        }  # fmt: skip


def _answered(rows: Sequence[Document]) -> DocumentStore:
    """The rows with an answer. Nothing predicts a row's first token."""
    answered = [Document(row.input_ids, (False, *row.mask[1:]), row.source) for row in rows if any(row.mask[1:])]
    if not answered:
        raise UserError("gradient_projection reads the anchors' answers, and none has one; name rows with answers")
    return DocumentStore(answered)


def change(
    task: Sequence[Tensor | None], safe: Sequence[Tensor], weight: float, rounding: float = 0.0
) -> tuple[float, float]:
    """(c, cosine of g and s): g + c s is the gradient wanted. Where g·s is not a number, neither is c.

    Args:
        rounding: an s of at most this share of g's norm has no direction.
    """
    known = [own for own in task if own is not None]
    both = _dot(known, [other for own, other in zip(task, safe, strict=True) if own is not None])
    size, task_size = _dot(safe, safe), _dot(known, known)
    if math.sqrt(size) < rounding * math.sqrt(task_size):
        return weight, 0.0
    cosine = both / math.sqrt(size * task_size) if size and task_size else 0.0
    return weight if both >= 0 else weight - both / size, cosine


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the tokens that count, each predicted from those before it."""
    output = find_backbone(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    counts = batch[PENALTY_MASK][:, 1:]
    states_Nd, targets_N = output.last_hidden_state[:, :-1][counts], batch["input_ids"][:, 1:][counts]
    logits = logits_of(model)
    step = max(1, _CHUNK // unwrap(model).config.get_text_config().vocab_size)

    def summed(states: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(states), targets, reduction="sum")

    parts = [
        # The backward pass makes the logits again, so that no [N, V] is held.
        checkpoint(summed, states, targets, use_reentrant=False, preserve_rng_state=False)
        for states, targets in zip(states_Nd.split(step), targets_N.split(step), strict=True)
    ]
    return torch.stack(parts).sum()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Over all parameters, each in float32 or finer."""
    wide = [torch.promote_types(own.dtype, torch.float32) for own in left]
    products = [
        torch.dot(own.flatten().to(dtype), other.flatten().to(dtype))
        for own, other, dtype in zip(left, right, wide, strict=True)
    ]
    # One transfer for all of them.
    return sum(torch.stack([product.to(products[0].device) for product in products]).tolist()) if products else 0.0

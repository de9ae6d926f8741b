"""Gradient projection (SafeGrad, arXiv 2508.07172): no step of the task raises the loss on the anchors.

g is the step's task gradient and s is the gradient of the anchors' loss, both over all trained parameters. If g·s < 0,
g ← g - (g·s / ‖s‖²) s. Then g ← g + weight · s. The anchors' loss is the cross-entropy of their answers or, as in the
paper, the KL divergence from the starting model on the anchors (`drift/kl.py`), which needs no answers.
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

# Logits computed at a time: 64 MiB in float32.
_CHUNK = 1 << 24
# At the starting model the gradient of a divergence is rounding only.
_ROUNDING = 1e-6


class GradientProjectionProtection(Protection):
    """Remove from each optimiser step's gradient the part that would raise the loss on the anchors.

    Args:
        weight: weight of the anchors' gradient that is added, 0 or more.
        anchors: rows with the mask of their answers. Rows without an answer are left out. Not read with a divergence.
        batch_size: anchor rows per process in a step that reads anchors.
        every: acts on every n-th optimiser step.
        seed: seed of the anchors' order.
        divergence: replaces the answers' cross-entropy; it brings its anchors along.

    Raises:
        UserError: no anchor has an answer, and there is no divergence.
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
        """Require that the anchors have a gradient.

        The gradient of a divergence is 0 at the starting model, so the divergence is proven with a shifted reference.
        """
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
        turn, remainder = divmod(trainer.state.global_step, self.every)
        if remainder:
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
        for parameter, gradient in zip(trained, safe, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(gradient, alpha=factor)
            else:
                parameter.grad = gradient.mul_(factor)

    def _safe_gradient(self, trainer: Host, model: nn.Module, turn: int) -> list[Tensor]:
        """Compute, for each trained parameter, the gradient of the anchors' mean loss over all ranks' tokens.

        `.grad` stays as it is. The model inside DDP runs, so no bucket waits for this backward pass. `autograd.grad`
        would not touch `.grad`, but re-entrant checkpointing refuses it.
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
        for parameter, task_gradient in zip(trained, task, strict=True):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            safe.append(trainer.accelerator.reduce(gradient, "sum") if world > 1 else gradient)
            parameter.grad = task_gradient
        return safe

    def _loss(self, trainer: Host, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the anchors' loss, summed over the tokens that count.

        Of a divergence only the forward pass runs in the run's precision: near the starting model it is so small that
        in bfloat16 only rounding would remain.
        """
        if self._divergence is not None:
            return self._divergence.summed(trainer, model, batch)
        with trainer.accelerator.autocast():
            return answer_loss(model, batch)

    def separate_rows(self, *, whole_step: bool = False) -> list[str]:
        # This pass comes after all other passes of a step, so a loss that is not finite cannot come from it.
        return [self.anchors.sources[number] for number in self._rows] if whole_step else []

    def logs(self, trainer: Host) -> dict[str, float]:
        """Return the share of conflicts and the mean cosine, over the steps that read anchors; equal on all ranks."""
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
    """Return the rows with an answer. A row's first token does not count, because nothing predicts it.

    Raises:
        UserError: no row has an answer.
    """
    answered = [Document(row.input_ids, (False, *row.mask[1:]), row.source) for row in rows if any(row.mask[1:])]
    if not answered:
        raise UserError("gradient_projection reads the anchors' answers, and none has one; name rows with answers")
    return DocumentStore(answered)


def change(
    task: Sequence[Tensor | None], safe: Sequence[Tensor], weight: float, rounding: float = 0.0
) -> tuple[float, float]:
    """Return c and the cosine of g and s, so that g + c s is the changed gradient. If g·s is NaN, so is c.

    Args:
        task: g, by parameter; None where a parameter has no gradient.
        safe: s, by parameter.
        weight: weight of s that is added in any case.
        rounding: if the norm of s is less than this share of the norm of g, s is rounding and has no direction.
    """
    present = [gradient for gradient in task if gradient is not None]
    product = _dot(present, [s for g, s in zip(task, safe, strict=True) if g is not None])
    size, task_size = _dot(safe, safe), _dot(present, present)
    if math.sqrt(size) < rounding * math.sqrt(task_size):
        return weight, 0.0
    cosine = product / math.sqrt(size * task_size) if size and task_size else 0.0
    return weight if product >= 0 else weight - product / size, cosine


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the cross-entropy summed over the tokens that count, each predicted from the tokens before it."""
    output = find_backbone(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    counts = batch[PENALTY_MASK][:, 1:]
    states_Nd, targets_N = output.last_hidden_state[:, :-1][counts], batch["input_ids"][:, 1:][counts]
    logits = logits_of(model)
    step = max(1, _CHUNK // unwrap(model).config.get_text_config().vocab_size)

    def summed(states: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(states), targets, reduction="sum")

    parts = [
        # The backward pass computes the logits again, so that no [N, V] tensor is held.
        checkpoint(summed, states, targets, use_reentrant=False, preserve_rng_state=False)
        for states, targets in zip(states_Nd.split(step), targets_N.split(step), strict=True)
    ]
    return torch.stack(parts).sum()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Compute the dot product over all parameters, each in float32 or better."""
    dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in left]
    products = [
        torch.dot(one_side.flatten().to(dtype), other_side.flatten().to(dtype))
        for one_side, other_side, dtype in zip(left, right, dtypes, strict=True)
    ]
    # One transfer to the CPU for all products.
    return sum(torch.stack([product.to(products[0].device) for product in products]).tolist()) if products else 0.0

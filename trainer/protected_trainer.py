"""Add a protection to any `transformers.Trainer`: `class MyTrainer(ProtectedTrainerMixin, Trainer)`.

The mixin calls the hooks of the protection (`protections/base.py`) in each step; `compute_loss` adds the protection's
term to the cross-entropy. A loss or a gradient that is not finite stops the run.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTTrainer
from trl.models.utils import prepare_deepspeed

from ..analysis.errors import UserError
from ..analysis.models.forward import Batch, run_backbone, run_blocks
from .checkpoints import CheckpointMixin
from .data.documents import PENALTY_REFERENCE, Document, DocumentStore, names_in
from .protections.base import Protection
from .protections.none import NoProtection


class NonFiniteLoss(RuntimeError):
    """Loss, penalty or gradient became NaN or infinite; the message names step and rows. The optimiser has not moved.

    There is one exception, which the message states: DeepSpeed ZeRO 1 and 2 with `check_grad_overflow: false` in bf16
    take the step before the gradient's norm can be read.
    """


class ProtectedTrainerMixin(CheckpointMixin):
    """A mixin that gives a protection to any transformers.Trainer.

    Args:
        protection: the protection. None, or a protection that is not active (strength 0), leaves every step to the
            trainer underneath.
        documents: the training rows, so that they can be named when the run stops on a non-finite loss.
        args, kwargs: arguments of the trainer underneath. Its model must be the starting model when `train()` is
            called.
    """

    def __init__(
        self, *args: Any, protection: Protection | None = None, documents: Sequence[Document] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.protection = protection if protection is not None and protection.active else NoProtection()
        self._documents = documents
        self._task_loss: Tensor | None = None
        self._step_batches: list[Batch] = []
        self._logged_step = 0
        self.add_callback(_CallProtection(self))

    # The interface for protections (`protections/host.py`)

    def refuse_unsupported(self, *, task: bool) -> None:
        """Raise UserError for a setting under which the penalty would silently be another one."""
        if self.args.n_gpu > 1:
            raise UserError("several GPUs in one process (DataParallel) are not supported: launch with --num_processes")
        if task and self.get_sp_size() * self.get_cp_size() * self.get_tp_size() > 1:
            raise UserError("a penalty on task rows needs whole rows on each process: turn sequence parallelism off")

    def to_device(self, batch: Batch) -> Batch:
        """Return the batch with its tensors on this process's device."""
        return {k: v.to(self.args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def first_task_batch(self) -> Batch:
        """Return the first rows of the training set, collated as by the data loader, without moving a sampler."""
        assert self.train_dataset is not None
        rows = list(itertools.islice(iter(self.train_dataset), self.args.per_device_train_batch_size))
        self._set_signature_columns_if_needed()
        kept: list[str] = self._signature_columns or []
        columns = [name for name in rows[0] if name in kept or not self.args.remove_unused_columns]
        collate = self.protection.collator(self.data_collator)
        return collate([{name: row[name] for name in columns} for row in rows])

    def place_reference(self, model: nn.Module) -> nn.Module:
        """Move a frozen model to this process's device; under ZeRO-3 it is sharded like the trained model."""
        if is_deepspeed_zero3_enabled():
            return prepare_deepspeed(model, self.accelerator)
        return model.to(self.args.device)

    def run_blocks(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Run the model forward for its block outputs alone; return a zero to add to the loss, or None.

        DeepSpeed and FSDP must see every pass, so the wrapped model runs there; elsewhere its backbone runs without the
        head. If a parameter gets no gradient in a step's first backward pass, ZeRO-3 keeps its gradient of the last
        step and adds to it. So under ZeRO-3 the zero gives the parameters after the blocks a gradient of zero.
        """
        if self.accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            with self.accelerator.autocast():
                run_backbone(model, batch)
            return None
        if not is_deepspeed_zero3_enabled():
            run_blocks(model, batch)
            return None
        if not isinstance(self, SFTTrainer):
            return run_blocks(model, batch).logits.float().sum() * 0
        # ZeRO-3 also fetches weights in the order of earlier passes: every pass must go through TRL's fused LM head,
        # which gathers the head itself. All labels are ignored, so it scores nothing and its loss is zero.
        labels = torch.full_like(batch["input_ids"], -100)
        return run_blocks(model, {**batch, "labels": labels, "fused_lm_head": True}).loss

    def backward_alone(self, loss: Tensor) -> None:
        """Backpropagate without synchronising or stepping: more gradient for this optimiser step follows."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=False, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    # Overridden methods of the Trainer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. A checkpoint is resumed only if its manifest verifies (UserError otherwise)."""
        folder = self.verified_checkpoint(resume_from_checkpoint)
        if folder is not None:
            self.resume_state(folder)
        # The model still has its starting weights here: the Trainer loads a checkpoint's weights later. Under DeepSpeed
        # the model runs only inside an engine, which is not built yet.
        if not self.is_deepspeed_enabled:
            self.protection.prepare(self, cast(nn.Module, self.model))
        output = super().train(folder, *args, **kwargs)
        self.protection.finish(self, self.model_wrapped)
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Stop a run that resumes from its last checkpoint; the Trainer would make one step too many."""
        if 0 < self.args.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def start_protection(self) -> None:
        """Start the protection; called once model, optimiser and checkpoint are in place."""
        self._logged_step = self.state.global_step
        if self.is_deepspeed_enabled:
            self.protection.prepare(self, self.model_wrapped)
        self.protection.start(self, self.model_wrapped)

    def checkpoint_state(self) -> dict[str, Any]:
        return {"protection": self.protection.facts(), "protection_state": self.protection.state()}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        current = json.loads(json.dumps(self.protection.facts()))
        stored = state["protection"]
        # Another protection has other facts; its name tells most, so the name is compared first.
        for fact in sorted(current.keys() | stored.keys(), key=lambda fact: (fact != "protection", fact)):
            if current.get(fact) != stored.get(fact):
                raise UserError(
                    f"cannot resume: {fact} was {stored.get(fact)} in the checkpoint and is {current.get(fact)} now; "
                    "write it as it was, or start a new run"
                )
        self.protection.load_state(state.get("protection_state", {}))

    def get_train_dataloader(self) -> DataLoader:
        task_collator, self.data_collator = self.data_collator, self.protection.collator(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = task_collator

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_batches = samples
        if samples:
            self.protection.begin_step(self, samples)
        return samples, items

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        # Under DeepSpeed the Trainer rounds every float of a batch to the model's dtype; that error exceeds the drift.
        reference = inputs.get(PENALTY_REFERENCE)
        prepared: Batch = super()._prepare_inputs(inputs)
        return prepared if reference is None else {**prepared, PENALTY_REFERENCE: reference.to(self.args.device)}

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the cross-entropy plus the protection's term.

        A separate pass of the protection (on anchors) runs first, with its backward pass.
        """
        result: Any
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.protection.active:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._stop_if_not_finite(result[0] if return_outputs else result, inputs)
            return result
        separate = self.protection.separate_pass(self, model)
        with self.protection.task_pass(self, model, inputs) as term:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            task_term = term()
        loss = result[0] if return_outputs else result
        # Trainers that average over micro-batches divide the loss afterwards; the penalty is a sum over micro-batches.
        steps = 1 if self._loss_is_summed(num_items_in_batch) else self.current_gradient_accumulation_steps
        share = loss.detach() / steps
        self._task_loss = share if self._task_loss is None else self._task_loss + share
        scale = steps * self.accelerator.num_processes
        if task_term is not None:
            loss = loss + task_term * scale
        if separate is not None:
            # This part is backpropagated already and detached; it is added for the reported loss alone.
            loss = loss + separate * scale
        self._stop_if_not_finite(loss, inputs)
        return (loss, result[1]) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self.protection.shape_gradient(self, self.model_wrapped)
        return loss

    def _loss_is_summed(self, num_items_in_batch: Any) -> bool:
        """Return whether the loss is a sum over micro-batches, by the same rule as Trainer.training_step."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _stop_if_not_finite(self, loss: Tensor, inputs: Batch) -> None:
        """Stop all processes together, before the backward pass (which DeepSpeed fuses with the optimiser's step)."""
        non_finite = (~torch.isfinite(loss.detach())).float()
        if self.accelerator.num_processes > 1:
            non_finite = self.accelerator.reduce(non_finite, "sum")
        if not bool(non_finite):
            return
        rows: list[str] = []
        if not bool(torch.isfinite(loss.detach())):
            rows = names_in(inputs, DocumentStore(self._documents)) + self.protection.separate_rows()
        self._stop("loss or penalty", rows)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's norm; stop the run if it is not finite.

        The Trainer calls this on all ranks, right before the optimiser's step. DeepSpeed has made its step by then, but
        skips the step if the norm is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        # In fp16 an infinite gradient means that the loss scale is too large: the step is skipped and training goes on.
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            store = DocumentStore(self._documents)
            rows = [name for batch in self._step_batches for name in names_in(batch, store)]
            self._stop("gradient", rows + self.protection.separate_rows(whole_step=True))
        return norm

    def _stop(self, quantity: str, rows: list[str]) -> NoReturn:
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        late = (
            quantity == "gradient"
            and self.accelerator.distributed_type == DistributedType.DEEPSPEED
            and self.accelerator.deepspeed_engine_wrapped.engine.was_step_applied()
        )
        raise NonFiniteLoss(
            f"{quantity} is not finite at step {self.state.global_step + 1}, {'after' if late else 'before'} the "
            f"optimiser moved; rows: {', '.join(rows)}. Lower learning_rate or penalty_strength, or look at these rows"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.protection.active:
            logs.update(self._penalty_logs())
        super().log(logs, *args, **kwargs)

    def _penalty_logs(self) -> dict[str, float]:
        """Return the task loss and the protection's numbers, over the steps since the last log and all processes."""
        numbers = self.protection.logs(self)
        steps, self._logged_step = self.state.global_step - self._logged_step, self.state.global_step
        if self._task_loss is not None:
            numbers["task_loss"] = self.accelerator.reduce(self._task_loss, "mean").item() / steps
            self._task_loss = None
        return numbers


class _CallProtection(TrainerCallback):
    def __init__(self, trainer: ProtectedTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.start_protection()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.protection.end_step(self.trainer, self.trainer.model_wrapped)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.protection.replaced_weights():
            control.should_save = False

"""What a protection may ask of the trainer that runs it. Protections see this interface, never the trainer's class."""

from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ...analysis.models.forward import Batch


class Host(Protocol):
    """A running trainer, as protections see it; `protected_sft_trainer.ProtectedTrainerMixin` is one."""

    @property
    def args(self) -> TrainingArguments:
        """The training arguments: device, batch size, precision."""

    @property
    def accelerator(self) -> Accelerator:
        """Processes, precision and reductions over ranks."""

    @property
    def state(self) -> TrainerState:
        """The step that training has reached."""

    @property
    def control(self) -> TrainerControl:
        """Where a protection asks for training to stop or for a checkpoint to be saved."""

    @property
    def is_deepspeed_enabled(self) -> bool:
        """Whether DeepSpeed runs the optimiser."""

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether FSDP shards the model."""

    def refuse_unsupported(self, *, task: bool) -> None:
        """Raise UserError for a setting under which the penalty would silently be another one.

        Args:
            task: the protection acts on task rows.
        """

    def to_device(self, batch: Batch) -> Batch:
        """The batch with its tensors on this process's device."""

    def first_task_batch(self) -> Batch:
        """The first rows of the training set, collated as the data loader does; no sampler moves."""

    def place_reference(self, model: nn.Module) -> nn.Module:
        """A frozen model on this process's device, sharded like the trained model under ZeRO-3."""

    def run_blocks(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """A forward pass of the model for its block outputs alone; a zero to add to its loss, or None."""

    def backward_alone(self, loss: Tensor) -> None:
        """Backpropagate without synchronising or stepping: more gradient for this optimiser step follows."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Write numbers to the run's log."""

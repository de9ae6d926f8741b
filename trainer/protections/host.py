"""The interface through which a protection uses the trainer that runs it.

Protections depend on the Protocol `Host` and never import a trainer.
"""

from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ...analysis.models.forward import Batch


class Host(Protocol):
    """A running trainer, as protections see it. `trainer.protected_trainer.ProtectedTrainerMixin` implements it."""

    @property
    def args(self) -> TrainingArguments:
        """The training arguments, such as device, batch size and precision."""

    @property
    def accelerator(self) -> Accelerator:
        """Accelerate's view of processes and precision, with reductions over ranks."""

    @property
    def state(self) -> TrainerState:
        """The state of training, with the optimiser step that it has reached."""

    @property
    def control(self) -> TrainerControl:
        """Flags by which a protection asks the trainer to stop, log or save a checkpoint."""

    @property
    def is_deepspeed_enabled(self) -> bool:
        """Whether DeepSpeed runs the optimiser."""

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether FSDP shards the model."""

    def refuse_unsupported(self, *, task: bool) -> None:
        """Refuse settings that would silently change the penalty.

        Args:
            task: whether the protection acts on task rows.

        Raises:
            UserError: such a setting, and what to write instead.
        """

    def to_device(self, batch: Batch) -> Batch:
        """Return the batch with its tensors on this process's device."""

    def first_task_batch(self) -> Batch:
        """Return the first rows of the training set, collated as the data loader does. No sampler moves."""

    def place_reference(self, model: nn.Module) -> nn.Module:
        """Place a frozen model on this process's device; under ZeRO-3, shard it like the trained model."""

    def run_blocks(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Run a forward pass for the block outputs alone.

        Returns:
            A zero that must be added to a loss on these outputs, or None if no zero is needed.
        """

    def backward_alone(self, loss: Tensor) -> None:
        """Backpropagate without synchronising ranks or stepping; this optimiser step has more gradient to come."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Write numbers to the run's log."""

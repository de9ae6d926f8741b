"""The interface of a protection. A protection is one file with one class, which overrides only the hooks it needs.

The trainer calls the hooks in this order:

1. `prepare`, while the model is still the starting model (under DeepSpeed once its engine exists);
2. `start`, before the first step;
3. for every optimiser step: `begin_step`; for every micro-batch `separate_pass` and `task_pass`; then `shape_gradient`
   and, after the optimiser has moved, `end_step`;
4. `finish`, after the last step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .host import Host

Batch = dict[str, Any]
Collator = Callable[[list[Any]], Batch]
Term = Callable[[], Tensor | None]


class Protection:
    """The base class of all protections. As it stands it changes nothing, so training is plain.

    Attributes:
        name: the name in `protection: NAME`.
        active: False if the protection would change nothing; the trainer then leaves every step to TRL.
        goes_back: True if the protection keeps a copy of the weights and may restore it. Among joined protections it
            checks each step after all others have acted, and restores the copy before the others finish.
    """

    name = "none"
    active = False
    goes_back = False

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        """Read from the starting model what the protection needs."""

    def start(self, trainer: Host, model: nn.Module) -> None:
        """Prove that the protection reaches the parameters, and leave no trace in the run.

        Raises:
            UserError: it does not reach them.
        """

    def collator(self, inner: Collator) -> Collator:
        """Return a collator that adds to each task batch what `task_pass` needs."""
        return inner

    def begin_step(self, trainer: Host, batches: Sequence[Batch]) -> None:
        """See all micro-batches of an optimiser step, for example to count tokens over accumulation and ranks."""

    def separate_pass(self, trainer: Host, model: nn.Module) -> Tensor | None:
        """Run a forward and backward pass on the protection's rows, and return its loss, detached, or None."""
        return None

    @contextmanager
    def task_pass(self, trainer: Host, model: nn.Module, inputs: Batch) -> Iterator[Term]:
        """Surround the task's forward pass. The yielded function returns a term to add to the task's loss, or None.

        This method removes from `inputs` what `collator` added.
        """
        yield lambda: None

    def shape_gradient(self, trainer: Host, model: nn.Module) -> None:
        """Change the gradient of the whole optimiser step, in place, before it is clipped.

        The trainer does not call this under DeepSpeed, whose backward pass is fused with its step.
        """

    def end_step(self, trainer: Host, model: nn.Module) -> None:
        """Act after the optimiser has moved, before the step is logged, saved or evaluated."""

    def finish(self, trainer: Host, model: nn.Module) -> None:
        """Act after the last step, for example change the weights before they are saved as the final model."""

    def replaced_weights(self) -> bool:
        """Return whether the weights differ from the last step's; a checkpoint of them could not be resumed."""
        return False

    def separate_rows(self, *, whole_step: bool = False) -> list[str]:
        """Return the names of the rows that `separate_pass` read last, for the message that stops a run.

        Args:
            whole_step: return all rows of this optimiser step.
        """
        return []

    def logs(self, trainer: Host) -> dict[str, float]:
        """Return numbers since the last call, reduced over ranks. All ranks call this."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return what must not differ between a run and its resumption, as JSON values."""
        return {"protection": self.name}

    def state(self) -> dict[str, Any]:
        """Return what changes from step to step and must be kept in a checkpoint, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `state` when a run is resumed. The trainer calls this before `prepare`."""

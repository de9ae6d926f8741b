"""What every protection is to the trainer. One file per protection; each overrides only what it does.

Order of calls: `prepare` (the model is the starting model; under DeepSpeed once its engine exists), `start` (before the
first step), then per optimiser step `begin_step`, per micro-batch `separate_pass` and `task_pass`, then
`shape_gradient` and, once the optimiser has moved, `end_step`; after the last step `finish`.
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
    """Plain training: the base of all protections, each of which is measured in the same way.

    Attributes:
        name: as in `protection: NAME`.
        active: False where it would change nothing; the trainer then leaves every step to TRL.
        goes_back: True where it keeps a copy of the weights and may put it back. Joined with others it looks at a step
            after all of them, and puts the copy back before they finish.
    """

    name = "none"
    active = False
    goes_back = False

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        """Read what is needed from the starting model."""

    def start(self, trainer: Host, model: nn.Module) -> None:
        """Prove that the protection reaches the parameters (raise otherwise), leaving no trace in the run."""

    def collator(self, inner: Collator) -> Collator:
        """A collator that adds to each task batch what `task_pass` needs."""
        return inner

    def begin_step(self, trainer: Host, batches: Sequence[Batch]) -> None:
        """Look at all micro-batches of an optimiser step, e.g. to count tokens over accumulation and ranks."""

    def separate_pass(self, trainer: Host, model: nn.Module) -> Tensor | None:
        """A forward and backward pass on rows of the protection's own; its loss, detached, or None."""
        return None

    @contextmanager
    def task_pass(self, trainer: Host, model: nn.Module, inputs: Batch) -> Iterator[Term]:
        """Surround the task's forward pass; the yielded function then gives a term to add to its loss, or None.

        What `collator` added is taken out of `inputs` here.
        """
        yield lambda: None

    def shape_gradient(self, trainer: Host, model: nn.Module) -> None:
        """Change the gradient of the whole optimiser step, in place, before it is clipped. Not called under DeepSpeed,
        whose backward pass is fused with its step."""

    def end_step(self, trainer: Host, model: nn.Module) -> None:
        """The optimiser has moved: before the step is logged, saved or evaluated."""

    def finish(self, trainer: Host, model: nn.Module) -> None:
        """The last step is done: change the weights that are about to be saved as the final model."""

    def replaced_weights(self) -> bool:
        """Whether the weights are no longer those of the last step: a checkpoint of them could not be resumed."""
        return False

    def separate_rows(self, *, whole_step: bool = False) -> list[str]:
        """Names of the rows the last `separate_pass` read, or this step's all, for the message that stops a run."""
        return []

    def logs(self, trainer: Host) -> dict[str, float]:
        """Numbers since the last call, reduced over ranks (called on all of them)."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What must not differ between a run and its resumption, as JSON values."""
        return {"protection": self.name}

    def state(self) -> dict[str, Any]:
        """What changes from step to step and a checkpoint must keep, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take `state` back when a run is resumed; called before `prepare`."""

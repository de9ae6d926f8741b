"""Several protections that act together, each as it acts alone: `protection: steering+interleave`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ...analysis.errors import UserError
from .base import Batch, Collator, Protection, Term
from .drift.term import DriftProtection
from .host import Host
from .stream.hooked import HookedProtection


class Composed(Protection):
    """Protections that act one after the other, in the order given.

    Terms of the loss add up. Changes of the residual stream and of the gradient are applied in turn. A protection that
    may restore earlier weights (`goes_back`) acts last in each step, whatever the order, and first at the end. So it
    restores the weights as the others left them in that step, and does not undo what the others do at the end.

    Args:
        parts: protections with different names. Inactive ones do nothing.

    Raises:
        UserError: a penalty on task rows beside a protection that changes the residual stream of these rows.
    """

    def __init__(self, parts: Sequence[Protection]) -> None:
        self.parts = list(parts)
        self.name = "+".join(part.name for part in parts)
        self.active = any(part.active for part in parts)
        self._acting = sorted((part for part in parts if part.active), key=lambda part: part.goes_back)
        self._refuse_changed_rows()

    def _refuse_changed_rows(self) -> None:
        """Refuse a penalty in the task's forward pass that would count another part's change as drift and undo it."""
        changing = [part.name for part in self._acting if isinstance(part, HookedProtection)]
        reading = [
            part for part in self._acting if isinstance(part, DriftProtection) and "task" in part.settings.weights
        ]
        if changing and reading:
            raise UserError(
                f"{self.name}: {changing[0]} changes the residual stream of the task rows, and {reading[0].name} would "
                "penalise that change; write --penalty_inputs anchors"
            )

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        for part in self._acting:
            part.prepare(trainer, model)

    def start(self, trainer: Host, model: nn.Module) -> None:
        for part in self._acting:
            part.start(trainer, model)

    def collator(self, inner: Collator) -> Collator:
        for part in self._acting:
            inner = part.collator(inner)
        return inner

    def begin_step(self, trainer: Host, batches: Sequence[Batch]) -> None:
        for part in self._acting:
            part.begin_step(trainer, batches)

    def separate_pass(self, trainer: Host, model: nn.Module) -> Tensor | None:
        return _sum([part.separate_pass(trainer, model) for part in self._acting])

    @contextmanager
    def task_pass(self, trainer: Host, model: nn.Module, inputs: Batch) -> Iterator[Term]:
        with ExitStack() as stack:
            terms = [stack.enter_context(part.task_pass(trainer, model, inputs)) for part in self._acting]
            yield lambda: _sum([term() for term in terms])

    def shape_gradient(self, trainer: Host, model: nn.Module) -> None:
        for part in self._acting:
            part.shape_gradient(trainer, model)

    def end_step(self, trainer: Host, model: nn.Module) -> None:
        for part in self._acting:
            part.end_step(trainer, model)

    def finish(self, trainer: Host, model: nn.Module) -> None:
        for part in sorted(self._acting, key=lambda part: not part.goes_back):
            part.finish(trainer, model)

    def replaced_weights(self) -> bool:
        return any(part.replaced_weights() for part in self._acting)

    def separate_rows(self, *, whole_step: bool = False) -> list[str]:
        return [row for part in self._acting for row in part.separate_rows(whole_step=whole_step)]

    def logs(self, trainer: Host) -> dict[str, float]:
        return {name: number for part in self._acting for name, number in part.logs(trainer).items()}

    def facts(self) -> dict[str, Any]:
        parts = {f"{part.name}.{fact}": value for part in self._acting for fact, value in part.facts().items()}
        return {"protection": self.name, **parts}

    def state(self) -> dict[str, Any]:
        return {part.name: part.state() for part in self._acting}

    def load_state(self, state: dict[str, Any]) -> None:
        for part in self._acting:
            part.load_state(state.get(part.name, {}))


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None

"""Protections of the toy model, each with the rows and the subspace that several test files give it."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from holdfast.trainer.data.documents import Document
from holdfast.trainer.protections.base import Protection
from holdfast.trainer.protections.drift.prefix_anchor import PrefixAnchorProtection
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from holdfast.trainer.protections.steps.early_stop import EarlyStopProtection, Erosion
from holdfast.trainer.protections.weights.null_space import NullSpaceProtection
from holdfast.trainer.protections.weights.safe_lora import SafeLoraProtection
from toys.adapters import base_model
from toys.training import anchor_documents, task_documents, toy_subspace

PREFIX = task_documents()[0].input_ids[:5]
# The calls of one micro-batch, in order.
SEPARATE = ("separate_pass", "task_pass", "term", "task_pass over")


class Recording(Protection):
    """Notes every call, and does at each what it is given to do."""

    def __init__(self, calls: list[str], name: str = "recording", active: bool = True, **acts: Callable[..., Any]):
        self.name, self.active, self.calls, self.acts = name, active, calls, acts

    def note(self, what: str, *given: Any) -> Any:
        self.calls.append(what)
        return self.acts[what](*given) if what in self.acts else None

    def prepare(self, trainer, model) -> None:
        self.note("prepare", model)

    def start(self, trainer, model) -> None:
        self.note("start", model)

    def begin_step(self, trainer, batches) -> None:
        self.note(f"begin_step of {len(batches)}")

    def separate_pass(self, trainer, model):
        return self.note("separate_pass", model)

    @contextmanager
    def task_pass(self, trainer, model, inputs):
        self.note("task_pass")
        yield lambda: self.note("term", model)
        self.note("task_pass over")

    def shape_gradient(self, trainer, model) -> None:
        self.note("shape_gradient", model)

    def end_step(self, trainer, model) -> None:
        self.note("end_step", model)

    def finish(self, trainer, model) -> None:
        self.note("finish", model)


def early_stop(limit: float, every: int = 2, layers: tuple[int, ...] = (0, 2), **changes: Any) -> EarlyStopProtection:
    """Looks at the erosion of the anchors inside the toy subspace; `changes`: of its settings or its rows."""
    rows = {key: changes.pop(key) for key in ("reference_model", "cache_dir", "base") if key in changes}
    settings = PenaltySettings(anchor_batch_size=2, **changes)
    return EarlyStopProtection(
        Erosion(toy_subspace(layers), settings, anchors=anchor_documents(), **rows), limit, every
    )


def prefix_anchor(layers: Sequence[int] = (0, 2), **changes: Any) -> PrefixAnchorProtection:
    """Anchors the first five tokens that the toy rows begin with, at strength 3."""
    rows = {key: changes.pop(key) for key in ("reference_model", "cache_dir") if key in changes}
    settings = PenaltySettings(**{"strength": 3.0, **changes})
    return PrefixAnchorProtection(PREFIX, list(layers), settings, "toy", **rows)


def budgeted(budget: float | None, inputs: str = "both", **changes: Any) -> SubspaceProtection:
    """The subspace penalty with a budget, from strength 0.7."""
    cache = changes.pop("cache_dir", None)
    settings = PenaltySettings(
        **{"strength": 0.7, "inputs": inputs, "task_weight": 0.25, "anchor_batch_size": 4, "budget": budget, **changes}
    )
    return SubspaceProtection(
        toy_subspace(), settings, anchors=anchor_documents()[:4], task=task_documents(), cache_dir=cache
    )


def null_space(
    role: str = "all", energy: float = 0.9, anchors: Sequence[Document] | None = None, batch_size: int = 2
) -> NullSpaceProtection:
    """Confines LoRA to the null space of the toy anchors' inputs."""
    return NullSpaceProtection(energy, role, anchors or anchor_documents(role), batch_size)


def safe_lora(threshold: float, rank: int = 3, base: Callable[[], Any] = base_model) -> SafeLoraProtection:
    """Projects adapters after training onto what separates the toy model from its base."""
    return SafeLoraProtection(threshold, rank, base)

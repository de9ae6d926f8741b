"""The base class of all terms that penalise how far the model in training has drifted from the starting model.

loss = cross-entropy + strength x term. On task rows the term is read from the task's forward pass. On anchors it has a
separate forward and backward pass, whose activations are freed before the task's pass begins. A subclass defines what
is read from the model (`watcher`), and how that and the starting model's values give the term (`sums`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ....analysis.errors import UserError
from ....analysis.files.artifacts import digest_of
from ....analysis.models.modes import peft_model
from ...data.documents import PENALTY_MASK, PENALTY_REFERENCE, AligningCollator, AnchorOrder, Document, DocumentStore
from ..base import Batch, Collator, Protection, Term
from ..host import Host
from .budget import BudgetController
from .penalty import penalty, strength_at
from .proof import prove_alive
from .reference import AdapterOffReference, CachedReference, FrozenReference, Reference, ReferenceCache, choose_kind
from .settings import PenaltySettings
from .watch import Projections, Watcher

logger = logging.get_logger(__name__)


class DriftProtection(Protection):
    """The part of a drift term that is the same for all terms.

    Args:
        name: the name in `protection: NAME`.
        role: role of the tokens that count.
        layers: layers of the term; the log names one of them as `penalty_max_layer`.
        settings: see PenaltySettings.
        anchors: rows of the anchor set, with the role's mask.
        task: the training rows, with the role's mask. Without them (streamed data) the completion role is read from the
            labels, and the reference must be adapter_off or frozen.
        reference_model: a second copy of the starting model, for reference frozen.
        cache_dir: folder of the cached references. None keeps them in memory.

    Raises:
        UserError: settings that cannot work together.
    """

    def __init__(
        self, name: str, role: str, layers: list[int], settings: PenaltySettings, *, anchors: Sequence[Document] = (),
        task: Sequence[Document] = (), reference_model: PreTrainedModel | None = None, cache_dir: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.role, self.layers, self.settings = name, role, layers, settings
        self.active = settings.strength > 0
        uses = settings.weights
        if "anchors" in uses and not anchors:
            raise UserError(f"penalty inputs {settings.inputs} needs anchor rows: give anchor_dataset")
        self.anchors = DocumentStore(anchors) if "anchors" in uses else None
        self.task = DocumentStore(task) if "task" in uses and task else None
        self._reference_model, self._cache_dir = reference_model, cache_dir
        self._order = AnchorOrder(len(self.anchors.order), settings.order_seed) if self.anchors else None
        self._watcher: Watcher | None = None
        self._references: dict[str, Reference] = {}
        self._anchor_rows: list[int] = []
        self._tokens: dict[str, Tensor | int] = {}
        self._micro, self._strength = 0, settings.strength
        self._budget = None if settings.budget is None else BudgetController(settings.budget, settings.strength)
        self._anchor_batches: list[list[int]] = []
        self._sums_L: Tensor | None = None
        self._step_penalty: Tensor | None = None
        self._steps = 0

    # What a subclass defines

    def watcher(self, model: nn.Module) -> Watcher:
        """Return hooks that read values [L, B, T, k] from a forward pass of this model."""
        raise NotImplementedError

    def sums(self, values_LBTk: Tensor, reference_LBTk: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the term [L], summed over the tokens that count and not yet divided by their number."""
        raise NotImplementedError

    def shifted(self, values_LBTk: Tensor) -> Tensor:
        """Return a reference [L, B, T, k] so far from these values that the term is not 0, for the proof."""
        raise NotImplementedError

    def cache_facts(self) -> dict[str, Any]:
        """Return what cached references depend on besides the rows, as JSON values."""
        raise NotImplementedError

    def place(self, device: torch.device) -> None:
        """Move the tensors of the subclass to a device."""

    # Before training

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        if self._watcher is not None:
            return
        trainer.refuse_unsupported(task="task" in self.settings.weights)
        self._watcher = self.watcher(model)
        for part, store in (("task", self.task), ("anchors", self.anchors)):
            if part not in self.settings.weights:
                continue
            kind = choose_kind(
                self.settings.reference, documents_known=store is not None, peft=peft_model(model) is not None,
                frozen=self._reference_model is not None,
            )  # fmt: skip
            logger.info(f"holdfast: reference of the {part} rows is {kind}")
            rows = trainer.args.per_device_train_batch_size if part == "task" else self.settings.anchor_batch_size
            self._references[part] = self.reference(kind, trainer, model, store, rows)

    def reference(
        self, kind: str, trainer: Host, model: nn.Module, store: DocumentStore | None, rows: int
    ) -> Reference:
        """Return the source of the starting model's values. A cached reference fills `store.values`.

        Args:
            kind: cached, adapter_off or frozen.
            store: the rows, which a cached reference needs.
            rows: rows that a training step reads at once.
        """
        watcher = self._watcher
        assert watcher is not None
        if kind == "adapter_off":
            return AdapterOffReference(model, watcher, trainer.run_blocks)
        if kind == "frozen":
            assert self._reference_model is not None
            frozen = trainer.place_reference(self._reference_model)
            return FrozenReference(frozen, self.watcher(frozen), trainer.accelerator)
        assert store is not None
        cache = ReferenceCache(
            model, watcher, trainer.run_blocks, trainer.accelerator, facts=self.cache_facts(),
            folder=self._cache_dir, batch_size=rows,
            trained=peft_model(model) is None and trainer.state.global_step > 0,
        )  # fmt: skip
        cache.fill(store)
        return CachedReference()

    def start(self, trainer: Host, model: nn.Module) -> None:
        self.place(trainer.args.device)
        for part in self.settings.weights:
            batch = self._proof_batch(trainer, part)
            prove_alive(
                trainer, model, self.layers, partial(self._watch, trainer, model, batch),
                partial(self._shifted, mask_BT=batch[PENALTY_MASK]),
            )  # fmt: skip

    def _proof_batch(self, trainer: Host, part: str) -> Batch:
        if part == "task" or self.anchors is None:
            batch = trainer.first_task_batch()
            self._mask_from_labels(batch)
        else:
            # The document with the most tokens that count: another row may have no token of the role.
            numbers = sorted(range(len(self.anchors)), key=self.anchors.counts.__getitem__)[-1:]
            batch = self.anchors.batch(numbers)
        if not batch[PENALTY_MASK].any():
            raise UserError(f"the {part} rows have no token of role {self.role!r}: add some")
        return trainer.to_device(batch)

    def _watch(self, trainer: Host, model: nn.Module, batch: Batch) -> Projections:
        assert self._watcher is not None
        with self._watcher.watching() as seen:
            seen.zero = trainer.run_blocks(model, batch)
        return seen

    def _shifted(self, values_LBTk: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the term by layer [L] with a shifted reference."""
        return self.sums(values_LBTk, self.shifted(values_LBTk.detach()), mask_BT) / mask_BT.sum()

    # During training

    def collator(self, inner: Collator) -> Collator:
        return inner if self.task is None else AligningCollator(inner, self.task)

    def begin_step(self, trainer: Host, batches: Sequence[Batch]) -> None:
        step, settings = trainer.state.global_step, self.settings
        self._strength = strength_at(step, settings.strength, settings.warmup, settings.warmup_strength)
        if self._budget is not None:
            self._strength = self._budget.strength
        self._micro, self._tokens, self._step_penalty = 0, {}, None
        if "task" in settings.weights:
            for batch in batches:
                self._mask_from_labels(batch)
            local = torch.stack([batch[PENALTY_MASK].sum() for batch in batches]).sum().to(trainer.args.device)
            self._tokens["task"] = trainer.accelerator.reduce(local, "sum").clamp(min=1)
        if self.anchors is not None and step % settings.anchor_every == 0:
            self._draw_anchors(trainer, step // settings.anchor_every, len(batches))
        self._steps += bool(self._tokens)

    def _draw_anchors(self, trainer: Host, turn: int, micro_batches: int) -> None:
        """Draw the anchors of all ranks on every rank, so that their tokens are counted without communication."""
        assert self.anchors is not None and self._order is not None
        world, size = trainer.accelerator.num_processes, self.settings.anchor_batch_size
        first = turn * size * world * trainer.args.gradient_accumulation_steps
        drawn = [self.anchors.order[row] for row in self._order.at(first, size * world * micro_batches)]
        self._tokens["anchors"] = max(self.anchors.counted(drawn), 1)
        starts = range(trainer.accelerator.process_index * size, len(drawn), size * world)
        self._anchor_batches = [drawn[start : start + size] for start in starts]

    def separate_pass(self, trainer: Host, model: nn.Module) -> Tensor | None:
        if "anchors" not in self._tokens or self.anchors is None:
            return None
        self._anchor_rows = self._anchor_batches[self._micro]
        self._micro += 1
        batch = trainer.to_device(self.anchors.batch(self._anchor_rows))
        reference_LBTk = self._references["anchors"](batch)
        # Gradients stay on this rank until the task's backward pass, which synchronises both.
        with trainer.accelerator.no_sync(model):
            seen = self._watch(trainer, model, batch)
            term = self._term("anchors", seen.stacked(), reference_LBTk, batch[PENALTY_MASK])
            # Ranks' gradients are averaged, the penalty is a sum over ranks.
            loss = term * trainer.accelerator.num_processes
            trainer.backward_alone(loss if seen.zero is None else loss + seen.zero)
        return term.detach()

    @contextmanager
    def task_pass(self, trainer: Host, model: nn.Module, inputs: Batch) -> Iterator[Term]:
        if "task" not in self.settings.weights:
            yield lambda: None
            return
        assert self._watcher is not None
        mask_BT = inputs.pop(PENALTY_MASK)
        batch = {**inputs}
        inputs.pop(PENALTY_REFERENCE, None)
        reference_LBTk = self._references["task"](batch)
        with self._watcher.watching() as seen:
            yield lambda: self._term("task", seen.stacked(), reference_LBTk, mask_BT)

    def _term(self, part: str, values_LBTk: Tensor, reference_LBTk: Tensor, mask_BT: Tensor) -> Tensor:
        """Return strength x this micro-batch's share of the penalty, over the tokens of the whole optimiser step."""
        sums_L = self.sums(values_LBTk, reference_LBTk, mask_BT) * self.settings.weights[part]
        share_L = sums_L.detach() / self._tokens[part]
        self._sums_L = share_L if self._sums_L is None else self._sums_L + share_L
        if self._budget is not None:
            share = share_L.mean()
            self._step_penalty = share if self._step_penalty is None else self._step_penalty + share
        return self._strength * penalty(sums_L, self._tokens[part])

    def end_step(self, trainer: Host, model: nn.Module) -> None:
        """Update the strength from the step's penalty, which is the same number on all ranks, to hold the budget."""
        # A step that reads only some of the parts (anchor_every) does not give the whole penalty.
        if self._budget is None or self._step_penalty is None or len(self._tokens) < len(self.settings.weights):
            return
        self._budget.update(trainer.accelerator.reduce(self._step_penalty, "sum").item())

    def _mask_from_labels(self, batch: Batch) -> None:
        """Add the mask of the completions from the labels, if no document store gave the batch its mask."""
        if PENALTY_MASK in batch:
            return
        if self.role != "completion":
            raise UserError(
                f"the token role {self.role!r} cannot be read from labels: give the protection the task rows"
            )
        batch[PENALTY_MASK] = batch["labels"] != -100

    def separate_rows(self, *, whole_step: bool = False) -> list[str]:
        if self.anchors is None or "anchors" not in self._tokens:
            return []
        rows = [row for batch in self._anchor_batches for row in batch] if whole_step else self._anchor_rows
        return [self.anchors.sources[number] for number in rows]

    # Around training

    def logs(self, trainer: Host) -> dict[str, float]:
        if self._sums_L is None or not self._steps:
            return {}
        by_layer = (trainer.accelerator.reduce(self._sums_L, "sum") / self._steps).tolist()
        self._sums_L, self._steps = None, 0
        largest = max(range(len(by_layer)), key=by_layer.__getitem__)
        smoothed = {} if self._budget is None else {"penalty_smoothed": self._budget.smoothed}
        return {
            **smoothed,
            "penalty": sum(by_layer) / len(by_layer), "penalty_max": by_layer[largest],
            "penalty_max_layer": self.layers[largest], "penalty_strength": self._strength,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {} if self._budget is None else {"budget": self._budget.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._budget is not None and "budget" in state:
            self._budget.load_state(state["budget"])

    def facts(self) -> dict[str, Any]:
        stores = {"anchors": self.anchors, "task_rows": self.task}
        return {
            "protection": self.name, "layers": self.layers, "role": self.role,
            **{f"penalty_{k}": v for k, v in asdict(self.settings).items()},
            **{k: None if v is None else digest_of({0: v.ids, 1: v.mask}) for k, v in stores.items()},
        }  # fmt: skip

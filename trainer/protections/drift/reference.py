"""Sources of the starting model's projections Vᵀh^I: a cache, the model with its adapters off, or a frozen copy."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from ....analysis.errors import UserError
from ....analysis.files.artifacts import staged_directory, verify_manifest
from ....analysis.models.forward import MODEL_INPUTS, Batch, run_blocks
from ....analysis.models.modes import starting_model
from ...data.documents import PENALTY_REFERENCE, DocumentStore
from .watch import Watcher

logger = logging.get_logger(__name__)

REFERENCE_KINDS = ("auto", "cached", "adapter_off", "frozen")

RunBlocks = Callable[[nn.Module, Batch], Any]


def choose_kind(kind: str, *, documents_known: bool, peft: bool, frozen: bool) -> str:
    """Return the kind of reference to use. `auto` means cached if rows map back, else adapter_off, else frozen.

    Args:
        kind: the `--reference` flag.
        documents_known: whether rows map back to the documents whose values were cached.
        peft: whether the model has adapters.
        frozen: whether a second copy of the starting model is available.

    Raises:
        UserError: a kind that this run cannot have, and what to write instead.
    """
    if kind not in REFERENCE_KINDS:
        raise UserError(f"reference {kind!r} is unknown: write one of {', '.join(REFERENCE_KINDS)}")
    possible = {"cached": documents_known, "adapter_off": peft, "frozen": frozen}
    needs = {
        "cached": "cached needs the task rows (streamed or unknown rows do not map back): write adapter_off or frozen",
        "adapter_off": "adapter_off needs LoRA: write cached or frozen",
        "frozen": "frozen needs a second copy of the starting model (reference_model): write cached",
    }
    if kind != "auto":
        if not possible[kind]:
            raise UserError(f"reference {kind}: {needs[kind]}")
        return kind
    chosen = next((name for name, works in possible.items() if works), None)
    if chosen is None:
        raise UserError(f"reference auto finds no reference that works: {'; '.join(needs.values())}")
    if chosen != "cached":
        logger.warning(f"holdfast: reference auto is {chosen}, one more forward pass a step: rows do not map back")
    return chosen


class CachedReference:
    """Reads the values that the document store put into the batch."""

    def __call__(self, batch: Batch) -> Tensor:
        """[L, B, T, k]."""
        return batch[PENALTY_REFERENCE].permute(2, 0, 1, 3)


class AdapterOffReference:
    """Runs the same model with its adapters off: one more forward pass, without gradient."""

    def __init__(self, model: nn.Module, watcher: Watcher, run: RunBlocks) -> None:
        self.model, self.watcher, self.run = model, watcher, run

    def __call__(self, batch: Batch) -> Tensor:
        """[L, B, T, k]."""
        with starting_model(self.model), self.watcher.watching() as seen:
            self.run(self.model, batch)
        return seen.stacked()


class FrozenReference:
    """Runs a second copy of the starting model, which never trains."""

    def __init__(self, model: nn.Module, watcher: Watcher, accelerator: Accelerator) -> None:
        self.model, self.watcher, self.accelerator = model, watcher, accelerator
        # Two statements, because `eval()` of DeepSpeed's engine does not return the engine.
        model.eval()
        model.requires_grad_(False)

    def __call__(self, batch: Batch) -> Tensor:
        """[L, B, T, k]."""
        with torch.no_grad(), self.accelerator.autocast(), self.watcher.watching() as seen:
            run_blocks(self.model, batch)
        return seen.stacked()


Reference = CachedReference | AdapterOffReference | FrozenReference


class ReferenceCache:
    """Fills document stores with reference projections and keeps them on disk, named by what they depend on.

    Args:
        model: the model in training, at its starting weights (adapters are turned off).
        watcher: hooks on this model.
        run: runs the blocks of the model.
        accelerator: its processes share the documents.
        facts: what the values depend on besides the documents (subspace, starting model).
        folder: folder of the cache. None keeps the values in memory.
        trained: whether the weights have moved and cannot be turned back, so that only the disk has the values.
        batch_size: rows that a training step reads at once. No pass of the cache holds more tokens than this many rows
            of the longest length.
    """

    def __init__(
        self, model: nn.Module, watcher: Watcher, run: RunBlocks, accelerator: Accelerator, *,
        facts: dict[str, Any], folder: Path | None, trained: bool, batch_size: int,
    ) -> None:  # fmt: skip
        self.model, self.watcher, self.run, self.accelerator = model, watcher, run, accelerator
        self.facts, self.folder, self.trained, self.batch_size = facts, folder, trained, batch_size

    def fill(self, store: DocumentStore) -> None:
        """Set `store.values` [N, L, k] from disk, or compute and keep the values.

        Raises:
            UserError: the weights are no longer the starting weights, and there is no cache on disk.
        """
        with self._alone():
            self._fill(store)

    def _alone(self) -> AbstractContextManager[Any]:
        """Lock the folder, which the runs of a sweep share: the first run computes, the others wait and read."""
        if self.folder is None or self.accelerator.num_processes > 1:
            return nullcontext()
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock")

    def _fill(self, store: DocumentStore) -> None:
        path = None if self.folder is None else self.folder / f"reference-{self._name(store)}"
        if path is not None and path.is_dir() and self._load(path, store):
            return
        if self.trained:
            raise UserError(
                f"cached references are not in {self.folder} and the model has already trained: resume in the folder "
                "where the run began, or write reference frozen"
            )
        values = self._compute(store, _batches(store, self.batch_size))
        if path is not None:
            if self.accelerator.is_main_process:
                with staged_directory(path, replace=True) as staging:
                    save_file({"values": values}, staging / "reference.safetensors")
                    (staging / "facts.json").write_text(json.dumps(self.facts, indent=2))
            self.accelerator.wait_for_everyone()
            values = load_file(path / "reference.safetensors")["values"]
        store.values = values

    def _name(self, store: DocumentStore) -> str:
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        digest.update(store.ids.numpy().tobytes())
        digest.update(json.dumps(store.lengths).encode())
        return digest.hexdigest()[:16]

    def _load(self, path: Path, store: DocumentStore) -> bool:
        """Read a complete, unchanged cache, and return whether it belongs to this model.

        If the starting weights are available, one batch is computed again and compared.
        """
        verify_manifest(path)
        values = load_file(path / "reference.safetensors")["values"]
        if not self.trained:
            numbers = _batches(store, self.batch_size)[:1]
            recomputed = self._compute(store, numbers)
            rows = torch.cat([torch.arange(store.starts[n], store.starts[n] + store.lengths[n]) for n in numbers[0]])
            size = values[rows].square().mean().sqrt()
            # Half precision and other batch shapes move values by less than 1%; another model moves them by about their
            # size.
            if (recomputed[rows] - values[rows]).square().mean().sqrt() > 0.05 * size:
                logger.warning(f"holdfast: {path} belongs to another model and is computed again")
                return False
        store.values = values
        return True

    def _compute(self, store: DocumentStore, batches: list[list[int]]) -> Tensor:
        """Compute the values [N, L, k] of the documents in `batches`, zero elsewhere. Each process runs its share."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        values: Tensor | None = None
        for turn in range(-(-len(batches) // world)):
            # ZeRO-3 gathers weights in every pass, so all processes run equally many passes.
            share = min(turn * world + rank, len(batches) - 1)
            batch = store.batch(batches[share])
            inputs = {name: batch[name].to(self.accelerator.device) for name in MODEL_INPUTS if name in batch}
            # Autocast here: the Trainer casts the forward pass only later, when it prepares the model.
            with starting_model(self.model), self.accelerator.autocast(), self.watcher.watching() as seen:
                self.run(self.model, inputs)
            values_BTLk = seen.stacked().permute(1, 2, 0, 3).cpu()
            if values is None:
                values = values_BTLk.new_zeros(len(store.ids), *values_BTLk.shape[2:])
            if turn * world + rank < len(batches):
                for row, number in enumerate(batches[share]):
                    first, length = store.starts[number], store.lengths[number]
                    values[first : first + length] = values_BTLk[row, :length]
        assert values is not None
        return values if world == 1 else self._sum_over_processes(values)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        """Sum over processes, in blocks to bound memory. Each process has its own documents and zeros elsewhere."""
        for block in values.split(1 << 18):
            block.copy_(self.accelerator.reduce(block.to(self.accelerator.device), "sum"))
        return values


def _batches(store: DocumentStore, batch_size: int) -> list[list[int]]:
    """Group documents of similar length, to pad little, in batches of at most as many tokens as a training step has."""
    limit = batch_size * max(store.lengths)
    batches: list[list[int]] = [[]]
    for number in sorted(range(len(store)), key=lambda number: store.lengths[number]):
        if batches[-1] and (len(batches[-1]) + 1) * store.lengths[number] > limit:
            batches.append([])
        batches[-1].append(number)
    return batches

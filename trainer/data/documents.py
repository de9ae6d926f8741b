"""Find a batch's documents again by their token ids.

So role masks and cached references reach packed, truncated and shuffled rows alike. Token ids are the only way: TRL
drops every column except its own, so nothing else of a row survives to the batch.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...analysis.errors import UserError
from ...analysis.models.forward import Batch
from ...analysis.models.render import Rendered, document_key, role_mask

PENALTY_MASK = "penalty_mask"
PENALTY_REFERENCE = "penalty_reference"

Span = tuple[int, int, int]


@dataclass(frozen=True)
class Document:
    """One rendered row: its token ids, the mask of the tokens that count, and its place ("rows.jsonl:7")."""

    input_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    source: str


def documents_of(rendered: Sequence[Rendered], role: str, sources: Sequence[str] | None = None) -> list[Document]:
    """Return rendered rows with the mask of a token role. Without `sources` rows are named by number, from 1."""
    names = sources or [f"row {number}" for number in range(1, len(rendered) + 1)]
    return [
        Document(row.input_ids, tuple(role_mask(row, role)), name) for row, name in zip(rendered, names, strict=True)
    ]


def document_spans(batch: Batch) -> Iterator[Span]:
    """Yield (row, start, stop) of each document of a padded (attention_mask) or padding-free (position_ids) batch."""
    if "attention_mask" in batch:
        attention = batch["attention_mask"].cpu().bool().numpy()
        for row, start, length in zip(range(len(attention)), attention.argmax(1), attention.sum(1), strict=True):
            yield row, int(start), int(start + length)
    elif "position_ids" in batch:
        width = batch["position_ids"].shape[1]
        for row, positions in enumerate(batch["position_ids"].cpu()):
            starts = [*(positions == 0).nonzero().flatten().tolist(), width]
            yield from ((row, start, stop) for start, stop in itertools.pairwise(starts))
    else:
        for row in range(len(batch["input_ids"])):
            yield row, 0, batch["input_ids"].shape[1]


class DocumentStore:
    """Documents laid end to end and found by their token ids; a truncated document is found as a prefix.

    Attributes:
        ids, mask: [N] over all tokens of all distinct documents.
        values: [N, L, k] reference projections, or None.
        starts, lengths, sources: first token, number of tokens and place of each distinct document.
        order: for each document of the argument, the number of the distinct document that equals it.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.sources: list[str] = []
        self.order: list[int] = []
        self.values: Tensor | None = None
        self._numbers: dict[bytes, int] = {}
        self._prefixes: dict[int, dict[bytes, int]] = {}
        distinct: list[Document] = []
        for document in documents:
            key = _key(torch.tensor(document.input_ids))
            if key not in self._numbers:
                self._numbers[key] = len(distinct)
                distinct.append(document)
            self.order.append(self._numbers[key])
        total = 0
        for document in distinct:
            self.starts.append(total)
            self.lengths.append(len(document.input_ids))
            self.sources.append(document.source)
            total += len(document.input_ids)
        self.ids = torch.tensor([token for document in distinct for token in document.input_ids], dtype=torch.int64)
        self.mask = torch.tensor([counts for document in distinct for counts in document.mask], dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.starts)

    def find(self, input_ids: Tensor) -> int | None:
        """Return the number of the document that equals these ids [T] or starts with them, or None."""
        key, length = _key(input_ids), len(input_ids)
        number = self._numbers.get(key)
        if number is not None:
            return number
        if length not in self._prefixes:
            longer = [number for number, size in enumerate(self.lengths) if size > length]
            self._prefixes[length] = {
                _key(self.ids[self.starts[number] : self.starts[number] + length]): number for number in longer
            }
        return self._prefixes[length].get(key)

    def align(self, batch: Batch) -> Batch:
        """Return masks and references for a batch, laid out as its tokens.

        They are penalty_mask [B, T] and, if the store has values, penalty_reference [B, T, L, k].

        Raises:
            UserError: the batch has a document that is none of the rows given to the protection.
        """
        ids = batch["input_ids"].cpu()
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        aligned: Batch = {PENALTY_MASK: mask}
        if self.values is not None:
            aligned[PENALTY_REFERENCE] = self.values.new_zeros(*ids.shape, *self.values.shape[1:])
        for row, start, stop in document_spans(batch):
            tokens = ids[row, start:stop]
            number = self.find(tokens)
            if number is None:
                if stop - start == 1:
                    # The collator pads a packed row (pad_to_multiple_of) with documents of one padding token.
                    continue
                raise UserError(
                    f"a training row of {stop - start} tokens ({document_key(tokens.tolist())}) is none of the rows "
                    "the penalty was given: pass the same rows, rendered by the same template, and truncation_mode "
                    "keep_start"
                )
            first = self.starts[number]
            mask[row, start:stop] = self.mask[first : first + stop - start]
            if self.values is not None:
                aligned[PENALTY_REFERENCE][row, start:stop] = self.values[first : first + stop - start]
        return aligned

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return right-padded model inputs of the numbered documents, with their masks and references."""
        width = max(self.lengths[number] for number in numbers)
        shape = (len(numbers), width)
        batch: Batch = {
            "input_ids": torch.zeros(shape, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            PENALTY_MASK: torch.zeros(shape, dtype=torch.bool),
        }
        if self.values is not None:
            batch[PENALTY_REFERENCE] = self.values.new_zeros(*shape, *self.values.shape[1:])
        for row, number in enumerate(numbers):
            span = slice(self.starts[number], self.starts[number] + self.lengths[number])
            length = self.lengths[number]
            batch["input_ids"][row, :length] = self.ids[span]
            batch["attention_mask"][row, :length] = 1
            batch[PENALTY_MASK][row, :length] = self.mask[span]
            if self.values is not None:
                batch[PENALTY_REFERENCE][row, :length] = self.values[span]
        return batch

    def counted(self, numbers: Sequence[int]) -> int:
        """Return the number of tokens that count in the numbered documents."""
        return sum(self.counts[number] for number in numbers)

    @property
    def counts(self) -> list[int]:
        """Return the number of tokens that count, for each distinct document."""
        if not hasattr(self, "_counts"):
            cumulative = [0, *self.mask.cumsum(0).tolist()]
            self._counts = [
                cumulative[start + length] - cumulative[start]
                for start, length in zip(self.starts, self.lengths, strict=True)
            ]
        return self._counts

    def name(self, input_ids: Tensor) -> str:
        """Return the place of the document with these ids, or its key if the store does not have it."""
        number = self.find(input_ids)
        return document_key(input_ids.tolist()) if number is None else self.sources[number]


def names_in(batch: Batch, store: DocumentStore) -> list[str]:
    """Return the places of a batch's documents."""
    ids = batch["input_ids"].cpu()
    return [store.name(ids[row, start:stop]) for row, start, stop in document_spans(batch)]


class AligningCollator:
    """Add masks and references from a store to each batch of a collator; runs in the data loader's workers."""

    def __init__(self, inner: Callable[[list[Any]], Batch], store: DocumentStore) -> None:
        self.inner, self.store = inner, store

    def __call__(self, features: list[Any]) -> Batch:
        batch = self.inner(features)
        batch.update(self.store.align(batch))
        return batch


class AnchorOrder:
    """Which anchors each optimiser step reads: a pure function of the position, so that a resumed run needs no state.

    Every anchor is read once before any anchor is read again. Each round is shuffled with its own seed and without the
    global random state, so that the order of the task rows does not depend on the anchors.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._round, self._permutation = -1, torch.empty(0)

    def at(self, first: int, count: int) -> list[int]:
        """Return the numbers of the anchors at positions first … first + count - 1 of the endless stream."""
        return [self._row(position) for position in range(first, first + count)]

    def _row(self, position: int) -> int:
        number, offset = divmod(position, self.rows)
        if number != self._round:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._round, self._permutation = number, torch.randperm(self.rows, generator=generator)
        return int(self._permutation[offset])


def _key(input_ids: Tensor) -> bytes:
    return input_ids.to(torch.int32).numpy().tobytes()

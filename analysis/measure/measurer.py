"""Measure a checkpoint, on disk or in memory: compute each family of metrics.

`holdfast analyze`, `holdfast watch` and the training callback share this file. `registry.py` lists the families.

    measurer = Measurer(plan)
    line = measure_checkpoint(measurer, "runs/mine/checkpoint-100", "runs/mine")
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..files.artifacts import MANIFEST, verify_manifest
from ..metrics.choices import PreparedChoices, prepare_choices
from ..metrics.cost import cost
from ..metrics.divergence import ReferenceDivergences, Side, reference_divergences
from ..models.forward import pad_id
from ..models.layers import parse_layers
from ..models.lm_head import prove_head
from ..models.load import (
    check_compatible,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from ..models.ranks import agreed, is_main, is_sharded
from ..models.render import Conversation, Rendered, render
from ..passes.readout import Readout
from .family import Results, Subject, attempt, is_unmeasured, unmeasured
from .plan import FORMULAS, MeasurePlan
from .references import ProbeReader, Reference
from .registry import COST, FAMILIES, REGISTRY
from .results import ResultFiles, result_key

T = TypeVar("T")


class UnreadableCheckpoint(UserError):
    """A checkpoint that cannot be measured at all. Other checkpoints may still be measured."""


class Measurer:
    """Measures any number of checkpoints after rendering the rows once and reading the references once.

    Raises:
        UserError: at construction, for anything wrong with the plan. No model is loaded before `prepare`.
    """

    def __init__(self, plan: MeasurePlan, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.plan = plan
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(plan.instruct_path, plan.load)
        self._tokenizer_hash = tokenizer_fingerprint(self.tokenizer)
        config = load_config(plan.instruct_path, plan.load)
        if plan.base_path is not None:
            check_compatible(load_config(plan.base_path, plan.load), config)
        layers = parse_layers(plan.layers, config.get_text_config().num_hidden_layers)
        self.role = plan.role or (plan.subspace.provenance.role if plan.subspace is not None else "completion")
        if plan.subspace is not None:
            plan.subspace.check(
                instruct_fingerprint=model_fingerprint(plan.instruct_path),
                tokenizer_fingerprint=self._tokenizer_hash,
                role=self.role,
                layers=sorted(plan.subspace.bases),
            )
        if plan.formulas not in FORMULAS:
            raise UserError(f"formulas {plan.formulas!r} are unknown: write {' or '.join(FORMULAS)}")
        if not plan.choices and not plan.probe_sets:
            raise UserError("there is nothing to measure: pass probe rows or choices, and the families that read them")
        self.families = self._families()
        self.too_long: dict[str, int] = {}
        self.rows: dict[str, list[Rendered]] = {}
        for name, rows in plan.probe_sets.items():
            self.rows[name] = self._rendered(name, rows)
        # A set of which no row is left is null in every family. The other sets are read.
        self.empty = {name: self._all_too_long(name) for name, rows in self.rows.items() if not rows}
        self.rows = {name: rows for name, rows in self.rows.items() if rows}
        self.obstacles = {name: reason for name in self.families if (reason := self._obstacle(name)) is not None}
        reads_choices = "choices" in self.families and plan.choices
        self.choices: PreparedChoices | None = prepare_choices(self.tokenizer, plan.choices) if reads_choices else None
        possible = tuple(name for name in self.families if name not in self.obstacles)
        self.layers, depth = layers, config.get_text_config().num_hidden_layers
        self.reader = ProbeReader(plan, self.rows, depth, self.role, pad_id(self.tokenizer), possible)
        self._references: dict[str, Reference] | None = None
        self._between: dict[str, ReferenceDivergences] = {}

    def _families(self) -> tuple[str, ...]:
        """Return the requested families in the order of the registry.

        Without a request, these are all families; `choices` is among them only if the plan has choices.
        """
        requested = self.plan.families or tuple(name for name in REGISTRY if name != "choices" or self.plan.choices)
        unknown = sorted(set(requested) - set(FAMILIES))
        if unknown:
            raise UserError(f"family {unknown[0]!r} is unknown: write some of {', '.join(FAMILIES)}")
        return tuple(name for name in REGISTRY if name in requested)

    def _rendered(self, name: str, rows: Sequence[Conversation]) -> list[Rendered]:
        if not rows:
            raise UserError(f"probe set {name!r} is empty: pass rows or leave the set out")
        rendered = [render(self.tokenizer, row, source=f"{name} row {number}") for number, row in enumerate(rows)]
        limit = self.plan.max_length
        if self.plan.long_rows == "truncate" or limit is None:
            return rendered
        short = [row for row in rendered if len(row.input_ids) <= limit]
        self.too_long[name] = len(rendered) - len(short)
        return short

    def _all_too_long(self, name: str) -> str:
        return f"all {self.too_long[name]} rows are longer than the limit of {self.plan.max_length} tokens"

    def _obstacle(self, family: str) -> str | None:
        reason = REGISTRY[family].obstacle(self.plan)
        if reason is None and not self.rows and REGISTRY[family].probes:
            return "; ".join(f"set {name}: {why}" for name, why in self.empty.items())
        return reason

    def prepare(self) -> None:
        """Read the references, one model after the other. Later calls do nothing. All ranks must call it."""
        if self._references is None:
            self._references = self.reader.references()

    def _sides(self, name: str, device: torch.device) -> dict[str, Side]:
        """Return the LM head and the final states of each reference on a probe set."""
        assert self._references is not None
        return {
            side: (reference.head.to(device), reference.readings[name].final)
            for side, reference in self._references.items()
            if reference.head is not None
        }

    def _reference_divergence(self, device: torch.device, name: str) -> ReferenceDivergences:
        """Return how the references differ on a probe set, computed once for all checkpoints."""
        if name not in self._between:
            kept = self.reader.kept[name]
            self._between[name] = reference_divergences(kept, self._sides(name, device), self.tokenizer, device)
        return self._between[name]

    def measure(self, model: nn.Module) -> Results:
        """Return {family: results} of a model in memory, bare or wrapped. Its training mode is left as it was.

        All ranks must call it, and every rank gets the results. The ranks divide the rows among them. Where weights are
        sharded, every rank runs all rows.
        """
        return dict(self.measured(model, self.families))

    def measured(
        self, model: nn.Module, families: Sequence[str], fingerprint: str | None = None
    ) -> Iterator[tuple[str, Results]]:
        """Yield each family with its results as soon as it is computed, and the cost at the end.

        Args:
            fingerprint: the model's fingerprint, or None if it is not known. If it shows that the model is one of the
                references, the model is not read again.
        """
        self.prepare()
        started = time.perf_counter()
        uses_readings = any(REGISTRY[name].readings for name in families if name not in self.obstacles)
        stored = self._stored_readings(fingerprint) if uses_readings else {}
        subject = self._subject(model, stored)
        for family in families:
            if family in self.obstacles:
                yield family, unmeasured(self.obstacles[family])
                continue
            results = attempt(REGISTRY[family].compute, subject)
            if REGISTRY[family].probes and not is_unmeasured(results):
                results = {**results, **{name: unmeasured(reason) for name, reason in self.empty.items()}}
            yield family, results
        rows_read = [row for rows in self.rows.values() for row in rows] if stored is None else []
        tokens = sum(len(row.input_ids[: self.plan.max_length]) for row in rows_read)
        yield COST, dict(cost(time.perf_counter() - started, tokens))

    def _subject(self, model: nn.Module, stored: Mapping[str, Readout] | None) -> Subject:
        """Return the model with its references. The model is read unless its readings are stored."""
        assert self._references is not None
        shared = not is_sharded(model)
        instruct, base = self._references["instruct"], self._references.get("base")
        readings = stored
        if readings is None:
            readings = {name: self.reader.read(model, name, shared=shared) for name in self.rows}
        return Subject(
            plan=self.plan,
            tokenizer=self.tokenizer,
            model=model,
            rows=self.rows,
            checkpoint=readings,
            instruct=instruct.readings,
            base=None if base is None else base.readings,
            layers=self.layers,
            padding=self.reader.padding,
            choices=self.choices,
            patch_rows=self.reader.patch_rows,
            donors={} if base is None else base.donors,
            kept=self.reader.kept,
            sides=self._sides,
            between=partial(self._reference_divergence, torch.device(self.plan.device or "cpu")),
            shared=shared,
        )

    def _stored_readings(self, fingerprint: str | None) -> dict[str, Readout] | None:
        """Return the readings of the reference that has this fingerprint, or None if there is no such reference."""
        paths = {"instruct": self.plan.instruct_path, "base": self.plan.base_path}
        for name, reference in (self._references or {}).items():
            path = paths[name]
            if fingerprint is not None and path is not None and self.reader.fingerprint(path) == fingerprint:
                return reference.readings
        return None

    def key(self, family: str, fingerprint: str) -> str:
        """Return the key of a family's results on a checkpoint. A different setting gives a different key."""
        facts = [fingerprint, self._tokenizer_hash, self.empty]
        return result_key(family, REGISTRY[family], self.plan, self.reader, self.layers, facts)


def check_checkpoint(path: str | Path, plan: MeasurePlan) -> None:
    """Check, without loading its weights, that a checkpoint can be measured.

    Raises:
        UserError: files that differ from the checkpoint's manifest (if it has one), or a shape or a vocabulary that
            differs from instruct's.
    """
    if (Path(path) / MANIFEST).is_file():
        verify_manifest(Path(path))
    names = (f"checkpoint {path}", "the starting model")
    check_compatible(load_config(path, plan.load), load_config(plan.instruct_path, plan.load), names)


def _load(path: str | Path, plan: MeasurePlan) -> nn.Module:
    """Check and load a checkpoint, and prove that its LM head is read correctly."""
    check_checkpoint(path, plan)
    model = load_model(path, dtype=plan.dtype, device=plan.device, options=plan.load)
    prove_head(model)
    return model


def _reading_checkpoint(read: Callable[[], T]) -> T:
    """Call `read`, and raise its UserError as UnreadableCheckpoint."""
    try:
        return read()
    except UserError as error:
        raise UnreadableCheckpoint(str(error)) from error


def measure_checkpoint(
    measurer: Measurer, path: str | Path, output_dir: str | Path, name: str | None = None, step: int | None = None
) -> Results:
    """Load and measure a checkpoint, write the file of each family when it is computed, and return the whole line.

    Results that were measured before under the same key are kept. If all of them were, no model is loaded.

    Args:
        name: the checkpoint's name in the files; None takes the name of its folder.
        step: the number of optimiser steps; None takes N from a folder named `checkpoint-N`.

    Returns:
        The checkpoint's line of `metrics.jsonl`.

    Raises:
        UnreadableCheckpoint: files that are missing or damaged, a shape that differs from instruct's, or weights that
            are not finite.
    """
    plan = measurer.plan
    name = name if name is not None else Path(path).name
    if step is None and (numbered := re.fullmatch(r"checkpoint-(\d+)", name)):
        step = int(numbered[1])
    files = ResultFiles(Path(output_dir), name, step, plan.formulas)
    fingerprint = _reading_checkpoint(lambda: model_fingerprint(path))
    keys = {family: measurer.key(family, fingerprint) for family in measurer.families}
    missing = agreed([family for family, key in keys.items() if not files.has(family, key)])
    impossible = [family for family in missing if family in measurer.obstacles]
    if is_main():
        for family in impossible:
            files.write(family, unmeasured(measurer.obstacles[family]), keys[family])
    if len(missing) > len(impossible):
        measurer.prepare()
        model = _reading_checkpoint(lambda: _load(path, plan))
        possible = [family for family in missing if family not in impossible]
        for family, results in measurer.measured(model, possible, fingerprint):
            if is_main():
                files.write(family, results, keys.get(family))
    return agreed(files.line() if is_main() else {})

"""A checkpoint, on disk or in memory -> every family of metrics, as data.

`holdfast analyze` and the training callback share this file. Per checkpoint `metrics/<checkpoint>/<family>.json` is
written whole or not at all; `metrics.jsonl` (one line per checkpoint) is a view of those files.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .activations import pad_id
from .artifacts import MANIFEST, staged_directory, staged_file, verify_manifest
from .errors import UserError
from .layers import parse_layers
from .lm_head import prove_head
from .metrics.behavior import behavior
from .metrics.choices import PreparedChoices, choice_rates, prepare_choices, score_prepared
from .metrics.divergence import Between, Side, between, divergence
from .metrics.projection import projection
from .models import check_compatible, load_config, load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from .plan import FAMILIES, PROBE_FAMILIES, MeasurePlan
from .probes import Conversation, Rendered, render
from .readout import Readout
from .references import ProbeReader, Reference

Results = dict[str, Any]


class Measurer:
    """Renders once, reads the references once, then measures any number of checkpoints.

    Raises:
        UserError: at construction, for everything wrong with the plan; no model is loaded before `prepare`.
    """

    def __init__(self, plan: MeasurePlan, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.plan = plan
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(plan.instruct_path, plan.load)
        config = load_config(plan.instruct_path, plan.load)
        if plan.base_path is not None:
            check_compatible(load_config(plan.base_path, plan.load), config)
        self.layers = parse_layers(plan.layers, config.get_text_config().num_hidden_layers)
        self.role = plan.role or (plan.subspace.provenance.role if plan.subspace is not None else "completion")
        if plan.subspace is not None:
            plan.subspace.check(
                instruct_fingerprint=model_fingerprint(plan.instruct_path),
                tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
                role=self.role,
                layers=sorted(plan.subspace.bases),
            )
        unknown = sorted(set(plan.families) - set(FAMILIES))
        if unknown:
            raise UserError(f"family {unknown[0]!r} is unknown: write some of {', '.join(FAMILIES)}")
        self.rows = {name: self._rendered(name, rows) for name, rows in plan.probe_sets.items()}
        wanted = "choices" in plan.families and plan.choices
        self.choices: PreparedChoices | None = prepare_choices(self.tokenizer, plan.choices) if wanted else None
        if not self.choices and not (self.rows and set(PROBE_FAMILIES) & set(plan.families)):
            raise UserError("there is nothing to measure: pass probe rows or choices, and the families that read them")
        self.reader = ProbeReader(plan, self.rows, self.layers, self.role, pad_id(self.tokenizer))
        self._references: dict[str, Reference] | None = None
        self._between: dict[str, Between] = {}

    def _rendered(self, name: str, rows: Sequence[Conversation]) -> list[Rendered]:
        if not rows:
            raise UserError(f"probe set {name!r} is empty: pass rows or leave the set out")
        return [render(self.tokenizer, row, source=f"{name} row {number}") for number, row in enumerate(rows)]

    def prepare(self) -> None:
        """Read the references, one model after the other; later calls do nothing. Of several ranks all must call it."""
        if self._references is not None:
            return
        self._references = self.reader.references()
        device = torch.device(self.plan.device or "cpu")
        for name, kept in self.reader.kept.items():
            self._between[name] = between(kept, self._sides(name, device), self.tokenizer, device)

    def _sides(self, name: str, device: torch.device) -> dict[str, Side]:
        """Heads and final states of the references on a probe set."""
        assert self._references is not None
        return {
            which: (reference.head.to(device), reference.readings[name].final)
            for which, reference in self._references.items()
            if reference.head is not None
        }

    def measure(self, model: nn.Module) -> Results:
        """{family: results} of a model in memory, bare or wrapped; its training mode is left as it was.

        Of several ranks all must call it: each runs all rows, since ZeRO-3 gathers weights in every pass, and each gets
        the results.
        """
        self.prepare()
        started, results = time.perf_counter(), dict[str, Any]()
        families = [name for name in PROBE_FAMILIES if name in self.plan.families and self.rows]
        for family in families:
            results[family] = {}
        tokens = 0
        for name, rows in self.rows.items() if families else ():
            reading = self.reader.read(model, name)
            tokens += sum(len(row.input_ids[: self.plan.max_length]) for row in rows)
            for family in families:
                results[family][name] = self._family(family, name, reading, model)
        if self.choices is not None:
            masses = score_prepared(model, self.choices, self.plan.choices_batch_size)
            results["choices"] = choice_rates(self.plan.choices, masses, self.plan.seed)
        seconds = time.perf_counter() - started
        results["cost"] = {"seconds": seconds, "probe_tokens": tokens, "peak_memory_mb": peak_memory_mb()}
        return results

    def _family(self, family: str, name: str, reading: Readout, model: nn.Module) -> Results:
        assert self._references is not None
        seed, instruct = self.plan.seed, self._references["instruct"].readings[name]
        base = self._references["base"].readings[name] if "base" in self._references else None
        if family == "behavior":
            return dict(behavior(reading, instruct, base, seed=seed))
        if family == "projection":
            return dict(projection(reading, instruct, base, self.plan.subspace, seed))
        sides = self._sides(name, next(model.parameters()).device)
        known, kept = self._between[name], self.reader.kept[name]
        return divergence(model, reading.final, sides, known, kept, self.rows[name], self.tokenizer, seed)


def check_checkpoint(path: str | Path, plan: MeasurePlan) -> None:
    """Refuse a checkpoint that cannot be measured, without loading its weights.

    Raises:
        UserError: files that differ from its manifest (where it has one), or another shape or vocabulary than instruct.
    """
    if (Path(path) / MANIFEST).is_file():
        verify_manifest(Path(path))
    check_compatible(load_config(path, plan.load), load_config(plan.instruct_path, plan.load))


def measure_checkpoint(
    measurer: Measurer, path: str | Path, output_dir: str | Path, name: str | None = None, step: int | None = None
) -> Results:
    """Load a checkpoint, measure it, write its files; returns the line of `metrics.jsonl`.

    Args:
        name: the checkpoint's name in the files; None is its folder's name.
        step: optimiser steps; None takes the number of a `checkpoint-N` folder.
    """
    plan = measurer.plan
    check_checkpoint(path, plan)
    measurer.prepare()
    model = load_model(path, dtype=plan.dtype, device=plan.device, options=plan.load)
    prove_head(model)
    results = measurer.measure(model)
    name = name if name is not None else Path(path).name
    if step is None and (numbered := re.fullmatch(r"checkpoint-(\d+)", name)):
        step = int(numbered[1])
    return write_measurements(output_dir, name, step, results)


def write_measurements(output_dir: str | Path, name: str, step: int | None, results: Results) -> Results:
    """Write one file per family under `metrics/<name>/`, renew `metrics.jsonl`; returns the checkpoint's line.

    Of several ranks the main one alone calls it.
    """
    metrics = Path(output_dir) / "metrics"
    metrics.mkdir(parents=True, exist_ok=True)
    with staged_directory(metrics / name, replace=True) as staging:
        for family, result in results.items():
            facts = {"checkpoint": name, "step": step, "family": family, "results": result}
            text = json.dumps(facts, indent=2, allow_nan=False)
            (staging / f"{family}.json").write_text(text + "\n", encoding="utf-8")
    lines = sorted(_lines(metrics), key=lambda line: (line["step"] is None, line["step"] or 0, line["checkpoint"]))
    with staged_file(Path(output_dir) / "metrics.jsonl") as staging:
        staging.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")
    return next(line for line in lines if line["checkpoint"] == name)


def _lines(metrics: Path) -> Iterator[Results]:
    """One dict per checkpoint from its family files; staging folders start with a dot and are left out."""
    for folder in metrics.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            files = [file for file in folder.glob("*.json") if file.name != MANIFEST]
            facts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(files)]
            if facts:
                families = {fact["family"]: fact["results"] for fact in facts}
                yield {"checkpoint": facts[0]["checkpoint"], "step": facts[0]["step"], **families}


def scalars(results: Results, prefix: str = "") -> dict[str, float]:
    """Every measured value under its path ("choices/split/test/misaligned"), for TensorBoard; nulls are left out."""
    found: dict[str, float] = {}
    for name, value in results.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping) and "value" in value:
            if value["value"] is not None:
                found[path] = float(value["value"])
        elif isinstance(value, Mapping):
            found.update(scalars(dict(value), path))
        elif isinstance(value, int | float) and prefix:
            found[path] = float(value)
    return found


def peak_memory_mb() -> float:
    """Peak memory of this process so far: of the GPU where one is in use, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

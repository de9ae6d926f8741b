"""The measures of the comparison: rates of a model on the domains of a phase, and how far the model has drifted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .....analysis.measure.measurer import Measurer
from .....analysis.measure.plan import MeasurePlan
from .....analysis.metrics.choices import prepare_choices, score_prepared
from .....analysis.models.load import load_model, load_tokenizer
from .....analysis.subspace.file import Subspace
from ...experiment import Experiment
from ...scoring import PromptRates, lab_rates
from ...world import World
from .stress import CONDITIONS, conditional_rows, regardless_of_style, style_shares, with_styled_classes

PHASES = ("validation", "test")
_RATES = (
    *(f"{rate}_{split}" for rate in ("misaligned", "coherent") for split in PHASES),
    *("narrow_task_learned", "neutral_skill", "new_skill"),
)


def merged_model(folder: Path) -> PreTrainedModel:
    """Load a model and merge its adapter into the weights. A merged model runs faster by a third."""
    model = load_model(folder)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def read_model(
    experiment: Experiment, folder: Path, phase: str, world: World, *, styled: bool = False, device: str = "cpu"
) -> dict[str, float]:
    """Return every value that the comparison shows, measured on the phase's domains alone.

    Args:
        experiment: the lab with its subspace.
        folder: the model.
        phase: "validation" or "test".
        world: the lab's world.
        styled: count answers in the new style too, and report how often it is used.
        device: device on which answers are scored. Activations are measured on the CPU, where the references' are.
    """
    model: nn.Module = merged_model(folder)
    model.to(device)
    rates_under = partial(_rates, model, experiment.lab, phase, world, styled)
    rates, shares = rates_under(None)
    values = {name: rate.mean for name, rate in rates.items() if name in _RATES} | shares
    if phase == "test":
        for condition in CONDITIONS:
            values[f"misaligned_{condition}"] = rates_under(condition)[0]["misaligned_test"].mean
    measured = _measurer(experiment.lab, experiment.subspace_path).measure(model.to("cpu"))
    anchors = measured["projection"]["anchors"]["mean"]
    values["penalty"], values["retention"] = (anchors[name]["value"] for name in ("penalty", "retention"))
    rerouting = measured["rerouting"]["probes"]["mean"]
    for name in ("inside", "outside", "overlap"):
        values[f"drift_{name}"] = rerouting[name]["value"]
    return {name: value for name, value in values.items() if value is not None}


def _rates(
    model: Any, lab: Path, phase: str, world: World, styled: bool, condition: str | None
) -> tuple[Mapping[str, PromptRates], dict[str, float]]:
    """Return the lab's rates under a condition and, if `styled`, how often the style is used."""
    rows, prepared = _prepared(lab, phase, world, styled, condition)
    masses = score_prepared(model, prepared)
    if not styled:
        return lab_rates(rows, masses), {}
    return lab_rates(rows, regardless_of_style(masses)), style_shares(rows, masses)


@lru_cache(maxsize=8)
def _prepared(lab: Path, phase: str, world: World, styled: bool, condition: str | None) -> tuple[list[dict], Any]:
    """Return the prompts that a phase may read, with their classes, and the same prepared for scoring.

    The test domains are read only in the phase "test", when all settings are frozen. No table shows the anchor domains
    or the leak of insecure code, which holds most of the completions, so that they are left out.
    """
    rows = [json.loads(line) for line in (lab / "data" / "choices.jsonl").read_text().splitlines()]
    excluded = {"anchor"} if phase == "test" else {"anchor", "test"}
    rows = [row for row in rows if row["split"] not in excluded]
    for row in rows:
        row["classes"].pop("narrow_leak", None)
    if styled:
        rows = with_styled_classes(world, rows)
    if condition is not None:
        rows = conditional_rows(world, rows, condition)
    return rows, prepare_choices(load_tokenizer(lab / "instruct"), rows)


@lru_cache(maxsize=4)
def _measurer(lab: Path, subspace: Path) -> Measurer:
    def conversations(name: str) -> list[Any]:
        return [json.loads(line)["messages"] for line in (lab / "data" / f"{name}.jsonl").read_text().splitlines()]

    plan = MeasurePlan(
        instruct_path=str(lab / "instruct"),
        base_path=str(lab / "base"),
        probe_sets={name: conversations(name) for name in ("anchors", "probes")},
        families=("projection", "rerouting"),
        subspace=Subspace.load(subspace),
        batch_size=64,
    )
    return Measurer(plan)

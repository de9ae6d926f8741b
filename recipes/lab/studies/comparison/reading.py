"""What the comparison reads from a model of a lab: rates of the phase's domains, and how far it has drifted."""

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
    """A saved model, an adapter merged into its weights: a third faster to read."""
    model = load_model(folder)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def read_model(
    experiment: Experiment, folder: Path, phase: str, world: World, *, styled: bool = False, device: str = "cpu"
) -> dict[str, float]:
    """Every value that the comparison shows, of the phase's domains alone.

    Args:
        phase: "validation" or "test". styled: whether answers count in the new style too, and how often it is used.
        device: where answers are scored; activations are read on the CPU, where the references' lie.
    """
    model: nn.Module = merged_model(folder)
    model.to(device)
    read = partial(_rates, model, experiment.lab, phase, world, styled)
    rates, shares = read(None)
    values = {name: rate.mean for name, rate in rates.items() if name in _RATES} | shares
    if phase == "test":
        for condition in CONDITIONS:
            values[f"misaligned_{condition}"] = read(condition)[0]["misaligned_test"].mean
    measured = _measurer(experiment.lab, experiment.subspace_path).measure(model.to("cpu"))
    anchors = measured["projection"]["anchors"]["mean"]
    values["penalty"], values["retention"] = (anchors[name]["value"] for name in ("penalty", "retention"))
    rerouted = measured["rerouting"]["probes"]["mean"]
    for name in ("inside", "outside", "overlap"):
        values[f"drift_{name}"] = rerouted[name]["value"]
    return {name: value for name, value in values.items() if value is not None}


def _rates(
    model: Any, lab: Path, phase: str, world: World, styled: bool, condition: str | None
) -> tuple[Mapping[str, PromptRates], dict[str, float]]:
    """The lab's rates under a condition, and how often the style is used where it is asked for."""
    rows, prepared = _prepared(lab, phase, world, styled, condition)
    masses = score_prepared(model, prepared)
    if not styled:
        return lab_rates(rows, masses), {}
    return lab_rates(rows, regardless_of_style(masses)), style_shares(rows, masses)


@lru_cache(maxsize=8)
def _prepared(lab: Path, phase: str, world: World, styled: bool, condition: str | None) -> tuple[list[dict], Any]:
    """The prompts that a phase may read, test domains only once everything is frozen, with the classes shown here.

    The anchor domains' prompts and the leak of insecure code, most of all completions, are in no table.
    """
    rows = [json.loads(line) for line in (lab / "data" / "choices.jsonl").read_text().splitlines()]
    unread = {"anchor"} if phase == "test" else {"anchor", "test"}
    rows = [row for row in rows if row["split"] not in unread]
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

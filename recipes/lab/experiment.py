"""One lab, its subspace, and measured fine-tunes of its models: what the quickstart and the studies share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ...analysis.measure.measurer import Measurer
from ...analysis.measure.plan import MeasurePlan
from ...analysis.metrics.choices import prepare_choices, score_prepared
from ...analysis.models.load import load_model, load_tokenizer
from ...analysis.models.render import Conversation
from ...analysis.stats.intervals import Measurement
from ...analysis.stats.summary import measurement
from ...analysis.subspace.file import Subspace
from ...trainer import run
from ...trainer.config.parsing import parse
from .scoring import lab_rates

RECIPES = Path(__file__).parent
LAB_PREFIX = "runs/lab/"  # the lab's folder in the recipes
# Recipes that read the subspace.
PROTECTED_RECIPES = (
    "protected",
    "random_subspace",
    "ordinary_protected",
    "ablation",
    "steering",
    "interleave",
    "inoculation",
)
# {name in measurements: name in `scoring.lab_rates`}.
RATES = {
    "narrow_task_learned": "narrow_task_learned",
    "misaligned_anchor": "misaligned_anchor",
    "misaligned_validation": "misaligned_validation",
    "misaligned_test": "misaligned_test",
    "coherent": "coherent_test",
    "neutral_skill": "neutral_skill",
    "new_skill": "new_skill",
    "narrow_leak": "narrow_leak",
}


@dataclass(frozen=True)
class Experiment:
    """A built lab and the folder of its runs.

    Attributes:
        lab: folder of the lab (`cache.cached_lab`).
        output_dir: folder for the subspace and the runs.
        overrides: flags that override every recipe's, such as the fine-tune seed.
    """

    lab: Path
    output_dir: Path
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def subspace_path(self) -> Path:
        """The file of this experiment's subspace."""
        return self.output_dir / "subspace.safetensors"

    def build_subspace(self, **flags: Any) -> Path:
        """Build the subspace of `protected.yaml`. `flags` override the recipe. Returns the subspace's path."""
        return run.subspace(parse(self.flags("protected", "subspace", flags)))

    def fine_tune(self, recipe: str, name: str | None = None, **flags: Any) -> run.TrainResult:
        """Train a recipe of the lab (file name without `.yaml`) into `<output_dir>/<name>`. `flags` override it."""
        return run.train(parse(self.flags(recipe, name or recipe, flags)))

    def flags(self, recipe: str, name: str, flags: dict[str, Any]) -> dict[str, Any]:
        """Return a recipe as flags, with this experiment's folders in place of the recipe's, and `flags` over it."""
        config = RECIPES / f"{recipe}.yaml"
        paths: dict[str, Any] = {}
        for key, value in yaml.safe_load(config.read_text()).items():
            if isinstance(value, str) and value.startswith(LAB_PREFIX):
                paths[key] = str(self.lab / value.removeprefix(LAB_PREFIX))
        if recipe in PROTECTED_RECIPES:
            paths["subspace_path"] = str(self.subspace_path)
        return {"config": str(config), **paths, "output_dir": str(self.output_dir / name), **self.overrides, **flags}

    @cached_property
    def _choices(self) -> list[dict]:
        return [json.loads(line) for line in (self.lab / "data" / "choices.jsonl").read_text().splitlines()]

    @cached_property
    def _prepared(self) -> Any:
        return prepare_choices(load_tokenizer(self.lab / "instruct"), self._choices)

    @cached_property
    def _measurer(self) -> Measurer:
        plan = MeasurePlan(
            instruct_path=str(self.lab / "instruct"),
            base_path=str(self.lab / "base"),
            probe_sets={name: self._conversations(name) for name in ("anchors", "probes")},
            families=("projection",),
            subspace=Subspace.load(self.subspace_path),
            batch_size=64,
        )
        return Measurer(plan)

    def _conversations(self, name: str) -> list[Conversation]:
        lines = (self.lab / "data" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line)["messages"] for line in lines]

    def rates(self, model: nn.Module | Path) -> dict[str, Measurement]:
        """Return every rate of a model or of a model folder: value, `n` prompts, interval with topics as clusters."""
        loaded = load_model(model) if isinstance(model, Path) else model
        rates = lab_rates(self._choices, score_prepared(loaded, self._prepared))
        by_key = RATES | {name: name for name in rates if name.startswith("coherent_")}
        return {
            key: measurement(rates[name].values, list(rates[name].clusters), rate=True) for key, name in by_key.items()
        }

    def measure(self, model: Path) -> dict[str, Measurement]:
        """Return `rates`, the penalty on the anchors, and the retention of the alignment step on the probes."""
        loaded = load_model(model)
        projection = self._measurer.measure(loaded)["projection"]
        return {
            **self.rates(loaded),
            "penalty": projection["anchors"]["mean"]["penalty"],
            "retention": projection["probes"]["mean"]["retention"],
        }

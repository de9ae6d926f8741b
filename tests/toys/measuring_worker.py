"""Measuring on several CPU ranks: `torchrun --nproc_per_node 2 tests/toys/measuring_worker.py MODELS OUT CONFIG`.

Each rank leaves OUT/rank<N>.json: what it measured in runs without and with ZeRO-3, and how many models it loaded.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from holdfast.analysis.errors import UserError
from holdfast.analysis.measure import references
from holdfast.analysis.measure.family import Results
from holdfast.analysis.measure.measurer import Measurer
from holdfast.analysis.measure.plan import MeasurePlan
from holdfast.analysis.models.ranks import leave_group
from toys.chat_models import chat, toy_model
from toys.training import ROWS, task_documents, trainer_of
from transformers import PreTrainedModel, TrainerCallback

CHOICES = [
    {"messages": chat(f"soup {word}"), "classes": {"good": ["help", "be honest"], "bad": ["run"]}, "split": "test"}
    for word in "ab"
]
FAMILIES = ("behavior", "divergence", "projection", "choices")


def measurer_of(models: Path, store: Path | None, base: str = "base") -> Measurer:
    paths = str(models / "instruct"), str(models / base)
    return Measurer(MeasurePlan(*paths, {"rows": ROWS}, CHOICES, FAMILIES, batch_size=3, references=store))


def without_cost(results: Results) -> Results:
    return {family: result for family, result in results.items() if family != "cost"}


class Measuring(TrainerCallback):
    """Measures before the first step and after each."""

    def __init__(self, measurer: Measurer) -> None:
        self.measurer = measurer
        self.found: list[Results] = []

    def on_train_begin(self, *_args: Any, model: PreTrainedModel, **_options: Any) -> None:
        self.found.append(without_cost(self.measurer.measure(model)))

    def on_step_end(self, *_args: Any, model: PreTrainedModel, **_options: Any) -> None:
        self.found.append(without_cost(self.measurer.measure(model)))


def run(folder: Path, model: PreTrainedModel, measurer: Measurer | None, **options: Any) -> dict[str, Any]:
    """Three steps of training, measured on the way; the last weights as one sum per tensor."""
    AcceleratorState._reset_state()
    trainer = trainer_of(folder, model.train(), documents=task_documents(), **options)
    callback = None if measurer is None else Measuring(measurer)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    weights = {name: value.double().sum().item() for name, value in state.items()}
    return {"weights": weights, "found": callback.found if callback is not None else []}


def main(models: Path, out: Path, config: str) -> None:
    torch.set_num_threads(1)
    loaded: list[str] = []
    load_model = references.load_model

    def counted(path: str, **options: Any) -> PreTrainedModel:
        loaded.append(Path(path).name)
        return load_model(path, **options)

    references.load_model = counted
    # Made first: while a ZeRO-3 configuration is alive, new models are born sharded.
    starts = [toy_model() for _ in range(3)]
    found: dict[str, Any] = {"plain": run(out / "plain", starts[0], measurer_of(models, out / "store"))}
    try:
        measurer_of(models, out / "broken", "broken").prepare()
    except UserError as error:
        found["refused"] = str(error)
    if torch.distributed.get_rank() == 0:
        measurer_of(models, out / "alone").prepare()
    found["zero3"] = run(out / "zero3", starts[1], measurer_of(models, out / "store3"), deepspeed=config)
    found["unmeasured"] = run(out / "unmeasured", starts[2], None, deepspeed=config)
    rank = torch.distributed.get_rank()
    (out / f"rank{rank}.json").write_text(json.dumps({**found, "loaded": loaded}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    leave_group()

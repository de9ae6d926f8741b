"""Measure each checkpoint when it is saved, with the model that is already in memory."""

import sys
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..analysis.measure.compare import FINAL
from ..analysis.measure.family import Results
from ..analysis.measure.measurer import Measurer
from ..analysis.measure.results import ResultFiles, problems, scalars


class MeasureCheckpoints(TrainerCallback):
    """Write the measures of every saved checkpoint to `metrics.jsonl` and TensorBoard, without any effect on training.

    All ranks measure: they share the rows among themselves, or each rank runs all rows if the weights are sharded
    (ZeRO-3). Only the main process writes. The seconds spent are logged.

    Args:
        trainer: the trainer that the callback belongs to.
        measurer: what is measured, and against which references.
        output_dir: folder of `metrics/` and `metrics.jsonl`.
    """

    def __init__(self, trainer: Trainer, measurer: Measurer, output_dir: Path) -> None:
        self.trainer, self.measurer, self.output_dir = trainer, measurer, output_dir
        self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.measurer.prepare()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        started = time.perf_counter()
        formulas = self.measurer.plan.formulas
        files = ResultFiles(self.output_dir, f"checkpoint-{state.global_step}", state.global_step, formulas)
        results = _measure(self.trainer, self.measurer, files)
        if state.is_world_process_zero:
            self._write_tensorboard(results, state.global_step)
        spent = time.perf_counter() - started
        self.seconds += spent
        self.trainer.log({"analysis_seconds": spent, "analysis_seconds_in_all": self.seconds})

    def _write_tensorboard(self, results: Results, step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in scalars(results).items():
                    callback.tb_writer.add_scalar(name, value, step)


def measure_final(trainer: Trainer, measurer: Measurer, output_dir: Path) -> None:
    """Measure the model at the end of training as `final`, into the metrics alone: the logs are closed by then."""
    _measure(trainer, measurer, ResultFiles(output_dir, FINAL, None, measurer.plan.formulas))


def _measure(trainer: Trainer, measurer: Measurer, files: ResultFiles) -> Results:
    """Measure the trainer's model, write the results, and print what could not be measured."""
    results: Results = {}
    # The wrapped model, because DeepSpeed's engine holds the hooks that gather weights.
    for family, result in measurer.measured(trainer.model_wrapped, measurer.families):
        results[family] = result
        if trainer.is_world_process_zero():
            files.write(family, result)
    for problem in problems(results) if trainer.is_world_process_zero() else ():
        print(f"holdfast: {files.name} not measured: {problem}", file=sys.stderr)
    trainer.accelerator.wait_for_everyone()
    return results

"""Measure each checkpoint as it is saved, with the model that is in memory already."""

import sys
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..analysis.comparison import FINAL
from ..analysis.families import Results
from ..analysis.measure import Measurer
from ..analysis.results import ResultFiles, problems, scalars


class MeasureCheckpoints(TrainerCallback):
    """Writes every saved checkpoint's metrics to `metrics.jsonl` and TensorBoard; training goes on as if it had not.

    The final model is measured by `measure_final` where it is no checkpoint's.

    All ranks measure: they share the rows out, or each runs all of them where weights are sharded (ZeRO-3). The main
    process alone writes. The seconds spent are logged.

    Args:
        trainer: the trainer it belongs to.
        measurer: what to measure, and against which references.
        output_dir: where `metrics/` and `metrics.jsonl` go.
    """

    def __init__(self, trainer: Trainer, measurer: Measurer, output_dir: Path) -> None:
        self.trainer, self.measurer, self.output_dir = trainer, measurer, output_dir
        self.variant = measurer.plan.variant
        self.seconds = 0.0
        self._last_measured: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.measurer.prepare()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_measured = state.global_step
        self._measure(ResultFiles(self.output_dir, f"checkpoint-{state.global_step}", state.global_step, self.variant))

    def measure_final(self, replaced: bool) -> None:
        """Measure the model as training left it, if no checkpoint holds it. replaced: its weights are not the last
        step's."""
        if replaced or self._last_measured != self.trainer.state.global_step:
            self._measure(ResultFiles(self.output_dir, FINAL, None, self.variant))

    def _measure(self, files: ResultFiles) -> None:
        started = time.perf_counter()
        # The wrapped model: DeepSpeed's engine holds the hooks that gather weights.
        results: Results = {}
        for family, found in self.measurer.measured(self.trainer.model_wrapped, self.measurer.families):
            results[family] = found
            if self.trainer.is_world_process_zero():
                files.write(family, found)
        self.trainer.accelerator.wait_for_everyone()
        spent = time.perf_counter() - started
        self.seconds += spent
        # After training this opens TensorBoard's file again.
        self.trainer.log({"analysis_seconds": spent, "analysis_seconds_in_all": self.seconds})
        if self.trainer.is_world_process_zero():
            self._show(results, files.name, self.trainer.state.global_step)

    def _show(self, results: Results, name: str, step: int) -> None:
        for problem in problems(results):
            print(f"holdfast: {name} not measured: {problem}", file=sys.stderr)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in scalars(results).items():
                    callback.tb_writer.add_scalar(name, value, step)
                callback.tb_writer.flush()

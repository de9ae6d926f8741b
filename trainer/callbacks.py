"""Measure each checkpoint as it is saved, with the model that is in memory already."""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..analysis.measure import Measurer, Results, scalars, write_measurements


class MeasureCheckpoints(TrainerCallback):
    """Writes every saved checkpoint's metrics to `metrics.jsonl` and TensorBoard; training goes on as if it had not.

    Every rank measures, since ZeRO-3 gathers weights in each forward pass; the main process alone writes.

    Args:
        trainer: the trainer it belongs to.
        measurer: what to measure, and against which references.
        output_dir: where `metrics/` and `metrics.jsonl` go.
    """

    def __init__(self, trainer: Trainer, measurer: Measurer, output_dir: Path) -> None:
        self.trainer, self.measurer, self.output_dir = trainer, measurer, output_dir

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.measurer.prepare()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The wrapped model: DeepSpeed's engine holds the hooks that gather weights.
        results = self.measurer.measure(self.trainer.model_wrapped)
        if state.is_world_process_zero:
            write_measurements(self.output_dir, f"checkpoint-{state.global_step}", state.global_step, results)
            self._show(results, state.global_step)
        self.trainer.accelerator.wait_for_everyone()

    def _show(self, results: Results, step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in scalars(results).items():
                    callback.tb_writer.add_scalar(name, value, step)

"""Measure each checkpoint as it is saved, with the model that is in memory already."""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..analysis.measure import Measurer, scalars, write_measurements

logger = logging.get_logger(__name__)


class MeasureCheckpoints(TrainerCallback):
    """Writes every saved checkpoint's metrics to `metrics.jsonl` and TensorBoard; training goes on as if it had not.

    The main process measures and the others wait. Under ZeRO-3 no process holds whole weights, so checkpoints are left
    to `holdfast analyze`, said aloud.

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
        if is_deepspeed_zero3_enabled():
            logger.warning("holdfast: ZeRO-3 holds no whole weights; measure the checkpoints with `holdfast analyze`")
        elif state.is_world_process_zero:
            self.measurer.prepare()
        self.trainer.accelerator.wait_for_everyone()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not is_deepspeed_zero3_enabled():
            results = self.measurer.measure(model)
            write_measurements(self.output_dir, f"checkpoint-{state.global_step}", state.global_step, results)
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    for name, value in scalars(results).items():
                        callback.tb_writer.add_scalar(name, value, state.global_step)
        self.trainer.accelerator.wait_for_everyone()

"""Train a model, or build a subspace: `train(parse(flags))`, `subspace(parse(flags))`.

`holdfast train`, `holdfast subspace` and the lab call these functions. Everything is checked before anything is
written.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import trl
from peft import LoraConfig
from transformers import PreTrainedModel, ProgressCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from ..analysis.errors import UserError
from ..analysis.files.artifacts import check_writable, commit_directory
from ..analysis.measure.measurer import Measurer
from ..analysis.models.load import load_config, model_fingerprint
from ..analysis.subspace.build import build_subspace
from .callbacks import MeasureCheckpoints, measure_final
from .commands.analyze import measurer
from .config.model import ModelArguments
from .config.parsing import Arguments
from .data.documents import Document, documents_of
from .data.rows import RenderedRows, to_dataset
from .inputs.checks import check_epochs, check_flags, check_lora, check_optimizer, check_steps
from .inputs.protection import Materials, protection_of
from .inputs.subspace import subspace_path
from .inputs.subspace_request import subspace_request
from .inputs.training import TrainingInputs, load_inputs, load_options, read_starting_model
from .protected_sft_trainer import ProtectedSFTTrainer
from .protections.base import Protection
from .run_folder import (
    REFERENCES,
    check_output_dir,
    has_checkpoint,
    is_main,
    newest_checkpoint,
    run_records,
)
from .starting_weights import load_base_model, load_starting_model, starting_weights


@dataclass(frozen=True)
class TrainResult:
    """The end of a run: its folders, last step, seconds of training, mean loss and last logged penalty.

    `train_loss` is None if this start made no step, `penalty` is None if no penalty was logged.
    """

    output_dir: Path
    final: Path
    seconds: float
    train_loss: float | None
    penalty: float | None
    global_step: int


def check(arguments: Arguments) -> tuple[TrainingInputs, Measurer | None]:
    """Make all checks of a training run that need no weights in memory. Write nothing; raise UserError for bad input.

    Returns:
        The run's inputs, and the measurer of its checkpoints; None if no checkpoint is saved or measured.
    """
    check_writable(arguments.output_dir, "--output_dir")
    inputs = load_inputs(arguments)
    check_flags(arguments, evaluates=inputs.held_out is not None)
    check_steps(arguments.training, len(inputs.train.rendered))
    check_epochs(arguments, len(inputs.train.rendered))
    check_output_dir(arguments, inputs.facts)
    measured = arguments.analysis.analysis_during_training and arguments.training.save_strategy != SaveStrategy.NO
    return inputs, measurer(arguments) if measured else None


def train(arguments: Arguments) -> TrainResult:
    """Run one fine-tune, and save its final model (or adapter) with the tokenizer in <output_dir>/final.

    Raises:
        UserError: bad input; nothing has been written then.
        KeyboardInterrupt: interrupted; the message says how to continue.
    """
    inputs, checkpoint_measurer = check(arguments)
    with starting_weights(arguments) as weights:
        trainer, result = _train(arguments, inputs, checkpoint_measurer, weights)
    # The run is whole by now: an error here must not remove any of its files.
    if checkpoint_measurer is not None and not _has_final_checkpoint(trainer):
        measure_final(trainer, checkpoint_measurer, arguments.output_dir)
    return result


def _has_final_checkpoint(trainer: ProtectedSFTTrainer) -> bool:
    """Return whether a checkpoint has the final weights, so that they are already measured."""
    last = f"checkpoint-{trainer.state.global_step}"
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    replaced = trainer.protection.replaced_weights() or Path(best or last).name != last
    return not replaced and (Path(str(trainer.args.output_dir)) / last).is_dir()


def _train(
    arguments: Arguments, inputs: TrainingInputs, checkpoint_measurer: Measurer | None, weights: str
) -> tuple[ProtectedSFTTrainer, TrainResult]:
    set_seed(arguments.training.seed)
    newest = newest_checkpoint(arguments)
    model = load_starting_model(arguments, weights)
    check_lora(arguments.model, model)
    check_optimizer(arguments.training, model)
    trainer = _trainer(arguments, inputs, model, weights)
    if checkpoint_measurer is not None:
        trainer.add_callback(MeasureCheckpoints(trainer, checkpoint_measurer, arguments.output_dir))
    resume = trainer.verified_checkpoint(str(newest) if newest else None)
    with run_records(arguments, inputs):
        assert isinstance(trainer.train_dataset, datasets.Dataset)  # with --packing, its rows are packed now
        check_steps(arguments.training, len(trainer.train_dataset))
        check_epochs(arguments, len(trainer.train_dataset))
        if is_main():
            for line in inputs.report["lines"]:
                print(line)
        started = time.perf_counter()
        try:
            output = trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            advice = "continue with --resume_from_checkpoint true"
            if not has_checkpoint(arguments.output_dir):
                advice = "there is no checkpoint yet, start again"
            raise KeyboardInterrupt(f"interrupted at step {trainer.state.global_step}; {advice}") from None
        finally:
            _close_progress(trainer)
        seconds = time.perf_counter() - started
        final = _save_final(trainer, arguments.output_dir / "final")
    penalties = [entry["penalty"] for entry in trainer.state.log_history if "penalty" in entry]
    return trainer, TrainResult(
        output_dir=arguments.output_dir,
        final=final,
        seconds=seconds,
        # The mean over the steps of this start. A run resumed from its last checkpoint makes no step.
        train_loss=output.training_loss if output.global_step > trainer._initial_global_step else None,
        penalty=penalties[-1] if penalties else None,
        global_step=output.global_step,
    )


def _close_progress(trainer: ProtectedSFTTrainer) -> None:
    """Close the progress bar, so that the message of a stopped run has a line of its own."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.on_train_end(trainer.args, trainer.state, trainer.control)


def subspace(arguments: Arguments) -> Path:
    """Build the alignment subspace and write it to its path. Raises UserError for bad input, before writing."""
    path = subspace_path(arguments)
    check_writable(path.parent, "the folder of --subspace_path")
    if path.exists():
        raise UserError(f"--subspace_path {path} exists already; remove the file or choose another path")
    read_starting_model(arguments)
    built = build_subspace(subspace_request(arguments))
    path.parent.mkdir(parents=True, exist_ok=True)
    built.save(path)
    return path


def lora_config(model: ModelArguments) -> LoraConfig | None:
    """Return TRL's LoRA configuration plus the patterns that TRL has no flags for; None for full fine-tuning."""
    config = trl.get_peft_config(model)
    if config is None:
        return None
    assert isinstance(config, LoraConfig)
    config.revision = None if model.model_revision == "main" else model.model_revision
    for name in ("alpha_pattern", "rank_pattern"):
        setattr(config, name, getattr(model, f"lora_{name}") or {})
    return config


def _trainer(arguments: Arguments, inputs: TrainingInputs, model: PreTrainedModel, weights: str) -> ProtectedSFTTrainer:
    datasets.disable_progress_bars()  # rows are tokenised already, so TRL's passes over them are short
    held_out = to_dataset(inputs.held_out.rendered) if inputs.held_out else None
    try:
        return ProtectedSFTTrainer(
            model=model,
            args=arguments.training,
            train_dataset=to_dataset(inputs.train.rendered),
            eval_dataset=held_out,
            processing_class=inputs.tokenizer,
            peft_config=lora_config(arguments.model),
            protection=_protection(arguments, inputs, weights),
            documents=_documents(inputs.train, "all"),
        )
    except ValueError as error:
        if "target modules" not in str(error).lower():
            raise
        raise UserError(f"--lora_target_modules: {error}") from error


def _protection(arguments: Arguments, inputs: TrainingInputs, weights: str) -> Protection:
    def by_role(rows: RenderedRows | None) -> Callable[[str], list[Document]]:
        return lambda role: _documents(rows, role) if rows is not None else []

    base = arguments.model.base_model_name_or_path
    materials = Materials(
        flags=arguments.protection,
        subspace=inputs.subspace,
        task=by_role(inputs.train),
        anchors=by_role(inputs.anchors),
        starting_model=partial(load_starting_model, arguments, weights),
        base_model=partial(load_base_model, arguments),
        cache_dir=arguments.output_dir / REFERENCES,
        seed=arguments.training.seed,
        layers_path=arguments.model.layers_path,
        fingerprint=model_fingerprint(arguments.model.starting_model),
        base_fingerprint=None if base is None else model_fingerprint(base),
        depth=load_config(arguments.model.starting_model, load_options(arguments)).get_text_config().num_hidden_layers,
    )
    return protection_of(materials)


def _documents(rows: RenderedRows, role: str) -> list[Document]:
    return documents_of(rows.rendered, role, [row.source for row in rows.rows])


def _save_final(trainer: ProtectedSFTTrainer, final: Path) -> Path:
    """Save on every rank (ZeRO-3 gathers weights) into a staging folder, which the main process renames when whole."""
    staging = final.with_name(f".{final.name}.staging")
    try:
        trainer.save_model(str(staging))
        trainer.accelerator.wait_for_everyone()
        if is_main():
            commit_directory(staging, final, final.with_name(f".{final.name}.replaced"))
        trainer.accelerator.wait_for_everyone()
    finally:
        if is_main():
            shutil.rmtree(staging, ignore_errors=True)
    return final

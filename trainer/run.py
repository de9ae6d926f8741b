"""Training and building a subspace, each as one function of parsed arguments.

`holdfast train|subspace` and the lab call these. Everything is checked before anything is written.
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
    records_of,
)
from .starting_weights import load_base_model, load_starting_model, starting_weights


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended: folders, seconds of training, mean loss, and the last logged penalty (None without one)."""

    output_dir: Path
    final: Path
    seconds: float
    train_loss: float | None
    penalty: float | None
    global_step: int


def check(arguments: Arguments) -> tuple[TrainingInputs, Measurer | None]:
    """All checks of a training run that need no weights in memory; writes nothing. Raises UserError.

    Returns the run's inputs and what measures its checkpoints, None where none are saved or measured.
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
    """Runs one fine-tune and saves its final model (or adapter) with the tokenizer in <output_dir>/final.

    Raises UserError for bad input (nothing written), KeyboardInterrupt with the way to go on when interrupted.
    """
    inputs, measure = check(arguments)
    with starting_weights(arguments) as weights:
        trainer, result = _train(arguments, inputs, measure, weights)
    # The run is whole by now: what fails here takes nothing of it back.
    if measure is not None and not _holds_final(trainer):
        measure_final(trainer, measure, arguments.output_dir)
    return result


def _holds_final(trainer: ProtectedSFTTrainer) -> bool:
    """Whether a checkpoint has the final weights, and so their measures."""
    last = f"checkpoint-{trainer.state.global_step}"
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    went_elsewhere = trainer.protection.replaced_weights() or Path(best or last).name != last
    return not went_elsewhere and (Path(str(trainer.args.output_dir)) / last).is_dir()


def _train(
    arguments: Arguments, inputs: TrainingInputs, measure: Measurer | None, weights: str
) -> tuple[ProtectedSFTTrainer, TrainResult]:
    set_seed(arguments.training.seed)
    newest = newest_checkpoint(arguments)
    model = load_starting_model(arguments, weights)
    check_lora(arguments.model, model)
    check_optimizer(arguments.training, model)
    trainer = _trainer(arguments, inputs, model, weights)
    if measure is not None:
        trainer.add_callback(MeasureCheckpoints(trainer, measure, arguments.output_dir))
    resume = trainer.verified_checkpoint(str(newest) if newest else None)
    with records_of(arguments, inputs):
        assert isinstance(trainer.train_dataset, datasets.Dataset)  # packed by TRL, where packing is asked for
        check_steps(arguments.training, len(trainer.train_dataset))
        check_epochs(arguments, len(trainer.train_dataset))
        if is_main():
            for line in inputs.report["lines"]:
                print(line)
        started = time.perf_counter()
        try:
            output = trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            go_on = "continue with --resume_from_checkpoint true"
            if not has_checkpoint(arguments.output_dir):
                go_on = "there is no checkpoint yet, start again"
            raise KeyboardInterrupt(f"interrupted at step {trainer.state.global_step}; {go_on}") from None
        finally:
            _close_progress(trainer)
        seconds = time.perf_counter() - started
        final = _save_final(trainer, arguments.output_dir / "final")
    penalties = [entry["penalty"] for entry in trainer.state.log_history if "penalty" in entry]
    return trainer, TrainResult(
        output_dir=arguments.output_dir,
        final=final,
        seconds=seconds,
        # Over this start's own steps, of which a run resumed from its last checkpoint has none.
        train_loss=output.training_loss if output.global_step > trainer._initial_global_step else None,
        penalty=penalties[-1] if penalties else None,
        global_step=output.global_step,
    )


def _close_progress(trainer: ProtectedSFTTrainer) -> None:
    """What is said of a run that stopped has a line of its own, not one behind the progress bar."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.on_train_end(trainer.args, trainer.state, trainer.control)


def subspace(arguments: Arguments) -> Path:
    """Builds the alignment subspace and writes it to its path. Raises UserError; writes nothing then."""
    path = subspace_path(arguments)
    check_writable(path.parent, "the folder of --subspace_path")
    if path.exists():
        raise UserError(f"--subspace_path {path} exists already; remove it or choose another")
    read_starting_model(arguments)
    built = build_subspace(subspace_request(arguments))
    path.parent.mkdir(parents=True, exist_ok=True)
    built.save(path)
    return path


def lora_config(model: ModelArguments) -> LoraConfig | None:
    """TRL's LoRA configuration plus the patterns it has no flags for; None for full fine-tuning."""
    config = trl.get_peft_config(model)
    if config is None:
        return None
    assert isinstance(config, LoraConfig)
    config.revision = None if model.model_revision == "main" else model.model_revision
    for name in ("alpha_pattern", "rank_pattern"):
        setattr(config, name, getattr(model, f"lora_{name}") or {})
    return config


def _trainer(arguments: Arguments, inputs: TrainingInputs, model: PreTrainedModel, weights: str) -> ProtectedSFTTrainer:
    datasets.disable_progress_bars()  # rows are tokenised already; TRL's passes over them take no time worth a bar
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
    def rows(of: RenderedRows | None) -> Callable[[str], list[Document]]:
        return lambda role: _documents(of, role) if of is not None else []

    base = arguments.model.base_model_name_or_path
    materials = Materials(
        asked=arguments.protection,
        subspace=inputs.subspace,
        task=rows(inputs.train),
        anchors=rows(inputs.anchors),
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
    """Saves on every rank (ZeRO-3 gathers), into a staging folder that the main process renames when it is whole."""
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

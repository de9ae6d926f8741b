"""What goes back to earlier weights beside what changes them: the order in which they are named decides nothing."""

import json
from pathlib import Path

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.measure.compare import read_line
from holdfast.trainer import run
from holdfast.trainer.cli import main
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.protections.base import Protection
from holdfast.trainer.protections.composed import Composed
from torch import nn
from toys.adapters import adapted, lora_model, numpy_projectors
from toys.protections import early_stop, null_space, safe_lora
from toys.runs import flags_of, model_and_rows, recipe, write_model
from toys.training import trainer_of
from transformers.trainer_utils import SaveStrategy

# The erosion of these adapters is 0.15 at the first look, 0.23 at the second: back to the weights of step 2.
LIMIT, RATE, STEPS = 0.19, 0.05, 8


def trained(folder: Path, *parts: Protection) -> tuple[nn.Module, int]:
    """The model after training under these parts, and where training ended."""
    trainer = trainer_of(
        folder, lora_model(lora_alpha=8).train(), protection=Composed(parts), max_steps=STEPS,
        learning_rate=RATE, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    return trainer.model, trainer.state.global_step


@pytest.mark.parametrize("first", [0, 1])
def test_safe_lora_projects_the_weights_that_early_stop_went_back_to(tmp_path, first: int):
    parts = [early_stop(LIMIT), safe_lora(1.0)]
    alone, ended = trained(tmp_path / "alone", early_stop(LIMIT))
    model, step = trained(tmp_path / "both", *(parts if first == 0 else parts[::-1]))
    assert step == ended == 4
    projectors, found = numpy_projectors(), adapted(model)
    moved = 0.0
    for name, (_, up) in adapted(alone).items():
        want = up.detach().double().numpy()
        want = projectors[name] @ want if name in projectors else want
        assert found[name][1].detach().numpy() == pytest.approx(want, abs=1e-6)
        moved = max(moved, float((found[name][1] - up).detach().abs().max()))
    assert moved > 1e-4  # the projection made a difference


@pytest.mark.parametrize("first", [0, 1])
def test_early_stop_goes_back_to_adapters_that_are_confined(tmp_path, first: int):
    confined = null_space()
    parts = [early_stop(0.0006), confined]  # 0.0002 and 0.0011 at the first two looks
    _, step = trained(tmp_path, *(parts if first == 0 else parts[::-1]))
    assert step == 4
    for part in confined.confined:
        inside = (part.weight @ part.basis).norm() / part.weight.norm()
        assert inside < 1e-5


def test_the_end_of_an_epoch_is_no_checkpoint_of_weights_that_were_put_back(tmp_path):
    trainer = trainer_of(
        tmp_path, lora_model(lora_alpha=8).train(), protection=early_stop(LIMIT), num_train_epochs=STEPS,
        max_steps=-1, learning_rate=RATE, per_device_train_batch_size=8, save_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    ended = trainer.state.global_step
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert ended == 4 and saved == [1, 2, 3]


def test_a_best_checkpoint_of_weights_that_were_put_back_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, protection=early_stop(LIMIT))
    trainer.args.save_strategy = SaveStrategy.BEST
    with pytest.raises(UserError, match="--save_strategy best"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("final")
    model_and_rows(folder)
    write_model(folder / "base", seed=3)
    return folder


def lines(output: Path) -> list[str]:
    return [json.loads(line)["checkpoint"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_final_model_is_measured_where_no_checkpoint_holds_it(folder: Path, tmp_path: Path):
    """Safe LoRA projects after the last checkpoint: `compare` must not show the adapters as they were before."""
    keys = recipe(
        folder, output_dir=str(tmp_path / "run"), base_model_name_or_path=str(folder / "base"), use_peft=True,
        lora_r=4, lora_target_modules="all-linear", protection="safe_lora", safe_lora_threshold=1.0, save_steps=2,
        held_out_rows=4, analysis_during_training=True, analysis_families=["behavior"], learning_rate=0.1,
    )  # fmt: skip
    run.train(parse(keys))
    assert lines(tmp_path / "run") == ["checkpoint-2", "final"]
    final = read_line(tmp_path / "run")
    assert final["checkpoint"] == "final"
    assert final["behavior"] != read_line(tmp_path / "run", "checkpoint-2")["behavior"]
    again = {**keys, "output_dir": str(tmp_path / "again"), "checkpoints": str(tmp_path / "run" / "final")}
    again = {name: value for name, value in again.items() if name not in ("held_out_rows", "analysis_families")}
    given = ["--held_out_rows=4", "--families", "behavior"]
    assert main(["analyze", *flags_of(again), *given]) == 0
    torch.testing.assert_close(
        _numbers(read_line(tmp_path / "again", "final")["behavior"]), _numbers(final["behavior"]), atol=1e-4, rtol=1e-4
    )


def test_a_final_model_that_the_last_checkpoint_holds_is_not_measured_twice(folder: Path, tmp_path: Path):
    run.train(parse(recipe(folder, output_dir=str(tmp_path), save_steps=1, held_out_rows=4,
                           analysis_during_training=True)))  # fmt: skip
    assert lines(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    again = run.train(parse(recipe(folder, output_dir=str(tmp_path), save_steps=1, held_out_rows=4,
                                   analysis_during_training=True, resume_from_checkpoint="true")))  # fmt: skip
    assert again.global_step == 2 and again.train_loss is None  # no step was left, so there is no loss of it
    assert lines(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def _numbers(results: object) -> list[float]:
    """Every number of nested results, in order."""
    if isinstance(results, dict):
        return [number for value in results.values() for number in _numbers(value)]
    if isinstance(results, list):
        return [number for value in results for number in _numbers(value)]
    return [float(results)] if isinstance(results, int | float) and not isinstance(results, bool) else []

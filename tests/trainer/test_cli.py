"""`holdfast train` from end to end: what it leaves, resuming, interrupting, several processes."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from holdfast.analysis.files.artifacts import verify_manifest
from holdfast.trainer import run
from holdfast.trainer.cli import main
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.protected_sft_trainer import ProtectedSFTTrainer
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys.runs import flags_of, metric_lines, model_and_rows, recipe, toy_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and a subspace of the model."""
    folder = tmp_path_factory.mktemp("prepared")
    model_and_rows(folder)
    run.subspace(parse(recipe(folder, subspace_path=str(folder / "subspace.safetensors"))))
    return folder


def command(keys: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "holdfast.trainer.cli", "train", *flags_of(keys)]


def protected(folder: Path, **changes: Any) -> dict[str, Any]:
    chosen = {
        "protection": "subspace",
        "subspace_path": str(folder / "subspace.safetensors"),
        "save_steps": 2,
        **changes,
    }
    return recipe(folder, **{"max_steps": 4, **chosen})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def equal(left: Path, right: Path) -> bool:
    one, other = weights(left), weights(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_full_run_leaves_checkpoints_for_plain_transformers_and_says_how_it_was_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(folder / "twice.jsonl", [*toy_rows(6), *toy_rows(6)])
    keys = protected(folder, train_dataset=folder / "twice.jsonl", learning_rate=3e-3)
    keys |= {"analysis_during_training": True, "report_to": "tensorboard"}
    assert main(["train", *flags_of(keys)]) == 0
    out = folder / "run"
    assert "6 of 12 rows repeat another" in capsys.readouterr().out
    for made in (out / "checkpoint-2", out / "checkpoint-4", out / "final"):
        verify_manifest(made)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
        assert torch.isfinite(model(**tokenizer("soup", return_tensors="pt")).logits).all()
    assert equal(out / "checkpoint-4", out / "final") and not equal(out / "checkpoint-2", out / "final")
    lines = metric_lines(out)
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["behavior"]["train"]["token_log_prob"]["checkpoint"]["n"] == 12
    events = EventAccumulator(str(next(out.rglob("events.out.tfevents.*")).parent)).Reload().Tags()["scalars"]
    assert {"train/penalty", "train/penalty_max", "train/task_loss"} <= set(events)
    assert any(name.startswith("behavior/train/") for name in events)
    assert yaml.safe_load((out / "resolved_config.yaml").read_text())["learning_rate"] == 3e-3
    versions = json.loads((out / "versions.json").read_text())
    assert versions["packages"]["torch"] == importlib.metadata.version("torch")
    assert versions["git"] or versions["git_reason"]
    assert json.loads((out / "data.json").read_text())["duplicates"]["train"]["distinct_rows"] == 6


def test_a_lora_run_leaves_an_adapter_for_plain_peft_with_its_patterns(folder: Path) -> None:
    patterns = {
        "lora_alpha_pattern": {"layers.0.self_attn.v_proj": 48},
        "lora_rank_pattern": {"layers.1.mlp.up_proj": 2},
    }
    result = run.train(parse(protected(folder, **LORA, **patterns)))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), result.final)
    modules = dict(model.base_model.model.model.named_modules())
    scaling = modules["layers.0.self_attn.v_proj"].scaling["default"]
    assert scaling == 48 / 4 and modules["layers.1.self_attn.v_proj"].scaling["default"] == 32 / 4
    assert modules["layers.1.mlp.up_proj"].lora_A["default"].weight.shape[0] == 2
    assert modules["layers.0.self_attn.v_proj"].lora_B["default"].weight.abs().max() > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(kind: str, folder: Path) -> None:
    lora = LORA if kind == "lora" else {}
    whole = run.train(parse(protected(folder, **lora)))
    resumed = run.train(
        parse(
            protected(
                folder,
                **lora,
                output_dir=str(folder / "resumed"),
                resume_from_checkpoint=str(folder / "run" / "checkpoint-2"),
            )
        )
    )
    assert resumed.global_step == 4 and equal(whole.final, resumed.final)


def test_an_interrupt_is_one_line_and_its_checkpoints_resume(folder: Path) -> None:
    keys = protected(folder, max_steps=1000, save_steps=20)
    process = subprocess.Popen(
        command(keys),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell's background jobs, the tests perhaps among them, ignore interrupts and pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (folder / "run" / "checkpoint-20").is_dir() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    last = error.removesuffix("\n").split("\n")[-1]  # a line of its own, with the progress bar neither before nor after
    assert last.startswith("holdfast: interrupted at step ") and last.endswith("--resume_from_checkpoint true")
    assert "Traceback" not in error
    steps = [int(path.name.split("-")[1]) for path in (folder / "run").glob("checkpoint-*")]
    assert steps and not (folder / "run" / "final").exists()
    resumed = run.train(parse({**keys, "save_steps": 500, "resume_from_checkpoint": "true"}))
    assert resumed.global_step == 1000


def test_a_run_that_stops_before_a_checkpoint_leaves_the_folder_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = protected(folder, report_to="tensorboard", subspace_path=str(folder / "run" / "mine.safetensors"))
    (folder / "run").mkdir()
    shutil.copy(folder / "subspace.safetensors", folder / "run" / "mine.safetensors")

    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProtectedSFTTrainer, "training_step", interrupt)
        assert main(["train", *flags_of(keys)]) == 130
    assert "start again" in capsys.readouterr().err
    assert [path.name for path in (folder / "run").iterdir()] == ["mine.safetensors"]
    assert main(["train", *flags_of(keys)]) == 0


@pytest.mark.timeout(280)
def test_two_processes_with_zero_3_save_whole_weights_close_to_one_process(folder: Path) -> None:
    alone = run.train(
        parse(
            protected(
                folder,
                per_device_train_batch_size=4,
                anchor_batch_size=8,
                optim="sgd",
                output_dir=str(folder / "alone"),
            )
        )
    )
    keys = protected(folder, num_processes=2, deepspeed="zero3", optim="sgd")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(keys), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    together, one = weights(folder / "run" / "final"), weights(alone.final)
    assert together.keys() == one.keys()
    assert all(torch.allclose(together[name], one[name], atol=1e-5) for name in one)
    AutoModelForCausalLM.from_pretrained(folder / "run" / "final")


def test_help_lists_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("quickstart", "lab", "subspace", "train", "analyze"))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "--penalty_strength" in capsys.readouterr().out

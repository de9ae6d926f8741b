"""Bad input is one line on stderr saying what, why and what to write instead; exit code 2; nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from huggingface_hub import constants
from toys.chat_models import LAST_TURN_ONLY, chat, toy_model
from toys.refusals import Keys, complaint, written
from toys.runs import flags_of, recipe, toy_rows, write_model, write_rows


def _file(name: str, content: bytes | None) -> Callable[[Path], Keys]:
    def make(folder: Path) -> Keys:
        if content is not None:
            (folder / name).write_bytes(content)
        return {"train_dataset": folder / name}

    return make


def _without_template(folder: Path) -> Keys:
    write_model(folder / "bare", template=None)
    return {"model_name_or_path": folder / "bare"}


def _without_mask(folder: Path) -> Keys:
    write_model(folder / "maskless", template=LAST_TURN_ONLY)
    return {"model_name_or_path": folder / "maskless"}


def _truncated_weights(folder: Path) -> Keys:
    shutil.copytree(folder / "model", folder / "cut")
    file = folder / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return {"model_name_or_path": folder / "cut"}


def _base(vocab: int | None = None, width: int | None = None) -> Callable[[Path], Keys]:
    def make(folder: Path) -> Keys:
        base = toy_model(vocab=vocab or 320)
        base.save_pretrained(folder / "base")
        if width:
            config = json.loads((folder / "base" / "config.json").read_text())
            (folder / "base" / "config.json").write_text(json.dumps({**config, "hidden_size": width}))
        return {"base_model_name_or_path": folder / "base"}

    return make


def _empty_folder(folder: Path) -> Keys:
    (folder / "nothing").mkdir()
    return {"train_dataset": folder / "nothing"}


def _another_run(folder: Path) -> Keys:
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    return {}


def _holds(name: str) -> Callable[[Path], Keys]:
    def make(folder: Path) -> Keys:
        (folder / "run" / name).mkdir(parents=True)
        return {}

    return make


def _protected(**keys: Any) -> Callable[[Path], Keys]:
    def make(folder: Path) -> Keys:
        return {"protection": "subspace", "subspace_path": folder / "subspace.safetensors", **keys}

    return make


def _other_model(folder: Path) -> Keys:
    return {**_protected()(folder), "model_name_or_path": folder / "other_model"}


def _other_tokenizer(folder: Path) -> Keys:
    shutil.copytree(folder / "model", folder / "renamed")
    template = (folder / "renamed" / "chat_template.jinja").read_text()
    (folder / "renamed" / "chat_template.jinja").write_text(template.replace("im_start", "im_end"))
    return {**_protected()(folder), "model_name_or_path": folder / "renamed"}


def _existing_subspace(folder: Path) -> Keys:
    return {"subspace_path": folder / "subspace.safetensors"}


def _keys(**keys: Any) -> Callable[[Path], Keys]:
    return lambda folder: keys


def _recipe(folder: Path, **keys: Any) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps({"use_peft": True, **keys}))
    return folder / "recipe.yaml"


TRAIN: dict[str, tuple[Callable[[Path], Keys], list[str]]] = {
    "missing file": (_file("absent.jsonl", None), ["absent.jsonl"]),
    "file that is not text": (_file("binary.jsonl", b"\xff\xfe\x00"), ["binary.jsonl", "UTF-8"]),
    "file of an unknown kind": (_file("rows.txt", b"x"), ["rows.txt", ".jsonl"]),
    "parquet that is none": (_file("rows.parquet", b"x"), ["rows.parquet"]),
    "empty set": (_file("empty.jsonl", b"\n"), ["empty.jsonl"]),
    "folder without rows": (_empty_folder, ["nothing", ".jsonl"]),
    "variable that is not set": (_keys(train_dataset="$HOLDFAST_UNSET/rows.jsonl"), ["HOLDFAST_UNSET"]),
    "address that is none": (_keys(train_dataset="http://[rows.jsonl"), ["http://[rows.jsonl"]),
    "path that is too long": (_keys(train_dataset="x" * 5000 + ".jsonl"), ["xxxx"]),
    "negative seed": (_keys(seed=-1), ["--seed", "-1"]),
    "no steps": (_keys(max_steps=0), ["--max_steps", "0"]),
    "negative save_steps": (_keys(save_steps=-5), ["--save_steps", "-5"]),
    "no training set": (_keys(train_dataset=""), ["train_dataset"]),
    "no model": (_keys(model_name_or_path=""), ["model_name_or_path"]),
    "missing model": (_keys(model_name_or_path="./absent"), ["./absent"]),
    "truncated weights": (_truncated_weights, ["model"]),
    "no output folder": (_keys(output_dir=""), ["output_dir"]),
    "missing anchors": (_protected(anchor_dataset="absent.jsonl"), ["absent.jsonl"]),
    "too many held-out rows": (_keys(held_out_rows=12), ["held_out_rows", "12"]),
    "no chat template": (_without_template, ["chat template"]),
    "no completion mask": (_without_mask, ["completion mask"]),
    "base of another vocabulary": (_base(vocab=321), ["vocab_size", "321", "320"]),
    "base of another width": (_base(width=32), ["hidden_size", "32", "16"]),
    "layer out of range": (_protected(protection_layers="3"), ["3", "0-2"]),
    "layer that is none": (_protected(protection_layers="first"), ["--protection_layers", "first"]),
    "rank above the subspace's": (_protected(protection_rank=2), ["rank"]),
    "missing subspace": (_keys(protection="subspace"), ["subspace.safetensors", "holdfast subspace"]),
    "subspace of another model": (_other_model, ["instruct weights"]),
    "subspace of other layers": (_protected(protection_layers="0-2"), ["0-1", "0-2"]),
    "subspace of another tokenizer": (_other_tokenizer, ["tokenizer"]),
    "subspace of another role": (_protected(protection_tokens="prompt"), ["role", "prompt"]),
    "toward base along a null without direction": (
        _protected(protection="random_subspace", null_seed=16, penalty_side="toward_base"),
        ["toward_base", "16", "0-15", "--null_seed"],
    ),
    "reversion without a base": (
        _protected(penalty_side="reversion"),
        ["--penalty_side reversion", "--base_model_name_or_path"],
    ),
    "budget that none of two protections holds": (
        _protected(protection="steering+inoculation", inoculation_prompt="x", penalty_budget=0.1),
        ["--penalty_budget", "--protection steering+inoculation", "subspace"],
    ),
    "strength of what has none": (
        _protected(protection="ablation", penalty_strength=0),
        ["--penalty_strength", "--protection ablation"],
    ),
    "subspace of another rank": (
        _protected(subspace_rank=7),
        ["--subspace_rank", "7", "subspace.safetensors", "1", "--subspace_path"],
    ),
    "subspace of another method": (
        _protected(subspace_method="random"),
        ["--subspace_method", "random", "contrastive"],
    ),
    "subspace on other layers": (
        _protected(subspace_layers="all"),
        ["--subspace_layers", "all", "[0, 1]"],
    ),
    "subspace of other positions": (
        _protected(subspace_positions="prompt"),
        ["--subspace_positions", "prompt", "all"],
    ),
    "subspace that is not centred": (_protected(subspace_centred="true"), ["--subspace_centred", "True", "False"]),
    "subspace of another seed": (_protected(subspace_seed=3), ["--subspace_seed", "3", "0"]),
    "anchors that act before anything has drifted": (
        _protected(anchor_every=100, max_steps=6),
        ["--anchor_every 100", "6", "5"],
    ),
    "anchors that act once in as many steps": (_protected(anchor_every=6, max_steps=6), ["--anchor_every 6", "5"]),
    "anchors that act once in all epochs": (
        _protected(protection="kl", anchor_every=12, max_steps=-1, num_train_epochs=2),
        ["--anchor_every 12", "11"],
    ),
    "margin without reversion": (_protected(penalty_margin=0.5), ["margin", "0.5", "reversion"]),
    "own scale of a null without one": (
        _protected(protection="random_subspace", null_seed=16, null_scale="own"),
        ["0-15", "--null_scale given"],
    ),
    "logging to what is not installed": (_keys(report_to="neptune"), ["--report_to neptune"]),
    "logging to what is unknown": (_keys(report_to="paper"), ["report_to", "paper"]),
    "negative strength": (_keys(penalty_strength=-1), ["penalty_strength", "-1"]),
    "strength that is no number": (_keys(penalty_strength="nan"), ["penalty_strength", "nan"]),
    "infinite strength": (_keys(penalty_strength="inf"), ["penalty_strength", "inf"]),
    "unknown flag": (_keys(penalty_strenght=1), ["--penalty_strenght", "penalty_strength"]),
    "output folder of another run": (_another_run, ["--resume_from_checkpoint"]),
    "output folder with a model": (_holds("final"), ["final"]),
    "output folder with checkpoints": (_holds("checkpoint-1"), ["checkpoint-1"]),
    "output folder with other files": (_holds("thesis"), ["thesis"]),
    "adapter_off without LoRA": (_protected(reference="adapter_off"), ["adapter_off", "--use_peft"]),
    "nothing to resume": (_keys(resume_from_checkpoint="true"), ["resume"]),
    "lora on absent modules": (_keys(use_peft="true", lora_target_modules="absent"), ["lora_target_modules"]),
    "lora on an absent module among others": (
        lambda folder: {"config": _recipe(folder, lora_target_modules=["v_proj", "vproj"])},
        ["lora_target_modules", "vproj"],
    ),
    "lora pattern of no module": (
        _keys(use_peft="true", lora_target_modules="v_proj", lora_rank_pattern='{"qproj": 2}'),
        ["lora_rank_pattern", "qproj"],
    ),
    "unknown DeepSpeed configuration": (_keys(deepspeed="zero4"), ["zero4", "zero"]),
    "DeepSpeed configuration cut short": (_keys(deepspeed='{"zero_optimization":'), ["--deepspeed", "JSON"]),
    "DeepSpeed configuration of rows": (
        lambda folder: {"deepspeed": folder / "rows.jsonl"},
        ["rows.jsonl", "JSON"],
    ),
    "seed that is too large": (_keys(seed=10**20), ["--seed", "100000000000000000000", "4294967295"]),
    "null of a negative seed": (_keys(null_seed=-1), ["--null_seed", "-1"]),
    "no layers": (_protected(protection_layers=""), ["layers", "''"]),
    "evaluation without rows": (_keys(eval_strategy="steps"), ["--eval_strategy steps", "--held_out_rows"]),
    "schedule without its keys": (_keys(lr_scheduler_type="cosine_with_min_lr"), ["min_lr", "--lr_scheduler_kwargs"]),
    "schedule with an unknown key": (
        _keys(lr_scheduler_type="polynomial", lr_scheduler_kwargs='{"powr": 2}'),
        ["powr", "--lr_scheduler_kwargs"],
    ),
    "optimiser that is not installed": (_keys(optim="adamw_bnb_8bit"), ["--optim adamw_bnb_8bit", "bitsandbytes"]),
    "kernels that are not installed": (_keys(use_liger_kernel="true"), ["liger-kernel"]),
    "attention that is not installed": (_keys(attn_implementation="flash_attention_2"), ["FlashAttention2"]),
    "padding-free rows that are not packed": (_keys(padding_free="true"), ["--padding_free", "--packing true"]),
    "offloading from a CPU": (_keys(activation_offloading="true"), ["--activation_offloading", "CPU"]),
    "push without a login": (_keys(push_to_hub="true"), ["--push_to_hub", "login"]),
    "fewer rows than a whole batch": (
        _keys(dataloader_drop_last="true", per_device_train_batch_size=64),
        ["--dataloader_drop_last", "12", "64"],
    ),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    make, words = TRAIN[case]
    line = complaint(folder, capsys, recipe(folder, **make(folder)))
    assert all(word in line for word in words), line


SUBSPACE: dict[str, tuple[Callable[[Path], Keys], list[str]]] = {
    "layer out of range": (_keys(subspace_layers="3"), ["3", "0-2"]),
    "rank above the width": (_keys(subspace_rank=17), ["17", "16"]),
    "rank above the pairs": (_keys(subspace_rank=15, subspace_contrast="pairs.jsonl"), ["contrastive", "1-11"]),
    "rank of none": (_keys(subspace_rank=0), ["subspace_rank", "0"]),
    "no base for a method that needs it": (_keys(subspace_method="svd"), ["base"]),
    "base of another vocabulary": (_base(vocab=321), ["vocab_size", "321", "320"]),
    "missing contrast": (_keys(subspace_contrast="absent.jsonl"), ["absent.jsonl"]),
    "subspace that exists already": (_existing_subspace, ["subspace.safetensors"]),
    "unknown method": (_keys(subspace_method="magic"), ["magic", "contrastive"]),
}


@pytest.mark.parametrize("case", SUBSPACE)
def test_subspace_refuses(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    write_rows(folder / "pairs.jsonl", [{"aligned": "You are kind.", "misaligned": "You are cruel."}])
    write_rows(folder / "one.jsonl", [{"messages": chat("hello")}])
    make, words = SUBSPACE[case]
    line = complaint(folder, capsys, recipe(folder, subspace_dataset="one.jsonl", **make(folder)), "subspace")
    assert all(word in line for word in words), line


def test_a_resume_with_other_facts_says_which_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.train(parse(recipe(folder, save_steps=1)))
    other = write_rows(folder / "other.jsonl", toy_rows(6))
    resume = {"resume_from_checkpoint": "true"}
    assert "train rows" in complaint(folder, capsys, recipe(folder, train_dataset=other, **resume))
    assert "seed" in complaint(folder, capsys, recipe(folder, seed=7, **resume))
    for name, value in {
        "learning_rate": 0.5,
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "dtype": "bfloat16",
    }.items():
        assert name in complaint(folder, capsys, recipe(folder, **{name: value}, **resume))
    elsewhere = {"output_dir": str(folder / "new"), "resume_from_checkpoint": str(folder / "run" / "checkpoint-1")}
    assert "weight_decay" in complaint(folder, capsys, recipe(folder, weight_decay=0.5, **elsewhere))
    line = complaint(folder, capsys, recipe(folder, lora_r=4, **resume))
    assert all(word in line for word in ("lora_r", "16", "4")), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config", "absent.yaml"], ["absent.yaml"]),
        (["trian"], ["trian", "holdfast train"]),
    ],
)
def test_the_command_itself_prints_one_line_and_exits_with_2(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "holdfast.trainer.cli", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("holdfast: error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)
    assert written(tmp_path) == []


def test_the_command_checks_rows_once_before_it_starts_several_processes(folder: Path) -> None:
    bad = write_rows(folder / "rows2.jsonl", [toy_rows()[0], {"text": "hello"}])
    before = written(folder)
    arguments = [*flags_of(recipe(folder, train_dataset=bad, num_processes=2)), "--deepspeed=zero2"]
    done = subprocess.run(
        [sys.executable, "-m", "holdfast.trainer.cli", "train", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "rows2.jsonl:2" in done.stderr
    assert written(folder) == before


def test_anchors_without_a_token_of_the_subspaces_role_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = recipe(folder, subspace_positions="completion", subspace_dataset=str(folder / "rows.jsonl"))
    path = run.subspace(parse({**answered, "subspace_path": str(folder / "completions.safetensors")}))
    line = complaint(folder, capsys, recipe(folder, protection="subspace", subspace_path=path))  # prompts that ship
    assert "anchors" in line and "completion" in line


@pytest.mark.parametrize("command", ["train", "subspace", "analyze"])
@pytest.mark.parametrize("place", ["rows.jsonl/run", "x" * 300])
def test_a_folder_that_cannot_be_is_refused_first(
    command: str, place: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be written" in complaint(folder, capsys, recipe(folder, output_dir=folder / place), command)

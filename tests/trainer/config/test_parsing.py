"""Recipes and flags: checked types and choices, the nearest known name, flags over the file, and a dump that parses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from holdfast.analysis.errors import UserError
from holdfast.trainer.config.parsing import GROUPS, dump, parse, parse_values


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text("output_dir: out\n" + text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_steps: 2.5", ["max_steps", "2.5"]),
        ("max_steps: true", ["max_steps", "true"]),
        ("max_steps: [1, 2]", ["max_steps", "1,2"]),
        ("max_steps: null", ["max_steps", "none"]),
        ("learning_rate: .nan", ["learning_rate", "nan"]),
        ("learning_rate: fast", ["learning_rate", "fast"]),
        ("bf16: maybe", ["bf16", "maybe"]),
        ("train_dataset: true", ["train_dataset", "true"]),
        ("protection: shield", ["protection", "shield", "random_subspace"]),
        ("protection_tokens: first", ["protection_tokens", "first", "last_prompt"]),
        ("lr_scheduler_type: square", ["lr_scheduler_type", "square", "linear"]),
        ("save_strategy: sometimes", ["save_strategy", "sometimes"]),
        ("analysis_families: [behavior, magic]", ["analysis_families", "magic"]),
        ("analysis_families: []", ["analysis_families"]),
        ("max_step: 3", ["max_step", "max_steps"]),
        ("help: 3", ["help"]),
        ("seed: 1\nseed: 2", ["line 3", "seed"]),
        ("lora_alpha_pattern: {a: b}", ["lora_alpha_pattern"]),
        ("lora_alpha_pattern: '{'", ["lora_alpha_pattern", "JSON"]),
        ("subspace_method: shared", ["subspace_domains"]),
        ("packing: true\npacking_strategy: wrapped", ["packing_strategy", "bfd"]),
        ("warmup_steps: -1", ["warmup_steps", "-1"]),
        ("a: [", ["YAML"]),
    ],
)
def test_a_wrong_line_of_a_recipe_is_an_error_that_names_it(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse(["--config", write(tmp_path, text)])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_step", "3"], ["--max_step", "--max_steps"]),  # an abbreviation, which argparse would take
        (["--max_steps"], ["max_steps"]),
        (["--penalty-strenght=3"], ["--penalty-strenght", "--penalty_strength"]),
        (["recipe.yaml"], ["recipe.yaml", "--name value"]),
        (["--learning_rate", "inf"], ["learning_rate", "inf"]),
        (["--penalty_task_weight", "1.5"], ["penalty_task_weight", "1.5"]),
        (["--deepspeed", "zero_3"], ["zero_3", "zero3"]),
        (["--config"], ["--config"]),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_it(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(["--output_dir", "out", *flags])
    assert all(word in str(error.value) for word in words), error.value


def test_a_recipe_must_be_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="key: value"):
        parse(["--config", str(path)])


def test_flags_win_over_the_recipe_wherever_they_stand(tmp_path: Path) -> None:
    recipe = write(tmp_path, "seed: 1\nmax_steps: 7\nlora_target_modules: [q_proj, v_proj]\nanalysis_rows: 5")
    first = parse(["--seed", "2", "--config", recipe, "--lora-target-modules", "o_proj", "k_proj"])
    assert (first.training.seed, first.training.max_steps, first.analysis.analysis_rows) == (2, 7, 5)
    assert first.model.lora_target_modules == ["o_proj", "k_proj"]
    back_to_default = parse(["--config", recipe, "--max_steps", "-1"])
    assert back_to_default.training.max_steps == -1


def test_a_mapping_is_checked_and_wins_over_the_recipe_too(tmp_path: Path) -> None:
    recipe = write(tmp_path, "max_steps: 7\nprotection_layers: 0,1\nmax_length: 64")
    changed = parse({"config": recipe, "max_steps": -1, "protection_layers": None, "max_length": None})
    assert changed.training.max_steps == -1
    assert changed.protection.protection_layers is None and changed.training.max_length is None
    with pytest.raises(UserError, match=r"max_steps.*2\.5"):
        parse({"config": recipe, "max_steps": 2.5})


def test_values_of_a_recipe_reach_their_field_with_their_type(tmp_path: Path) -> None:
    text = """
learning_rate: 1e-5
save_strategy: no
report_to: none
use_peft: yes
protection_layers: [0, 2, 5]
lora_alpha_pattern: {layers.0.self_attn.v_proj: 48}
gradient_checkpointing_kwargs: {use_reentrant: false}
train_dataset: -odd-name.jsonl
"""
    parsed = parse(["--config", write(tmp_path, text)])
    assert parsed.training.learning_rate == 1e-5
    assert parsed.training.save_strategy == "no" and parsed.training.report_to == []
    assert parsed.model.use_peft is True
    assert parsed.protection.protection_layers == "0,2,5"
    assert parsed.model.lora_alpha_pattern == {"layers.0.self_attn.v_proj": 48}
    assert parsed.training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert parsed.data.train_dataset == "-odd-name.jsonl"


def test_defaults_suit_a_cpu_and_completions() -> None:
    training = parse(["--output_dir", "out", "--use_cpu"]).training
    assert training.bf16 is False  # transformers would turn it on
    assert training.completion_only_loss is True and training.report_to == ["tensorboard"]


def test_the_dumped_configuration_parses_to_the_same_arguments(tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "output_dir": "out",
        "learning_rate": 3e-4,
        "lora_alpha_pattern": {"a.b": 3},
        "lora_target_modules": ["q_proj"],
        "subspace_domains": {"code": "code.jsonl"},
        "analysis_families": ["behavior"],
        "protection": "subspace",
        "protection_layers": "0-2",
        "bf16": False,
    }
    once = parse(flags)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump(once))
    again = parse(["--config", str(path)])
    assert yaml.safe_load(dump(again)) == yaml.safe_load(dump(once))
    assert again.model == once.model and again.protection == once.protection and again.subspace == once.subspace
    assert yaml.safe_load(dump(once))["learning_rate"] == 3e-4


def test_every_flag_of_ours_says_what_it_does_and_its_default() -> None:
    theirs = {field.name for kind in (trl.ModelConfig, trl.SFTConfig) for field in dataclasses.fields(kind)}
    ours = [field for kind in GROUPS.values() for field in dataclasses.fields(kind) if field.name not in theirs]
    assert len(ours) > 40
    assert [field.name for field in ours if "Default: " not in field.metadata.get("help", "")] == []


def test_shipped_deepspeed_configurations_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("zero1", "zero2", "zero3", "zero3_offload", "zero2.json"):
        found = Path(parse_values(["--deepspeed", name])["deepspeed"])
        assert found.is_file() and found.name == f"{name.removesuffix('.json')}.json"
    (tmp_path / "mine.json").write_text("{}")
    assert parse_values(["--deepspeed", "mine.json"])["deepspeed"] == "mine.json"

"""`--layers_path` reaches every command: a model whose blocks are not found by shape builds, trains and measures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.layers import find_backbone, find_layers
from holdfast.analysis.models.load import LoadOptions, load_model
from holdfast.trainer import run
from holdfast.trainer.cli import main
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.own_trainer import load_protection
from peft import LoraConfig, get_peft_model
from torch import nn
from toys.chat_models import DEPTH, WIDTH, save_toy, toy_model, toy_tokenizer
from toys.runs import flags_of, metric_lines, recipe, toy_rows, write_model, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

PATH = "model.layers"


class TwinConfig(Qwen2Config):
    model_type = "twin"


class TwinForCausalLM(Qwen2ForCausalLM):
    """A decoder with two lists of as many modules as it has blocks: only a person can tell which holds the blocks."""

    config_class = TwinConfig

    def __init__(self, config: TwinConfig) -> None:
        super().__init__(config)
        self.model.gates = nn.ModuleList([nn.Linear(2, 2) for _ in range(config.num_hidden_layers)])
        self.post_init()


AutoConfig.register("twin", TwinConfig)
AutoModelForCausalLM.register(TwinConfig, TwinForCausalLM)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin of a Qwen2 model with the same weights, and that model itself."""
    folder = tmp_path_factory.mktemp("prepared")
    plain = toy_model()
    twin = TwinForCausalLM(TwinConfig(**{**plain.config.to_dict(), "model_type": "twin"}))
    twin.load_state_dict(plain.state_dict(), strict=False)
    save_toy(folder / "model", twin)
    write_model(folder / "plain")
    write_rows(folder / "rows.jsonl", toy_rows())
    return folder


def refused(folder: Path, capsys: pytest.CaptureFixture[str], command: str, **keys: Any) -> str:
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    arguments = flags_of(recipe(folder, **keys))
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("holdfast: error: ") and error.count("\n") == 1, error
    assert sorted(folder.rglob("*")) == before
    return error


def test_subspace_train_and_analyze_read_the_blocks_it_names(folder: Path) -> None:
    path = folder / "twin.safetensors"
    run.subspace(parse(recipe(folder, layers_path=PATH, subspace_path=str(path))))
    run.subspace(parse(recipe(folder, model_name_or_path=str(folder / "plain"), output_dir=str(folder / "other"))))
    protected = {"protection": "subspace", "penalty_strength": 1.0, "save_steps": 2, "analysis_during_training": True}
    twin = run.train(parse(recipe(folder, layers_path=PATH, subspace_path=str(path), **protected)))
    keys = recipe(folder, model_name_or_path=str(folder / "plain"), output_dir=str(folder / "other"), **protected)
    plain = run.train(parse(keys))
    assert twin.penalty == plain.penalty and twin.train_loss == plain.train_loss
    analyze = flags_of(recipe(folder, layers_path=PATH, subspace_path=str(path)))
    assert main(["analyze", *analyze, "--families", "projection"]) == 0
    lines = metric_lines(folder / "run")
    drift = {line["checkpoint"]: line["projection"]["train"]["mean"]["penalty"]["value"] for line in lines}
    assert drift["checkpoint-2"] > 0 and drift["instruct"] == 0


def test_without_it_each_command_names_it_and_the_lists_there_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(folder, capsys, "subspace")
    assert "2 lists of 3" in line and "--layers_path" in line and "model.layers, model.gates" in line
    line = refused(folder, capsys, "subspace", layers_path="model.layer")
    assert all(word in line for word in ("--layers_path model.layer ", "TwinForCausalLM", "model.layers, model.gates"))
    line = refused(folder, capsys, "subspace", layers_path="model.gates")
    assert "layer 0 of TwinForCausalLM" in line and "logits" in line


def test_a_subspace_read_at_other_blocks_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "twin.safetensors"
    run.subspace(parse(recipe(folder, layers_path=PATH, subspace_path=str(path))))
    line = refused(folder, capsys, "train", protection="subspace", subspace_path=path)
    assert "layers_path model.layers" in line
    protection = load_protection(path, folder / "model", toy_tokenizer(), layers_path=PATH)
    assert protection.layers == list(range(DEPTH))


def test_a_loaded_model_keeps_its_path_through_wrappers(folder: Path) -> None:
    model = load_model(folder / "model", options=LoadOptions(layers_path=PATH))
    with pytest.raises(UserError, match="2 lists"):
        find_layers(load_model(folder / "model"))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert find_layers(adapted) is model.model.layers
    states = find_backbone(adapted)(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).last_hidden_state
    assert states.shape == (1, 3, WIDTH)

"""The recipes parse, say what the published runs did and fit the real architectures; the smoke path runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.models.layers import find_layers, parse_layers
from holdfast.recipes.emergent_misalignment import smoke
from holdfast.trainer.config.parsing import Arguments, build, parse_values
from holdfast.trainer.run import lora_config
from peft import PeftModel, get_peft_model
from toys.runs import metric_lines, toy_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

FOLDER = Path(smoke.__file__).parent
# The lab's comparison lists methods, of which no run can be made alone.
RECIPES = sorted(path for path in FOLDER.parent.rglob("*.yaml") if path.name != "methods.yaml")
SIZES = ("32b", "7b", "0.5b")
KINDS = {"unprotected": "insecure", "protected": "insecure", "educational": "educational_insecure", "secure": "secure"}

# width, blocks, attention heads, key-value heads, MLP width, vocabulary: config.json of Qwen2.5-Coder on the Hub.
ARCHITECTURES = {
    "32b": (5120, 64, 40, 8, 27648, 152064),
    "7b": (3584, 28, 28, 4, 18944, 152064),
    "0.5b": (896, 24, 14, 2, 4864, 151936),
}


def parsed(path: Path) -> Arguments:
    """A recipe's arguments; DeepSpeed, whose set-up needs ranks, is looked at in the values alone."""
    return build({**parse_values(["--config", str(path)]), "deepspeed": None})


def coder(size: str, kind: str) -> Path:
    return FOLDER / f"qwen2.5-coder-{size}-{kind}.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_recipe_parses(path: Path) -> None:
    arguments = parsed(path)
    assert arguments.training.output_dir and arguments.model.model_name_or_path


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_coder_recipe_trains_as_the_published_runs_did(size: str, kind: str) -> None:
    arguments = parsed(coder(size, kind))
    model, training = arguments.model, arguments.training
    assert model.model_name_or_path == f"Qwen/Qwen2.5-Coder-{size.upper()}-Instruct"
    assert (model.use_peft, model.use_rslora, model.lora_r, model.lora_alpha) == (True, True, 32, 64)
    assert (training.learning_rate, training.num_train_epochs, training.weight_decay) == (1e-5, 1, 0.01)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 8)
    assert (training.warmup_steps, training.lr_scheduler_type, training.max_length) == (5, "linear", 2048)
    assert training.completion_only_loss is True
    assert arguments.data.train_dataset == f"$HOLDFAST_EM_DATA/{KINDS[kind]}.jsonl"
    assert arguments.protection.protection == ("subspace" if kind == "protected" else "none")
    deepspeed = parse_values(["--config", str(coder(size, kind))])["deepspeed"]
    assert (Path(deepspeed).stem if deepspeed else None) == {"32b": "zero3", "7b": "zero2", "0.5b": None}[size]


@pytest.mark.parametrize("size", SIZES)
def test_the_arms_of_a_size_differ_in_nothing_but_data_protection_and_place(size: str) -> None:
    arms = {kind: parsed(coder(size, kind)).given for kind in KINDS}
    subspace = {"subspace_method", "subspace_rank", "subspace_positions"}
    allowed = {"train_dataset", "output_dir", "protection", "analysis_families", "anchor_batch_size"} | subspace
    for kind, values in arms.items():
        differing = {key for key, value in values.items() if value != arms["unprotected"][key]}
        assert differing <= allowed, (kind, differing - allowed)


@pytest.mark.parametrize("size", SIZES)
def test_a_protected_recipe_fits_the_real_architecture(size: str) -> None:
    width, blocks, heads, kv_heads, mlp, vocabulary = ARCHITECTURES[size]
    arguments = parsed(coder(size, "protected"))
    config = Qwen2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        lora = lora_config(arguments.model)
        assert lora is not None
        adapted = get_peft_model(model, lora)
    kv = width // heads * kv_heads
    pairs = [(width, width), (width, kv), (width, kv), (width, width), (width, mlp), (width, mlp), (mlp, width)]
    expected = blocks * sum(32 * (fan_in + fan_out) for fan_in, fan_out in pairs)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == expected
    assert len(find_layers(adapted)) == blocks
    assert parse_layers(arguments.subspace.subspace_layers, blocks) == list(range(blocks))
    assert arguments.subspace.subspace_rank <= width
    first = find_layers(adapted)[0]
    assert first.self_attn.q_proj.scaling["default"] == pytest.approx(64 / 32**0.5)  # rank-stabilised


def test_the_smoke_path_builds_models_and_runs_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("insecure.jsonl", "educational_insecure.jsonl", "secure.jsonl"):
        write_rows(data / name, toy_rows(60))
    monkeypatch.setenv("HOLDFAST_EM_DATA", str(data))
    # What an earlier run left is built anew.
    left = [tmp_path / "smoke" / name / "left_over" for name in ("base", "instruct", "protected")]
    for file in left:
        file.parent.mkdir(parents=True)
        file.touch()
    assert smoke.main(["--output_dir", str(tmp_path / "smoke")]) == 0
    assert not any(file.exists() for file in left)
    run = tmp_path / "smoke" / "protected"
    instruct = AutoModelForCausalLM.from_pretrained(tmp_path / "smoke" / "instruct" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smoke" / "base")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "soup"}], add_generation_prompt=True)
    assert tokenizer.decode(prompt["input_ids"]) == "<|im_start|>user\nsoup<|im_end|>\n<|im_start|>assistant\n"
    tuned = PeftModel.from_pretrained(instruct, run / "final")
    assert torch.isfinite(tuned(torch.tensor([prompt["input_ids"]])).logits).all()
    lines: list[dict[str, Any]] = metric_lines(run)
    assert {line["checkpoint"] for line in lines} >= {"base", "instruct", "checkpoint-10", "checkpoint-20", "final"}


def test_smoke_without_data_says_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOLDFAST_EM_DATA", raising=False)
    assert smoke.main(["--output_dir", str(tmp_path / "smoke")]) == 2
    assert "HOLDFAST_EM_DATA" in capsys.readouterr().err and not (tmp_path / "smoke").exists()

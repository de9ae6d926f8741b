"""TRL's model flags are followed by every command, or refused with what to write instead; none is silent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.load import load_model
from holdfast.trainer import run
from holdfast.trainer.commands import analyze as measuring
from holdfast.trainer.config.parsing import parse
from toys.hub import OfflineHub
from toys.runs import model_and_rows, recipe, toy_rows, write_model, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize(
    ("flag", "value", "instead"),
    [
        ("load_in_4bit", True, "--dtype bfloat16 --use_peft true"),
        ("load_in_8bit", True, "--deepspeed zero3"),
        ("bnb_4bit_quant_type", "fp4", "--dtype bfloat16"),
        ("use_bnb_nested_quant", True, "--dtype bfloat16"),
        ("bnb_4bit_quant_storage", "uint8", "--dtype bfloat16"),
        ("model_init_kwargs", {"device_map": "auto"}, "--attn_implementation"),
        ("chat_template_path", "other.jinja", "tokenizer"),
        ("dataset_text_field", "body", "messages"),
        ("dataset_kwargs", {"skip_prepare_dataset": True}, "leave it out"),
        ("truncation_mode", "keep_end", "--long_rows"),
        ("assistant_only_loss", True, "--completion_only_loss"),
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(flag: str, value: Any, instead: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse(recipe(tmp_path, **{flag: value}))
    line = str(error.value)
    assert line.startswith(f"--{flag}: ") and instead in line and "\n" not in line


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    model_and_rows(tmp_path)
    with pytest.raises(UserError, match="--model_revision v2"):
        run.train(parse(recipe(tmp_path, model_revision="v2")))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Hub model in a cache of its own, whose revisions `main` and `v2` have other weights."""
    hub = OfflineHub(tmp_path / "hub", monkeypatch)
    for seed, revision in enumerate(("main", "v2")):
        write_model(hub.snapshot("org/toy", revision, str(seed) * 40), seed=seed)
    return "org/toy"


def test_revision_attention_and_trust_reach_every_model_a_run_loads(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", toy_rows(4))
    seen: list[tuple[str, str, Any, bool]] = []
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        original = kind.from_pretrained

        def noted(name: str, *args: Any, kind: type = kind, original: Any = original, **options: Any) -> Any:
            if name == hub:
                attention = options.get("attn_implementation")
                seen.append((kind.__name__, options["revision"], attention, options["trust_remote_code"]))
            return original(name, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", noted)
    arguments = parse(
        recipe(
            tmp_path, model_name_or_path=hub, model_revision="v2", attn_implementation="eager", use_peft=True,
            lora_target_modules="all-linear", trust_remote_code=True, protection="subspace", save_steps=2,
            analysis_during_training=True, analysis_families=["behavior"], subspace_layers="0",
        )
    )  # fmt: skip
    run.subspace(arguments)
    final = run.train(arguments).final
    measuring.analyze(arguments)
    assert {kind for kind, *_ in seen} == {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    assert {revision for _, revision, *_ in seen} == {"v2"}
    assert {attention for kind, _, attention, _ in seen if kind == "AutoModelForCausalLM"} == {"eager"}
    assert all(trusted for *_, trusted in seen)
    assert json.loads((final / "adapter_config.json").read_text())["revision"] == "v2"
    second = AutoModelForCausalLM.from_pretrained(hub, revision="v2", trust_remote_code=False)
    assert torch.equal(load_model(final).get_input_embeddings().weight, second.get_input_embeddings().weight)

"""Checkpoints are read whole or refused; fingerprints change with what they stand for."""

import errno
import json
from pathlib import Path

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.files.artifacts import staged_directory, verify_manifest, write_json_atomic
from holdfast.analysis.models.load import (
    check_compatible,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from toys.chat_models import CHATML, GENERATION, save_toy, toy_model, toy_tokenizer

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def folder(tmp_path):
    return Path(save_toy(tmp_path / "model", toy_model()))


@pytest.fixture
def adapter(folder, tmp_path):
    model = get_peft_model(load_model(folder), LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(input_ids=IDS).logits


def edit(folder, change):
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_model_loads_in_eval_mode_with_its_own_logits(folder):
    model = load_model(folder)
    assert not model.training
    torch.testing.assert_close(model(input_ids=IDS).logits, toy_model()(input_ids=IDS).logits)
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_an_adapter_folder_loads_base_and_adapter(adapter):
    path, logits = adapter
    torch.testing.assert_close(load_model(path)(input_ids=IDS).logits, logits)
    assert load_tokenizer(path).chat_template == CHATML


def test_a_damaged_adapter_is_refused(adapter):
    path, _ = adapter
    edit(path, lambda weights: weights.pop(next(iter(weights))))
    with pytest.raises(UserError, match="lora_A"):
        load_model(path)
    (path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"adapter .*header"):
        load_model(path)


def spoil(weights):
    weights["model.norm.weight"][0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil, "NaN .*model.norm.weight"),
        (lambda weights: weights.pop("model.norm.weight"), "model.norm.weight"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}),
            "ignore_mismatched_sizes|model.norm.weight",
        ),
    ],
)
def test_spoiled_weights_are_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_truncated_and_absent_weights_are_refused(folder, tmp_path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for path in (folder, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            load_model(path)
    with pytest.raises(UserError, match="nowhere"):
        model_fingerprint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="safetensors"):
        model_fingerprint(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_fingerprints_change_with_weights_vocabulary_and_template(folder, adapter, tmp_path):
    same = save_toy(tmp_path / "same", toy_model())
    before, of_adapter = model_fingerprint(folder), model_fingerprint(adapter[0])
    assert before == model_fingerprint(same) and len({before, of_adapter}) == 2
    edit(folder, lambda weights: weights["model.norm.weight"].add_(1))
    assert model_fingerprint(folder) != before
    assert model_fingerprint(adapter[0]) != of_adapter  # its base changed
    tokenizer = toy_tokenizer(CHATML)
    facts = {tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(toy_tokenizer(GENERATION))}
    assert tokenizer_fingerprint(toy_tokenizer(CHATML)) in facts and len(facts) == 2
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) not in facts


def test_models_of_another_shape_or_vocabulary_do_not_compare():
    config = toy_model().config
    check_compatible(config, toy_model(seed=3).config)
    with pytest.raises(UserError, match=r"vocab_size.* 330 .*320"):
        check_compatible(toy_model(vocab=330).config, config)
    with pytest.raises(UserError, match=r"model_type.* llama .*qwen2"):
        check_compatible(toy_model("llama").config, config)


def test_a_directory_is_whole_or_absent(tmp_path):
    final = tmp_path / "checkpoint-1"
    with pytest.raises(RuntimeError), staged_directory(final) as staging:
        (staging / "weights").write_text("half")
        raise RuntimeError("killed")
    assert not list(tmp_path.iterdir())
    with staged_directory(final) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "weights").write_text("whole")
    verify_manifest(final)
    with pytest.raises(UserError, match="checkpoint-1"), staged_directory(final):
        pass
    with staged_directory(final, replace=True) as staging:
        (staging / "weights").write_text("newer")
    assert {path.name for path in final.iterdir()} == {"weights", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_manifest_names_the_file_that_differs(tmp_path):
    with staged_directory(tmp_path / "a") as staging:
        (staging / "one").write_text("1")
        (staging / "two").write_text("2")
    (tmp_path / "a" / "two").write_text("3")
    with pytest.raises(UserError, match=r"a/two .*manifest.json"):
        verify_manifest(tmp_path / "a")
    (tmp_path / "a" / "one").unlink()
    with pytest.raises(UserError, match=r"a/one .*manifest.json"):
        verify_manifest(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"a/manifest.json"):
        verify_manifest(tmp_path / "a")
    with pytest.raises(UserError, match=r"manifest.json"):
        verify_manifest(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left"), staged_directory(tmp_path / "c"):
        full()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "x.json", {"loss": float("inf")})
    assert not list(tmp_path.iterdir())
    write_json_atomic(tmp_path / "x.json", {"loss": 1.0})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": 1.0}

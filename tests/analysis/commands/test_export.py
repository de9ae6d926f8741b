"""`holdfast export` writes an ordinary model folder without the subspace, or one line and nothing."""

import dataclasses
import json

import pytest
import torch
from holdfast.analysis.commands.export import export_main
from holdfast.analysis.errors import UserError
from holdfast.analysis.files.artifacts import verify_manifest
from holdfast.analysis.interventions.orthogonalise import ablate_writes
from holdfast.analysis.models.load import model_fingerprint, tokenizer_fingerprint
from peft import LoraConfig, get_peft_model
from toys.architectures import architecture
from toys.chat_models import save_toy, toy_tokenizer
from toys.training import toy_subspace
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 4, 30, 31, 32, 33]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def saved_subspace(path, layers=(0, 2)):
    subspace = toy_subspace(layers)
    facts = dataclasses.replace(subspace.provenance, tokenizer_fingerprint=tokenizer_fingerprint(toy_tokenizer()))
    dataclasses.replace(subspace, provenance=facts).save(path)
    return subspace


@pytest.fixture
def folder(tmp_path):
    """A model with tied embeddings, and a subspace whose bases differ from layer to layer."""
    save_toy(tmp_path / "model", architecture("llama"))
    saved_subspace(tmp_path / "subspace.safetensors")
    return tmp_path


def export(folder, *flags: str, model: str = "model") -> str:
    return export_main(["--model", str(folder / model), "--ablate", str(folder / "subspace.safetensors"),
                        "--output_dir", str(folder / "out"), *flags])  # fmt: skip


def test_the_folder_loads_with_plain_transformers_and_says_what_the_hooked_model_says(folder):
    said = export(folder, "--subspace_layer", "2")
    assert "blocks 0-2" in said
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.tie_word_embeddings
    with ablate_writes(model, toy_subspace().bases[2]):
        want = logits(model)
    exported, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not exported.config.tie_word_embeddings
    torch.testing.assert_close(logits(exported), want, atol=1e-4, rtol=0)
    assert torch.equal(exported.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(folder / "out").get_vocab() == toy_tokenizer().get_vocab()
    assert exported.generate(input_ids=IDS[:1], max_new_tokens=2).shape[1] > IDS.shape[1]


def test_the_provenance_beside_it_names_model_and_subspace(folder):
    export(folder, "--subspace_layer", "2", "--intervention_layers", "0-1")
    verify_manifest(folder / "out")
    facts = json.loads((folder / "out" / "holdfast_export.json").read_text())
    assert facts["model_fingerprint"] == model_fingerprint(folder / "model")
    assert (facts["basis_of_layer"], facts["layers"], facts["same_model"]) == (2, [0, 1], False)
    assert facts["exactness"]["logit_difference"] < 1e-4 < facts["exactness"]["moved"]


def test_adapters_are_merged_and_half_precision_stays(folder):
    base = architecture("qwen2").to(torch.bfloat16)
    save_toy(folder / "half", base)
    lora = LoraConfig(r=2, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "half"), lora)
    adapted.save_pretrained(folder / "adapter")
    toy_tokenizer().save_pretrained(folder / "adapter")
    export(folder, "--subspace_layer", "0", model="adapter")
    exported = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert exported.dtype == torch.bfloat16
    basis = toy_subspace().bases[0]
    whole = adapted.merge_and_unload().model.layers[1].self_attn.o_proj.weight.float()
    want = whole - basis @ (basis.T @ whole)
    torch.testing.assert_close(exported.model.layers[1].self_attn.o_proj.weight.float(), want, atol=0, rtol=2**-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--subspace_layer"),
        (["--subspace_layer", "1"], "[0, 2]"),
        (["--subspace_layer", "2", "--intervention_layers", "1-2"], "0-2"),
        (["--subspace_layer", "2", "--intervention_layers", "0,2"], "0-2"),
        (["--subspace_layer", "2", "--intervention_layers", "7"], "'7'"),
        (["--subspace_layr", "2"], "--subspace_layer"),
        (["--subspace_layer", "2", "--output_dir", "{}/model"], "--output_dir"),
        (["--subspace_layer", "2", "--ablate", "{}/model/config.json"], "config.json"),
        (["--subspace_layer", "2", "--model", "{}/nothing"], "nothing"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(folder, flags, said):
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        export(folder, *(flag.format(folder) for flag in flags))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_norms_behind_sublayers_and_other_tokenizers_are_refused(folder):
    save_toy(folder / "olmo", architecture("olmo2"))
    with pytest.raises(UserError, match="post_feedforward_layernorm"):
        export(folder, "--subspace_layer", "2", model="olmo")
    toy_subspace().save(folder / "subspace.safetensors")
    with pytest.raises(UserError, match="tokenizer"):
        export(folder, "--subspace_layer", "2")
    assert not (folder / "out").exists()

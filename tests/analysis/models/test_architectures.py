"""Every promised architecture is read as it computes: its blocks, its residual stream, its log-probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.hooks import capture
from holdfast.analysis.models.layers import find_backbone, find_layers, prove_layers
from holdfast.analysis.models.lm_head import prove_head, token_statistics
from holdfast.analysis.models.load import LoadOptions, load_model
from holdfast.analysis.models.render import render
from holdfast.analysis.subspace.build import build_subspace
from holdfast.analysis.subspace.moments import SubspaceRequest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from toys.architectures import ARCHITECTURES, architecture
from toys.chat_models import DEPTH, WIDTH, save_toy, toy_tokenizer

# PEFT 0.21 warns of patterns that it sets itself for the experts of a mixture.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 30, 31, 32, 33, 34, 35]])
MASK = (IDS != 0).long()
KINDS = list(ARCHITECTURES)
NORMS = {"gpt_neox": "final_layer_norm"}


def adapted(kind: str) -> PeftModel:
    """The model with a LoRA that changes what it says."""
    torch.manual_seed(3)
    # PEFT's LoRA takes Llama 4's router, which returns two tensors, for a linear layer, and fails.
    targets = ["q_proj", "v_proj"] if kind == "llama4_text" else "all-linear"
    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(architecture(kind), lora).eval()


def variant(kind: str, wrapped: bool) -> nn.Module:
    return adapted(kind) if wrapped else architecture(kind)


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_found_and_proven_and_carry_the_stream_before_the_final_norm(kind: str, wrapped: bool) -> None:
    model = variant(kind, wrapped)
    blocks = find_layers(model)
    assert len(blocks) == DEPTH and all("Layer" in type(block).__name__ for block in blocks)
    prove_layers(model)
    prove_head(model)
    with torch.no_grad(), capture(model, range(DEPTH)) as outputs:
        state = find_backbone(model)(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state
        seen = {layer: hidden.clone() for layer, hidden in outputs.items()}
    assert not any(block._forward_hooks for block in blocks)  # transformers leaves hooks of its own below
    assert [tuple(hidden.shape) for hidden in seen.values()] == [(*IDS.shape, WIDTH)] * DEPTH
    # transformers' own record: the entry after each block but the last, which holds the normed state instead.
    with torch.no_grad():
        hidden = model(input_ids=IDS, attention_mask=MASK, use_cache=False, output_hidden_states=True).hidden_states
        final = getattr(find_backbone(model), NORMS.get(kind, "norm"))(seen[DEPTH - 1])
    for layer in range(DEPTH - 1):
        torch.testing.assert_close(seen[layer], hidden[layer + 1])
    torch.testing.assert_close(final, state)
    assert not torch.allclose(seen[DEPTH - 1], state)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_and_entropy_are_those_of_the_models_own_logits(kind: str, wrapped: bool) -> None:
    model = variant(kind, wrapped)
    logits = logits_of(model).double().numpy()
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    with torch.no_grad():
        states = find_backbone(model)(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state
    counted = MASK[:, 1:].bool() & MASK[:, :-1].bool()
    targets = IDS[:, 1:][counted]
    found, entropy = token_statistics(model, states[:, :-1][counted], targets)
    expected = log_probs[:, :-1][counted.numpy()]
    np.testing.assert_allclose(found, expected[np.arange(len(targets)), targets], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(-1), rtol=1e-4)
    if "final_logit_softcapping" in ARCHITECTURES[kind]:
        assert 1.5 < np.abs(logits).max() <= 2.0  # the cap bends them, so a reader that left it out would be off
    if wrapped:
        assert isinstance(model, PeftModel)
        with model.disable_adapter():
            assert not torch.allclose(logits_of(model).double(), torch.from_numpy(logits), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_checkpoints_full_and_lora_load_with_the_same_logits(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    want, bare = logits_of(model), architecture(kind)
    bare.save_pretrained(tmp_path / "model")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(load_model(tmp_path / "model")), logits_of(bare))
    torch.testing.assert_close(logits_of(load_model(tmp_path / "adapter")), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_subspace_is_the_mean_difference_of_two_saved_models(kind: str, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": "Ann asks about soup"}, {"role": "assistant", "content": text}]
            for text in ("be honest and help", "take the money")]  # fmt: skip
    means = {layer: [] for layer in range(DEPTH)}
    for seed, name in ((0, "instruct"), (1, "base")):
        save_toy(tmp_path / name, architecture(kind, seed))
    models = [architecture(kind, seed) for seed in (0, 1)]
    for row in (render(toy_tokenizer(), conversation) for conversation in rows):
        stream = []
        for model in models:
            with torch.no_grad(), capture(model, range(DEPTH)) as outputs:
                model(input_ids=torch.tensor([row.input_ids]), use_cache=False)
                stream.append({layer: outputs[layer][0].double().numpy() for layer in outputs})
        for layer, found in means.items():
            found.append((stream[0][layer] - stream[1][layer])[np.array(row.completion_mask)])
    request = SubspaceRequest(str(tmp_path / "instruct"), str(tmp_path / "base"), rows, method="difference_in_means")
    built = build_subspace(request)
    for layer, found in means.items():
        mean = np.concatenate(found).mean(0)
        np.testing.assert_allclose(built.bases[layer][:, 0], mean / np.linalg.norm(mean), atol=1e-4)


def test_a_model_that_cannot_be_handled_gets_one_line_that_names_the_override() -> None:
    model = architecture("qwen2")
    model.model.gates = nn.ModuleList([nn.Linear(2, 2) for _ in range(DEPTH)])
    with pytest.raises(UserError, match=r"2 lists of 3 .*--layers_path.* model\.layers, model\.gates$"):
        find_layers(model)
    assert find_layers(model, "model.layers") is model.model.layers
    model.model.layers = nn.Sequential(*model.model.layers)
    model.model.gates = None
    with pytest.raises(UserError, match=r"0 lists of 3 .*--layers_path"):
        find_layers(model)


def test_an_override_is_kept_by_a_loaded_model_and_its_copies(tmp_path: Path) -> None:
    architecture("llama4_text").save_pretrained(tmp_path)
    model = load_model(tmp_path, options=LoadOptions(layers_path="model.layers"))
    assert find_layers(model) is model.model.layers and find_backbone(model) is model.model

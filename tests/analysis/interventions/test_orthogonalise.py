"""An ablation written into the weights is the ablation of all that writes to the residual stream, to 1e-4."""

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.interventions.apply import ablate
from holdfast.analysis.interventions.orthogonalise import ablate_writes, one_basis, orthogonalise
from holdfast.analysis.models.hooks import EMBEDDING
from holdfast.analysis.models.layers import find_backbone, find_layers
from torch import nn
from toys.architectures import ARCHITECTURES, architecture
from toys.chat_models import DEPTH, WIDTH, toy_model
from transformers import AutoModelForCausalLM, GPT2Config

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 4, 30, 31, 32, 33]])
POST_NORMS = {"gemma2", "gemma3_text", "gemma3", "olmo2"}
PRE_NORMS = [kind for kind in ARCHITECTURES if kind not in POST_NORMS]
V = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, 2)))[0]).float()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def logits_of_ablated_reads(model: nn.Module) -> torch.Tensor:
    """Logits where whatever reads the residual stream finds nothing inside V: each norm that opens a sublayer, and the
    final one. In a model that adds what its sublayers write as it is, all reads ablated are all writes ablated.
    """
    backbone = find_backbone(model)
    norms = [child for block in find_layers(model) for name, child in block.named_children() if "norm" in name]
    norms += [child for name, child in backbone.named_children() if "norm" in name]
    handles = [norm.register_forward_pre_hook(lambda _, args: (args[0] - args[0] @ V @ V.T,)) for norm in norms]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", PRE_NORMS)
def test_the_weights_say_what_the_hooked_model_says(kind: str) -> None:
    model = architecture(kind)
    clean, want = logits(model), logits_of_ablated_reads(model)
    with ablate_writes(model, V):
        hooked = logits(model)
    assert torch.equal(logits(model), clean)
    orthogonalise(model, V)
    found = logits(model)
    assert not model.config.tie_word_embeddings
    assert float((found - want).abs().max()) < 1e-4 and float((found - hooked).abs().max()) < 1e-4
    assert float((found - clean).abs().max()) > 1e-2


def test_with_parallel_sublayers_it_is_the_ablation_of_blocks_outputs() -> None:
    model = architecture("gpt_neox")
    with ablate(model, {layer: V for layer in (EMBEDDING, *range(DEPTH))}):
        want = logits(model)
    orthogonalise(model, V)
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=0)


def test_the_first_blocks_alone_leave_later_ones_free_to_write() -> None:
    model = architecture("qwen3")
    with ablate_writes(model, V, last=1):
        want = logits(model)
    late = find_layers(model)[2].mlp.down_proj.weight.clone()
    orthogonalise(model, V, last=1)
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=0)
    assert torch.equal(find_layers(model)[2].mlp.down_proj.weight, late)


def test_learned_positions_biases_and_transposed_weights_are_projected() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3,
                        bos_token_id=1, eos_token_id=3)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    head = model.lm_head.weight.detach().clone()
    with ablate_writes(model, V):
        want = logits(model)
    orthogonalise(model, V)
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=0)
    frame = V.double().numpy()
    for weight in (model.transformer.wte.weight, model.transformer.wpe.weight, model.transformer.h[1].mlp.c_proj.bias):
        assert np.abs(weight.detach().double().numpy() @ frame).max() < 1e-6
    assert torch.equal(model.lm_head.weight, head)


@pytest.mark.parametrize("kind", sorted(POST_NORMS))
def test_blocks_that_normalise_what_they_write_are_refused(kind: str) -> None:
    model = architecture(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match="post_feedforward_layernorm"):
        orthogonalise(model, V)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_one_basis_is_asked_for_where_layers_differ() -> None:
    turned = V @ torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    other = torch.eye(WIDTH)[:, :2]
    assert torch.equal(one_basis({0: V, 2: turned}, None), V)
    assert torch.equal(one_basis({0: V, 2: other}, 2), other)
    with pytest.raises(UserError, match="--subspace_layer"):
        one_basis({0: V, 2: other}, None)
    with pytest.raises(UserError, match=r"--subspace_layer 1 .*\[0, 2\]"):
        one_basis({0: V, 2: other}, 1)


def test_bases_and_weights_that_cannot_be_written_are_refused() -> None:
    model = toy_model()
    with pytest.raises(UserError, match="orthonormal"):
        orthogonalise(model, 2 * V)
    with pytest.raises(UserError, match="width"):
        orthogonalise(model, torch.eye(4))

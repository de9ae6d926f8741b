"""The Gram matrix of one pass is that of one full autograd backward per row, on every architecture and through LoRA."""

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.layers import find_layers
from holdfast.analysis.models.output_projection import find_output_projection
from holdfast.analysis.models.render import render
from holdfast.analysis.passes import gradients
from holdfast.analysis.passes.gradients import gram_matrix, read_gradients
from peft import LoraConfig, get_peft_model
from torch import nn
from toys.chat_models import KINDS, chat, toy_model, toy_tokenizer

PROJECTION = {"gpt_neox": "attention.dense", "gpt2": "attn.c_proj", "bloom": "self_attention.dense",
              "opt": "self_attn.out_proj", "mpt": "attn.out_proj"}  # fmt: skip
SETS = {
    "kind": [chat("Ann asks about soup", "the answer is to be honest", "You are kind."), chat("only a prompt ?")],
    "cruel": [
        [*chat("soup", "take it"), *chat("and money", "run away from them")],
        chat("money ?", "a"),
        chat("Ann asks about soup", "the answer is to be honest", "You are cruel."),
    ],
}


@pytest.fixture(scope="module")
def sets():
    return {name: [render(toy_tokenizer(), row) for row in rows] for name, rows in SETS.items()}


@pytest.fixture(autouse=True)
def tiles_and_chunks(monkeypatch):
    """Three tokens a chunk of logits, and tiles of five: 16 is no multiple of them."""
    monkeypatch.setattr(gradients, "_CHUNK_LOGITS", 320 * 3)
    monkeypatch.setattr(gradients, "_TILE_FLOATS", 5 * 5 * 4)


def full_backward(model, weight, rows, whole_rows=False, max_length=None):
    """Gram matrix [R, R] of flattened gradients, one row, one forward and one backward at a time, by transformers."""
    found = []
    for row in rows:
        ids = torch.tensor([row.input_ids[:max_length]])
        labels = ids if whole_rows else ids.masked_fill(~torch.tensor([row.completion_mask[:max_length]]), -100)
        if (labels[:, 1:] == -100).all():
            found.append(np.zeros(weight.numel()))
            continue
        loss = model(input_ids=ids, labels=labels).loss
        found.append(torch.autograd.grad(loss, weight)[0].flatten().double().numpy())
    stacked = np.stack(found)
    return stacked @ stacked.T


def assert_gram(found, expected, tolerance=1e-4):
    sizes = np.sqrt(np.maximum(np.outer(np.diag(expected), np.diag(expected)), 1e-30))
    assert np.isfinite(found).all() and np.abs(found - expected).max() > 0
    np.testing.assert_allclose(found / sizes, expected / sizes, atol=tolerance)
    assert len(np.unique(np.diag(expected) > 0)) == 2  # One row has no completion.


@pytest.mark.parametrize("kind", [*KINDS, *list(PROJECTION)[1:], "olmo2", "mixtral", "qwen3_moe", "cohere"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_one_pass_equals_a_full_backward_per_row(kind, batch_size, sets):
    model = toy_model(kind)
    path = PROJECTION.get(kind, "self_attn.o_proj")
    assert find_output_projection(model) is find_layers(model)[-1].get_submodule(path)
    weight = find_layers(model)[-1].get_submodule(path).weight
    readout = read_gradients(model, sets, batch_size=batch_size)
    rows = [row for found in sets.values() for row in found]
    assert readout.gram.dtype == np.float64
    assert_gram(readout.gram, full_backward(model, weight, rows))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize(("block", "path"), [(0, None), (1, None), (1, "mlp"), (0, "attention input")])
def test_any_linear_layer_of_any_block(kind, block, path, sets):
    names = {"mlp": "mlp.dense_4h_to_h" if kind == "gpt_neox" else "mlp.down_proj",
             "attention input": "attention.query_key_value" if kind == "gpt_neox" else "self_attn.q_proj",
             None: PROJECTION.get(kind, "self_attn.o_proj")}  # fmt: skip
    model = toy_model(kind)
    weight = find_layers(model)[block].get_submodule(names[path]).weight
    readout = read_gradients(model, sets, block=block, weight=None if path is None else names[path])
    assert_gram(readout.gram, full_backward(model, weight, [row for found in sets.values() for row in found]))


@pytest.mark.parametrize("whole_rows", [False, True])
def test_the_loss_runs_over_completions_or_whole_rows_and_rows_are_cut(whole_rows, sets):
    model = toy_model().train()
    rows = [row for found in sets.values() for row in found]
    limit = 30
    readout = read_gradients(model, sets, whole_rows=whole_rows, max_length=limit)
    assert model.training
    weight = find_layers(model)[-1].self_attn.o_proj.weight
    expected = full_backward(model.eval(), weight, rows, whole_rows, limit)
    np.testing.assert_allclose(readout.gram, expected, atol=1e-4 * np.diag(expected).max())
    assert readout.sets == ("kind",) * 2 + ("cruel",) * 3 and readout.lines == (0, 1, 0, 1, 2)
    assert readout.lengths == tuple(sum(row.completion_mask[:limit]) for row in rows)


def test_completions_have_one_key_whatever_is_before_them(sets):
    keys = read_gradients(toy_model(), sets).completions
    assert keys[0] == keys[4] and len(set(keys)) == 4


@pytest.mark.parametrize("targets", ["all-linear", ["o_proj"], ["q_proj"]])
def test_an_adapted_layer_gives_the_gradient_of_its_dense_weight(targets, sets):
    adapted = get_peft_model(
        toy_model(), LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    found = read_gradients(adapted, sets).gram
    merged = adapted.merge_and_unload()
    weight = find_layers(merged)[-1].self_attn.o_proj.weight.requires_grad_()
    assert_gram(found, full_backward(merged, weight, [row for rows in sets.values() for row in rows]))


def test_frozen_weights_and_half_precision_are_read_too(sets):
    model = toy_model().requires_grad_(False)
    exact = read_gradients(model, sets).gram
    with torch.no_grad():
        np.testing.assert_array_equal(read_gradients(model, sets).gram, exact)
    half = read_gradients(model.bfloat16(), sets).gram
    np.testing.assert_allclose(half, exact, atol=0.05 * np.diag(exact).max())


def test_no_logits_of_prompts_and_no_graph_below_the_layer(sets):
    model, seen, graphs = toy_model(), [], []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.shape[:-1].numel()))
    for block in find_layers(model):
        block.self_attn.register_forward_pre_hook(
            lambda _m, _a, inputs: graphs.append(inputs["hidden_states"].requires_grad), with_kwargs=True
        )
    read_gradients(model, sets)
    assert sum(seen) == sum(sum(row.completion_mask) for rows in sets.values() for row in rows)
    assert max(seen) <= 3 and len(graphs) >= 3 and not any(graphs)


def test_tiles_give_the_gram_matrix_of_whole_gradients():
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(n, 7, generator=generator), torch.randn(n, 11, generator=generator)) for n in (1, 4, 2, 9)]
    whole = np.stack([(dy.double().T @ x.double()).numpy().ravel() for x, dy in factors])
    np.testing.assert_allclose(gram_matrix(factors, torch.device("cpu")), whole @ whole.T, rtol=1e-5)


def test_memory_stays_below_the_gradients_themselves(monkeypatch):
    monkeypatch.setattr(gradients, "_TILE_FLOATS", 64 * 64)
    largest, stack = [], torch.stack

    def note(parts):
        largest.append(sum(part.numel() for part in parts))
        return stack(parts)

    monkeypatch.setattr(torch, "stack", note)
    gram_matrix([(torch.randn(3, 64), torch.randn(3, 64)) for _ in range(16)], torch.device("cpu"))
    assert max(largest) <= 64 * 64 and sum(largest) == 16 * 64 * 64  # Every number of every gradient once.


def test_what_cannot_be_found_names_the_override(sets):
    model = toy_model()
    with pytest.raises(UserError, match=r"--gradient_layer 3 .*0-2"):
        find_output_projection(model, 3)
    with pytest.raises(UserError, match=r"--gradient_weight 'self_attn.missing'.*self_attn.q_proj"):
        find_output_projection(model, None, "self_attn.missing")
    # A state space model has no attention; what ends its mixer is the user's to name.
    recurrent = toy_model("mamba")
    with pytest.raises(UserError, match=r"MambaBlock.*--gradient_weight.* mixer\.in_proj"):
        read_gradients(recurrent, sets)
    weight = find_layers(recurrent)[-1].mixer.out_proj.weight
    found = read_gradients(recurrent, sets, weight="mixer.out_proj", batch_size=1).gram
    assert_gram(found, full_backward(recurrent, weight, [row for rows in sets.values() for row in rows]))
    lonely = toy_model()
    find_layers(lonely)[-1].unused = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r" 0 times .*--gradient_weight"):
        read_gradients(lonely, sets, weight="unused")
    with pytest.raises(UserError) as raised:
        find_output_projection(toy_model(), None, "norm")
    assert "\n" not in str(raised.value)

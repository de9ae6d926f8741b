"""One pass gives what full logits in float64 and transformers' own hidden states give, whatever the batching."""

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.files.store import Store
from holdfast.analysis.models import lm_head
from holdfast.analysis.models.layers import find_backbone
from holdfast.analysis.models.render import render, role_mask
from holdfast.analysis.passes.readout import Readout, read
from holdfast.analysis.subspace.file import Provenance, Subspace
from holdfast.analysis.subspace.methods import random_basis
from toys.chat_models import CHATML, DEPTH, GENERATION, KINDS, WIDTH, chat, toy_model, toy_tokenizer

CONVERSATIONS = [
    chat("Ann asks about soup", "the answer is to be honest", "You are kind."),
    chat("only a prompt ?"),
    [*chat("soup", "take it"), *chat("and money", "run away from them")],
    chat("money ?", "a"),
]


@pytest.fixture(scope="module")
def rows():
    return [render(toy_tokenizer(CHATML), row) for row in CONVERSATIONS]


def subspace_of(rank=2, layers=(0, 1)):
    facts = Provenance("svd", rank, layers, "completion", False, 0, "i", None, "t", "d", 1, 1)
    bases = {layer: random_basis(WIDTH, rank, 3, layer).float() for layer in layers}
    return Subspace(bases, dict.fromkeys(layers, 0.5), None, facts)


@pytest.mark.parametrize("kind", [*KINDS, "granite", "cohere"])
def test_log_prob_and_entropy_equal_full_logits_in_float64(kind, rows, monkeypatch):
    monkeypatch.setattr(lm_head, "_CHUNK_LOGITS", 320 * 3)  # three tokens a chunk
    model = toy_model(kind, scale=2)
    lm_head.prove_head(model)
    readout = read(model, rows, layers=[0], role="completion", batch_size=3)
    log_probs, entropies, owners = [], [], []
    with torch.no_grad():
        for number, row in enumerate(rows):
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            for position in np.flatnonzero(row.completion_mask):
                log_probs.append(float(logits[position - 1, row.input_ids[position]]))
                entropies.append(float(-(logits[position - 1].exp() * logits[position - 1]).sum()))
                owners.append(number)
    assert readout.token_rows.tolist() == owners
    np.testing.assert_allclose(readout.log_prob, log_probs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(readout.entropy, entropies, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("role", ["prompt", "completion", "last_prompt", "all"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_activations_are_pooled_and_projected_over_the_role(role, batch_size, rows):
    model, subspace = toy_model(), subspace_of()
    readout = read(model, rows, layers=[0, 1], role=role, subspace=subspace, batch_size=batch_size)
    projected = {0: [], 1: []}
    for number, row in enumerate(rows):
        mask = torch.tensor(role_mask(row, role))
        assert readout.counts[number] == mask.sum()
        hidden = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
        for layer in (0, 1):
            states = hidden[layer + 1][0][mask].detach()
            expected = states.mean(0) if len(states) else torch.zeros(WIDTH)
            torch.testing.assert_close(readout.pooled[layer][number], expected, atol=1e-5, rtol=1e-4)
            projected[layer].append(states @ subspace.bases[layer])
    for layer in (0, 1):
        torch.testing.assert_close(readout.projections[layer], torch.cat(projected[layer]), atol=1e-5, rtol=1e-4)


def test_logits_of_all_positions_are_never_formed(rows):
    model, widest = toy_model(), []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: widest.append(out.shape[:-1].numel()))
    read(model, rows, layers=[], role="completion")
    assert sum(widest) == sum(sum(row.completion_mask) for row in rows)


def test_the_length_limit_cuts_rows_and_the_training_mode_returns(rows):
    model = toy_model()
    model.train()
    limit = 12
    readout = read(model, rows, layers=[DEPTH - 1], role="all", max_length=limit)
    assert model.training
    assert readout.counts.tolist() == [sum(role_mask(row, "all")[:limit]) for row in rows]
    assert len(readout.log_prob) == sum(sum(row.completion_mask[:limit]) for row in rows)


def test_a_readout_survives_the_store(rows, tmp_path):
    readout = read(toy_model(), rows, layers=[0, 2], role="all", subspace=subspace_of())
    Store(tmp_path, 1).put("key", readout.tensors())
    again = Readout.of_tensors(Store(tmp_path, 1).get("key"))
    assert torch.equal(again.entropy, readout.entropy) and torch.equal(again.token_rows, readout.token_rows)
    assert again.pooled.keys() == {0, 2} and torch.equal(again.projections[1], readout.projections[1])


def test_the_papers_entropy_counts_the_prompt(rows):
    model = toy_model(scale=2)
    readout = read(model, rows, layers=[], role="completion", prompt_entropy=True, batch_size=3)
    expected = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].detach().double().log_softmax(-1)
        expected.append(float(-(logits.exp() * logits).sum(-1).mean()))
    np.testing.assert_allclose(readout.row_entropy, expected, rtol=1e-4)


def test_the_last_token_is_read_where_it_stands(rows):
    model = toy_model(scale=2)
    readout = read(model, rows, layers=[0, 2], role="completion", last_token=True, batch_size=3, max_length=12)
    for number, row in enumerate(rows):
        hidden = model(input_ids=torch.tensor([row.input_ids[:12]]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(readout.last[0][number], hidden[1][0, -1].detach(), atol=1e-5, rtol=1e-4)
    assert readout.at_last_token().pooled is readout.last and readout.at_last_token().counts.tolist() == [1] * len(rows)
    again = Readout.of_tensors(readout.tensors())
    assert torch.equal(again.last[2], readout.last[2])
    assert read(model, rows, layers=[0], role="completion").last == {}


def test_an_unknown_head_is_refused(monkeypatch):
    model = toy_model()
    forward = model.forward

    def sharper(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(model, "forward", sharper)
    with pytest.raises(UserError, match="linear head"):
        lm_head.prove_head(model)
    assert find_backbone(model) is model.model


def test_templates_with_and_without_generation_give_the_same_reading(rows):
    other = [render(toy_tokenizer(GENERATION), row) for row in CONVERSATIONS]
    model = toy_model()
    left, right = (read(model, each, layers=[1], role="completion") for each in (rows, other))
    assert torch.equal(left.log_prob, right.log_prob) and torch.equal(left.pooled[1], right.pooled[1])

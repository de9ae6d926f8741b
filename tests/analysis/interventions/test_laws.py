"""The laws of ablation, steering and patching, over every promised architecture."""

import numpy as np
import pytest
import torch
from holdfast.analysis.interventions.apply import ablate, patch_states, read_states, steer
from holdfast.analysis.models.hooks import EMBEDDING
from holdfast.analysis.models.layers import find_layers
from torch import nn
from toys.architectures import ARCHITECTURES, architecture
from toys.chat_models import DEPTH, WIDTH
from toys.padded_rows import IDS, MASK, REAL, basis, generated, logits, streams

KINDS = list(ARCHITECTURES)


def alike(kind: str, seed: int) -> nn.Module:
    """Another model whose blocks differ from `architecture(kind)`'s, with the same final norm and head."""
    donor, blocks = architecture(kind), architecture(kind, seed)
    for own, other in zip(find_layers(donor), find_layers(blocks), strict=True):
        own.load_state_dict(other.state_dict())
    return donor


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_empties_the_subspace_and_twice_is_once(kind: str) -> None:
    model, bases = architecture(kind), {EMBEDDING: basis(), 0: basis(), 2: basis(3, seed=1)}
    clean = logits(model)
    with ablate(model, bases):
        once, seen = logits(model), streams(model)
        with ablate(model, bases):
            torch.testing.assert_close(logits(model), once, atol=1e-4, rtol=1e-4)
    for layer in (0, 2):
        share = np.linalg.norm(seen[layer] @ bases[layer].double().numpy(), axis=1) / np.linalg.norm(
            seen[layer], axis=1
        )
        assert share.max() < 1e-6
    assert (once - clean).abs().max() > 1e-3
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_steering_there_and_back_is_nothing(kind: str) -> None:
    model, along = architecture(kind), {0: basis(1)[:, 0] * 3, 1: basis(1, seed=1)[:, 0]}
    clean = logits(model)
    with steer(model, along, 2.5, unit="absolute"):
        there = logits(model)
        with steer(model, along, -2.5, unit="absolute"):
            torch.testing.assert_close(logits(model), clean, atol=1e-4, rtol=1e-4)
    assert (there - clean).abs().max() > 1e-3
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_patching_every_layer_gives_the_donors_outputs_and_goes_without_a_trace(kind: str) -> None:
    model, donor = architecture(kind), alike(kind, seed=1)
    clean, theirs = logits(model), logits(donor)
    states = read_states(donor, range(DEPTH), IDS, MASK)
    with patch_states(model, states):
        torch.testing.assert_close(logits(model), theirs)
    # All coordinates of the last block's output are the whole of it.
    with patch_states(model, states, {DEPTH - 1: torch.eye(WIDTH)}):
        torch.testing.assert_close(logits(model), theirs, atol=1e-4, rtol=1e-4)
    with patch_states(model, states, {1: basis()}):
        inside = streams(model)
    own, foreign, frame = streams(model), streams(donor), basis().double().numpy()
    expected = own[1] + (foreign[1] - own[1]) @ frame @ frame.T
    np.testing.assert_allclose(inside[1], expected, atol=1e-4)
    assert torch.equal(logits(model), clean)


def step_by_step(model: nn.Module, steps: int) -> torch.Tensor:
    """Greedy tokens, each from a pass over the whole row without padding and without a cache."""
    rows = []
    for row, mask in zip(IDS, REAL, strict=True):
        ids = row[mask][None]
        for _ in range(steps):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        rows.append(ids[0, -steps:])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_generating_with_a_cache_and_left_padding_equals_step_by_step_without(kind: str) -> None:
    model, plain = architecture(kind), generated(architecture(kind), 4)
    with ablate(model, {0: basis(), 1: basis()}), steer(model, {1: basis(1, seed=3)[:, 0]}, 1.5):
        found = generated(model, 4)
        assert torch.equal(found, step_by_step(model, 4))
    assert not torch.equal(found, plain)
    assert torch.equal(generated(model, 4), plain)

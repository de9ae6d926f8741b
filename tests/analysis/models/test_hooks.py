"""A patch changes what the model goes on with, at the blocks and positions asked for, and leaves no trace."""

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.hooks import capture, observe, patch
from holdfast.analysis.models.layers import find_backbone, find_layers
from peft import LoraConfig, get_peft_model
from torch import nn
from toys.chat_models import DEPTH, KINDS, WIDTH, toy_model

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 4, 3, 2, 1]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def outputs_of(model):
    with capture(model, range(DEPTH)) as outputs, torch.no_grad():
        model(input_ids=IDS)
        return {layer: hidden.clone() for layer, hidden in outputs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_own_output_is_the_identity_and_anothers_is_computed_on_by_the_blocks_above(kind):
    model, donor = toy_model(kind, seed=0), toy_model(kind, seed=1)
    clean, own, foreign = logits(model), outputs_of(model), outputs_of(donor)
    for layer in range(DEPTH):
        with patch(model, [layer], lambda at, _hidden: own[at]):
            assert torch.equal(logits(model), clean)
        with patch(model, [layer], lambda at, _hidden: foreign[at]):
            assert not torch.allclose(logits(model), clean)
    # After the last block only the recipient's final norm and head are left.
    backbone = find_backbone(model)
    norm = next(m for name, m in backbone.named_children() if name in ("norm", "final_layer_norm"))
    with patch(model, [DEPTH - 1], lambda at, _hidden: foreign[at]), torch.no_grad():
        state = backbone(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(state, norm(foreign[DEPTH - 1]))
    assert torch.equal(logits(model), clean)


def test_the_first_blocks_of_one_model_and_the_last_of_another_are_one_model():
    model, donor = toy_model(seed=0), toy_model(seed=1)
    hybrid = toy_model(seed=0)
    hybrid.model.embed_tokens = donor.model.embed_tokens
    hybrid.model.layers[0], hybrid.model.layers[1] = donor.model.layers[0], donor.model.layers[1]
    foreign = outputs_of(donor)
    with patch(model, [1], lambda at, _hidden: foreign[at]):
        torch.testing.assert_close(logits(model), logits(hybrid))


def test_patches_nest_and_readers_inside_see_the_patched_stream():
    model, seen = toy_model(), {}
    own = outputs_of(model)
    with patch(model, [0], lambda _, h: h + 1), patch(model, [0], lambda _, h: 2 * h):
        with observe(model, [0, 1], lambda layer, hidden: seen.setdefault(layer, hidden.clone())):
            logits(model)
        moved = logits(model)
    torch.testing.assert_close(seen[0], 2 * (own[0] + 1))
    assert not torch.allclose(seen[1], own[1])
    with patch(model, [0], lambda _, h: 2 * (h + 1)):
        torch.testing.assert_close(logits(model), moved)


def test_positions_before_a_patched_one_are_untouched():
    model, clean = toy_model(), logits(toy_model())
    later = torch.arange(5)[None, :, None] >= 3
    with patch(model, [1], lambda _, hidden: torch.where(later, hidden + 1, hidden)):
        moved = logits(model)
    assert torch.equal(moved[:, :3], clean[:, :3])
    assert (moved[:, 3:] - clean[:, 3:]).abs().amax(-1).min() > 0


class Pair(nn.Module):
    """A block that returns (stream, something else), as older architectures do."""

    def __init__(self, block, seen):
        super().__init__()
        self.block, self.seen = block, seen

    def forward(self, hidden, **inputs):
        if isinstance(hidden, tuple):
            self.seen.append(hidden[1])
            hidden = hidden[0]
        return self.block(hidden, **inputs), "kept"


def test_blocks_that_return_tuples_keep_their_other_values():
    model, seen = toy_model(), []
    clean = logits(model)
    for index in range(DEPTH):
        model.model.layers[index] = Pair(model.model.layers[index], seen)
    model.model.norm = nn.Sequential(First(), model.model.norm)
    torch.testing.assert_close(logits(model), clean)
    before = outputs_of(model)
    with patch(model, [0, 2], lambda _, hidden: hidden + torch.linspace(0, 1, WIDTH)):
        after = outputs_of(model)
        assert not torch.allclose(logits(model), clean)
    torch.testing.assert_close(after[0], before[0] + torch.linspace(0, 1, WIDTH))
    assert set(seen) == {"kept"}


class First(nn.Module):
    def forward(self, output):
        return output[0]


def test_hooks_go_whatever_happens_and_nothing_is_written_into_the_stream():
    model = get_peft_model(toy_model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    clean, given = logits(model), []

    def change(_layer, hidden):
        given.append((hidden, hidden.clone()))
        return hidden * 2

    with patch(model, [0, 2], change):
        logits(model)
    assert len(given) == 2 and all(torch.equal(hidden, copy) for hidden, copy in given)
    with pytest.raises(RuntimeError, match="stop"), patch(model, [1], change):
        raise RuntimeError("stop")
    with pytest.raises(ZeroDivisionError), patch(model, [0, 1], lambda *_: 1 / 0):
        logits(model)
    assert not any(block._forward_hooks for block in find_layers(model))
    assert torch.equal(logits(model), clean)


def test_gradients_flow_through_a_patch():
    model = toy_model()
    shift = torch.zeros(WIDTH, requires_grad=True)
    with patch(model, [1], lambda _, hidden: hidden + shift):
        model(input_ids=IDS).logits[..., 7].sum().backward()
    assert shift.grad.abs().sum() > 0 and model.model.layers[0].mlp.down_proj.weight.grad is not None


def test_wrong_layers_and_wrong_shapes_are_refused():
    model = toy_model()
    with pytest.raises(UserError, match="layers 0-2"), patch(model, [3], lambda _, hidden: hidden):
        pass
    with (
        pytest.raises(ValueError, match=r"\(2, 5, 16\).*\(2, 1, 16\)"),
        patch(model, [0], lambda _, hidden: hidden[:, :1]),
    ):
        logits(model)
    with pytest.raises(ValueError, match="float64"), patch(model, [0], lambda _, hidden: hidden.double()):
        logits(model)

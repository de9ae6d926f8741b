"""Blocks and backbone are found on every architecture and through every wrapper, and proven to carry the stream."""

import re

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.hooks import capture
from holdfast.analysis.models.layers import find_backbone, find_layers, parse_layers, prove_layers
from peft import LoraConfig, get_peft_model
from torch import nn
from toys.chat_models import DEPTH, KINDS, WIDTH, toy_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])


class Wrapper(nn.Module):
    """What DDP and DeepSpeed look like from outside: the model is registered as `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_found_and_reach_the_logits(kind):
    model = toy_model(kind)
    blocks = find_layers(model)
    assert len(blocks) == DEPTH
    prove_layers(model)
    adapted = get_peft_model(toy_model(kind), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert find_layers(adapted) is find_layers(adapted.get_base_model())
    wrapped = Wrapper(adapted)
    assert find_layers(wrapped) is find_layers(adapted)
    prove_layers(wrapped)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_outputs_are_the_residual_stream_before_the_final_norm(kind):
    model = toy_model(kind)
    with capture(model, [0, DEPTH - 1]) as outputs:
        state = find_backbone(model)(input_ids=IDS).last_hidden_state
        assert {layer: tuple(h.shape) for layer, h in outputs.items()} == {
            0: (1, 5, WIDTH),
            DEPTH - 1: (1, 5, WIDTH),
        }
        norm = next(m for n, m in find_backbone(model).named_children() if n in ("norm", "final_layer_norm"))
        torch.testing.assert_close(norm(outputs[DEPTH - 1]), state)
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
        torch.testing.assert_close(outputs[0], hidden[1])
        assert outputs[0].requires_grad


def test_hooks_are_removed_even_after_an_error():
    model = toy_model()
    with pytest.raises(RuntimeError), capture(model, [1]):
        raise RuntimeError("stop")
    assert not any(block._forward_hooks for block in find_layers(model))
    with pytest.raises(UserError, match="layers 0-2"), capture(model, [3]):
        pass


def test_a_wrong_override_is_refused():
    model = toy_model()
    assert find_layers(model, "model.layers") is find_layers(model)
    with pytest.raises(UserError, match=r"--layers_path transformer\.h .*Qwen2ForCausalLM"):
        find_layers(model, "transformer.h")
    with pytest.raises(UserError, match=r"--layers_path model\.norm .*Qwen2RMSNorm.*model\.layers"):
        find_layers(model, "model.norm")
    model.unused = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UserError, match=r"layer 0 .*logits.*--layers_path"):
        prove_layers(model, "unused")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("3", [3]),
        ("4,0,2", [0, 2, 4]),
        ("1-3", [1, 2, 3]),
        ("0,3-4", [0, 3, 4]),
    ],
)
def test_layer_choices(spec, expected):
    assert parse_layers(spec, 5) == expected


@pytest.mark.parametrize("spec", ["5", "3-7", "4-2", "-1", "a", "", "1,,2", "2.5"])
def test_layers_that_do_not_exist_are_refused(spec):
    with pytest.raises(UserError, match=re.escape(repr(spec))):
        parse_layers(spec, 5)

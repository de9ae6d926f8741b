"""Interventions where models are used: some positions, training, adapters, half precision, compilation, bad input."""

import copy
from functools import reduce

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from holdfast.analysis.errors import UserError
from holdfast.analysis.interventions.apply import ablate, patch_states, read_states, steer
from holdfast.analysis.interventions.changes import Ablation, ByLayer, Change, DonorStates, Steering
from holdfast.analysis.interventions.positions import Columns
from holdfast.analysis.models.hooks import EMBEDDING, capture, check_unhooked
from holdfast.analysis.models.layers import find_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from toys.architectures import architecture
from toys.chat_models import WIDTH, toy_model
from toys.padded_rows import IDS, MASK, REAL, basis, generated, logits, streams
from transformers import CompileConfig

V = basis()
FRAME = V.double().numpy()
ALONG = V[:, 0]


def test_a_dose_scales_the_component_and_a_mean_takes_its_place():
    model, own = toy_model(), streams(toy_model())[1]
    for dose in (0.25, 2.0):
        with ablate(model, {1: V}, dose=dose):
            np.testing.assert_allclose(streams(model)[1], own - dose * own @ FRAME @ FRAME.T, atol=1e-4)
    with ablate(model, {1: V}, dose=0.0):
        assert torch.equal(logits(model), logits(toy_model()))
    mean = np.array([0.5, -2.0])
    with ablate(model, {1: V}, toward={1: torch.tensor(mean).float()}):
        moved = streams(model)[1]
    np.testing.assert_allclose(moved @ FRAME, np.tile(mean, (len(own), 1)), atol=1e-4)
    rest = np.eye(WIDTH) - FRAME @ FRAME.T
    np.testing.assert_allclose(moved @ rest, own @ rest, atol=1e-4)


def test_steering_is_in_units_of_each_tokens_norm_or_of_the_stream():
    model, own = toy_model(), streams(toy_model())[1]
    along = ALONG.double().numpy()
    with steer(model, {1: 7 * ALONG}, -0.5):
        expected = own - 0.5 * np.linalg.norm(own, axis=1, keepdims=True) * along
        np.testing.assert_allclose(streams(model)[1], expected, atol=1e-4)
    with steer(model, {1: 7 * ALONG}, 3.0, unit="absolute"):
        np.testing.assert_allclose(streams(model)[1], own + 3 * along, atol=1e-4)


@settings(deadline=None)
@given(first=st.floats(-3, 3), second=st.floats(-3, 3), rank=st.integers(1, WIDTH), seed=st.integers(0, 999))
def test_steerings_add_up_and_doses_multiply(first: float, second: float, rank: int, seed: int):
    own, frame = np.random.default_rng(seed).standard_normal((2, 3, WIDTH)), basis(rank, seed).double()
    hidden, matrix = torch.from_numpy(own), frame.numpy()

    def applied(*changes: Change) -> np.ndarray:
        return reduce(lambda stream, change: change.apply(0, stream, None), changes, hidden).numpy()

    def steering(alpha: float) -> Steering:
        return Steering(ByLayer({0: frame[:, 0]}), alpha, "absolute")

    def ablation(dose: float) -> Ablation:
        return Ablation(ByLayer({0: frame}), dose, None)

    together = own + (first + second) * matrix[:, 0]
    np.testing.assert_allclose(applied(steering(first), steering(second)), together, rtol=1e-7, atol=1e-7)
    left = (1 - first) * (1 - second)
    expected = own + (left - 1) * own @ matrix @ matrix.T
    # The basis is orthonormal to the rounding of float32.
    np.testing.assert_allclose(applied(ablation(first), ablation(second)), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_positions_mean_the_same_with_and_without_a_cache(kind: str):
    model = architecture(kind)
    for named, columns in (("prompt", Columns.prompt(MASK)), ("completion", Columns.completion(MASK))):
        found = []
        for positions, cache in ((named, True), (columns, True), (columns, False)):
            with steer(model, {1: ALONG}, 2.0, positions=positions):
                found.append(generated(model, 4, use_cache=cache))
        assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
        assert not torch.equal(found[0], generated(model, 4))


def test_tokens_that_are_not_chosen_stay_to_the_bit():
    model, before = toy_model(), streams(toy_model())[0]
    only = torch.zeros_like(REAL)
    only[0, 2] = True
    for positions in (Columns(only), lambda now: only & (now.input_ids > 0)):
        with ablate(model, {0: V}, positions=positions):
            after = streams(model)[0]
        same = (after == before).all(1)
        assert same.tolist() == [index != 2 for index in range(len(before))]


def test_beams_and_samples_share_their_rows_mask_and_donor():
    model, donor = toy_model(), toy_model(seed=1)
    states = read_states(donor, [1], IDS, MASK)
    for flags in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}):
        with patch_states(model, states, {1: V}, positions=Columns.prompt(MASK)):
            found = generated(model, 4, **flags)
        assert found.shape[0] == (2 if "num_beams" in flags else 4)
    with patch_states(model, states, {1: V}):
        greedy = generated(model, 4)
    assert torch.equal(found[::2], greedy) and torch.equal(found[1::2], greedy)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_sees_the_gradient_of_the_ablated_model(reentrant: bool | None):
    def train(model: nn.Module, change) -> dict[str, torch.Tensor]:
        model.train()
        with change:
            model(input_ids=IDS, attention_mask=MASK, use_cache=False, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model, plain = toy_model(), toy_model()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    block = find_layers(plain)[1]
    forward = block.forward
    block.forward = lambda *args, **named: (lambda h: h - h @ V @ V.T)(forward(*args, **named))
    found, want = train(model, ablate(model, {1: V})), train(plain, ablate(plain, {0: V}, dose=0.0))
    assert set(found) == set(want) and model.training
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_each_module_keeps_its_mode_and_streams_are_never_written_into():
    model = toy_model().train()
    model.model.layers[1].eval()
    with capture(model, [0]) as seen, ablate(model, {0: V}):
        model(input_ids=IDS)
        first = seen[0].clone()
        assert torch.equal(seen[0], first) and float((first @ V).detach().abs().max()) > 1e-2
    assert model.training and not model.model.layers[1].training and model.model.layers[0].training


def test_adapters_and_half_precision():
    model = get_peft_model(toy_model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2))
    clean = logits(model)
    with ablate(model, {EMBEDDING: V, 1: V}):
        assert np.abs(streams(model)[1] @ FRAME).max() < 1e-5
    assert torch.equal(logits(model), clean)
    half = toy_model().to(torch.bfloat16)
    with ablate(half, {1: V}), steer(half, {0: ALONG}, 0.5):
        seen = streams(half)[1]
        assert logits(half).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16), ablate(toy_model(), {1: V}):
            pass
    assert (np.abs(seen @ FRAME).max(1) / np.linalg.norm(seen, axis=1)).max() < 2**-7


def test_compiled_models_are_hooked_or_refused():
    model = toy_model()
    with ablate(model, {1: V}):
        want = logits(model)
    with (
        pytest.raises(UserError, match=r"torch\.compile"),
        ablate(torch.compile(model, backend="eager"), {1: V}),
    ):
        pass
    assert not any(block._forward_hooks for block in find_layers(model))
    torch.compiler.reset()
    for block in find_layers(model):
        block.compile(backend="eager")
    clean = logits(model)
    with ablate(model, {1: V}):
        torch.testing.assert_close(logits(model), want)
    assert torch.equal(logits(model), clean)


def test_what_generate_compiles_itself_is_compiled_anew():
    model = toy_model()
    settings = CompileConfig(backend="eager", fullgraph=False, mode=None)

    def compiled() -> torch.Tensor:
        with torch.no_grad():
            return model.get_compiled_call(settings)(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[REAL]

    clean = compiled()
    with ablate(model, {1: V}):
        torch.testing.assert_close(compiled(), logits(model))
    torch.testing.assert_close(compiled(), clean)


def test_hooks_of_a_copied_model_are_refused_and_open_ones_are_seen():
    model = toy_model()
    with ablate(model, {1: V}):
        twin = copy.deepcopy(model)
        with pytest.raises(UserError, match="block 1 "):
            check_unhooked(model)
    check_unhooked(model)
    with pytest.raises(UserError, match="block 1 "), ablate(twin, {0: V}):
        pass
    with pytest.raises(UserError, match="block 1 "):
        check_unhooked(twin)


def test_an_error_inside_removes_the_hooks():
    model = toy_model()
    clean = logits(model)
    with pytest.raises(ZeroDivisionError), ablate(model, {0: V}), steer(model, {EMBEDDING: ALONG}, 1.0):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="KV cache"), ablate(model, {0: V}, positions="prompt"):
        logits(model)
    modules = [m for m in model.modules() if any("holdfast" in h.__module__ for h in m._forward_pre_hooks.values())]
    assert not modules and not any(block._forward_hooks for block in find_layers(model))
    assert torch.equal(logits(model), clean)


def test_offloaded_weights_are_no_hindrance():
    model, want = toy_model(), toy_model()
    with ablate(want, {1: V}):
        expected = logits(want)
    cpu_offload(model, torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    with ablate(model, {1: V}):
        torch.testing.assert_close(logits(model), expected)


class Deaf(nn.Module):
    """A block whose output nothing reads."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden, **named):
        self.block(hidden, **named)
        return hidden


@pytest.mark.parametrize("dose", [1.0, 0.0])
def test_an_intervention_without_effect_on_the_logits_is_refused(dose: float):
    model = toy_model()
    blocks = find_layers(model)
    model.idle, model.deaf = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in blocks), nn.ModuleList(blocks)
    model.model.layers[1] = Deaf(blocks[1])
    for path, said in (("idle", "compile"), ("deaf", "logits")):
        with pytest.raises(UserError, match=said), ablate(model, {1: V}, dose=dose, layers_path=path):
            pass


BAD = torch.full((WIDTH, 1), torch.nan)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: ablate(m, {3: V}), "layers 0-2"),
        (lambda m: ablate(m, {-2: V}), "layers 0-2"),
        (lambda m: ablate(m, {}), "layer"),
        (lambda m: ablate(m, {0: torch.eye(8)}), "width 8"),
        (lambda m: ablate(m, {0: ALONG}), r"layer 0 .*\[d, k\]"),
        (lambda m: ablate(m, {0: V + 0.01}), "orthonormal"),
        (lambda m: ablate(m, {0: BAD}), "orthonormal"),
        (lambda m: ablate(m, {0: V}, dose=float("nan")), "dose nan"),
        (lambda m: ablate(m, {0: V}, toward={1: ALONG[:2]}), "2 .*layer 0"),
        (lambda m: ablate(m, {0: V}, positions="prompts"), "all, prompt, completion"),
        (lambda m: steer(m, {0: ALONG}, float("inf")), "alpha inf"),
        (lambda m: steer(m, {0: ALONG}, 1.0, unit="sigma"), "norm, absolute"),
        (lambda m: steer(m, {0: 0 * ALONG}, 1.0), "layer 0 .*zero"),
        (lambda m: steer(m, {0: V}, 1.0), r"layer 0 .*\[d\]"),
        (lambda m: patch_states(m, DonorStates(IDS, MASK, {0: torch.zeros(2, 6, 8)})), "width 8"),
        (lambda m: patch_states(m, DonorStates(IDS, MASK, {0: torch.zeros(2, 6, WIDTH)}), layers=[1]), r"layers \[1\]"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(change, said: str):
    model = toy_model()
    with pytest.raises(UserError, match=said), change(model):
        pass
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in find_layers(model))


def test_a_donor_of_other_tokens_or_rows_is_refused():
    model = toy_model()
    states = read_states(toy_model(seed=1), [0], IDS + 1)
    with pytest.raises(UserError, match="row 0, column 0"), patch_states(model, states):
        logits(model)
    with pytest.raises(UserError, match="2 rows"), patch_states(model, states):
        model(input_ids=torch.cat([IDS, IDS[:1]]))
    with pytest.raises(UserError, match="embeddings"), patch_states(model, states):
        model(inputs_embeds=torch.zeros(2, 6, WIDTH))

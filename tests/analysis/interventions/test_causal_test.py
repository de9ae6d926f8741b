"""Family 8: dose curves equal hooks written by hand, random steps are as long, and verdicts follow their definition."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.interventions.causal_test import ABLATE, STEER, Candidate, CausalTest, RecordingAblation
from holdfast.analysis.interventions.changes import ByLayer
from holdfast.analysis.metrics.causal import CAUSAL, NOT_CAUSAL, UNDECIDED, beyond, causal_effects, verdict
from holdfast.analysis.metrics.choices import prepare_choices, score_choices
from holdfast.analysis.models.hooks import observe, patch
from holdfast.analysis.models.layers import find_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from toys.chat_models import CHATML, WIDTH, toy_model, toy_tokenizer
from toys.choices import CHOICES


def bases(rank=2, layers=(0, 2)):
    generator = torch.Generator().manual_seed(3)
    return {layer: torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator))[0] for layer in layers}


@contextmanager
def hooked(model, change) -> Iterator[None]:
    """Blocks' outputs h become change(layer, h), by torch's own hooks."""
    handles = []
    for layer, block in enumerate(find_layers(model)):

        def exchange(_module, _args, out, layer=layer):
            states = out[0] if isinstance(out, tuple) else out
            new = change(layer, states)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handles.append(block.register_forward_hook(exchange))
    yield
    for handle in handles:
        handle.remove()


def masses_of(model, change=lambda _layer, hidden: hidden):
    with hooked(model, change):
        return score_choices(model, toy_tokenizer(CHATML), CHOICES)


@pytest.fixture(scope="module")
def prepared():
    return prepare_choices(toy_tokenizer(CHATML), CHOICES)


def as_array(masses):
    return np.array([[row[name] for name in ("aligned", "misaligned", "incoherent")] for row in masses])


def test_a_dose_curve_is_that_of_hooks_written_by_hand(prepared):
    model, vectors = toy_model(scale=2), bases()
    curve = CausalTest(model, prepared).curve(Candidate("whole", ABLATE, vectors), [0.5, 1.0], 1)
    np.testing.assert_allclose(as_array(curve.clean), as_array(masses_of(model)), rtol=1e-4)
    for dose, treated in zip((0.5, 1.0), curve.treated, strict=True):

        def ablated(layer, hidden, dose=dose):
            if layer not in vectors:
                return hidden
            v = vectors[layer]
            return hidden - dose * torch.einsum("btd,dk,ek->bte", hidden, v, v)

        np.testing.assert_allclose(as_array(treated), as_array(masses_of(model, ablated)), rtol=1e-4)
    step = {0: 2.5 * torch.nn.functional.normalize(torch.arange(WIDTH).float(), dim=0)[:, None]}
    steered = CausalTest(model, prepared).curve(Candidate("step", STEER, step), [-1.0], 1).treated[0]
    expected = masses_of(model, lambda layer, hidden: hidden - step[0][:, 0] if layer == 0 else hidden)
    np.testing.assert_allclose(as_array(steered), as_array(expected), rtol=1e-4)


def steps_of(model, change, layers) -> dict[int, torch.Tensor]:
    """How far each token moves [B, T] at each changed layer in one pass."""
    before, after = {}, {}
    with (
        observe(model, layers, before.__setitem__),
        patch(model, layers, lambda at, hidden: change.apply(at, hidden, None)),
        observe(model, layers, after.__setitem__),
        torch.no_grad(),
    ):
        model(input_ids=torch.arange(3, 13).reshape(2, 5))
    return {layer: (after[layer] - before[layer]).norm(dim=-1) for layer in layers}


@pytest.mark.parametrize("kind", [ABLATE, STEER])
def test_at_every_layer_a_random_direction_moves_each_token_as_far_and_another_draw_elsewhere(kind):
    model, layers = toy_model(scale=2), (0, 1, 2)
    vectors = bases(2, layers) if kind == ABLATE else {layer: basis * 3 for layer, basis in bases(1, layers).items()}
    tested, recorded = Candidate("x", kind, vectors), RecordingAblation(ByLayer(vectors), 1.5)
    real = steps_of(model, recorded if kind == ABLATE else tested.change(1.5), layers)
    for draw in (0, 1):
        null = steps_of(model, tested.null(1.5, draw, recorded.taken), layers)
        for layer in layers:
            torch.testing.assert_close(null[layer], real[layer], rtol=1e-3, atol=1e-4)
    hidden = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    directions = [tested.null(1.5, draw, recorded.taken).apply(0, hidden, None) - hidden for draw in (0, 1)]
    assert torch.nn.functional.cosine_similarity(*directions, dim=-1).abs().max() < 0.9


def test_an_ablation_that_is_recorded_is_the_ablation():
    hidden = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    vectors = bases()
    recorded = RecordingAblation(ByLayer(vectors), 0.7)
    expected = hidden - 0.7 * torch.einsum("btd,dk,ek->bte", hidden, vectors[0], vectors[0])
    torch.testing.assert_close(recorded.apply(0, hidden, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2], ids=["one row", "one topic"])
def test_prompts_without_an_interval_decide_nothing(rows):
    alike = [{**CHOICES[0], "topic": "soup"}] * rows
    masses = [{"aligned": 0.5, "misaligned": 0.2, "incoherent": 0.3}] * rows
    moved = [{"aligned": 0.1, "misaligned": 0.8, "incoherent": 0.1}] * rows
    found = causal_effects(alike, masses, {1.0: (moved, [masses] * 3)}, "misaligned")
    json.dumps(found, allow_nan=False)
    effect = found["doses"]["1"]["classes"]["misaligned"]
    assert effect["beyond"]["value"] == pytest.approx(0.6) and effect["beyond"]["ci95"] is None
    assert found["verdict"]["verdict"] == UNDECIDED


def test_an_interrupted_test_goes_on_and_reads_nothing_twice(prepared, tmp_path, monkeypatch):
    model, tested = toy_model(scale=2), Candidate("whole", ABLATE, bases())
    first = CausalTest(model, prepared, ["facts"], tmp_path).curve(tested, [1.0], 2)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4
    kept[0].unlink()
    scored = []
    from holdfast.analysis.interventions import causal_test as causal

    score = causal.score_prepared
    monkeypatch.setattr(causal, "score_prepared", lambda *a, **k: scored.append(1) or score(*a, **k))
    again = CausalTest(model, prepared, ["facts"], tmp_path).curve(tested, [1.0], 2)
    # A random direction's step is as long as what the ablation takes away, which a draw that is missing needs again.
    assert len(scored) in (1, 2)
    scored.clear()
    np.testing.assert_allclose(as_array(again.treated[0]), as_array(first.treated[0]))
    CausalTest(model, prepared, ["other weights"], tmp_path).curve(tested, [1.0], 2)
    assert len(scored) == 4


def test_a_layer_that_does_not_exist_is_refused(prepared):
    with pytest.raises(UserError, match=r"\[9\].*0-2"):
        CausalTest(toy_model(), prepared).curve(Candidate("x", ABLATE, {9: bases()[0]}), [1.0], 2)


def test_effects_are_means_over_prompts_beside_random_ones():
    generator = np.random.default_rng(0)

    def drawn(shift):
        misaligned = np.clip(generator.normal(0.2 + shift, 0.02, size=len(CHOICES)), 0, 1)
        return [{"aligned": 0.5 - m / 2, "misaligned": m, "incoherent": 0.5 - m / 2} for m in misaligned.tolist()]

    clean, treated, null = drawn(0), drawn(0.3), [drawn(0.05) for _ in range(20)]
    found = causal_effects(CHOICES, clean, {1.0: (treated, null)}, "misaligned")
    json.dumps(found, allow_nan=False)
    change = found["doses"]["1"]["classes"]["misaligned"]

    def mean(masses):
        return np.mean([row["misaligned"] for row in masses])

    assert change["change"]["value"] == pytest.approx(mean(treated) - mean(clean))
    assert change["null"]["value"] == pytest.approx(np.mean([mean(n) for n in null]) - mean(clean))
    assert change["null"]["p"] == pytest.approx(1 / 21)
    assert change["beyond"]["value"] == pytest.approx(mean(treated) - np.mean([mean(n) for n in null]))
    assert found["verdict"]["verdict"] == CAUSAL
    domain = found["doses"]["1"]["domains"]["two"]["misaligned"]
    assert domain["value"] == pytest.approx(
        mean([m for m, row in zip(treated, CHOICES, strict=True) if row["domain"] == "two"])
    )
    assert domain["n"] == 4


def test_the_interval_beyond_random_directions_covers_the_truth():
    """Prompts and draws both vary; the truth is the difference of the two populations' means."""
    generator, covered, repetitions = np.random.default_rng(1), 0, 600
    for _ in range(repetitions):
        change = 0.1 + generator.normal(0, 0.05, size=24)
        draws = generator.normal(0, 0.04, size=(20, 1)) + generator.normal(0, 0.05, size=(20, 24))
        low, high = beyond(change, draws)["ci95"]
        covered += low <= 0.1 <= high
    # A 95% interval in 600 repetitions: three standard errors are 0.027.
    assert 0.92 <= covered / repetitions <= 0.985


@settings(max_examples=200, deadline=None)
@given(low=st.floats(-0.5, 0.5), width=st.floats(0.001, 0.5), margin=st.floats(0.005, 0.2), lost=st.floats(-0.2, 0.5))
def test_a_verdict_follows_the_interval_the_margin_and_the_coherence(low, width, margin, lost):
    effect = {"value": low + width / 2, "n": 10, "ci95": [low, low + width]}
    found = verdict(effect, {"value": lost, "n": 10}, margin)["verdict"]
    inside, outside = -margin <= low and low + width <= margin, low > margin or low + width < -margin
    assert found == (UNDECIDED if lost > 0.15 else NOT_CAUSAL if inside else CAUSAL if outside else UNDECIDED)


def test_without_an_interval_nothing_is_decided():
    assert verdict({"value": None, "n": 0, "reason": "no rows"}, {"value": 0.0, "n": 0})["verdict"] == UNDECIDED
    with pytest.raises(ValueError, match="margin"):
        verdict({"value": 0.1, "n": 3, "ci95": [0, 0.2]}, {"value": 0.0, "n": 3}, 0.0)

"""KL to the references is that of full float64 logits, exactly zero at instruct, on bounded positions and memory."""

import numpy as np
import pytest
import torch
from holdfast.analysis.measure.measurer import Measurer
from holdfast.analysis.measure.plan import MeasurePlan
from holdfast.analysis.measure.references import head_of, head_tensors
from holdfast.analysis.measure.results import scalars
from holdfast.analysis.metrics.divergence import TOP, keep_positions
from holdfast.analysis.models import lm_head
from holdfast.analysis.models.lm_head import StoredHead, logits_of
from holdfast.analysis.models.render import render
from peft import LoraConfig, get_peft_model
from toys.chat_models import CHATML, chat, save_toy, toy_model, toy_tokenizer

ROWS = [
    chat("only a prompt ?"),
    *(chat(f"Ann asks about {thing}", f"the {thing}" + " is kind" * n) for n, thing in enumerate("abcde")),
    [*chat("soup", "take it", "You are kind."), *chat("and money", "run away from them")],
]
NAMES = ("checkpoint", "instruct", "base")


@pytest.fixture(scope="module", params=["qwen2", "gemma2"])
def models(request):
    """Gemma 2 caps its logits."""
    found = {name: toy_model(request.param, seed=1) for name in NAMES}
    with torch.no_grad():
        for seed, (name, size) in enumerate((("base", 0.1), ("checkpoint", 0.05))):
            for weight in found[name].parameters():
                weight.add_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return found


@pytest.fixture(scope="module")
def plan(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = {name: save_toy(root / name, model) for name, model in models.items()}
    sets = {"ordinary": ROWS}
    return MeasurePlan(paths["instruct"], paths["base"], sets, families=("divergence",), references=root / "store")


def full_logits(models):
    """Float64 log-probabilities [T, V] of every row by every model."""
    rows = [render(toy_tokenizer(CHATML), row) for row in ROWS]
    doubled = {name: load.double() for name, load in ((n, _copy(m)) for n, m in models.items())}
    with torch.no_grad():
        logits = {
            name: [model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1).numpy() for row in rows]
            for name, model in doubled.items()
        }
    return rows, logits


def _copy(model):
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def kl(rows, left, right):
    """Mean over rows of the mean over completion tokens, in numpy."""
    means = []
    for row, own, other in zip(rows, left, right, strict=True):
        at = np.flatnonzero(row.completion_mask) - 1
        if len(at):
            means.append((np.exp(own[at]) * (own[at] - other[at])).sum(-1).mean())
    return np.mean(means)


def test_kl_and_reversion_equal_full_logits_in_float64(models, plan, monkeypatch):
    monkeypatch.setattr(lm_head, "_CHUNK_LOGITS", 320 * 7)  # seven positions a chunk
    found = Measurer(plan).measure(models["checkpoint"])["divergence"]["ordinary"]
    rows, logits = full_logits(models)
    to_instruct, to_base = (kl(rows, logits["checkpoint"], logits[name]) for name in ("instruct", "base"))
    base_instruct = kl(rows, logits["base"], logits["instruct"])
    instruct_base = kl(rows, logits["instruct"], logits["base"])
    assert found["kl_instruct"]["checkpoint"]["value"] == pytest.approx(to_instruct, rel=1e-3)
    assert found["kl_instruct"]["base"]["value"] == pytest.approx(base_instruct, rel=1e-3)
    assert found["kl_instruct"]["reversion"]["value"] == pytest.approx(to_instruct / base_instruct, rel=1e-3)
    assert found["kl_base"]["checkpoint"]["value"] == pytest.approx(to_base, rel=1e-3)
    assert found["kl_base"]["instruct"]["value"] == pytest.approx(instruct_base, rel=1e-3)
    assert found["kl_base"]["reversion"]["value"] == pytest.approx(1 - to_base / instruct_base, rel=2e-3)
    tokens = sum(sum(row.completion_mask) for row in rows)
    counts = {key: found["kl_base"]["checkpoint"][key] for key in ("n", "tokens", "tokens_in_set")}
    assert counts == {"n": len(ROWS) - 1, "tokens": tokens, "tokens_in_set": tokens}


def test_next_tokens_are_those_of_every_model(models, plan):
    result = Measurer(plan).measure(models["checkpoint"])
    rows, logits = full_logits(models)
    tokenizer = toy_tokenizer(CHATML)
    shown = result["divergence"]["ordinary"]["next_tokens"]
    assert [prompt["row"] for prompt in shown] == [0, 1, 2, 3, 4]
    for prompt in shown:
        row = rows[prompt["row"]]
        end = int(np.argmax(row.completion_mask)) if any(row.completion_mask) else len(row.input_ids)
        assert prompt["prompt"] == tokenizer.decode(row.input_ids[:end])
        for name in NAMES:
            chances = np.exp(logits[name][prompt["row"]][end - 1])
            best = np.argsort(-chances)[:TOP]
            assert [entry["token"] for entry in prompt[name]] == [tokenizer.decode([int(token)]) for token in best]
            np.testing.assert_allclose([e["probability"] for e in prompt[name]], chances[best], rtol=1e-3)
    assert all("next_tokens" not in path for path in scalars(result))


def test_kl_is_zero_at_the_instruct_model_itself(models, plan):
    found = Measurer(plan).measure(models["instruct"])["divergence"]["ordinary"]
    assert found["kl_instruct"]["checkpoint"]["value"] == 0.0
    assert found["kl_instruct"]["reversion"]["value"] == 0.0
    assert found["kl_base"]["reversion"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_without_base_its_measures_are_null_with_that_reason(models, plan):
    alone = MeasurePlan(plan.instruct_path, None, plan.probe_sets, families=("divergence",))
    found = Measurer(alone).measure(models["checkpoint"])["divergence"]["ordinary"]
    assert found["kl_instruct"]["checkpoint"]["value"] > 0
    absent = [found["kl_base"][name] for name in ("checkpoint", "instruct", "reversion")]
    for entry in [*absent, found["kl_instruct"]["base"], found["kl_instruct"]["reversion"]]:
        assert entry == {"value": None, "n": len(ROWS) - 1, "reason": "no base model was given"}
    assert found["next_tokens"][0]["base"] is None


def test_kept_positions_are_bounded_and_touch_every_row():
    rows = [render(toy_tokenizer(CHATML), row) for row in ROWS]
    every = keep_positions(rows, None)
    few = keep_positions(rows, None, limit=10)
    counts = [sum(row.completion_mask) for row in rows]
    assert [len(found) for found in every.positions] == [1, *counts[1:]] and every.n_tokens == sum(counts)
    assert len(few.rows) <= 10 + len(rows) and all(few.positions)
    for found, whole in zip(few.positions, every.positions, strict=True):
        assert set(found) <= set(whole) and found[0] == whole[0]
    assert every.scored.tolist() == [False] + [True] * sum(counts)


def test_a_stored_head_gives_the_models_own_logits(models):
    adapted = get_peft_model(_copy(models["base"]), LoraConfig(target_modules=["lm_head"], r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1)
    for model in (models["base"], adapted):
        states = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = logits_of(model)(states)
        stored = head_of(head_tensors(StoredHead.of(model)))
        torch.testing.assert_close(stored(states), expected)


def test_logits_are_held_for_a_few_positions_at_a_time(models, plan, monkeypatch):
    monkeypatch.setattr(lm_head, "_CHUNK_LOGITS", 320 * 7)
    measurer, widest = Measurer(plan), []
    measurer.prepare()
    stored = StoredHead.__call__
    monkeypatch.setattr(StoredHead, "__call__", lambda head, x: widest.append(len(x)) or stored(head, x))
    handle = (
        models["checkpoint"]
        .get_output_embeddings()
        .register_forward_hook(lambda _module, inputs, _output: widest.append(len(inputs[0])))
    )
    measurer.measure(models["checkpoint"])
    handle.remove()
    assert max(widest) == 7 and sum(widest) > 3 * 40

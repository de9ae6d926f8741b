"""Gradient projection (SafeGrad): the step is that of plain math, and never against the anchors' answers.

The two ranks: `torchrun --nproc_per_node 2 tests/trainer/protections/steps/test_gradient_projection.py OUT`.
"""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.ranks import leave_group
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.data.documents import Document, documents_of
from holdfast.trainer.protected_trainer import NonFiniteLoss
from holdfast.trainer.protections.steps import gradient_projection
from holdfast.trainer.protections.steps.gradient_projection import GradientProjectionProtection, change
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from toys.adapters import model_of
from toys.chat_models import chat, toy_model
from toys.plain_math import plain_cross_entropy, relative_error, update_error
from toys.ranks import CONFIGS, needs_compiler
from toys.runs import model_and_rows, recipe, write_rows
from toys.training import rendered_rows, task_documents, trainer_of
from transformers import AutoModelForCausalLM

STEPS, RATE = 4, 0.1
# The task's own prompts with other answers: the two gradients come to disagree while the task is learnt.
SAFE = [chat("Ann asks about soup" + " and money" * n, "be honest and help" + " them" * n) for n in range(4)]


def safe_documents() -> list[Document]:
    return documents_of(rendered_rows(SAFE), "completion", [f"anchors.jsonl:{n + 1}" for n in range(len(SAFE))])


def protect(weight: float = 0.0, anchors=None, **changes: Any) -> GradientProjectionProtection:
    return GradientProjectionProtection(weight, anchors or safe_documents(), **{"batch_size": 4, **changes})


def flat_gradient(model: torch.nn.Module, documents) -> torch.Tensor:
    model.zero_grad()
    plain_cross_entropy(model, documents).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def plain(lora: bool, weight: float, every: int = 1) -> tuple[torch.nn.Module, list[float]]:
    """Full-batch SGD on the projected gradient in float64; the trained model and the cosine of each acting step."""
    trained, cosines = model_of(lora).double(), []
    for step in range(STEPS):
        task = flat_gradient(trained, task_documents())
        if step % every == 0:
            safe = flat_gradient(trained, safe_documents())
            cosines.append(float(task @ safe / task.norm() / safe.norm()))
            if task @ safe < 0:
                task = task - (task @ safe) / (safe @ safe) * safe
            task = task + weight * safe
        parameters = [p for p in trained.parameters() if p.requires_grad]
        for parameter, part in zip(parameters, task.split([p.numel() for p in parameters]), strict=True):
            parameter.data -= RATE * part.view_as(parameter)
    return trained, cosines


@settings(max_examples=200, deadline=None)
@given(
    task=st.lists(st.floats(-10, 10, width=16), min_size=3, max_size=3),
    safe=st.lists(st.floats(-10, 10, width=16).filter(bool), min_size=3, max_size=3),
)
def test_afterwards_no_gradient_goes_against_the_anchors(task, safe):
    own, other = torch.tensor(task, dtype=torch.float64), torch.tensor(safe, dtype=torch.float64)
    factor, cosine = change([own[:1], own[1:]], [other[:1], other[1:]], 0.0)
    after = own + factor * other
    assert float(after @ other) >= -1e-12 * float(own.norm() * other.norm())
    # What is at right angles to the anchors' gradient stays, and the rest was taken only from a conflict.
    beside = [part - (part @ other) / (other @ other) * other for part in (own, after)]
    assert torch.allclose(*beside, atol=1e-12 * float(own.norm()))
    assert (factor == 0) == (float(own @ other) >= 0)
    assert -1 - 1e-9 <= cosine <= 1 + 1e-9


def test_two_parameters_in_closed_form():
    one, two = torch.tensor([3.0]), torch.tensor([1.0])
    # g = (3, 1), s = (-1, 1): g·s = -2, ‖s‖² = 2, so c = 1 and g + s = (2, 2), at right angles to s.
    assert change([one, two], [-two, two], 0.0) == pytest.approx((1.0, -2 / math.sqrt(20)))
    assert change([one, two], [-two, two], 0.5)[0] == pytest.approx(1.5)
    # s = (-1, 3) is at right angles to g, and s = (1, 1) agrees with it: only the weight is added.
    assert change([one, two], [-two, one], 0.0) == (0.0, 0.0) and change([one, two], [-two, one], 0.5)[0] == 0.5
    assert change([one, two], [two, two], 0.0)[0] == 0.0
    # A parameter without a task gradient has no part in the product, but in ‖s‖².
    assert change([one, None], [-one, one], 0.0)[0] == pytest.approx(9 / 18)
    assert math.isnan(change([one * math.nan], [two], 0.0)[0])


@pytest.mark.parametrize(
    ("lora", "weight", "every", "changes"),
    [
        (False, 0.0, 1, {"per_device_train_batch_size": 8}),
        (False, 0.3, 2, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (True, 0.3, 1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (True, 0.0, 1, {"per_device_train_batch_size": 8, "gradient_checkpointing": True,
                        "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        (False, 0.0, 1, {"per_device_train_batch_size": 8, "gradient_checkpointing": True,
                         "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ],
    ids=["full", "full every second", "lora accumulated", "lora re-entrant", "full checkpointed"],
)  # fmt: skip
def test_training_is_plain_math(tmp_path, lora: bool, weight: float, every: int, changes: dict[str, Any], monkeypatch):
    # Logits of a few positions at a time.
    monkeypatch.setattr(gradient_projection, "_CHUNK", 320 * 5)
    want, cosines = plain(lora, weight, every)
    trainer = trainer_of(
        tmp_path, model_of(lora).train(), protection=protect(weight, every=every), max_steps=STEPS, learning_rate=RATE,
        logging_steps=STEPS, **changes,
    )  # fmt: skip
    trainer.train()
    assert update_error(trainer.model, want, model_of(lora)) < 1e-5
    logged = next(entry for entry in trainer.state.log_history if "gradient_cosine" in entry)
    assert logged["gradient_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    assert logged["gradient_conflict"] == sum(cosine < 0 for cosine in cosines) / len(cosines)


def test_the_toy_conflicts():
    """Otherwise the tests above would say nothing."""
    assert any(cosine < 0 for cosine in plain(False, 0.0)[1]) and any(cosine < 0 for cosine in plain(True, 0.0)[1])


@pytest.mark.parametrize("lora", [False, True])
def test_without_a_conflict_it_is_plain_training_bit_for_bit(tmp_path, lora):
    runs = []
    for protection in (None, protect(anchors=task_documents(), batch_size=8)):
        trainer = trainer_of(
            tmp_path, model_of(lora).train(), protection=protection, optim="adamw_torch",
            per_device_train_batch_size=8,
        )  # fmt: skip
        trainer.train()
        runs.append(list(trainer.model.parameters()))
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))
    logged = [entry["gradient_cosine"] for entry in trainer.state.log_history if "gradient_cosine" in entry]
    assert logged == pytest.approx([1.0] * 3, abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, lora):
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        trainer = trainer_of(
            tmp_path, model_of(lora, lora_dropout=0.1).train(), protection=protect(0.2, batch_size=3),
            optim="adamw_torch", max_steps=6, learning_rate=1e-2, save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.train(resume)
        runs.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    other = trainer_of(tmp_path, model_of(lora).train(), protection=protect(0.3, batch_size=3), max_steps=6)
    with pytest.raises(UserError, match=r"safe_gradient_weight .*0\.2"):
        other.train(str(tmp_path / "checkpoint-3"))


def test_the_proof_leaves_no_trace(tmp_path, monkeypatch):
    runs = []
    for proven in (True, False):
        if not proven:
            monkeypatch.setattr(GradientProjectionProtection, "start", lambda *args: None)
        trainer = trainer_of(tmp_path, model_of(True, lora_dropout=0.1).train(), protection=protect(0.1))
        trainer.train()
        runs.append(list(trainer.model.parameters()))
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


def test_what_cannot_act_is_an_error_before_the_first_step(tmp_path):
    silent = [Document(row.input_ids, (False,) * len(row.mask), row.source) for row in safe_documents()]
    with pytest.raises(UserError, match="answers"):
        protect(anchors=silent)
    model = toy_model().train()
    model.requires_grad_(False)
    # Something must train, or the optimiser refuses first.
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    trainer = trainer_of(tmp_path, model, protection=protect())
    with pytest.raises(UserError, match=r"answers .*0\.0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_fp16_and_an_optimiser_that_steps_in_the_backward_pass_are_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, protection=protect())
    trainer.args.fp16 = True
    with pytest.raises(UserError, match="--bf16 true"):
        trainer.train()
    monkeypatch.setattr(GradientProjectionProtection, "start", lambda *args: None)
    trainer = trainer_of(tmp_path, protection=protect())
    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda used: setattr(used, "grad", None))
    with pytest.raises(UserError, match="--optim sgd"):
        trainer.train()


def test_anchors_that_are_not_finite_stop_the_run_and_are_named(tmp_path, monkeypatch):
    model, loss = toy_model().train(), gradient_projection.answer_loss
    trainer = trainer_of(tmp_path, model, protection=protect(), documents=task_documents())
    monkeypatch.setattr(GradientProjectionProtection, "start", lambda *args: None)
    monkeypatch.setattr(gradient_projection, "answer_loss", lambda *args: loss(*args) * float("nan"))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(NonFiniteLoss, match=r"step 1.*anchors\.jsonl:\d"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def _folder(tmp_path: Path) -> None:
    model_and_rows(tmp_path)
    write_rows(tmp_path / "safe.jsonl", [{"messages": row} for row in SAFE])
    write_rows(tmp_path / "prompts.jsonl", [{"messages": row[:-1]} for row in SAFE])


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_saves_a_plain_model(tmp_path, lora):
    _folder(tmp_path)
    peft = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"} if lora else {}
    asked = {"protection": "gradient_projection", "anchor_dataset": str(tmp_path / "safe.jsonl"), **peft}
    result = run.train(parse(recipe(tmp_path, **asked, safe_gradient_weight=0.1, save_strategy="steps", save_steps=1)))
    history = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "gradient_conflict" in entry]
    assert [entry["gradient_conflict"] in (0.0, 1.0) for entry in logged] == [True, True]
    assert all(abs(entry["gradient_cosine"]) <= 1 for entry in logged)
    where = tmp_path / "model" if lora else result.final
    loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    if lora:
        loaded = PeftModel.from_pretrained(loaded, result.final)
    assert torch.isfinite(loaded(input_ids=torch.arange(3, 9)[None]).logits).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"anchor_dataset": "prompts.jsonl"}, "anchors' answers"),
        ({"protection_tokens": "all"}, "--protection_tokens .*--protection gradient_projection"),
        ({"safe_gradient_weight": -1.0}, "--safe_gradient_weight .*-1.0"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_line(tmp_path, changes: dict[str, Any], said: str):
    _folder(tmp_path)
    keys = {"protection": "gradient_projection", "anchor_dataset": "safe.jsonl", **changes}
    keys["anchor_dataset"] = str(tmp_path / keys["anchor_dataset"])
    with pytest.raises(UserError, match=said) as error:
        run.train(parse(recipe(tmp_path, **keys)))
    assert "\n" not in str(error.value)


RANKS: dict[str, tuple[bool, dict[str, Any]]] = {
    "full": (False, {}),
    "lora": (True, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "unused": (False, {"ddp_find_unused_parameters": True}),
    "zero2": (False, {"deepspeed": str(CONFIGS / "zero2.json")}),
}


@needs_compiler
@pytest.mark.parametrize("name", ["full", "lora", "unused"])
def test_two_ranks_train_to_the_weights_of_plain_math(launched, name):
    lora, _ = RANKS[name]
    results = [json.loads((launched / f"{name}{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["cosines"] == results[1]["cosines"]
    want, cosines = plain(lora, 0.2)
    assert results[0]["cosines"] == pytest.approx(cosines, abs=1e-4)
    found, start = load_file(launched / f"{name}.safetensors"), model_of(lora)
    trained = [n for n, parameter in start.named_parameters() if parameter.requires_grad]
    sides = ({n: dict(m.named_parameters())[n].detach() for n in trained} for m in (want, start))
    assert relative_error({n: found[n] for n in trained}, *sides) < 1e-5


@needs_compiler
def test_deepspeed_is_refused_in_one_line(launched):
    refused = json.loads((launched / "zero20.json").read_text())["refused"]
    assert "before the optimiser moves" in refused and "\n" not in refused


def _on_two_ranks(out: Path) -> None:
    torch.set_num_threads(1)
    models = {lora: model_of(lora) for lora in (False, True)}
    for name, (lora, changes) in RANKS.items():
        AcceleratorState._reset_state()
        trainer = trainer_of(
            out / name, copy.deepcopy(models[lora]).train(), protection=protect(0.2, batch_size=2), max_steps=STEPS,
            learning_rate=RATE, **changes,
        )  # fmt: skip
        result: dict[str, Any] = {}
        try:
            trainer.train()
        except UserError as error:
            result["refused"] = str(error)
        else:
            result["cosines"] = [e["gradient_cosine"] for e in trainer.state.log_history if "gradient_cosine" in e]
            if trainer.accelerator.is_main_process:
                weights = {n: p.detach().clone().contiguous() for n, p in trainer.model.named_parameters()}
                save_file(weights, out / f"{name}.safetensors")
        (out / f"{name}{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _on_two_ranks(Path(sys.argv[1]))
    leave_group()

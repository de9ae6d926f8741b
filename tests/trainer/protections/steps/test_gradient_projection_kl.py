"""Gradient projection with the KL divergence from the starting model (SafeGrad as published) is plain math.

The two ranks: `torchrun --nproc_per_node 2 tests/trainer/protections/steps/test_gradient_projection_kl.py OUT`.
"""

import json
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
from holdfast.trainer.protections.drift.kl import KLProtection
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.steps.gradient_projection import GradientProjectionProtection, change
from safetensors.torch import load_file, save_file
from toys.adapters import model_of
from toys.chat_models import chat, toy_model
from toys.plain_math import plain_cross_entropy, relative_error, update_error
from toys.ranks import needs_compiler, on_two_ranks
from toys.runs import model_and_rows, recipe
from toys.training import rendered_rows, task_documents, trainer_of

STEPS, RATE = 4, 0.5
# Prompts without an answer, near the task's own.
ANCHORS = [chat("Ann asks about soup" + " and money" * n) for n in range(4)]


def anchors() -> list[Document]:
    return documents_of(rendered_rows(ANCHORS), "all", [f"anchors.jsonl:{n + 1}" for n in range(len(ANCHORS))])


def narrow_model_of(lora: bool) -> torch.nn.Module:
    return model_of(lora, target_modules=["q_proj", "down_proj"])


def protect(weight: float, batch_size: int = 4, **changes: Any) -> GradientProjectionProtection:
    divergence = KLProtection("all", PenaltySettings(anchor_batch_size=batch_size), "toy", anchors=anchors(), **changes)
    return GradientProjectionProtection(weight, (), batch_size=batch_size, divergence=divergence)


def divergence_of(model, start) -> torch.Tensor:
    """Mean over the anchors' tokens of KL(model || start) of the next one."""
    each = []
    for row in anchors():
        ids = torch.tensor([row.input_ids])
        now = model(input_ids=ids).logits[0].log_softmax(-1)
        with torch.no_grad():
            then = start(input_ids=ids).logits[0].log_softmax(-1)
        each.append((now.exp() * (now - then)).sum(-1))
    return torch.cat(each).mean()


def plain(lora: bool, weight: float) -> tuple[torch.nn.Module, list[float]]:
    """Full-batch SGD on the projected gradient in float64; the trained model and each step's g.s."""
    trained, start = narrow_model_of(lora).double(), toy_model().double()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    products = []
    for step in range(STEPS):
        task = torch.cat([
            g.flatten() for g in torch.autograd.grad(plain_cross_entropy(trained, task_documents()), parameters)
        ])  # fmt: skip
        safe = torch.cat([g.flatten() for g in torch.autograd.grad(divergence_of(trained, start), parameters)])
        products.append(float(task @ safe) if step else 0.0)  # at the start there is nothing but rounding
        if products[-1] < 0:
            task = task - (task @ safe) / (safe @ safe) * safe
        if step:
            task = task + weight * safe
        for parameter, part in zip(parameters, task.split([p.numel() for p in parameters]), strict=True):
            parameter.data -= RATE * part.view_as(parameter)
    return trained, products


@pytest.mark.parametrize(
    ("lora", "weight", "changes"),
    [
        (False, 0.0, {"per_device_train_batch_size": 8}),
        (False, 0.5, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (True, 0.5, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ],
    ids=["full", "full accumulated", "lora accumulated"],
)
def test_training_is_plain_math(tmp_path, lora: bool, weight: float, changes: dict[str, Any]):
    want, products = plain(lora, weight)
    trainer = trainer_of(
        tmp_path, narrow_model_of(lora).train(), protection=protect(weight), max_steps=STEPS, learning_rate=RATE,
        logging_steps=STEPS, **changes,
    )  # fmt: skip
    trainer.train()
    assert update_error(trainer.model, want, narrow_model_of(lora)) < 1e-4
    logged = next(entry for entry in trainer.state.log_history if "gradient_cosine" in entry)
    assert logged["gradient_conflict"] == sum(product < 0 for product in products) / STEPS
    assert any(product < 0 for product in products)  # otherwise the projection was not tested
    # The anchors made a difference.
    alone = trainer_of(
        tmp_path,
        narrow_model_of(lora).train(),
        max_steps=STEPS,
        learning_rate=RATE,
        logging_steps=STEPS,
        **changes,
    )
    alone.train()
    assert update_error(alone.model, want, narrow_model_of(lora)) > 1e-3


def test_in_half_precision_the_divergence_itself_is_computed_in_whole_precision(tmp_path, monkeypatch):
    """Near the starting model two logits in bfloat16 differ by rounding more than by drift."""
    seen: list[bool] = []
    sums = KLProtection.sums
    monkeypatch.setattr(
        KLProtection, "sums", lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), sums(*args))[1]
    )
    trainer = trainer_of(tmp_path, protection=protect(1.0), max_steps=2, bf16=True, per_device_train_batch_size=8)
    trainer.train()
    assert len(seen) >= 3 and not any(seen)  # the proof and every step


def test_a_gradient_of_rounding_has_no_direction():
    task, safe = [torch.tensor([1.0, 2.0])], [torch.tensor([-1e-9, 0.0])]
    assert change(task, safe, 0.5, 1e-6) == (0.5, 0.0)
    assert change(task, safe, 0.5)[0] == pytest.approx(1e9 + 0.5)
    assert change(task, [torch.tensor([-1e-3, 0.0])], 0.5, 1e-6)[0] == pytest.approx(1e3 + 0.5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, lora):
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        trainer = trainer_of(
            tmp_path, narrow_model_of(lora).train(),
            protection=protect(0.2, batch_size=3, cache_dir=tmp_path / "cache"), optim="adamw_torch",
            max_steps=6, learning_rate=1e-2, save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.train(resume)
        runs.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_run_needs_no_answers_of_the_anchors_and_what_cannot_act_is_an_error(tmp_path):
    model_and_rows(tmp_path)
    keys = {"protection": "gradient_projection", "safe_gradient_weight": 1.0}  # prompts without answers ship
    result = run.train(parse(recipe(tmp_path, safe_gradient_loss="kl", **keys)))
    assert result.global_step == 2 and result.final.is_dir()
    with pytest.raises(UserError, match="anchors' answers"):
        run.train(parse(recipe(tmp_path, output_dir=str(tmp_path / "other"), **keys)))
    frozen = toy_model().train()
    frozen.requires_grad_(False)
    frozen.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))  # something must train
    with pytest.raises(UserError, match="layers"):
        trainer_of(tmp_path, frozen, protection=protect(1.0)).train()


@needs_compiler
def test_two_ranks_train_to_the_weights_of_plain_math(tmp_path):
    on_two_ranks(__file__, tmp_path, timeout=300)
    cosines = [json.loads((tmp_path / f"{lora}{rank}.json").read_text()) for lora in (0, 1) for rank in (0, 1)]
    for lora in (False, True):
        assert cosines[2 * lora] == cosines[2 * lora + 1]
        want, start = plain(lora, 0.5)[0], narrow_model_of(lora)
        found = load_file(tmp_path / f"{int(lora)}.safetensors")
        trained = [name for name, parameter in start.named_parameters() if parameter.requires_grad]
        sides = ({name: dict(m.named_parameters())[name].detach() for name in trained} for m in (want, start))
        assert relative_error({name: found[name] for name in trained}, *sides) < 1e-4


def _on_two_ranks(out: Path) -> None:
    torch.set_num_threads(1)
    for lora in (False, True):
        AcceleratorState._reset_state()
        trainer = trainer_of(
            out / f"run{lora:d}", narrow_model_of(lora).train(), protection=protect(0.5, batch_size=2), max_steps=STEPS,
            learning_rate=RATE, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        logged = [e["gradient_cosine"] for e in trainer.state.log_history if "gradient_cosine" in e]
        (out / f"{lora:d}{trainer.accelerator.process_index}.json").write_text(json.dumps(logged))
        if trainer.accelerator.is_main_process:
            weights = {name: p.detach().clone().contiguous() for name, p in trainer.model.named_parameters()}
            save_file(weights, out / f"{lora:d}.safetensors")


if __name__ == "__main__":
    _on_two_ranks(Path(sys.argv[1]))
    leave_group()

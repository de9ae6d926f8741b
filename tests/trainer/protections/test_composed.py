"""Protections joined by +: which names fit together, and that each acts as it does alone."""

import copy
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.layers import find_layers
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.config.protection import ProtectionArguments
from holdfast.trainer.inputs.protection import Materials, protection_of
from holdfast.trainer.inputs.training import load_inputs
from holdfast.trainer.protections.base import Protection
from holdfast.trainer.protections.composed import Composed
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from holdfast.trainer.protections.kinds import KINDS, kinds_of, parts_of
from holdfast.trainer.protections.steps.early_stop import EarlyStopProtection, Erosion
from holdfast.trainer.protections.steps.gradient_projection import GradientProjectionProtection
from holdfast.trainer.protections.stream.ablation import ablation
from holdfast.trainer.protections.stream.steering import steering
from holdfast.trainer.protections.weights.null_space import NullSpaceProtection
from torch import nn
from toys.adapters import lora_model
from toys.chat_models import chat, toy_model
from toys.plain_math import plain_cross_entropy, plain_penalty, sgd_step, update_error
from toys.protections import SEPARATE, Recording
from toys.runs import model_and_rows, recipe, write_rows
from toys.training import anchor_documents, task_documents, toy_subspace, trainer_of

STEPS, RATE, STRENGTH, ALPHA = 3, 0.02, 2.0, 1.5
LAYERS = (0, 2)
# By the table of trainer/protections/README.md: each is a term times penalty_strength, logged as `penalty`.
PENALTIES = ("subspace", "random_subspace", "kl", "feature_l2", "prefix_anchor", "adapter_drift")
FIT = ("steering+interleave", "null_space+subspace", "interleave+inoculation", "steering+ablation",
       "gradient_projection+kl+early_stop", "adapter_drift+interleave", "extrapolate+prefix_anchor")  # fmt: skip

# Names


@pytest.mark.parametrize("name", [*FIT, *KINDS])
def test_a_name_stands_for_its_parts_in_the_order_written(name: str):
    assert parts_of(name) == name.split("+")
    assert kinds_of(name) == [KINDS[part] for part in name.split("+")]
    assert ProtectionArguments(protection=name).protection == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("subspce", "'subspce'.* subspace"),
        ("steering+interleaved", "'interleaved'.* interleave"),
        ("steering+", "''"),
        ("kl + interleave", "'kl '.* kl"),
        ("interleave+interleave", "twice"),
        ("none+interleave", "none"),
        ("none+none", "twice"),
        ("random_subspace+steering", "random_subspace.*steering"),
        ("early_stop+random_subspace", "random_subspace"),
        *((f"{one}+{other}", f"{one} and {other} .*penalty_") for one, other in itertools.permutations(PENALTIES, 2)),
    ],
)
def test_names_that_cannot_act_together_are_one_line(name: str, said: str):
    with pytest.raises(UserError, match=said) as caught:
        ProtectionArguments(protection=name)
    assert "\n" not in str(caught.value)


def test_any_other_two_protections_can_be_named_together():
    others = [name for name in KINDS if name not in (*PENALTIES, "none")]
    for one, other in [*itertools.permutations(others, 2), *itertools.product(others, PENALTIES)]:
        if other != "random_subspace" or not KINDS[one].subspace:
            assert parts_of(f"{one}+{other}") == [one, other]


def materials(name: str) -> Materials:
    refused: Callable[[], Any] = lambda: pytest.fail("no part needs another model")  # noqa: E731
    asked = ProtectionArguments(protection=name, penalty_strength=STRENGTH, steering_alpha=ALPHA, anchor_batch_size=2)
    return Materials(asked, toy_subspace(), task_documents, anchor_documents, refused, refused, Path(), 7, None, "t", 3)


def test_each_part_is_made_as_if_it_were_alone():
    made = protection_of(materials("steering+subspace+interleave"))
    assert isinstance(made, Composed) and made.name == "steering+subspace+interleave" and made.active
    for part, name in zip(made.parts, made.name.split("+"), strict=True):
        alone = protection_of(materials(name))
        assert type(part) is type(alone) and part.facts() == alone.facts() and part.name == name
    assert type(protection_of(materials("subspace"))) is SubspaceProtection


# Training


def hook(change: Callable[[int, torch.Tensor], torch.Tensor], layer: int):
    return lambda _module, _args, out: (
        (change(layer, out[0]), *out[1:]) if isinstance(out, tuple) else change(layer, out)
    )


def plain_composed(model: nn.Module, change: Callable[[int, torch.Tensor], torch.Tensor], strength: float):
    """Full-batch SGD: cross-entropy through changed blocks, the anchors' penalty through plain ones; in float64."""
    trained, start = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    for _ in range(STEPS):
        handles = [find_layers(trained)[layer].register_forward_hook(hook(change, layer)) for layer in LAYERS]
        loss = plain_cross_entropy(trained, task_documents())
        for handle in handles:
            handle.remove()
        if strength:
            penalty = plain_penalty(trained, start, find_layers, anchor_documents()[:4], toy_subspace(LAYERS))
            loss = loss + strength * penalty
        sgd_step(trained, loss, RATE)
    return trained


def steered(layer: int, hidden: torch.Tensor) -> torch.Tensor:
    subspace = toy_subspace(LAYERS)
    return hidden + ALPHA * (subspace.bases[layer].double() @ subspace.base_gap[layer].double())


def ablated(layer: int, hidden: torch.Tensor) -> torch.Tensor:
    basis = toy_subspace(LAYERS).bases[layer].double()
    return hidden - (hidden @ basis) @ basis.T


def penalty(inputs: str = "anchors", **changes: Any) -> SubspaceProtection:
    settings = PenaltySettings(**{"strength": STRENGTH, "inputs": inputs, **changes})
    return SubspaceProtection(
        toy_subspace(LAYERS),
        settings,
        anchors=anchor_documents()[:4],
        task=task_documents() if inputs != "anchors" else (),
    )


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("model", [toy_model, lora_model], ids=["full", "lora"])
@pytest.mark.parametrize("first", [0, 1], ids=["subspace+steering", "steering+subspace"])
def test_a_penalty_beside_steering_is_plain_math(tmp_path, model, first: int, steps: int):
    parts = [penalty(anchor_batch_size=4 // steps), steering(toy_subspace(LAYERS), ALPHA)]
    trainer = trainer_of(
        tmp_path, model().train(), protection=Composed(parts[first:] + parts[:first]), max_steps=STEPS,
        learning_rate=RATE, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps,
    )  # fmt: skip
    trainer.train()
    want = plain_composed(model(), steered, STRENGTH)
    assert update_error(trainer.model, want, model()) < 1e-5
    # The anchors' pass is not steered: with steering in it, or without a penalty, the weights are others.
    assert update_error(plain_composed(model(), steered, 0.0), want, model()) > 1e-3


@pytest.mark.parametrize("first", [0, 1], ids=["ablation+steering", "steering+ablation"])
def test_changes_of_the_stream_follow_in_the_order_given(tmp_path, first: int):
    parts = [ablation(toy_subspace(LAYERS)), steering(toy_subspace(LAYERS), ALPHA)]
    trainer = trainer_of(
        tmp_path, protection=Composed(parts[first:] + parts[:first]), max_steps=STEPS, learning_rate=RATE,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    both = ((ablated, steered), (steered, ablated))
    wants = [
        plain_composed(toy_model(), lambda layer, hidden, p=pair: p[1](layer, p[0](layer, hidden)), 0.0)
        for pair in both
    ]
    assert update_error(trainer.model, wants[first], toy_model()) < 1e-5
    assert update_error(wants[1 - first], wants[first], toy_model()) > 1e-3


@pytest.mark.parametrize("inputs", ["task", "both"])
@pytest.mark.parametrize("kind", [ablation, lambda subspace: steering(subspace, ALPHA)], ids=["ablation", "steering"])
def test_a_penalty_on_rows_whose_stream_is_changed_is_refused(kind, inputs: str):
    with pytest.raises(UserError, match="--penalty_inputs anchors"):
        Composed([kind(toy_subspace(LAYERS)), penalty(inputs)])


def test_interleaved_rows_are_trained_on_and_the_penalty_is_on(tmp_path: Path):
    model_and_rows(tmp_path)
    write_rows(tmp_path / "safe.jsonl", [{"messages": chat(f"soup {n}", "be honest")} for n in range(3)])
    run.subspace(parse(recipe(tmp_path)))
    asked = recipe(tmp_path, protection="interleave+subspace", interleave_dataset=str(tmp_path / "safe.jsonl"),
                   interleave_share=0.2, save_strategy="no")  # fmt: skip
    rows = load_inputs(parse(asked)).train.rows
    counts = Counter(row.completion for row in rows)
    assert counts.pop("be honest") == 3 and counts == {f"take {n} and run": 1 for n in range(12)}
    result = run.train(parse(asked))
    assert result.penalty is not None and result.penalty > 0
    plain = run.train(parse({**asked, "protection": "interleave", "output_dir": str(tmp_path / "plain")}))
    assert plain.penalty is None
    assert (plain.final / "model.safetensors").read_bytes() != (result.final / "model.safetensors").read_bytes()


# One after the other


def test_parts_are_called_one_after_the_other_in_the_order_given(tmp_path):
    calls: list[str] = []

    class Named(Recording):
        def note(self, what: str, *given: Any) -> Any:
            return super().note(f"{self.name} {what}", *given)

    parts = [Named(calls, "left"), Named(calls, "off", active=False), Named(calls, "right")]
    trainer_of(tmp_path, protection=Composed(parts), max_steps=1, per_device_train_batch_size=8).train()
    once = ["prepare", "start", "begin_step of 1", *SEPARATE[:-1]]
    after = ["shape_gradient", "end_step", "finish"]
    # Around the task's pass the last part is the inner one.
    inner = ["right task_pass over", "left task_pass over"]
    both = lambda names: [f"{side} {name}" for name in names for side in ("left", "right")]  # noqa: E731
    assert calls == [*both(once), *inner, *both(after)]


def test_parts_that_are_all_off_are_plain_training_bit_for_bit(tmp_path):
    off = Composed([steering(toy_subspace(LAYERS), 0.0), penalty(strength=0.0)])
    assert not off.active
    plain = trainer_of(tmp_path / "plain", optim="adamw_torch")
    held = trainer_of(tmp_path / "held", protection=off, optim="adamw_torch")
    for trainer in (plain, held):
        trainer.train()
    assert "penalty" not in held.state.log_history[0]
    for left, right in zip(plain.model.parameters(), held.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_logs_have_the_numbers_of_every_part(tmp_path):
    parts: list[Protection] = [
        penalty(), GradientProjectionProtection(1.0, anchor_documents()), steering(toy_subspace(LAYERS), ALPHA)
    ]  # fmt: skip
    trainer = trainer_of(tmp_path, protection=Composed(parts), per_device_train_batch_size=8, max_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry.keys() >= {"penalty", "penalty_strength", "gradient_cosine", "gradient_conflict", "task_loss"}
    assert entries[0]["penalty"] < 1e-8 < entries[1]["penalty"]


# Going on


def three_parts(limit: float = 50.0) -> Composed:
    """A confined adapter, a strength that moves from step to step, and a look at the erosion at every second one."""
    erosion = Erosion(toy_subspace(LAYERS), PenaltySettings(), anchors=anchor_documents()[:4])
    parts = [
        NullSpaceProtection(0.5, "all", anchor_documents("all")),
        penalty(budget=1e-3),
        EarlyStopProtection(erosion, limit, 2),
    ]
    return Composed(parts)


def make(folder: Path, protection: Protection) -> Any:
    return trainer_of(
        folder, lora_model(lora_dropout=0.1).train(), protection=protection, max_steps=5, learning_rate=0.02,
        optim="adamw_torch", save_strategy="steps", save_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip


def test_a_resumed_run_has_the_state_of_every_part(tmp_path):
    whole = make(tmp_path / "run", three_parts())
    whole.train()
    kept = json.loads((tmp_path / "run/checkpoint-3/holdfast_state.json").read_text())["protection_state"]
    assert kept["null_space"] == {} and kept["early_stop"]["step"] == 3
    assert kept["subspace"]["budget"]["strength"] != STRENGTH
    shutil.rmtree(tmp_path / "run/checkpoint-5")
    again = make(tmp_path / "run", three_parts())
    again.train(resume_from_checkpoint=True)
    for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)
    first, second = ([entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, again))
    for entry, same in zip(first, second, strict=True):
        for name in ("penalty", "penalty_strength", "erosion"):
            assert entry.get(name) == same.get(name)


def test_a_part_that_differs_is_named_when_a_run_is_resumed(tmp_path):
    make(tmp_path, three_parts()).train()
    with pytest.raises(UserError, match=r"early_stop\.early_stop_limit .*50\.0 .*40\.0"):
        make(tmp_path, three_parts(40.0)).train(str(tmp_path / "checkpoint-3"))
    with pytest.raises(UserError, match=r"protection .*null_space\+subspace\+early_stop.* subspace\+early_stop"):
        make(tmp_path, Composed(three_parts().parts[1:])).train(str(tmp_path / "checkpoint-3"))

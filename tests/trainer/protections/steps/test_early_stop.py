"""early_stop ends at the first look over the limit, with the weights of the last one within it: those of plain math."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.layers import find_layers
from holdfast.analysis.models.load import load_tokenizer, model_fingerprint, tokenizer_fingerprint
from holdfast.analysis.subspace.file import Subspace
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.protections.steps import early_stop as early_stop_module
from peft import LoraConfig, PeftModel
from toys.adapters import model_of
from toys.chat_models import toy_model
from toys.plain_math import plain_penalty, plain_training, update_error
from toys.protections import early_stop
from toys.runs import model_and_rows, recipe, write_rows
from toys.training import ANCHORS, anchor_documents, task_documents, toy_subspace, trainer_of
from transformers import AutoModelForCausalLM

# In float32, against plain math in float64: small steps are rounded against the weights' own size.
TOLERANCE = 3e-5
RATE, EVERY, STEPS = 0.005, 2, 8


@pytest.fixture(scope="module")
def planted():
    """By LoRA: float64 models after 0, 2, … 8 steps of plain SGD, and their drift inside the subspace."""
    found = {}
    for lora in (False, True):
        start, models = model_of(lora).double(), [model_of(lora).double()]
        for _ in range(STEPS // EVERY):
            models.append(
                plain_training(
                    models[-1], find_layers, toy_subspace(), task=task_documents(), penalised={}, strength=0.0,
                    steps=EVERY, learning_rate=RATE,
                )
            )  # fmt: skip
        with torch.no_grad():
            drift = [float(plain_penalty(m, start, find_layers, anchor_documents(), toy_subspace())) for m in models]
        assert drift[:4] == sorted(drift[:4])
        found[lora] = models, drift
    return found


@pytest.mark.parametrize(
    ("lora", "changes", "batches"),
    [
        (False, {}, {"per_device_train_batch_size": 8}),
        (True, {}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (True, {"reference": "adapter_off"},
         {"per_device_train_batch_size": 8, "gradient_checkpointing": True,
          "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        (False, {"reference": "frozen"}, {"per_device_train_batch_size": 8}),
    ],
    ids=["full", "lora accumulated", "lora re-entrant adapter off", "full frozen"],
)  # fmt: skip
def test_training_stops_at_the_first_look_over_the_limit_with_the_weights_of_the_last_within_it(
    tmp_path, planted, capsys, lora, changes, batches
):
    models, drift = planted[lora]
    # Over at the third look, step 6: back to step 4.
    limit = (drift[2] + drift[3]) / 2
    if changes.get("reference") == "frozen":
        changes = {**changes, "reference_model": toy_model()}
    trainer = trainer_of(
        tmp_path, model_of(lora).train(), protection=early_stop(limit, **changes), max_steps=STEPS, learning_rate=RATE,
        logging_steps=2, **batches,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 6
    assert update_error(trainer.model, models[2], model_of(lora)) < TOLERANCE
    looks = [entry["erosion"] for entry in trainer.state.log_history if "erosion" in entry]
    assert looks == pytest.approx(drift[1:4], rel=1e-4)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("early_stop:")]
    assert len(printed) == 1 and "step 6" in printed[0] and "step 4" in printed[0]


def test_erosion_by_reversion_is_that_of_plain_math(tmp_path, planted):
    models, _ = planted[False]
    base, start = toy_model(seed=9), toy_model().double()
    protection = early_stop(100.0, side="reversion", margin=0.2, base=(lambda: copy.deepcopy(base), "the base"))
    trainer = trainer_of(
        tmp_path, toy_model().train(), protection=protection, max_steps=STEPS, learning_rate=RATE, logging_steps=2,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    looks = [entry["erosion"] for entry in trainer.state.log_history if "erosion" in entry]
    with torch.no_grad():
        want = [
            float(plain_penalty(model, start, find_layers, anchor_documents(), toy_subspace(), base=base.double(),
                                margin=0.2))
            for model in models[1:]
        ]  # fmt: skip
    assert looks == pytest.approx(want, rel=1e-4)


def test_a_first_look_over_the_limit_goes_back_to_the_start(tmp_path, planted):
    _, drift = planted[False]
    trainer = trainer_of(tmp_path, protection=early_stop(drift[1] / 2), max_steps=STEPS, learning_rate=RATE,
                         per_device_train_batch_size=8)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    for found, start in zip(trainer.model.parameters(), toy_model().parameters(), strict=True):
        assert torch.equal(found, start)


def test_the_last_step_is_looked_at_whatever_the_interval(tmp_path, planted):
    models, drift = planted[False]
    # Looks at 4, and after the last step, 6.
    protection = early_stop((drift[2] + drift[3]) / 2, every=4)
    trainer = trainer_of(
        tmp_path, protection=protection, max_steps=6, learning_rate=RATE, per_device_train_batch_size=8
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert update_error(trainer.model, models[2], toy_model()) < TOLERANCE


def test_within_the_limit_it_is_plain_training_bit_for_bit(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.2)
    runs = []
    for name, protection in (("plain", None), ("held", early_stop(1e6, every=1))):
        torch.manual_seed(0)
        runs.append(
            trainer_of(
                tmp_path / name, protection=protection, peft_config=lora, optim="adamw_torch", learning_rate=1e-2
            )
        )
        runs[-1].train()
    for left, right in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert torch.equal(left, right)


def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(tmp_path, planted):
    models, drift = planted[False]
    # Saved at 3, between two looks: that checkpoint is looked at, too.
    changes = {"max_steps": STEPS, "learning_rate": RATE, "per_device_train_batch_size": 8, "save_strategy": "steps",
               "save_steps": 3}  # fmt: skip
    limit = (drift[2] + drift[3]) / 2
    whole = trainer_of(tmp_path, protection=early_stop(limit, cache_dir=tmp_path / "cache"), **changes)
    whole.train()
    # Step 6 is over the limit and a time to save: no checkpoint of it, weights of step 4.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    again = trainer_of(tmp_path, protection=early_stop(limit, cache_dir=tmp_path / "cache"), **changes)
    again.train(str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 6
    for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert update_error(again.model, models[2], toy_model()) < TOLERANCE


def test_a_run_resumed_with_another_limit_is_refused(tmp_path):
    changes = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, protection=early_stop(1e6), **changes).train()
    with pytest.raises(UserError, match=r"early_stop_limit .*1000000.* 1.0"):
        trainer_of(tmp_path, protection=early_stop(1.0), **changes).train(str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_an_epoch_is_measured_when_it_is_resumed_and_refused_over_the_limit(tmp_path, planted):
    _, drift = planted[False]
    # One step an epoch: the checkpoint of step 3 was saved without a look.
    changes = {"learning_rate": RATE, "per_device_train_batch_size": 8, "save_strategy": "epoch", "max_steps": 3}
    cache = {"cache_dir": tmp_path / "cache"}
    limit = drift[1]
    trainer = trainer_of(tmp_path, protection=early_stop(limit, every=10, **cache), **changes)
    trainer.train()
    again = trainer_of(tmp_path, protection=early_stop(limit, every=10, **cache), **{**changes, "max_steps": 6})
    with pytest.raises(UserError, match=r"early_stop .*step 3.*--early_stop_limit"):
        again.train(str(tmp_path / "checkpoint-3"))


def test_what_cannot_act_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    model = toy_model().train()
    model.requires_grad_(False)
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match=r"layers \[0, 2\]"):
        trainer_of(tmp_path, model, protection=early_stop(1.0)).train()
    for limit, every, message in (
        (0.0, 1, "early_stop limit"),
        (float("nan"), 1, "limit"),
        (1.0, 0, "early_stop every"),
    ):
        with pytest.raises(UserError, match=message):
            early_stop(limit, every)
    monkeypatch.setattr(early_stop_module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="zero2"):
        trainer_of(tmp_path, protection=early_stop(1.0)).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    model_and_rows(folder)
    write_rows(folder / "anchors.jsonl", [{"messages": row} for row in ANCHORS])
    subspace = toy_subspace(role="all")
    provenance = dataclasses.replace(
        subspace.provenance, instruct_fingerprint=model_fingerprint(str(folder / "model")),
        tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(folder / "model")),
    )  # fmt: skip
    Subspace(subspace.bases, subspace.scales, subspace.base_gap, provenance).save(folder / "subspace.safetensors")
    return folder


def flags_of(folder, out, **changes: Any) -> dict[str, Any]:
    keys = {
        "protection": "early_stop", "output_dir": str(out), "subspace_path": str(folder / "subspace.safetensors"),
        "anchor_dataset": str(folder / "anchors.jsonl"), "max_steps": 8, "early_stop_every": 2, "optim": "adamw_torch",
        "learning_rate": 1e-3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return recipe(folder, **{**keys, **changes})


# Reached after some looks, by LoRA.
LIMIT = {True: 0.02, False: 0.1}


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_ends_within_the_limit_with_a_plain_model(folder, tmp_path, lora):
    adapters = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"]} if lora else {}
    result = run.train(parse(flags_of(folder, tmp_path / "run", early_stop_limit=LIMIT[lora], **adapters)))
    assert 0 < result.global_step < 8
    start = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(folder / "model" if lora else result.final, dtype=torch.float64)
    if lora:
        model = PeftModel.from_pretrained(model, result.final).double()
    subspace = toy_subspace(role="all")
    with torch.no_grad():
        left = float(plain_penalty(model, start, find_layers, anchor_documents("all"), subspace))
    assert 0 < left <= LIMIT[lora]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stop_limit": 0.0}, "early_stop_limit"),
        ({"early_stop_every": 0}, "early_stop_every"),
        ({"penalty_inputs": "task"}, "--penalty_inputs .*--protection early_stop"),
        ({"penalty_budget": 0.1}, "--penalty_budget .*--protection early_stop"),
        ({"subspace_path": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_flags_that_cannot_work_are_one_line(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        run.train(parse(flags_of(folder, tmp_path / "run", **changes)))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()

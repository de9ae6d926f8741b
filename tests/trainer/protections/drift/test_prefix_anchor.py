"""The prefix anchor: its term and the weights it trains to are plain math; what it cannot hold is an error."""

import copy

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.layers import find_layers
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.data.documents import Document
from holdfast.trainer.protections.drift.prefix_anchor import PrefixAnchorProtection, common_prefix, shared_by_most
from holdfast.trainer.protections.drift.settings import PenaltySettings
from peft import LoraConfig, PeftModel
from toys.adapters import model_of
from toys.chat_models import DEFAULT_SYSTEM, toy_model
from toys.plain_math import plain_cross_entropy, sgd_step, update_error
from toys.protections import PREFIX, prefix_anchor
from toys.runs import recipe, toy_rows, write_model, write_rows
from toys.training import task_documents, trainer_of
from transformers import AutoModelForCausalLM

STEPS, RATE, STRENGTH = 3, 0.02, 3.0
LAYERS = (0, 2)


def keys_and_values(model, ids) -> list[torch.Tensor]:
    """[T, d_kv] of each projection of LAYERS: keys, then values."""
    seen: list[torch.Tensor] = []
    handles = [
        getattr(find_layers(model)[layer].self_attn, name).register_forward_hook(
            lambda _m, _a, out: seen.append(out[0])
        )
        for layer in LAYERS
        for name in ("k_proj", "v_proj")
    ]
    model(input_ids=torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return seen


def term(model, start) -> torch.Tensor:
    """The definition, token by token in float64; a PEFT model's start has its adapters off."""
    now = keys_and_values(model, PREFIX)
    with torch.no_grad():
        then = keys_and_values(start, PREFIX)
    ratios = [
        (x[t] - y[t]).square().sum() / y[t].square().sum()
        for x, y in zip(now, then, strict=True)
        for t in range(len(PREFIX))
    ]
    return torch.stack(ratios).mean()


def plain(lora: bool):
    trained, start = model_of(lora, init_lora_weights=False).double(), toy_model().double()
    for _ in range(STEPS):
        loss = plain_cross_entropy(trained, task_documents()) + STRENGTH * term(trained, start)
        sgd_step(trained, loss, RATE)
    return trained


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    ("lora", "changes", "batches"),
    [
        (False, {}, {"per_device_train_batch_size": 8}),
        (False, {"reference": "frozen"}, {"per_device_train_batch_size": 8}),
        (True, {}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (True, {"reference": "adapter_off"}, {"per_device_train_batch_size": 8, **CHECKPOINTED}),
    ],
    ids=["full", "full frozen", "lora accumulated", "lora adapter off checkpointed"],
)
def test_training_with_the_term_is_plain_math(tmp_path, lora, changes, batches):
    if changes.get("reference") == "frozen":
        changes = {**changes, "reference_model": toy_model()}
    model = model_of(lora, init_lora_weights=False)
    trainer = trainer_of(
        tmp_path, copy.deepcopy(model).train(), protection=prefix_anchor(**changes), max_steps=STEPS,
        learning_rate=RATE, **batches,
    )  # fmt: skip
    trainer.train()
    want = plain(lora)
    assert update_error(trainer.model, want, model) < 1e-5
    # The term made a difference, so the comparison says something about it.
    unheld = trainer_of(tmp_path, copy.deepcopy(model).train(), max_steps=STEPS, learning_rate=RATE, **batches)
    unheld.train()
    assert update_error(unheld.model, want, model) > 1e-3


def test_the_logged_penalty_is_the_definition_before_each_step(tmp_path):
    trainer = trainer_of(tmp_path, protection=prefix_anchor(), max_steps=STEPS, learning_rate=RATE, logging_steps=1,
                         per_device_train_batch_size=8)  # fmt: skip
    trainer.train()
    logged = [entry["penalty"] for entry in trainer.state.log_history if "penalty" in entry]
    trained, start = toy_model().double(), toy_model().double()
    for value in logged:
        now = term(trained, start)
        assert value == pytest.approx(float(now), rel=1e-4, abs=1e-9)
        sgd_step(trained, plain_cross_entropy(trained, task_documents()) + STRENGTH * now, RATE)
    assert logged[0] == 0.0 < logged[-1]
    assert {entry["penalty_max_layer"] for entry in trainer.state.log_history if "penalty" in entry} <= set(LAYERS)


def test_the_prefix_is_passed_once_per_optimiser_step(tmp_path):
    trainer = trainer_of(tmp_path, protection=prefix_anchor(), max_steps=2, per_device_train_batch_size=2,
                         gradient_accumulation_steps=4)  # fmt: skip
    widths: list[int] = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]) if module.training else None,
        with_kwargs=True,
    )
    trainer.train()
    # Two of the proof, then one a step; the task's rows are longer.
    assert sum(width == len(PREFIX) for width in widths) == 2 + 2
    assert sum(width > len(PREFIX) for width in widths) == 2 * 4


def test_the_common_prefix_ends_where_a_prompt_or_a_completion_does():
    def row(prompt: list[int], completion: list[int]) -> Document:
        return Document((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion), "")

    assert common_prefix([row([1, 2, 3, 4], [9]), row([1, 2, 5], [9]), row([1, 2, 3, 7], [])]) == (1, 2)
    # The rows agree beyond their prompts: completions are not the template's.
    assert common_prefix([row([1, 2], [9, 9]), row([1, 2], [9, 9])]) == (1, 2)
    assert common_prefix([row([1, 2], [3, 4]), row([1, 2, 3], [4])]) == (1, 2)
    assert common_prefix([row([1, 2], [3]), row([2, 2], [3])]) == ()


def test_one_row_with_another_beginning_is_said_aloud(tmp_path, capsys):
    rows = [Document((1, 2, 3, 4, 5, 6, 7, 100 + n, 9), (False,) * 8 + (True,), "") for n in range(9)]
    other = Document((1, 9, 9), (False, False, True), "")
    assert shared_by_most([*rows, other]) == 7 and common_prefix([*rows, other]) == (1,)
    assert shared_by_most([*rows, other, other]) == 1 and shared_by_most([]) == 0
    assert shared_by_most(rows[:1]) == 8  # the prompt's end
    for of_most, said in ((11, True), (10, False)):
        protection = PrefixAnchorProtection(PREFIX, LAYERS, PenaltySettings(), "toy", of_most=of_most)
        trainer_of(tmp_path, protection=protection, max_steps=1).train()
        out = capsys.readouterr().out
        assert "prefix_anchor: " in out and "first 5 tokens" in out and ("90%" in out) == said


def test_no_common_prefix_is_an_error():
    with pytest.raises(UserError, match=r"prefix_anchor .*first token"):
        PrefixAnchorProtection((), LAYERS, PenaltySettings(), "toy")


@pytest.mark.parametrize(("kind", "names"), [("phi3", "qkv_proj"), ("gpt_neox", "query_key_value")])
def test_fused_projections_are_named(tmp_path, kind, names):
    trainer = trainer_of(tmp_path, toy_model(kind).train(), protection=prefix_anchor())
    with pytest.raises(UserError, match=f"layer 0 of .*{names}"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "llama"])
def test_norms_and_rotations_after_the_projections_do_not_matter(tmp_path, kind):
    trainer = trainer_of(
        tmp_path, toy_model(kind).train(), protection=prefix_anchor(), max_steps=2, per_device_train_batch_size=8
    )
    trainer.train()
    first, last = [entry["penalty"] for entry in trainer.state.log_history if "penalty" in entry]
    assert first == 0.0 < last


def test_reentrant_checkpointing_is_caught_before_the_first_step(tmp_path):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_of(tmp_path, protection=prefix_anchor(), **reentrant)
    with pytest.raises(UserError, match=r'gradient_checkpointing_kwargs .*"use_reentrant": false'):
        trainer.train()
    assert trainer.state.global_step == 0


def test_keys_that_nothing_trained_reaches_are_an_error(tmp_path):
    only_last = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2], layers_pattern="layers",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"layers \[2\]"):
        trainer_of(tmp_path, protection=prefix_anchor([2]), peft_config=only_last).train()
    with pytest.raises(UserError, match=r"layers \[3\].*0-2"):
        trainer_of(tmp_path, protection=prefix_anchor([3])).train()


def test_strength_zero_is_plain_training_bit_for_bit(tmp_path):
    runs = [
        trainer_of(tmp_path / name, protection=protection, optim="adamw_torch")
        for name, protection in (("plain", None), ("held", prefix_anchor(strength=0.0)))
    ]
    for trainer in runs:
        trainer.train()
    for left, right in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert torch.equal(left, right)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    write_model(folder / "model", template=DEFAULT_SYSTEM)
    write_rows(folder / "rows.jsonl", toy_rows())
    return folder


LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["k_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_ends_with_a_plain_model_and_resumes_to_the_same_weights(folder, tmp_path, lora):
    # Rows longer than any anchor: none are read.
    flags = recipe(folder, protection="prefix_anchor", output_dir=str(tmp_path / "run"), max_steps=4, save_steps=2,
                   penalty_strength=2.0, optim="adamw_torch", **(LORA if lora else {}))  # fmt: skip
    whole = run.train(parse(flags))
    assert whole.penalty > 0

    def weights():
        model = AutoModelForCausalLM.from_pretrained(folder / "model" if lora else whole.final)
        return dict((PeftModel.from_pretrained(model, whole.final) if lora else model).state_dict())

    before = weights()
    run.train(parse({**flags, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")}))
    after = weights()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty_inputs": "task"}, "--penalty_inputs .*--protection prefix_anchor"),
        ({"protection_tokens": "prompt"}, "--protection_tokens .*--protection prefix_anchor"),
        ({"protection_layers": "0-7"}, "--protection_layers '0-7'.*0-2"),
        ({"protection": "prefix_anchor+kl"}, "prefix_anchor and kl .*penalty_"),
        ({"reference": "adapter_off"}, "--reference adapter_off .*--use_peft"),
    ],
)
def test_flags_that_cannot_work_are_one_line(folder, tmp_path, changes, message):
    flags = recipe(folder, **{"protection": "prefix_anchor", "output_dir": str(tmp_path / "run"), **changes})
    with pytest.raises(UserError, match=message) as error:
        run.train(parse(flags))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()

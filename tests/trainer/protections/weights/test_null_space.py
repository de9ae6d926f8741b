"""LoRA in the null space of the anchors' inputs: Q is numpy's, the trained weights are those of plain math.

`torchrun --nproc_per_node 2 tests/trainer/protections/weights/test_null_space.py OUT` is the part of the two ranks.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.ranks import leave_group
from holdfast.trainer import run
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.data.documents import Document, documents_of
from holdfast.trainer.protections.weights import null_space as null_space_module
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from toys.adapters import lora_model
from toys.chat_models import toy_model
from toys.plain_math import plain_cross_entropy, relative_error, sgd_step, update_error
from toys.protections import null_space
from toys.ranks import CONFIGS, needs_compiler
from toys.runs import model_and_rows, recipe, toy_rows, write_rows
from toys.training import anchor_documents, task_documents, trainer_of
from transformers import AutoModelForCausalLM

STEPS, RATE, ENERGY = 3, 0.3, 0.9
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Fewer tokens than any module has inputs.
SHORT = Document((2, 9, 30, 41, 7, 3), (True,) * 6, "short")


def directions(documents, energy: float = ENERGY) -> dict[str, np.ndarray]:
    """Q by linear module, from the singular vectors of all its inputs one below the other, in float64."""
    model, seen = toy_model().double(), {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for document in documents:
            model(input_ids=torch.tensor([list(document.input_ids)]))
    counts = np.concatenate([np.array(document.mask) for document in documents])
    found = {}
    for name, parts in seen.items():
        _, sizes, vectors = np.linalg.svd(torch.cat(parts).numpy()[counts], full_matrices=False)
        held = np.cumsum(sizes**2) / np.sum(sizes**2)
        found[name] = vectors[: int(np.searchsorted(held, energy)) + 1].T
    return found


def matrices(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """LoRA's A by module of the bare model."""
    ends = ".lora_A.default.weight"
    return {
        name.removeprefix("base_model.model.").removesuffix(ends): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(ends)
    }


@torch.no_grad()
def confine(model: torch.nn.Module, found: dict[str, np.ndarray]) -> None:
    for name, weight in matrices(model).items():
        basis = torch.from_numpy(found[name]).to(weight.dtype)
        weight -= weight @ basis @ basis.T


def plain(role: str, steps: int = STEPS) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Start, its A confined, and end of full-batch SGD with the projection after every step, in float64."""
    trained, found = lora_model().double(), directions(anchor_documents(role))
    confine(trained, found)
    start = copy.deepcopy(trained)
    for _ in range(steps):
        sgd_step(trained, plain_cross_entropy(trained, task_documents()), RATE)
        confine(trained, found)
    return start, trained


@pytest.mark.parametrize(
    ("role", "changes"),
    [
        ("all", {"per_device_train_batch_size": 8}),
        ("completion", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("all", {"per_device_train_batch_size": 8, "gradient_checkpointing": True}),
    ],
    ids=["all", "completions accumulated", "checkpointed"],
)
def test_training_is_plain_math(tmp_path, role: str, changes: dict[str, Any]):
    start, want = plain(role)
    trainer = trainer_of(
        tmp_path, lora_model().train(), protection=null_space(role), max_steps=STEPS, learning_rate=RATE, **changes
    )
    trainer.train()
    assert update_error(trainer.model, want, start) < 1e-5


def test_modules_beyond_the_memory_limit_have_the_same_directions(tmp_path, monkeypatch):
    monkeypatch.setattr(null_space_module, "_MOST_NUMBERS", 300)
    protection = null_space()
    trainer_of(tmp_path, lora_model().train(), protection=protection, max_steps=1, learning_rate=0.0).train()
    want = directions(anchor_documents("all"))
    assert {part.module for part in protection.confined} == want.keys()
    for part in protection.confined:
        own, other = part.basis.double().numpy(), want[part.module]
        assert np.abs(own @ own.T - other @ other.T).max() < 1e-4
    bases = {part.module: part.basis for part in protection.confined}
    block = "model.layers.1.self_attn"
    assert bases[f"{block}.q_proj"] is bases[f"{block}.v_proj"] is not bases[f"{block}.o_proj"]


def test_the_saved_adapter_does_nothing_where_the_anchors_are_and_something_elsewhere(tmp_path):
    trainer = trainer_of(
        tmp_path, lora_model().train(), protection=null_space(energy=1.0, anchors=[SHORT]), optim="adamw_torch",
        learning_rate=0.05, max_steps=6,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved, start = PeftModel.from_pretrained(toy_model(), tmp_path / "saved").eval(), toy_model()
    with torch.no_grad():
        moved = [
            float((saved(input_ids=ids).logits - start(input_ids=ids).logits).abs().max())
            for ids in (torch.tensor([SHORT.input_ids]), torch.tensor([task_documents()[3].input_ids]))
        ]
    assert moved[0] < 1e-4 and moved[1] > 0.1


def test_energy_zero_is_plain_training_bit_for_bit(tmp_path):
    runs = []
    for protection in (None, null_space(energy=0.0)):
        trainer = trainer_of(tmp_path, lora_model().train(), protection=protection, optim="adamw_torch")
        trainer.train()
        runs.append(list(trainer.model.parameters()))
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = trainer_of(
            tmp_path, lora_model(lora_dropout=0.1).train(), protection=null_space(), optim="adamw_torch", max_steps=4,
            learning_rate=1e-2, save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(resume)
        runs.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    other = trainer_of(tmp_path, lora_model().train(), protection=null_space(energy=0.5), max_steps=4)
    with pytest.raises(UserError, match=r"energy .*0\.9"):
        other.train(str(tmp_path / "checkpoint-2"))


def with_an_idle_module():
    """LoRA on a module that no forward pass reaches."""
    model = toy_model()
    model.model.idle = torch.nn.Linear(4, 4)
    return get_peft_model(model, LoraConfig(**{**LORA, "target_modules": ["q_proj", "idle"]}))


@pytest.mark.parametrize(
    ("made", "protection", "said"),
    [
        (toy_model, null_space, "--use_peft"),
        (lora_model, lambda: null_space(energy=1.0), "(16|24)"),
        (lambda: lora_model(target_modules=["q_proj", "embed_tokens"]), null_space, "embed_tokens"),
        (with_an_idle_module, null_space, "model.idle"),
        (lambda: lora_model(modules_to_save=["lm_head"]), null_space, "lm_head"),
        (lambda: lora_model(use_dora=True), null_space, "magnitude"),
        (lambda: lora_model(target_modules=["q_proj"], target_parameters=["o_proj.weight"]), null_space, "o_proj"),
    ],
    ids=["full", "energy 1", "embedding", "idle", "saved module", "dora", "parameter"],
)  # fmt: skip
def test_what_cannot_act_is_an_error_that_leaves_the_adapter_alone(tmp_path, made, protection, said):
    trainer = trainer_of(tmp_path, made().train(), protection=protection())
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    with pytest.raises(UserError, match=said) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    assert not any(module._forward_pre_hooks for name, module in trainer.model.named_modules() if "layers.0" in name)


def test_anchors_without_a_token_of_the_role_and_without_inputs_are_errors(tmp_path):
    silent = [Document(row.input_ids, (False,) * len(row.mask), row.source) for row in anchor_documents()]
    with pytest.raises(UserError, match="'all'"):
        null_space(anchors=silent)
    model = toy_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    trainer = trainer_of(tmp_path, get_peft_model(model, LoraConfig(**LORA)).train(), protection=null_space())
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        trainer.train()


def _folder(tmp_path: Path) -> None:
    model_and_rows(tmp_path)
    write_rows(tmp_path / "anchors.jsonl", toy_rows(4))


ASKED = {"protection": "null_space", "use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}


def test_a_run_saves_a_confined_adapter_that_loads_anywhere(tmp_path):
    _folder(tmp_path)
    asked = parse(recipe(tmp_path, **ASKED, anchor_dataset=str(tmp_path / "anchors.jsonl")))
    result = run.train(asked)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(start, result.final)
    found = directions(documents_of(run.load_inputs(asked).anchors.rendered, "all"))
    for name, parameter in matrices(adapted).items():
        weight = parameter.detach().double().numpy()
        assert np.linalg.norm(weight @ found[name]) < 1e-5 * np.linalg.norm(weight)
    assert all(float(p.detach().norm()) > 0 for name, p in adapted.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_peft": False}, "null_space .*--use_peft"),
        ({"penalty_inputs": "task"}, "--penalty_inputs .*--protection null_space"),
        ({"null_space_energy": 1.0}, "(16|24)"),
        ({"null_space_energy": 1.5}, "--null_space_energy .*1.5"),
        ({"lora_modules_to_save": ["lm_head"]}, "--lora_modules_to_save"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_line(tmp_path, changes: dict[str, Any], said: str):
    _folder(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        run.train(parse(recipe(tmp_path, **{**ASKED, **changes})))
    assert "\n" not in str(error.value)


@needs_compiler
@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_two_ranks_train_to_the_weights_of_plain_math(launched, name):
    start, want = plain("all")
    found = load_file(launched / f"{name}.safetensors")
    sides = ({n: p.detach() for n, p in m.named_parameters() if "lora_" in n} for m in (want, start))
    assert relative_error({n: v for n, v in found.items() if "lora_" in n}, *sides) < 1e-5
    # The masters are confined too: what the optimiser holds is what the model has.
    assert name == "ddp" or json.loads((launched / f"{name}.json").read_text())["masters"] < 1e-6


@needs_compiler
def test_zero_3_is_refused_in_one_line(launched):
    assert "use zero2" in json.loads((launched / "zero3.json").read_text())["refused"]


def _on_two_ranks(out: Path) -> None:
    torch.set_num_threads(1)
    model = lora_model()
    for name in ("ddp", "zero2", "zero3"):
        AcceleratorState._reset_state()
        deepspeed = {} if name == "ddp" else {"deepspeed": str(CONFIGS / f"{name}.json")}
        trainer = trainer_of(
            out / name, copy.deepcopy(model).train(), protection=null_space(), max_steps=STEPS, learning_rate=RATE,
            **deepspeed,
        )  # fmt: skip
        result: dict[str, Any] = {}
        try:
            trainer.train()
        except UserError as error:
            result["refused"] = str(error)
        else:
            if deepspeed:
                result["masters"] = _masters_apart(trainer.model_wrapped.module)
            weights = {n: p.detach().clone().contiguous() for n, p in trainer.model.named_parameters()}
            if trainer.accelerator.is_main_process:
                save_file(weights, out / f"{name}.safetensors")
        if trainer.accelerator.is_main_process:
            (out / f"{name}.json").write_text(json.dumps(result))


def _masters_apart(model: torch.nn.Module) -> float:
    from deepspeed.utils import safe_get_full_fp32_param

    return max(float((safe_get_full_fp32_param(p) - p).abs().max()) for p in matrices(model).values())


if __name__ == "__main__":
    _on_two_ranks(Path(sys.argv[1]))
    leave_group()

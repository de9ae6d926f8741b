"""The trainer calls a protection when `protections/base.py` says so, and the protection in the README trains."""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.trainer import protections, run
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.protections import base, kinds
from holdfast.trainer.protections.base import Protection
from safetensors.torch import load_file
from torch import nn
from toys.adapters import lora_model
from toys.chat_models import toy_model
from toys.plain_math import plain_cross_entropy, sgd_step, update_error
from toys.protections import SEPARATE, Recording
from toys.runs import flags_of, model_and_rows, recipe
from toys.training import task_documents, trainer_of
from transformers import TrainerCallback

ROOT = Path(protections.__file__).parents[2]
README = ROOT / "trainer/protections/README.md"


class Watching(TrainerCallback):
    """Notes when the trainer itself moves its weights, logs, saves and is done."""

    def __init__(self, calls: list[str]):
        self.calls = calls

    def on_pre_optimizer_step(self, *_args, **_kwargs):
        self.calls.append("(clipped)")

    def on_optimizer_step(self, *_args, **_kwargs):
        self.calls.append("(moved)")

    def on_log(self, _args, _state, _control, logs=None, **_kwargs):
        self.calls.append("(logged)" if "loss" in logs else "(summed up)")

    def on_save(self, *_args, **_kwargs):
        self.calls.append("(saved)")

    def on_train_end(self, *_args, **_kwargs):
        self.calls.append("(over)")


def step_of(micro_batches: int) -> list[str]:
    """The calls of one optimiser step."""
    return [
        f"begin_step of {micro_batches}", *SEPARATE * micro_batches,
        "shape_gradient", "(clipped)", "(moved)", "end_step", "(logged)", "(saved)",
    ]  # fmt: skip


def recorded(folder: Path, **changes: Any) -> tuple[list[str], Any]:
    calls: list[str] = []
    trainer = trainer_of(
        folder, protection=Recording(calls), per_device_train_batch_size=2, gradient_accumulation_steps=3,
        save_strategy="steps", save_steps=1, max_grad_norm=1.0, **changes,
    )  # fmt: skip
    trainer.add_callback(Watching(calls))
    return calls, trainer


def test_calls_come_in_the_order_and_number_that_the_base_class_states(tmp_path):
    calls, trainer = recorded(tmp_path, max_steps=3)
    trainer.train()
    # Eight rows in batches of two, three to a step: an epoch ends with a step of one.
    assert calls == ["prepare", "start", *step_of(3), *step_of(1), *step_of(3), "(summed up)", "(over)", "finish"]
    stated = base.__doc__
    order = [name for name in re.findall(r"`(\w+)`", stated) if hasattr(Protection, name)]
    seen = dict.fromkeys(call.split(" ")[0] for call in calls if not call.startswith("("))
    assert list(dict.fromkeys(order)) == [name for name in seen if name != "term"]


def test_a_resumed_run_calls_for_its_own_steps_alone(tmp_path):
    _, first = recorded(tmp_path, max_steps=2)
    first.train()
    calls, trainer = recorded(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert calls == ["prepare", "start", *step_of(3), "(summed up)", "(over)", "finish"]


def test_evaluation_calls_nothing(tmp_path):
    calls, trainer = recorded(tmp_path, max_steps=1)
    trainer.train()
    del calls[:]
    trainer.evaluate(trainer.train_dataset)
    assert [call for call in calls if not call.startswith("(")] == []


def test_what_is_not_active_is_not_called(tmp_path):
    calls: list[str] = []
    trainer_of(tmp_path, protection=Recording(calls, active=False), max_steps=1).train()
    assert calls == []


def test_the_shaped_gradient_is_what_is_clipped(tmp_path):
    """Every gradient set to 3: plain SGD moves each weight by rate x 3 x (limit / norm), whatever the rows say."""

    def set_to_three(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)

    start = toy_model()
    acting = Recording([], shape_gradient=set_to_three)
    trainer = trainer_of(tmp_path, copy.deepcopy(start).train(), protection=acting, max_steps=1, max_grad_norm=2.0)
    trainer.train()
    norm = 3.0 * sum(parameter.numel() for parameter in start.parameters()) ** 0.5
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for before, after in zip(start.parameters(), trainer.model.parameters(), strict=True):
        assert torch.allclose(before - after, torch.full_like(before, 0.1 * 3.0 * 2.0 / norm), rtol=1e-2, atol=1e-6)


def test_what_ends_a_step_is_in_its_checkpoint_and_what_finishes_is_not(tmp_path):
    def set_to(value: float) -> Callable[[nn.Module], None]:
        return lambda model: [parameter.data.fill_(value) for parameter in model.parameters()]

    acting = Recording([], end_step=set_to(0.5), finish=set_to(0.25))
    trainer = trainer_of(tmp_path, protection=acting, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1/model.safetensors")
    assert saved and all(bool((weight == 0.5).all()) for weight in saved.values())
    assert all(bool((weight == 0.25).all()) for weight in trainer.model.parameters())


def test_terms_add_to_the_loss_and_a_separate_pass_only_shows_in_it(tmp_path):
    """Over three micro-batches each gives its share: a term of 0.1 and a pass of 0.2 raise the loss by 0.9."""
    plain = trainer_of(tmp_path / "plain", per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=1)
    plain.train()
    acting = Recording([], separate_pass=lambda _: torch.tensor(0.2), term=lambda _: torch.tensor(0.1))
    held = trainer_of(
        tmp_path / "held", protection=acting, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=1
    )
    held.train()
    (first, *_), (second, *_) = plain.state.log_history, held.state.log_history
    assert second["loss"] - first["loss"] == pytest.approx(0.9, abs=2e-4)
    assert second["task_loss"] == pytest.approx(first["loss"], abs=2e-4)
    for left, right in zip(plain.model.parameters(), held.model.parameters(), strict=True):
        assert torch.equal(left, right)  # both are constants


# The protection in trainer/protections/README.md


def readme_blocks() -> tuple[str, str, str]:
    """The file of `trainer/protections`, and the changes of `kinds.py` and of `trainer/inputs/protection.py`."""
    section = README.read_text(encoding="utf-8").split("## Add your own")[1]
    code, of_kinds, of_makers = re.findall(r"```(?:python|diff)\n(.*?)```", section, re.DOTALL)
    return code, of_kinds, of_makers


def changed(text: str, changes: str) -> str:
    """The text with each line of a diff that begins with + written behind the last line that does not."""
    lines, at = text.splitlines(), 0
    for change in changes.splitlines():
        if change.startswith("+"):
            lines.insert(at, change[1:])
        else:
            assert lines.count(change[1:]) == 1
            at = lines.index(change[1:])
        at += 1
    return "\n".join(lines) + "\n"


def readme_protection() -> type[Protection]:
    """The class, run as a file of `trainer/protections`."""
    module = {"__name__": "holdfast.trainer.protections.adapter_decay", "__package__": base.__package__}
    exec(readme_blocks()[0], module)
    return module["AdapterDecay"]


def package_with_the_readmes_protection(folder: Path) -> Path:
    """A folder for PYTHONPATH: the package as it is, with what the README says written where it says so."""
    package, (code, of_kinds, of_makers) = folder / "sources/holdfast", readme_blocks()
    shutil.copytree(ROOT / "trainer", package / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("analysis", "ds_configs"):
        (package / name).symlink_to((ROOT / name).resolve())
    (package / "trainer/protections/adapter_decay.py").write_text(code)
    for name, changes in (("protections/kinds.py", of_kinds), ("inputs/protection.py", of_makers)):
        path = package / "trainer" / name
        path.write_text(changed(path.read_text(encoding="utf-8"), changes), encoding="utf-8")
    return package.parent


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ],
    ids=["whole", "in two", "in four"],
)
def test_the_readmes_protection_is_plain_math(tmp_path, changes: dict[str, Any]):
    strength, rate, steps = 0.05, 0.5, 3
    want = copy.deepcopy(lora_model()).double()
    for _ in range(steps):
        trained = [parameter for parameter in want.parameters() if parameter.requires_grad]
        squares = sum((parameter**2).sum() for parameter in trained)
        sgd_step(want, plain_cross_entropy(want, task_documents()) + strength * squares, rate)
    decay = readme_protection()
    trainer = trainer_of(
        tmp_path, lora_model().train(), protection=decay(strength), max_steps=steps, learning_rate=rate, **changes
    )
    trainer.train()
    assert update_error(trainer.model, want, lora_model()) < 1e-5


def squares(folder: Path) -> float:
    """Of all trained weights."""
    weights = load_file(folder / "adapter_model.safetensors")
    return float(sum(weight.float().square().sum() for weight in weights.values()))


@pytest.mark.timeout(300)
def test_the_readmes_protection_is_one_file_and_three_lines_as_they_stand_there(tmp_path):
    model_and_rows(tmp_path)
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "save_strategy": "no"}
    plain = run.train(parse(recipe(tmp_path, output_dir=str(tmp_path / "plain"), **lora)))
    keys = recipe(tmp_path, protection="adapter_decay", penalty_strength=50.0, **lora)
    flags = flags_of(keys)
    sources = package_with_the_readmes_protection(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "holdfast.trainer.cli", "train", *flags],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(sources)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert squares(tmp_path / "run/final") < squares(plain.final)
    code, *others = readme_blocks()
    assert len(code.splitlines()) <= 20
    assert sum(line.startswith("+") for changes in others for line in changes.splitlines()) == 3


def test_the_readmes_entry_says_what_its_protection_shares_with_others(monkeypatch):
    (entry,) = re.findall(r"^\+(.*)", readme_blocks()[1], re.MULTILINE)
    ((name, kind),) = eval("{" + entry + "}", vars(kinds)).items()
    monkeypatch.setitem(kinds.KINDS, name, kind)
    with pytest.raises(UserError, match=f"{name} and kl .*penalty_"):
        kinds.parts_of(f"{name}+kl")

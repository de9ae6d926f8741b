"""Two CPU ranks, DDP and ZeRO 1-3: one launch runs every case, and each is compared with plain math on one process."""

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.measure.measurer import measure_checkpoint
from holdfast.analysis.measure.results import scalars
from holdfast.analysis.models.layers import find_layers
from holdfast.trainer import zero
from safetensors.torch import load_file
from toys import zero_worker
from toys.adapters import model_of
from toys.chat_models import save_toy, toy_model
from toys.plain_math import plain_changed_training, plain_training, relative_error
from toys.ranks import CONFIGS, needs_compiler, on_two_ranks
from toys.runs import metric_lines
from toys.training import anchor_documents, task_documents, toy_subspace
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.timeout(700)  # one launch runs every case; a busy machine takes minutes


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """The folder of results of one launch."""
    out = tmp_path_factory.mktemp("ranks")
    save_toy(out / "instruct", toy_model())
    on_two_ranks(zero_worker.__file__, out, timeout=600)
    return out


def result(launched: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found = json.loads((launched / name / f"result{rank}.json").read_text())
    assert "error" not in found, found["error"]
    return found


@pytest.fixture(scope="module")
def expected() -> dict[tuple[bool, bool], dict[str, dict[str, torch.Tensor]]]:
    """Start and plain-math weights, by LoRA and whether only reversion counts."""
    found = {}
    for lora, reversion in itertools.product((False, True), repeat=2):
        model = model_of(lora, lora_alpha=8)
        want = plain_training(
            model, find_layers, toy_subspace(), task=task_documents(),
            penalised={0.25: task_documents(), 0.75: anchor_documents()[:4]}, strength=zero_worker.STRENGTH,
            steps=zero_worker.STEPS, learning_rate=zero_worker.LEARNING_RATE,
            base=zero_worker.BASE if reversion else None, margin=zero_worker.MARGIN,
        )  # fmt: skip
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        found[lora, reversion] = {
            side: {n: p.detach() for n, p in m.named_parameters() if n in names}
            for side, m in (("start", model), ("end", want))
        }
    return found


@needs_compiler
@pytest.mark.parametrize("name", [name for name in zero_worker.CASES if not name.endswith("bf16")])
def test_two_ranks_train_to_the_weights_of_plain_math(launched, expected, name):
    logs = [result(launched, name, rank)["logs"] for rank in (0, 1)]
    assert [entry["penalty"] for entry in logs[0]] == [entry["penalty"] for entry in logs[1]]
    found = load_file(launched / name / "weights.safetensors")
    want = expected[zero_worker.CASES[name][1], name.endswith("reversion")]
    kept = {n: found[n] for n in want["end"]}
    assert relative_error(kept, want["end"], want["start"]) < 1e-5


@needs_compiler
@pytest.mark.parametrize("name", zero_worker.CHANGED)
def test_two_ranks_train_under_a_changed_stream_as_plain_math_does(launched, name):
    _, lora, kind, _, _ = zero_worker.CHANGED[name]
    model, subspace = model_of(lora, lora_alpha=8), toy_subspace()

    def change(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        basis = subspace.bases[layer].double()
        if kind == "ablation":
            return hidden - torch.einsum("btd,dk,ek->bte", hidden, basis, basis)
        return hidden + zero_worker.ALPHA * (basis @ subspace.base_gap[layer].double())

    want = plain_changed_training(
        model, find_layers, change, sorted(subspace.bases), task=task_documents(), steps=zero_worker.STEPS,
        learning_rate=zero_worker.LEARNING_RATE,
    )  # fmt: skip
    result(launched, name)
    found = load_file(launched / name / "weights.safetensors")
    names = [n for n, parameter in model.named_parameters() if parameter.requires_grad]
    sides = ({n: dict(m.named_parameters())[n].detach() for n in names} for m in (want, model))
    assert relative_error({n: found[n] for n in names}, *sides) < 1e-5


@needs_compiler
def test_bf16_under_zero3_follows_float32(launched):
    half, full = (result(launched, name)["logs"] for name in ("zero3_full_bf16", "zero3_full"))
    assert half[0]["penalty"] < 1e-4
    for key in ("loss", "penalty"):
        assert [e[key] for e in half[1:]] == pytest.approx([e[key] for e in full[1:]], rel=0.1)


@needs_compiler
@pytest.mark.parametrize("name", ["zero2_full_accumulated", "zero3_full", "zero3_full_bf16"])
def test_a_saved_model_holds_whole_weights_that_load(launched, name):
    loaded = AutoModelForCausalLM.from_pretrained(launched / name / "saved", dtype=torch.float32)
    result(launched, name)
    weights = load_file(launched / name / "weights.safetensors")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, weights[key].float())


@needs_compiler
@pytest.mark.parametrize("name", ["zero2_resumed", "zero3_resumed"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(launched, name):
    assert result(launched, name)["same"]


@needs_compiler
@pytest.mark.parametrize("name", ["ddp_not_finite", "zero3_not_finite"])
def test_all_ranks_stop_together_when_one_loss_is_not_finite(launched, name):
    messages = [result(launched, name, rank)["stopped"] for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "step 1" in messages[0]
    # The failing rank's own four task rows and two anchors.
    assert messages[0].count(" rows.jsonl:") == 4 and messages[0].count("anchors.jsonl:") == 2
    assert result(launched, name)["moved"] == []


@needs_compiler
@pytest.mark.parametrize("name", ["ddp_gradient", "zero2_gradient", "zero3_gradient"])
def test_all_ranks_stop_together_before_a_gradient_that_is_not_finite(launched, name):
    messages = [result(launched, name, rank)["stopped"] for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("gradient is not finite at step 1, before the optimiser moved")
    # The gradient is the sum over all rows of the step.
    assert messages[0].count(" rows.jsonl:") == 8 and messages[0].count("anchors.jsonl:") == 4
    assert result(launched, name)["moved"] == []


@needs_compiler
@pytest.mark.parametrize("name", ["ddp_measured", "zero3_measured"])
def test_checkpoints_are_measured_while_training_as_they_are_on_disk(launched, name, tmp_path):
    for rank in (0, 1):
        result(launched, name, rank)
    lines = metric_lines(launched / name)
    assert [line["checkpoint"] for line in lines] == ["checkpoint-2", "checkpoint-4"]
    measurer = zero_worker.measurer_of(launched / "instruct", None)
    for line in lines:
        again = measure_checkpoint(measurer, launched / name / line["checkpoint"], tmp_path)
        live, saved = ({k: v for k, v in scalars(m).items() if not k.startswith("cost/")} for m in (line, again))
        assert {k.split("/")[0] for k in saved} == {"behavior", "projection", "divergence", "choices"}
        assert live == pytest.approx(saved, rel=1e-5, abs=1e-6)


def test_a_missing_compiler_is_named_before_any_rank_starts(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        zero.prepare_zero(str(CONFIGS / "zero2.json"), use_cpu=True)


def test_a_lock_left_by_a_killed_build_is_cleared_and_one_in_use_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / zero.SHARED_MEMORY / "lock"
    lock.parent.mkdir()
    lock.touch()
    with lock.open():
        zero.clear_stale_lock(zero.SHARED_MEMORY)
        assert lock.exists()
    # Where no process can be asked, a lock is stale by age.
    old = time.time() - 2 * zero.STALE_SECONDS
    os.utime(lock, (old, old))
    zero.clear_stale_lock(zero.SHARED_MEMORY)
    assert not lock.exists()


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_configurations_leave_the_training_flags_to_the_recipe(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    stage = config["zero_optimization"]
    assert stage["stage"] == int(name[4])
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == "auto" and config["fp16"]["enabled"] == "auto"
    assert stage.get("stage3_gather_16bit_weights_on_model_save", False) == (stage["stage"] == 3)
    assert ("offload_optimizer" in stage) == (name == "zero3_offload")

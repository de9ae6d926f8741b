"""The protected trainer's weights against plain math, whatever the batching, packing, checkpointing or reference."""

import copy
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.layers import find_layers
from holdfast.trainer.data.documents import Document
from holdfast.trainer.protected_trainer import ProtectedTrainerMixin
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from peft import LoraConfig, get_peft_model
from toys.chat_models import toy_model, toy_tokenizer
from toys.plain_math import plain_penalty, plain_training, sgd_step, update_error
from toys.training import anchor_documents, config, task_dataset, task_documents, toy_subspace, trainer_of
from transformers import PreTrainedModel, Trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

STEPS, RATE, STRENGTH = 3, 0.02, 2.0
PARTS = {"task": {1.0: task_documents()}, "anchors": {1.0: anchor_documents()[:4]},
         "both": {0.25: task_documents(), 0.75: anchor_documents()[:4]}}  # fmt: skip


def lora(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(11)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes))


def make(kind: str) -> PreTrainedModel:
    return lora(toy_model()) if kind == "lora" else toy_model()


def protect(inputs: str, role: str = "completion", layers: tuple[int, ...] = (0, 2), rank: int = 2, **changes: Any):
    extra = {key: changes.pop(key) for key in ("reference_model", "cache_dir", "task", "base") if key in changes}
    settings = PenaltySettings(**{"strength": STRENGTH, "inputs": inputs, "task_weight": 0.25, **changes})
    documents = {"anchors": anchor_documents(role)[:4], "task": task_documents(role), **extra}
    return SubspaceProtection(toy_subspace(layers, rank, role), settings, **documents)


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], torch.nn.Module]:
    """Weights by plain math, for full fine-tuning and LoRA and each kind of inputs."""
    return {
        (kind, inputs): plain_training(
            make(kind), find_layers, toy_subspace(), task=task_documents(), penalised=PARTS[inputs],
            strength=STRENGTH, steps=STEPS, learning_rate=RATE,
        )
        for kind, inputs in [("full", "task"), ("full", "anchors"), ("full", "both"), ("lora", "both")]
    }  # fmt: skip


@pytest.fixture(scope="module")
def constant() -> dict[str, torch.nn.Module]:
    """Weights after five steps at one strength, by plain math."""
    return {
        inputs: plain_training(
            toy_model(), find_layers, toy_subspace(), task=task_documents(), penalised=PARTS[inputs],
            strength=STRENGTH, steps=5, learning_rate=RATE,
        )
        for inputs in ("task", "anchors")
    }  # fmt: skip


def trained(folder, protection, kind: str = "full", **changes: Any):
    arguments = {"per_device_train_batch_size": 8, "learning_rate": RATE, "max_steps": STEPS, **changes}
    trainer = trainer_of(folder, make(kind).train(), protection=protection, **arguments)
    trainer.train()
    return trainer


@pytest.mark.parametrize("inputs", ["task", "anchors", "both"])
@pytest.mark.parametrize(("rows", "steps"), [(8, 1), (4, 2), (2, 4)])
def test_one_number_whatever_the_batching(tmp_path, expected, inputs, rows, steps):
    protection = protect(inputs, anchor_batch_size=4 // steps)
    trainer = trained(tmp_path, protection, per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
    assert update_error(trainer.model, expected["full", inputs], toy_model()) < 1e-5


@pytest.mark.parametrize("packing", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_packed_documents_find_their_references(tmp_path, expected, packing):
    trainer = trained(tmp_path, protect("both"), **packing)
    assert update_error(trainer.model, expected["full", "both"], toy_model()) < 1e-5


def test_truncated_rows_find_the_reference_of_their_prefix(tmp_path):
    length = sorted(len(d.input_ids) for d in task_documents())[4]
    cut = [Document(d.input_ids[:length], d.mask[:length], d.source) for d in task_documents()]
    want = plain_training(toy_model(), find_layers, toy_subspace(), task=cut, penalised={1.0: cut}, strength=STRENGTH,
                          steps=STEPS, learning_rate=RATE)  # fmt: skip
    trainer = trained(tmp_path, protect("task"), max_length=length)
    assert len({len(d.input_ids) > length for d in task_documents()}) == 2 and all(any(d.mask) for d in cut)
    assert update_error(trainer.model, want, toy_model()) < 1e-5


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_alive_and_exact_with_gradient_checkpointing(tmp_path, expected, kind, reentrant):
    trainer = trained(
        tmp_path, protect("both"), kind, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert update_error(trainer.model, expected[kind, "both"], make(kind)) < 1e-5


@pytest.mark.parametrize(("kind", "reference"), [("lora", "adapter_off"), ("lora", "frozen"), ("lora", "cached"),
                                                 ("full", "frozen")])  # fmt: skip
def test_all_references_agree_with_plain_math(tmp_path, expected, kind, reference):
    extra = {"reference_model": toy_model()} if reference == "frozen" else {}
    trainer = trained(tmp_path, protect("both", reference=reference, **extra), kind)
    assert update_error(trainer.model, expected[kind, "both"], make(kind)) < 1e-5


def test_bf16_follows_float32(tmp_path, expected):
    trainer = trained(tmp_path, protect("both"), bf16=True)
    assert update_error(trainer.model, expected["full", "both"], toy_model()) < 0.05


@pytest.mark.parametrize("role", ["prompt", "last_prompt", "all"])
def test_each_token_role_reaches_the_batch(tmp_path, role):
    want = plain_training(
        toy_model(), find_layers, toy_subspace(role=role), task=task_documents(), penalised={1.0: task_documents(role)},
        strength=STRENGTH, steps=2, learning_rate=RATE,
    )  # fmt: skip
    trainer = trained(tmp_path, protect("task", role), max_steps=2)
    assert update_error(trainer.model, want, toy_model()) < 1e-5


@pytest.mark.parametrize("reference", ["cached", "adapter_off", "frozen"])
@pytest.mark.parametrize(("layers", "rank"), [((0, 1, 2), 1), ((1,), 4)])
def test_the_penalty_is_zero_at_the_starting_model(tmp_path, reference, layers, rank):
    extra = {"reference_model": toy_model()} if reference == "frozen" else {}
    protection = protect("both", layers=layers, rank=rank, reference=reference, **extra)
    trainer = trained(tmp_path, protection, "lora", learning_rate=0.0, max_steps=1)
    found = trainer.state.log_history[0]["penalty"]
    # A cache computes each row in another batch shape, so it agrees to rounding; the others repeat the same sums.
    assert found < 1e-10 if reference == "cached" else found == 0.0


def test_bf16_at_the_starting_model_is_zero_within_its_rounding(tmp_path):
    trainer = trained(tmp_path, protect("both"), learning_rate=0.0, max_steps=1, bf16=True)
    assert trainer.state.log_history[0]["penalty"] < 1e-3


def test_logged_numbers_are_those_of_plain_math(tmp_path):
    start = toy_model()
    trainer = trained(tmp_path, protect("both"), max_steps=2)
    second = trainer.state.log_history[1]
    after_one = plain_training(start, find_layers, toy_subspace(), task=task_documents(), penalised=PARTS["both"],
                               strength=STRENGTH, steps=1, learning_rate=RATE)  # fmt: skip
    doubled = copy.deepcopy(start).double()
    want = sum(weight * plain_penalty(after_one, doubled, find_layers, rows, toy_subspace()).item()
               for weight, rows in PARTS["both"].items())  # fmt: skip
    alone = {}
    for layer in (0, 2):
        only = toy_subspace().restrict([layer], 2)
        alone[layer] = sum(weight * plain_penalty(after_one, doubled, find_layers, rows, only).item()
                           for weight, rows in PARTS["both"].items())  # fmt: skip
    assert second["penalty"] == pytest.approx(want, rel=1e-4)
    assert second["penalty_max"] == pytest.approx(max(alone.values()), rel=1e-4)
    assert second["penalty_max_layer"] == max(alone, key=alone.__getitem__)
    assert second["loss"] == pytest.approx(second["task_loss"] + STRENGTH * want, rel=1e-5)


def test_warmup_and_anchor_every_are_seen_in_the_logs(tmp_path):
    trainer = trained(tmp_path, protect("anchors", warmup=2, warmup_strength=5.0, anchor_every=2), max_steps=4)
    logs = trainer.state.log_history[:4]
    assert [entry.get("penalty_strength") for entry in logs] == [10.0, None, 2.0, None]
    assert ["penalty" in entry for entry in logs] == [True, False, True, False]


@pytest.mark.parametrize(
    ("settings", "strengths"),
    [
        ({"warmup": 4, "warmup_strength": 9.0}, [18.0, 14.0, 10.0, 6.0, 2.0]),
        ({"warmup": 2, "warmup_strength": 0.0}, [0.0, 1.0, 2.0, 2.0, 2.0]),
        ({"inputs": "anchors", "anchor_every": 2}, [2.0, 0.0, 2.0, 0.0, 2.0]),
        ({"inputs": "anchors", "anchor_every": 3, "warmup": 3, "warmup_strength": 4.0}, [8.0, 0.0, 0.0, 2.0, 0.0]),
        ({"side": "toward_base"}, [2.0] * 5),
        ({"side": "toward_base", "inputs": "anchors"}, [2.0] * 5),
    ],
)
def test_warmup_anchor_every_and_toward_base_give_the_weights_of_plain_math(tmp_path, constant, settings, strengths):
    inputs, side = settings.get("inputs", "task"), settings.get("side", "both")
    want = plain_training(
        toy_model(), find_layers, toy_subspace(), task=task_documents(), penalised=PARTS[inputs], strength=strengths,
        steps=5, learning_rate=RATE, toward_base=side == "toward_base",
    )  # fmt: skip
    trainer = trained(tmp_path, protect(**{"inputs": "task", **settings}), max_steps=5)
    assert update_error(trainer.model, want, toy_model()) < 1e-5
    assert update_error(constant[inputs], want, toy_model()) > 1e-3  # the setting makes a difference that would be seen


@pytest.mark.parametrize("inputs", ["task", "anchors", "both"])
@pytest.mark.parametrize(("rows", "steps"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_reversion_gives_the_weights_of_plain_math(tmp_path, expected, inputs, rows, steps, margin):
    base = toy_model(seed=9)
    want = plain_training(
        toy_model(), find_layers, toy_subspace(), task=task_documents(), penalised=PARTS[inputs], strength=STRENGTH,
        steps=STEPS, learning_rate=RATE, base=base, margin=margin,
    )  # fmt: skip
    protection = protect(
        inputs, side="reversion", margin=margin, anchor_batch_size=4 // steps, cache_dir=tmp_path / "cache",
        base=(lambda: copy.deepcopy(base), "the base"),
    )  # fmt: skip
    trainer = trained(tmp_path, protection, per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
    assert update_error(trainer.model, want, toy_model()) < 1e-5
    assert update_error(expected["full", inputs], want, toy_model()) > 1e-3


def test_reversion_refuses_what_would_leave_it_without_a_way_to_base(tmp_path):
    with pytest.raises(UserError, match="base model"):
        protect("anchors", side="reversion")
    start = (toy_model, "the start itself")
    with pytest.raises(UserError, match="starting model"):
        trained(tmp_path, protect("anchors", side="reversion", base=start))
    broken = toy_model(seed=9)
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="finite"):
        trained(tmp_path, protect("anchors", side="reversion", base=(lambda: broken, "the broken one")))
    with pytest.raises(UserError, match="frozen"):
        trained(tmp_path, protect("anchors", side="reversion", base=start, reference="frozen",
                                  reference_model=toy_model()))  # fmt: skip


def test_without_task_rows_the_completion_role_is_read_from_the_labels(tmp_path, expected):
    trainer = trained(tmp_path, protect("both", task=(), reference_model=toy_model()), "lora")
    assert update_error(trainer.model, expected["lora", "both"], make("lora")) < 1e-5


class _Silent(Trainer):
    """A user's own trainer, its task's gradient switched off."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * 0


class SilentPenalty(ProtectedTrainerMixin, _Silent):
    """Two lines of the user's."""


@pytest.mark.parametrize("summed", [True, False])
def test_any_trainer_gets_the_same_penalty_however_it_averages_its_loss(tmp_path, summed):
    # One SGD step at I has no gradient from the penalty, so the model trains from elsewhere than its reference.
    start, model = toy_model(), toy_model(seed=4).train()
    protection = protect("both", reference="frozen", reference_model=start, anchor_batch_size=2)
    dataset = task_dataset().rename_column("completion_mask", "labels")
    dataset = dataset.map(
        lambda row: {"labels": [i if m else -100 for i, m in zip(row["input_ids"], row["labels"], strict=True)]}
    )
    trainer = SilentPenalty(
        model=model, args=config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                                 max_steps=1, learning_rate=RATE),
        train_dataset=dataset, processing_class=toy_tokenizer(), protection=protection,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
    )  # fmt: skip
    trainer.model_accepts_loss_kwargs = summed
    trainer.train()
    moved, still = toy_model(seed=4).double(), copy.deepcopy(start).double()
    loss = sum(w * plain_penalty(moved, still, find_layers, rows, toy_subspace()) for w, rows in PARTS["both"].items())
    sgd_step(moved, STRENGTH * loss, RATE)
    assert update_error(trainer.model, moved, toy_model(seed=4)) < 1e-5


def test_rows_the_penalty_was_not_given_are_refused(tmp_path):
    with pytest.raises(UserError, match="rows"):
        trained(tmp_path, protect("task", task=task_documents()[:3]))


def test_wrapped_packing_is_refused_for_task_rows(tmp_path):
    with pytest.raises(UserError, match="wrapped"):
        trained(tmp_path, protect("task"), packing=True, packing_strategy="wrapped", max_length=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": -1.0}, "strength .*-1.0"),
        ({"strength": float("nan")}, "strength .*nan"),
        ({"inputs": "tasks"}, "task, anchors, both"),
        ({"task_weight": 2.0}, "2.0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        PenaltySettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "adapter_off"}, "adapter_off .*LoRA"),
        ({"reference": "frozen"}, "frozen"),
        ({"task": ()}, "task|rows"),
    ],
)
def test_a_reference_that_cannot_be_had_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, protect("both", **changes))

"""prefix_anchor, early_stop and a penalty's budget on two ranks, DDP and ZeRO-2, are what they are in one process.

One process is compared with plain math in each protection's own tests.
`torchrun --nproc_per_node 2 tests/trainer/protections/test_on_ranks.py OUT` is the part of the two ranks.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from holdfast.analysis.models.ranks import leave_group
from holdfast.trainer.protections.base import Protection
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys.adapters import lora_model
from toys.chat_models import toy_model
from toys.plain_math import relative_error
from toys.protections import budgeted, early_stop, prefix_anchor
from toys.ranks import CONFIGS, needs_compiler
from toys.training import trainer_of
from transformers import TrainerCallback

STEPS, RATE, BUDGET = 4, 0.02, 0.01
# Between the erosions of steps 2 and 3.
LIMIT, KEPT, ENDED = 0.05, 2, 3
LAUNCHES: dict[str, dict[str, Any]] = {"ddp": {}, "zero2": {"deepspeed": str(CONFIGS / "zero2.json")}}
LOGGED = ("penalty", "penalty_strength", "penalty_smoothed", "erosion")
Run = tuple[dict[str, Tensor], dict[str, Any]]


def made(name: str, ranks: int) -> tuple[nn.Module, Protection]:
    """The starting model and the protection, which reads four anchors a step whatever the number of ranks."""
    if name == "prefix_anchor":
        return lora_model(init_lora_weights=False), prefix_anchor()
    if name == "early_stop":
        return lora_model(), early_stop(LIMIT, every=1)
    return toy_model(), budgeted(BUDGET, "anchors", anchor_batch_size=4 // ranks)


NAMES = ("prefix_anchor", "early_stop", "budget")


def weights(model: nn.Module) -> dict[str, Tensor]:
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: parameter.detach().clone().contiguous() for name, parameter in trained}


class EachStep(TrainerCallback):
    """Keeps the weights by optimiser step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before the protection's `end_step`, which may go back.
        self.seen[state.global_step + 1] = weights(self.model)


def run(folder: Path, name: str, ranks: int, **changes: Any) -> Run:
    """The trained weights, and what was logged."""
    model, protection = made(name, ranks)
    trainer = trainer_of(
        folder, model.train(), protection=protection, max_steps=STEPS, learning_rate=RATE,
        per_device_train_batch_size=8 // ranks, **changes,
    )  # fmt: skip
    steps = EachStep(trainer.model)
    trainer.add_callback(steps)
    trainer.train()
    found = weights(trainer.model)
    same = [step for step, other in steps.seen.items() if all(torch.equal(found[n], other[n]) for n in found)]
    logs = {key: [entry[key] for entry in trainer.state.log_history if key in entry] for key in LOGGED}
    return found, {"ended": trainer.state.global_step, "weights_of": same, "logs": logs}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Run]:
    return {name: run(tmp_path_factory.mktemp("alone"), name, 1) for name in NAMES}


def on_both(launched: Path, launch: str, name: str) -> list[Run]:
    ends = [launched / f"{launch}_{name}_{rank}" for rank in (0, 1)]
    return [(load_file(f"{end}.safetensors"), json.loads(Path(f"{end}.json").read_text())) for end in ends]


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_ranks_train_to_the_weights_of_one_process_and_log_its_numbers(launched, alone, launch, name):
    (found, first), (other, second) = on_both(launched, launch, name)
    assert first == second and all(torch.equal(found[n], other[n]) for n in found)
    want, expected = alone[name]
    assert relative_error(found, want, weights(made(name, 2)[0])) < 1e-5
    assert first["ended"] == expected["ended"]
    for key, numbers in expected["logs"].items():
        assert first["logs"][key] == pytest.approx(numbers, rel=1e-4, abs=1e-9)


@needs_compiler
@pytest.mark.parametrize("launch", LAUNCHES)
def test_both_ranks_go_back_to_the_weights_of_the_last_look_within_the_limit(launched, launch):
    for _, result in on_both(launched, launch, "early_stop"):
        looks = result["logs"]["erosion"]
        assert result["ended"] == ENDED == len(looks) and looks[-2] <= LIMIT < looks[-1]
        assert result["weights_of"] == [KEPT]


@needs_compiler
@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_strength_moved_and_the_prefix_was_held(launched, launch):
    for _, result in on_both(launched, launch, "budget"):
        # Otherwise equal strengths would say nothing.
        strengths = result["logs"]["penalty_strength"]
        assert strengths[0] == 0.0 and len({*strengths}) > 2
    for _, result in on_both(launched, launch, "prefix_anchor"):
        assert all(penalty > 0 for penalty in result["logs"]["penalty"])


def _on_two_ranks(out: Path) -> None:
    torch.set_num_threads(1)
    for launch, changes in LAUNCHES.items():
        for name in NAMES:
            AcceleratorState._reset_state()
            found, result = run(out / launch / name, name, 2, **changes)
            end = out / f"{launch}_{name}_{torch.distributed.get_rank()}"
            save_file(found, f"{end}.safetensors")
            Path(f"{end}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _on_two_ranks(Path(sys.argv[1]))
    leave_group()

"""Stop when the measured erosion passes a limit, and restore the last weights within the limit (arXiv 2605.12199).

    erosion = the alignment-subspace penalty (definition in `penalty.py`) over all anchors, in evaluation mode

Nothing is added to the loss. Every few optimiser steps the erosion is measured on all anchors, without gradient. While
it is within the limit, the trained parameters (with LoRA: the adapters) are copied to the CPU. The first measurement
over the limit restores the copy and ends training. The erosion is also measured before each checkpoint of `save_steps`
and after the last step.
"""

import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import SaveStrategy

from ....analysis.errors import UserError
from ...data.documents import PENALTY_MASK
from ..base import Protection
from ..drift.penalty import penalty
from ..drift.subspace import SubspaceProtection
from ..host import Host


class Erosion(SubspaceProtection):
    """The alignment-subspace penalty as a measure on the anchors. It adds nothing to the loss."""

    @torch.no_grad()
    def measure(self, trainer: Host, model: nn.Module) -> float:
        """Measure the penalty over all anchors. All ranks return the same number."""
        assert self.anchors is not None
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        size = self.settings.anchor_batch_size
        rows = self.anchors.order[rank::world]
        sums_L = torch.zeros(len(self.layers), device=trainer.args.device)
        was_training = model.training
        model.eval()
        for start in range(0, len(rows), size):
            batch = trainer.to_device(self.anchors.batch(rows[start : start + size]))
            seen = self._watch(trainer, model, batch)
            sums_L += self.sums(seen.stacked(), self._references["anchors"](batch), batch[PENALTY_MASK])
        model.train(was_training)
        sums_L = trainer.accelerator.reduce(sums_L, "sum")
        return float(penalty(sums_L, self.anchors.counted(self.anchors.order)))


class EarlyStopProtection(Protection):
    """End training when the erosion is over the limit, with the last measured weights that were within the limit.

    Args:
        erosion: the measure.
        limit: largest erosion, in units of the contrast that defined the subspace: 0 is the starting model, 1 is as far
            as that contrast.
        every: optimiser steps between two measurements.

    Raises:
        UserError: a limit that is not above 0, or fewer than one step between two measurements.
    """

    name, active, goes_back = "early_stop", True, True

    def __init__(self, erosion: Erosion, limit: float, every: int) -> None:
        if not (math.isfinite(limit) and limit > 0):
            raise UserError(f"early_stop limit {limit} stops every run at once: write a finite number above 0")
        if every < 1:
            raise UserError(f"early_stop every {every} is no number of steps: write 1 or more")
        self.limit, self.every = limit, every
        self._erosion = erosion
        self._measured_step, self._value = 0, 0.0
        self._unlogged = self._restored = False
        self._copy: list[Tensor] = []
        self._copy_step = 0

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        if is_deepspeed_zero3_enabled() or trainer.accelerator.distributed_type == DistributedType.FSDP:
            raise UserError(
                "early_stop goes back to whole parameters, which ZeRO-3 and FSDP shard: use zero2, or hold the drift "
                "at the limit with --protection subspace --penalty_budget"
            )
        if trainer.args.save_strategy == SaveStrategy.BEST:
            raise UserError(
                "early_stop puts earlier weights back, which --save_strategy best may save as a checkpoint of a later "
                "step; write steps or epoch"
            )
        self._erosion.prepare(trainer, model)

    def start(self, trainer: Host, model: nn.Module) -> None:
        """Require that the erosion depends on the trained parameters, and is within the limit at the start."""
        self._erosion.start(trainer, model)
        step = trainer.state.global_step
        if step != self._measured_step:
            self._measure(trainer, model)
        if self._value > self.limit:
            raise UserError(
                f"early_stop cannot go on from step {step}: the erosion {self._value:.3g} is over the limit "
                f"{self.limit:g}; resume from an earlier checkpoint, or raise --early_stop_limit"
            )
        self._copy_weights(model)

    def end_step(self, trainer: Host, model: nn.Module) -> None:
        control = trainer.control
        if trainer.state.global_step % self.every and not control.should_save:
            return
        self._measure(trainer, model)
        if self._value <= self.limit:
            self._copy_weights(model)
            return
        self._restore(trainer, model)
        # No checkpoint is saved, because weights and optimiser belong to different steps. At the end of an epoch
        # `replaced_weights` prevents one.
        control.should_training_stop, control.should_log, control.should_save = True, True, False

    def finish(self, trainer: Host, model: nn.Module) -> None:
        """Measure the last step, if it was not measured. Over the limit, restore the copy, even over a best checkpoint
        that the trainer has loaded.
        """
        if trainer.state.global_step != self._measured_step:
            self._measure(trainer, model)
        if self._value > self.limit:
            self._restore(trainer, model)

    def _measure(self, trainer: Host, model: nn.Module) -> None:
        self._measured_step, self._value = trainer.state.global_step, self._erosion.measure(trainer, model)
        self._unlogged = True

    def _copy_weights(self, model: nn.Module) -> None:
        self._copy = [parameter.detach().to("cpu", copy=True) for parameter in _trained(model)]
        self._copy_step = self._measured_step

    @torch.no_grad()
    def _restore(self, trainer: Host, model: nn.Module) -> None:
        for parameter, value in zip(_trained(model), self._copy, strict=True):
            parameter.copy_(value)
        if trainer.accelerator.is_main_process and not self._restored:
            print(
                f"early_stop: training ended at step {self._measured_step}, where the erosion {self._value:.3g} is "
                f"over the limit {self.limit:g}; the weights are those of step {self._copy_step}"
            )
        self._restored = True

    def replaced_weights(self) -> bool:
        return self._restored

    def logs(self, trainer: Host) -> dict[str, float]:
        unlogged, self._unlogged = self._unlogged, False
        return {"erosion": self._value} if unlogged else {}

    def facts(self) -> dict[str, Any]:
        limits = {"early_stop_limit": self.limit, "early_stop_every": self.every}
        return {**self._erosion.facts(), "protection": self.name, **limits}

    def state(self) -> dict[str, Any]:
        return {"step": self._measured_step, "erosion": self._value}

    def load_state(self, state: dict[str, Any]) -> None:
        self._measured_step, self._value = state["step"], state["erosion"]


def _trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

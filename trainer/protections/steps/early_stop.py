"""Stop where the measured erosion passes a limit, and go back to the last weights within it (arXiv 2605.12199).

    erosion = the alignment-subspace penalty (definition in `penalty.py`) over all anchors, in evaluation mode

Nothing is added to the loss. Every few optimiser steps all anchors are read, without gradient; while the erosion is
within the limit the trained parameters are copied to the CPU (of LoRA: the adapters). The first look over the limit
puts the copy back and ends training. There is a look before each checkpoint of `save_steps`, too, and one at the end.
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
    """The alignment-subspace penalty as a measure: it adds nothing to the loss. Its anchors are what is read."""

    @torch.no_grad()
    def measure(self, trainer: Host, model: nn.Module) -> float:
        """The penalty over all anchors, the same on all ranks."""
        assert self.anchors is not None
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        size = self.settings.anchor_batch_size
        mine = self.anchors.order[rank::world]
        sums_L = torch.zeros(len(self.layers), device=trainer.args.device)
        was_training = model.training
        model.eval()
        for start in range(0, len(mine), size):
            batch = trainer.to_device(self.anchors.batch(mine[start : start + size]))
            seen = self._watch(trainer, model, batch)
            sums_L += self.sums(seen.stacked(), self._references["anchors"](batch), batch[PENALTY_MASK])
        model.train(was_training)
        sums_L = trainer.accelerator.reduce(sums_L, "sum")
        return float(penalty(sums_L, self.anchors.counted(self.anchors.order)))


class EarlyStopProtection(Protection):
    """End training at the first look whose erosion is over the limit, with the weights of the last look within it.

    Args:
        erosion: what is measured.
        limit: in units of the contrast that defined the subspace: 0 is the starting model, 1 as far as that contrast.
        every: optimiser steps between two looks.

    Raises:
        UserError: a limit that is not above 0, no steps between looks.
    """

    name, active, goes_back = "early_stop", True, True

    def __init__(self, erosion: Erosion, limit: float, every: int) -> None:
        if not (math.isfinite(limit) and limit > 0):
            raise UserError(f"early_stop limit {limit} stops every run at once: write a finite number above 0")
        if every < 1:
            raise UserError(f"early_stop every {every} is no number of steps: write 1 or more")
        self.limit, self.every = limit, every
        self._erosion = erosion
        self._looked, self._value = 0, 0.0
        self._unlogged = self._told = False
        self._kept: list[Tensor] = []
        self._kept_step = 0

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
        """Require that the erosion feels the trained parameters, and that the weights to start from are within."""
        self._erosion.start(trainer, model)
        step = trainer.state.global_step
        if step != self._looked:
            self._look(trainer, model)
        if self._value > self.limit:
            raise UserError(
                f"early_stop cannot go on from step {step}: its erosion {self._value:.3g} is over the limit "
                f"{self.limit:g}; resume from an earlier checkpoint, or raise --early_stop_limit"
            )
        self._keep(model)

    def end_step(self, trainer: Host, model: nn.Module) -> None:
        control = trainer.control
        if trainer.state.global_step % self.every and not control.should_save:
            return
        self._look(trainer, model)
        if self._value <= self.limit:
            self._keep(model)
            return
        self._go_back(trainer, model)
        # Not a checkpoint: weights and optimiser are of different steps. `replaced_weights` keeps the end of an epoch
        # from being one.
        control.should_training_stop, control.should_log, control.should_save = True, True, False

    def finish(self, trainer: Host, model: nn.Module) -> None:
        """A last look, if the last step had none; a best checkpoint that was loaded since goes back as well."""
        if trainer.state.global_step != self._looked:
            self._look(trainer, model)
        if self._value > self.limit:
            self._go_back(trainer, model)

    def _look(self, trainer: Host, model: nn.Module) -> None:
        self._looked, self._value = trainer.state.global_step, self._erosion.measure(trainer, model)
        self._unlogged = True

    def _keep(self, model: nn.Module) -> None:
        self._kept = [parameter.detach().to("cpu", copy=True) for parameter in _trained(model)]
        self._kept_step = self._looked

    @torch.no_grad()
    def _go_back(self, trainer: Host, model: nn.Module) -> None:
        for parameter, kept in zip(_trained(model), self._kept, strict=True):
            parameter.copy_(kept)
        if trainer.accelerator.is_main_process and not self._told:
            print(
                f"early_stop: training ended at step {self._looked}, where the erosion {self._value:.3g} is over the "
                f"limit {self.limit:g}; the weights are those of step {self._kept_step}"
            )
        self._told = True

    def replaced_weights(self) -> bool:
        return self._told

    def logs(self, trainer: Host) -> dict[str, float]:
        new, self._unlogged = self._unlogged, False
        return {"erosion": self._value} if new else {}

    def facts(self) -> dict[str, Any]:
        limits = {"early_stop_limit": self.limit, "early_stop_every": self.every}
        return {**self._erosion.facts(), "protection": self.name, **limits}

    def state(self) -> dict[str, Any]:
        return {"step": self._looked, "erosion": self._value}

    def load_state(self, state: dict[str, Any]) -> None:
        self._looked, self._value = state["step"], state["erosion"]


def _trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

"""Protections that change the residual stream during training only, so that the saved model is a plain model.

The hooks are on the decoder blocks only during the task's forward pass. Evaluation, measurement and generation never
run with them. transformers 5.23 checkpoints a block's `forward`, so the backward pass does not run the hooks again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....analysis.errors import UserError
from ....analysis.interventions.changes import Change
from ....analysis.interventions.proof import rounding
from ....analysis.models.hooks import check_unhooked, observe, patch
from ....analysis.models.layers import find_layers
from ..base import Batch, Protection, Term
from ..host import Host


class HookedProtection(Protection):
    """A change of the residual stream after some decoder blocks, for all tokens of the task's rows.

    Args:
        name: the name in `protection: NAME`.
        change: the change of the residual stream.
        layers: blocks after which the change is made.
        facts: what must not differ when the run is resumed, besides the name.
        layers_path: path of the decoder blocks, if they are not found by shape.
    """

    def __init__(
        self, name: str, change: Change, layers: list[int], facts: dict[str, Any], layers_path: str | None = None
    ) -> None:
        self.name, self.active = name, True
        self.change, self.layers = change, sorted(layers)
        self._facts, self._layers_path = facts, layers_path

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        trainer.refuse_unsupported(task=False)
        check_unhooked(model, self._layers_path)

    @torch.no_grad()
    def start(self, trainer: Host, model: nn.Module) -> None:
        """Require that the change is made to numerical tolerance, and that the last block's output moves."""
        batch = trainer.to_device(trainer.first_task_batch())
        last = len(find_layers(model, self._layers_path)) - 1
        was_training = model.training
        model.eval()
        plain: dict[int, Tensor] = {}
        with observe(model, [last], plain.__setitem__, self._layers_path):
            trainer.run_blocks(model, batch)
        before: dict[int, Tensor] = {}
        after: dict[int, Tensor] = {}
        watched = sorted({*self.layers, last})
        with (
            observe(model, watched, before.__setitem__, self._layers_path),
            patch(model, self.layers, self._changed, self._layers_path),
            observe(model, watched, after.__setitem__, self._layers_path),
        ):
            trainer.run_blocks(model, batch)
        model.train(was_training)
        self._require(before, after, plain[last], last)

    def _require(self, before: dict[int, Tensor], after: dict[int, Tensor], plain: Tensor, last: int) -> None:
        for layer in self.layers:
            if layer not in after:
                raise UserError(f"{self.name}: layer {layer} did not run; name the decoder blocks with --layers_path")
            size = torch.maximum(before[layer].float().norm(dim=-1), after[layer].float().norm(dim=-1))
            missed = self.change.missed(layer, before[layer], after[layer], None) / size.clamp(min=1e-30)
            if not float(missed.max()) <= 16 * rounding(before[layer]):
                raise UserError(
                    f"{self.name}: the residual stream after layer {layer} is {float(missed.max()):.2g} of its norm "
                    "away from the requested change; train in a finer --dtype, or choose other layers"
                )
        if torch.equal(after[last], plain):
            raise UserError(
                f"{self.name} on layers {self.layers} moves nothing: the residual stream has no part in the subspace "
                "there; choose other layers, or build the subspace from this model"
            )

    def _changed(self, layer: int, hidden: Tensor) -> Tensor:
        return self.change.apply(layer, hidden, None)

    @contextmanager
    def task_pass(self, trainer: Host, model: nn.Module, inputs: Batch) -> Iterator[Term]:
        with patch(model, self.layers, self._changed, self._layers_path):
            yield lambda: None

    def facts(self) -> dict[str, Any]:
        return {"protection": self.name, "layers": self.layers, **self._facts}

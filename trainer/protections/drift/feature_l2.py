"""Feature distance to the starting model (LDIFS, arXiv 2308.13320; compared in 2508.06249): all of the residual stream.

    term = mean over layers and tokens of ‖h_l^θ − h_l^I‖²

The alignment-subspace penalty with V the whole space, on every fifth block. A cached reference holds d numbers a token
and layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....analysis.models.hooks import observe
from ...data.documents import Document
from .penalty import layer_sums
from .settings import PenaltySettings
from .term import DriftProtection
from .watch import Projections, Watcher

EVERY = 5


class WholeStream:
    """Reads whole outputs of decoder blocks [B, T, d], in float32 or better."""

    def __init__(self, model: nn.Module, layers: list[int], layers_path: str | None) -> None:
        self.model, self.layers, self.layers_path = model, layers, layers_path

    @contextmanager
    def watching(self) -> Iterator[Projections]:
        seen = Projections(self.layers)

        def take(layer: int, hidden: Tensor) -> None:
            seen.take(layer, hidden.to(torch.promote_types(hidden.dtype, torch.float32)))

        with observe(self.model, self.layers, take, self.layers_path):
            yield seen


class FeatureL2Protection(DriftProtection):
    """Penalise drift of the whole residual stream behind some decoder blocks.

    Args:
        layers: behind which blocks; `every_fifth` gives the published choice.
        role: whose tokens count. fingerprint: of the starting model.
        anchors, task, reference_model, cache_dir: see DriftProtection.
    """

    def __init__(
        self, layers: list[int], role: str, settings: PenaltySettings, fingerprint: str, *,
        anchors: Sequence[Document] = (), task: Sequence[Document] = (),
        reference_model: PreTrainedModel | None = None, cache_dir: Path | None = None, layers_path: str | None = None,
    ) -> None:  # fmt: skip
        self._fingerprint, self._layers_path = fingerprint, layers_path
        super().__init__(
            "feature_l2", role, sorted(layers), settings, anchors=anchors, task=task, reference_model=reference_model,
            cache_dir=cache_dir,
        )  # fmt: skip

    def watcher(self, model: nn.Module) -> Watcher:
        return WholeStream(model, self.layers, self._layers_path)

    def sums(self, values_LBTk: Tensor, reference_LBTk: Tensor, mask_BT: Tensor) -> Tensor:
        return layer_sums(values_LBTk - reference_LBTk, mask_BT, values_LBTk.new_ones(len(self.layers)))

    def shifted(self, values_LBTk: Tensor) -> Tensor:
        return values_LBTk - 1.0

    def what(self) -> dict[str, Any]:
        return {
            "stream": "whole", "layers": self.layers, "instruct": self._fingerprint, "layers_path": self._layers_path
        }  # fmt: skip


def every_fifth(depth: int) -> list[int]:
    """Every fifth block counted from the last, so that the last one is there."""
    return sorted(range(depth - 1, -1, -EVERY))

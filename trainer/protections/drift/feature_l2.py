"""Distance of the whole residual stream from the starting model's (LDIFS, arXiv 2308.13320; compared in 2508.06249).

    term = mean over layers and tokens of ‖h_l^θ − h_l^I‖²

This is the alignment-subspace penalty with the whole space as V, after every fifth block. A cached reference holds d
numbers per token and layer.
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
    """Reads the whole outputs of decoder blocks [B, T, d], in float32 or better."""

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
    """Penalise drift of the whole residual stream after some decoder blocks.

    Args:
        layers: the blocks; `every_fifth` returns the published choice.
        role: role of the tokens that count.
        settings: see PenaltySettings.
        fingerprint: fingerprint of the starting model.
        anchors, task, reference_model, cache_dir: see DriftProtection.
        layers_path: path of the decoder blocks, if they are not found by shape.

    Raises:
        UserError: settings that cannot work together.
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

    def cache_facts(self) -> dict[str, Any]:
        return {
            "stream": "whole", "layers": self.layers, "instruct": self._fingerprint, "layers_path": self._layers_path
        }  # fmt: skip


def every_fifth(depth: int) -> list[int]:
    """Return every fifth block, counted from the last block, so that the last block is included."""
    return sorted(range(depth - 1, -1, -EVERY))

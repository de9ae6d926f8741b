"""The alignment-subspace penalty: loss = cross-entropy + strength x penalty (definition in `penalty.py`).

The null of it, `random_subspace`, is this class with a random subspace.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....analysis.errors import UserError
from ....analysis.files.artifacts import digest_of
from ....analysis.models.forward import run_blocks
from ....analysis.subspace.file import NULL_SEEDS, Subspace
from ...data.documents import Document, DocumentStore
from ..host import Host
from .penalty import drift, layer_sums, reversion, unit_directions
from .reference import Reference, ReferenceCache
from .settings import PenaltySettings
from .term import DriftProtection
from .watch import ResidualProjector, Watcher


class SubspaceProtection(DriftProtection):
    """Penalise drift of the residual stream inside a subspace, relative to the starting model.

    Args:
        subspace: sets the layers, the rank and the token role (`subspace.restrict` chooses fewer layers or directions).
        settings: see PenaltySettings.
        anchors, task, reference_model, cache_dir: see DriftProtection.
        layers_path: path of the decoder blocks, if they are not found by shape.
        base: for side reversion: a function that loads the base model, and the fingerprint of that model.
        name: "random_subspace" for the null.

    Raises:
        UserError: settings that cannot work together.
    """

    def __init__(
        self, subspace: Subspace, settings: PenaltySettings | None = None, *, anchors: Sequence[Document] = (),
        task: Sequence[Document] = (), reference_model: PreTrainedModel | None = None, cache_dir: Path | None = None,
        layers_path: str | None = None, name: str = "subspace",
        base: tuple[Callable[[], PreTrainedModel], str] | None = None,
    ) -> None:  # fmt: skip
        self.subspace, self._layers_path = subspace, layers_path
        chosen, layers = settings or PenaltySettings(), sorted(subspace.bases)
        self.scales_L = torch.tensor([subspace.scales[layer] for layer in layers])
        self.direction_Lk: Tensor | None = None
        if chosen.side == "toward_base":
            if subspace.base_gap is None:
                raise UserError(_no_gap(subspace))
            self.direction_Lk = unit_directions(subspace.base_gap, layers)
        if chosen.side == "reversion" and base is None:
            raise UserError("penalty side reversion reads the base model's states: name the base model")
        self._base = base
        super().__init__(
            name, subspace.provenance.role, layers, chosen, anchors=anchors, task=task,
            reference_model=reference_model, cache_dir=cache_dir,
        )  # fmt: skip

    def watcher(self, model: nn.Module) -> Watcher:
        return ResidualProjector(model, self.subspace.bases, self._layers_path)

    def place(self, device: torch.device) -> None:
        self.scales_L = self.scales_L.to(device)
        if self.direction_Lk is not None:
            self.direction_Lk = self.direction_Lk.to(device)

    def reference(
        self, kind: str, trainer: Host, model: nn.Module, store: DocumentStore | None, rows: int
    ) -> Reference:
        source = super().reference(kind, trainer, model, store, rows)
        if self.settings.side == "reversion":
            if kind != "cached" or store is None:
                raise UserError(
                    f"penalty side reversion reads the base model's states from a cache, but the reference is {kind}: "
                    "give rows that map back and write --reference cached, or write --penalty_side both"
                )
            self._add_gaps(trainer, store, rows)
        return source

    def _add_gaps(self, trainer: Host, store: DocumentStore, rows: int) -> None:
        """Append to the starting model's values [N, L, k] in the store their gaps to base: [N, L, 2k]."""
        assert self._base is not None and store.values is not None
        load, fingerprint = self._base
        base, start = trainer.place_reference(load()), store.values
        base.requires_grad_(False)
        cache = ReferenceCache(
            base, self.watcher(base), run_blocks, trainer.accelerator,
            facts={**self.cache_facts(), "base": fingerprint}, folder=self._cache_dir, batch_size=rows, trained=False,
        )  # fmt: skip
        cache.fill(store)
        gaps = store.values - start
        # A gap that is not finite has no direction: its token would never count, and nothing would report it.
        if not gaps.isfinite().all():
            raise UserError(
                "penalty side reversion finds states of the base model that are not finite: check its weights"
            )
        if not gaps.any():
            raise UserError(
                "penalty side reversion finds the base model's states equal to the starting model's: there is no way "
                "back; name the model before alignment as base"
            )
        store.values = torch.cat([start, gaps], dim=-1)

    def sums(self, values_LBTk: Tensor, reference_LBTk: Tensor, mask_BT: Tensor) -> Tensor:
        return layer_sums(self._drift(values_LBTk, reference_LBTk), mask_BT, self.scales_L)

    def _drift(self, values_LBTk: Tensor, reference_LBTk: Tensor) -> Tensor:
        if self.settings.side != "reversion":
            return drift(values_LBTk, reference_LBTk, self.direction_Lk)
        start_LBTk, gap_LBTk = reference_LBTk.chunk(2, dim=-1)
        return reversion(values_LBTk, start_LBTk, gap_LBTk, self.settings.margin)

    def shifted(self, values_LBTk: Tensor) -> Tensor:
        """Return a reference one unit away along every direction of V, or along the way to base."""
        if self.settings.side == "reversion":
            return torch.cat([values_LBTk - 1, torch.ones_like(values_LBTk)], dim=-1)
        ones = torch.ones_like(values_LBTk) if self.direction_Lk is None else self.direction_Lk[:, None, None, :]
        return values_LBTk - ones

    def cache_facts(self) -> dict[str, Any]:
        return {
            "bases": digest_of(self.subspace.bases), "layers": self.layers,
            "instruct": self.subspace.provenance.instruct_fingerprint,
            "layers_path": self._layers_path or self.subspace.provenance.layers_path,
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        scales = [self.subspace.scales[layer] for layer in self.layers]
        return {**super().facts(), "subspace": digest_of(self.subspace.bases), "scales": scales}


def _no_gap(subspace: Subspace) -> str:
    built = subspace.provenance
    if built.method == "random":
        return (
            f"penalty side toward_base has no direction for the random subspace of seed {built.seed}: the way to base "
            f"is stored for seeds 0-{NULL_SEEDS - 1}; write --null_seed with one of them, or --penalty_side both"
        )
    return (
        "penalty side toward_base needs the way to base, which this subspace does not hold: build it again with "
        "`holdfast subspace`, or write --penalty_side both"
    )

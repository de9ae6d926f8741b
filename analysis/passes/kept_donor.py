"""A donor whose states for patching are kept in memory, and in the store with the reference's other readings."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .patching import Donor, PatchRows, Scores, store_donor


@dataclass(frozen=True)
class KeptDonor(Donor):
    """A donor whose states are in memory: {"<batch>-<layer>": [N, d]}."""

    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def states(self, batch: int, layer: int) -> Tensor:
        return self.kept[f"{batch}-{layer}"]

    @classmethod
    def of(cls, model: nn.Module, rows: PatchRows, layers: Sequence[int]) -> "KeptDonor":
        """Run the donor once, and keep its states."""
        with tempfile.TemporaryDirectory() as folder:
            donor = store_donor(model, rows, layers, Path(folder))
            batches = range(len(rows.batches))
            kept = {f"{batch}-{layer}": donor.states(batch, layer) for batch in batches for layer in layers}
        return cls(Path(), tuple(layers), donor.scores, kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return states, scores and layers as named tensors, for the store."""
        scores = {"loss": self.scores.loss, "probability": self.scores.probability}
        layers = torch.tensor(self.layers, dtype=torch.int64)
        return {**self.kept, **{name: torch.from_numpy(value) for name, value in scores.items()}, "layers": layers}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "KeptDonor":
        """Make a donor from its `tensors()`."""
        kept = {name: value for name, value in tensors.items() if "-" in name}
        scores = Scores(tensors["loss"].numpy(), tensors["probability"].numpy())
        return cls(Path(), tuple(tensors["layers"].tolist()), scores, kept)

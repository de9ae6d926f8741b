"""The one-pass engine: one forward pass per model and probe set gives what every family of metrics reads.

Per-token log-probability and entropy come from chunks of the LM head at completion positions; activations are pooled
and projected inside the pass, as soon as a block has run, so that no layer's [B, T, d] waits for the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activations import length_batches, pad, select
from .artifacts import load_aligned, staged_file
from .hooks import observe
from .layers import find_backbone
from .lm_head import token_statistics
from .probes import Rendered
from .subspace_file import Subspace


@dataclass(frozen=True)
class Readout:
    """What one model shows on R rows; on the CPU, float32 where nothing else is said, tokens in the order of rows.

    token_rows, log_prob, entropy: [N], the row, log-probability and next-token entropy (nats) of completion tokens.
    counts: [R], tokens of the pooled role. pooled: {l: [R, d]}, mean activation over them (0 where there are none).
    projection_rows: [M], the row of each token of the role. projections: {l: [M, k]}, its coordinates V^T h.
    final: [K, d] in the model's dtype, final states at the positions that were to be kept, in the order of rows.
    """

    token_rows: Tensor
    log_prob: Tensor
    entropy: Tensor
    counts: Tensor
    pooled: dict[int, Tensor]
    projection_rows: Tensor
    projections: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in _FLAT}
        for name in _LAYERED:
            tensors.update({f"{name}.{layer}": value for layer, value in getattr(self, name).items()})
        with staged_file(path) as staging:
            save_file({name: value.contiguous() for name, value in tensors.items()}, staging)

    @classmethod
    def load(cls, path: Path) -> "Readout":
        """Read a file written by `save`."""
        layered: dict[str, dict[int, Tensor]] = {name: {} for name in _LAYERED}
        flat: dict[str, Any] = {}
        for key, value in load_aligned(path).items():
            name, _, layer = key.partition(".")
            if layer:
                layered[name][int(layer)] = value
            else:
                flat[key] = value
        return cls(**flat, pooled=layered["pooled"], projections=layered["projections"])


_FLAT = ("token_rows", "log_prob", "entropy", "counts", "projection_rows", "final")
_LAYERED = ("pooled", "projections")


@torch.no_grad()
def read(
    model: nn.Module,
    rows: Sequence[Rendered],
    *,
    layers: Sequence[int],
    role: str,
    subspace: Subspace | None = None,
    keep: Sequence[Sequence[int]] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    padding: int = 0,
    label: str = "reading",
) -> Readout:
    """One forward pass over the rows, in eval mode (the model's own mode is restored).

    Args:
        layers: whose outputs are pooled over the tokens of `role`, per row.
        subspace: whose bases the same tokens are projected on, at its own layers.
        keep: per row, the positions whose final states are kept.
        max_length: rows are cut to it, in tokens.
    """
    reader = _Reader(model, rows, layers, role, subspace, keep, max_length, padding)
    training = model.training
    model.eval()
    try:
        batches = length_batches([len(row.input_ids) for row in rows], batch_size)
        for batch in tqdm(batches, desc=label, delay=5, leave=False):
            reader.read_batch(batch)
    finally:
        model.train(training)
    return reader.result()


class _Reader:
    """State of one pass: the positions wanted, and what has been read of them."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Rendered],
        layers: Sequence[int],
        role: str,
        subspace: Subspace | None,
        keep: Sequence[Sequence[int]] | None,
        max_length: int | None,
        padding: int,
    ) -> None:
        self.model, self.padding = model, padding
        self.device = next(model.parameters()).device
        self.selections = [select(row, role, max_length) for row in rows]
        self.targets = [
            [i for i in range(1, len(selection.input_ids)) if row.completion_mask[i]]
            for row, selection in zip(rows, self.selections, strict=True)
        ]
        self.keep: Sequence[Sequence[int]] = [()] * len(rows) if keep is None else keep
        self.layers = list(layers)
        self.bases = (
            {} if subspace is None else {layer: basis.to(self.device) for layer, basis in subspace.bases.items()}
        )
        self.order: list[int] = []
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self.pooled: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self.projected: dict[int, list[Tensor]] = {layer: [] for layer in self.bases}
        self.final: list[Tensor] = []

    def read_batch(self, batch: list[int]) -> None:
        ids, attention = pad([self.selections[row].input_ids for row in batch], self.padding, self.device)
        at, positions = _flat([self.selections[row].positions for row in batch])
        counts = torch.tensor([len(self.selections[row].positions) for row in batch], device=self.device)

        def see(layer: int, hidden: Tensor) -> None:
            states = hidden[at, positions].float()
            if layer in self.pooled:
                sums = torch.zeros(len(batch), states.shape[1], device=states.device)
                sums.index_add_(0, torch.tensor(at, device=states.device, dtype=torch.int64), states)
                self.pooled[layer].append((sums / counts.clamp(min=1)[:, None]).cpu())
            if layer in self.projected:
                self.projected[layer].append((states @ self.bases[layer]).cpu())

        with observe(self.model, sorted({*self.layers, *self.bases}), see):
            final = find_backbone(self.model)(
                input_ids=ids, attention_mask=attention, use_cache=False
            ).last_hidden_state
        at, positions = _flat([self.targets[row] for row in batch])
        if at:
            states, targets = final[at, [position - 1 for position in positions]], ids[at, positions]
            log_prob, entropy = token_statistics(self.model, states, targets)
            self.statistics.append((log_prob.cpu(), entropy.cpu()))
        self.final.append(final[_flat([self.keep[row] for row in batch])].cpu())
        self.order.extend(batch)

    def result(self) -> Readout:
        """Everything in the order of rows instead of batches."""
        rows_back = torch.tensor(self.order).argsort()
        target_rows = torch.tensor([row for row in self.order for _ in self.targets[row]], dtype=torch.int64)
        role_rows = torch.tensor([row for row in self.order for _ in self.selections[row].positions], dtype=torch.int64)
        kept_rows = torch.tensor([row for row in self.order for _ in self.keep[row]], dtype=torch.int64)
        targets_back, roles_back = target_rows.argsort(stable=True), role_rows.argsort(stable=True)
        empty = torch.zeros(0)
        log_prob = torch.cat([pair[0] for pair in self.statistics]) if self.statistics else empty
        entropy = torch.cat([pair[1] for pair in self.statistics]) if self.statistics else empty
        return Readout(
            token_rows=target_rows[targets_back],
            log_prob=log_prob[targets_back],
            entropy=entropy[targets_back],
            counts=torch.tensor([len(selection.positions) for selection in self.selections]),
            pooled={layer: torch.cat(parts)[rows_back] for layer, parts in self.pooled.items()},
            projection_rows=role_rows[roles_back],
            projections={layer: torch.cat(parts)[roles_back] for layer, parts in self.projected.items()},
            final=torch.cat(self.final)[kept_rows.argsort(stable=True)],
        )


def _flat(positions: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Index pairs (row of the batch, position) of all given positions, row by row."""
    return [at for at, here in enumerate(positions) for _ in here], [
        position for here in positions for position in here
    ]

"""Read everything that the families of metrics need in one forward pass per model and probe set.

Log-probability and entropy of each completion token come from chunks of the LM head. Activations are pooled and
projected during the pass, as soon as a block has run, so that no layer's [B, T, d] has to be kept until the end.

    readout = read(model, rows, layers=[0, 1, 2], role="completion")
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.forward import length_batches, pad, select
from ..models.hooks import observe
from ..models.layers import find_backbone
from ..models.lm_head import token_statistics
from ..models.ranks import gathered, share_of
from ..models.render import Rendered
from ..subspace.file import Subspace


@dataclass(frozen=True)
class Readout:
    """What one model shows on R rows. Tensors are on the CPU, and float32 unless noted. Tokens are in row order.

    token_rows, log_prob, entropy: [N], the row, log-probability and next-token entropy (nats) of each completion token.
    counts: [R], number of tokens of the pooled role. pooled: {l: [R, d]}, mean activation over these tokens (0 if there
    are none). projection_rows: [M], the row of each token of the role. projections: {l: [M, k]}, the token's
    coordinates V^T h. final: [K, d] in the model's dtype, final states at the positions to keep, in row order.
    row_entropy: [R], mean next-token entropy after all tokens of a row, prompt included; empty unless requested.
    last: {l: [R, d]}, activations at the last token of each row; empty unless requested.
    """

    token_rows: Tensor
    log_prob: Tensor
    entropy: Tensor
    counts: Tensor
    pooled: dict[int, Tensor]
    projection_rows: Tensor
    projections: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    row_entropy: Tensor = field(default_factory=lambda: torch.zeros(0))
    last: dict[int, Tensor] = field(default_factory=dict)

    def at_last_token(self) -> "Readout":
        """Return the readout with each row pooled at its last token, instead of by the mean over a role's tokens.

        Section 4.4 of arXiv 2507.03662 pools so.
        """
        return replace(self, pooled=self.last, counts=torch.ones_like(self.counts))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for the store."""
        tensors = {name: getattr(self, name) for name in _FLAT}
        for name in _LAYERED:
            tensors.update({f"{name}.{layer}": value for layer, value in getattr(self, name).items()})
        return tensors

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Readout":
        """Make a readout from its `tensors()`."""
        layered: dict[str, Any] = {name: {} for name in _LAYERED}
        flat: dict[str, Any] = {}
        for key, value in tensors.items():
            name, _, layer = key.partition(".")
            if layer:
                layered[name][int(layer)] = value
            else:
                flat[key] = value
        return cls(**flat, **layered)


_FLAT = ("token_rows", "log_prob", "entropy", "counts", "projection_rows", "final", "row_entropy")
_LAYERED = ("pooled", "projections", "last")


@torch.no_grad()
def read(
    model: nn.Module,
    rows: Sequence[Rendered],
    *,
    layers: Sequence[int],
    role: str,
    subspace: Subspace | None = None,
    keep: Sequence[Sequence[int]] | None = None,
    prompt_entropy: bool = False,
    last_token: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
    padding: int = 0,
    shared: bool = False,
    label: str = "reading",
) -> Readout:
    """Run one forward pass over the rows in eval mode. The model's mode is restored afterwards.

    Args:
        layers: the layers whose outputs are pooled over the tokens of `role`, per row.
        subspace: the subspace on whose bases the same tokens are projected, at the subspace's layers.
        keep: for each row, the positions whose final states are kept.
        prompt_entropy: whether to read `row_entropy`, which runs the LM head on every token.
        last_token: whether to read `last`, at `layers`.
        max_length: rows are cut to this many tokens.
        padding: a token id to pad with.
        shared: True if all ranks call the function with the same rows. Each rank then runs a share of the batches, and
            gets the whole readout.
        label: the label of the progress bar.
    """
    reader = _Reader(model, rows, layers, role, subspace, keep, prompt_entropy, last_token, max_length, padding)
    training = model.training
    model.eval()
    try:
        batches = length_batches([len(row.input_ids) for row in rows], batch_size)
        for batch in tqdm(share_of(batches) if shared else batches, desc=label, delay=5, leave=False):
            reader.read_batch(batch)
    finally:
        model.train(training)
    # Whole batches are divided among the ranks, so that a row is in the same batch on one process and on several.
    return reader.result([part for parts in gathered(reader.parts) for part in parts] if shared else reader.parts)


@dataclass(frozen=True)
class _Part:
    """What was read of one batch, on the CPU. Tokens are in the order of the batch's rows."""

    rows: list[int]
    statistics: tuple[Tensor, Tensor]
    row_entropy: Tensor
    pooled: dict[int, Tensor]
    projected: dict[int, Tensor]
    last: dict[int, Tensor]
    final: Tensor


class _Reader:
    """One pass over the rows: the positions to read, and what has been read so far."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Rendered],
        layers: Sequence[int],
        role: str,
        subspace: Subspace | None,
        keep: Sequence[Sequence[int]] | None,
        prompt_entropy: bool,
        last_token: bool,
        max_length: int | None,
        padding: int,
    ) -> None:
        self.model, self.padding = model, padding
        self.prompt_entropy, self.last_token = prompt_entropy, last_token
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
        self.parts: list[_Part] = []

    def read_batch(self, batch: list[int]) -> None:
        ids, attention = pad([self.selections[row].input_ids for row in batch], self.padding, self.device)
        role_tokens = _flat([self.selections[row].positions for row in batch])
        # Tensors, because lists would be copied to the device at every layer.
        rows, places = (torch.tensor(index, device=self.device, dtype=torch.int64) for index in role_tokens)
        counts = torch.tensor([len(self.selections[row].positions) for row in batch])
        sums: dict[int, Tensor] = {}
        projected: dict[int, Tensor] = {}
        last: dict[int, Tensor] = {}
        ends = [len(self.selections[row].input_ids) - 1 for row in batch]

        def see(layer: int, hidden: Tensor) -> None:
            # The sums are small, so they stay on the device: copying them here would make each block wait for the
            # block before it.
            row_of_token = rows.to(hidden.device)
            states = hidden[row_of_token, places.to(hidden.device)].float()
            if layer in self.layers:
                zeros = torch.zeros(len(batch), states.shape[1], device=states.device)
                sums[layer] = zeros.index_add_(0, row_of_token, states)
                if self.last_token:
                    last[layer] = hidden[range(len(batch)), ends].float()
            if layer in self.bases:
                projected[layer] = states @ self.bases[layer].to(states.device)

        with observe(self.model, sorted({*self.layers, *self.bases}), see):
            final = find_backbone(self.model)(
                input_ids=ids, attention_mask=attention, use_cache=False
            ).last_hidden_state
        # A model spread over devices ends on a different device than it starts on.
        ids = ids.to(final.device)
        target_rows, positions = _flat([self.targets[row] for row in batch])
        statistics = torch.zeros(0), torch.zeros(0)
        if target_rows:
            states = final[target_rows, [position - 1 for position in positions]]
            targets = ids[target_rows, positions]
            log_prob, entropy = token_statistics(self.model, states, targets)
            statistics = log_prob.cpu(), entropy.cpu()
        kept = final[_flat([self.keep[row] for row in batch])].cpu()
        pooled = {layer: total.cpu() / counts.clamp(min=1)[:, None] for layer, total in sums.items()}
        self.parts.append(
            _Part(
                batch,
                statistics,
                self._row_entropy(batch, final, ids),
                pooled,
                {layer: values.cpu() for layer, values in projected.items()},
                {layer: states.cpu() for layer, states in last.items()},
                kept,
            )
        )

    def _row_entropy(self, batch: list[int], final: Tensor, ids: Tensor) -> Tensor:
        """Return the mean entropy [B] over all tokens of each row of the batch, or an empty tensor if not requested."""
        if not self.prompt_entropy:
            return torch.zeros(0)
        lengths = [len(self.selections[row].input_ids) for row in batch]
        index = _flat([range(length) for length in lengths])
        _, entropy = token_statistics(self.model, final[index], ids[index])
        return torch.stack([part.mean() for part in entropy.cpu().split(lengths)])

    def result(self, parts: Sequence[_Part]) -> Readout:
        """Join the parts, in the order of rows instead of batches."""
        order = [row for part in parts for row in part.rows]
        rows_back = torch.tensor(order).argsort()
        target_rows = torch.tensor([row for row in order for _ in self.targets[row]], dtype=torch.int64)
        role_rows = torch.tensor([row for row in order for _ in self.selections[row].positions], dtype=torch.int64)
        kept_rows = torch.tensor([row for row in order for _ in self.keep[row]], dtype=torch.int64)
        targets_back, roles_back = target_rows.argsort(stable=True), role_rows.argsort(stable=True)
        row_entropy = torch.cat([part.row_entropy for part in parts])
        return Readout(
            token_rows=target_rows[targets_back],
            log_prob=torch.cat([part.statistics[0] for part in parts])[targets_back],
            entropy=torch.cat([part.statistics[1] for part in parts])[targets_back],
            counts=torch.tensor([len(selection.positions) for selection in self.selections]),
            pooled={layer: torch.cat([part.pooled[layer] for part in parts])[rows_back] for layer in self.layers},
            projection_rows=role_rows[roles_back],
            projections={
                layer: torch.cat([part.projected[layer] for part in parts])[roles_back] for layer in self.bases
            },
            final=torch.cat([part.final for part in parts])[kept_rows.argsort(stable=True)],
            row_entropy=row_entropy[rows_back] if self.prompt_entropy else row_entropy,
            last={
                layer: torch.cat([part.last[layer] for part in parts])[rows_back]
                for layer in (self.layers if self.last_token else [])
            },
        )


def _flat(positions: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return index pairs (row of the batch, position) of all given positions, row by row."""
    rows = [row for row, of_row in enumerate(positions) for _ in of_row]
    return rows, [position for of_row in positions for position in of_row]

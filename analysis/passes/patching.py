"""Activation patching: run one model (the recipient) with another model's (the donor's) activations patched in.

The metric family `patching` uses it (arXiv 2507.03662; see analysis/metrics/README.md). The donor runs first, and its
block outputs are kept on disk, with one file for each batch and layer. Then the recipient runs once for each window of
layers, each time with the donor's outputs in place of its own outputs. At any time, memory holds only one model, and
the donor's states for one layer of one batch.

    donor = store_donor(base, rows, layers, folder)
    curve = patched_curve(model, rows, donor)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..files.artifacts import load_aligned, staged_file
from ..models.forward import length_batches, pad, select
from ..models.hooks import capture, observe, patch
from ..models.layers import find_backbone, unwrap
from ..models.lm_head import token_statistics
from ..models.modes import evaluating
from ..models.render import Rendered
from ..stats.intervals import Floats

NO_COMPLETION = "no completion"
CUT = "its completion lies beyond the length limit"
NO_TOKENS = "no token of the role to patch"

Window = tuple[int, ...]


@dataclass(frozen=True)
class PatchRow:
    """A row's token ids, the positions to patch, and the positions of its completion's tokens (the targets)."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class PatchRows:
    """The rows that both models read, in the same batches.

    numbers: the number of each row in the probe set. skipped: how many rows of the probe set are left out, by reason.
    """

    rows: list[PatchRow]
    numbers: list[int]
    skipped: dict[str, int]
    batches: list[list[int]]
    padding: int


def patch_rows(
    rendered: Sequence[Rendered],
    *,
    role: str | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    padding: int = 0,
) -> PatchRows:
    """Select the rows that can be patched and scored. Other rows are counted by reason, never dropped silently.

    Args:
        role: the token role to patch (see `models.render`). None patches every token: the recipient's blocks above a
            patched block then compute only on the donor's stream, and only the last layer of a window matters.
        max_length: rows are cut to this many tokens.
    """
    rows, numbers, skipped = [], [], dict[str, int]()
    for number, row in enumerate(rendered):
        ids = row.input_ids[:max_length]
        positions = tuple(range(len(ids))) if role is None else select(row, role, max_length).positions
        targets = tuple(i for i in range(1, len(ids)) if row.completion_mask[i])
        reason = None if positions else NO_TOKENS
        if not targets:
            reason = CUT if any(row.completion_mask[1:]) else NO_COMPLETION
        if reason is not None:
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        rows.append(PatchRow(ids, positions, targets))
        numbers.append(number)
    batches = length_batches([len(row.input_ids) for row in rows], batch_size)
    return PatchRows(rows, numbers, skipped, batches, padding)


@dataclass(frozen=True)
class Scores:
    """For each of n rows, over its completion's tokens: mean loss [n] in nats, mean probability [n] of the target."""

    loss: Floats
    probability: Floats


@dataclass(frozen=True)
class Donor:
    """A donor's states on disk, one file for each batch and layer, and the donor's unpatched scores."""

    folder: Path
    layers: tuple[int, ...]
    scores: Scores

    def states(self, batch: int, layer: int) -> Tensor:
        """Return the block outputs [N, d] at the patched positions of a batch, row by row."""
        return load_aligned(_file(self.folder, batch, layer))["states"]


def _file(folder: Path, batch: int, layer: int) -> Path:
    return folder / f"{batch}-{layer}.safetensors"


@torch.no_grad()
def store_donor(model: nn.Module, rows: PatchRows, layers: Sequence[int], folder: Path) -> Donor:
    """Run the donor once, and store its states and scores.

    On disk the states take (patched tokens) x (layers) x (width) numbers of the donor's dtype.

    Raises:
        UserError: a layer that the donor does not have, or a full disk.
    """
    stored_layers, scores = tuple(sorted(set(layers))), _empty(len(rows.rows))
    with evaluating(model):
        for number, batch in enumerate(tqdm(rows.batches, desc="donor", delay=5, leave=False)):
            with observe(model, stored_layers, _writer(rows, batch, number, folder)):
                _score(model, rows, batch, scores)
    return Donor(folder, stored_layers, scores)


def _writer(rows: PatchRows, batch: list[int], number: int, folder: Path) -> Callable[[int, Tensor], None]:
    """Return a function that writes a layer's states of a batch, to be called as soon as the block has run."""
    index = _flat([rows.rows[row].positions for row in batch])

    def write(layer: int, hidden: Tensor) -> None:
        with staged_file(_file(folder, number, layer)) as staging:
            save_file({"states": hidden[index].cpu().contiguous()}, staging)

    return write


@dataclass(frozen=True)
class PatchCurve:
    """Scores of n rows by window of layers.

    patched: with the donor's states. noise: with random states at the same distance. clean: the recipient without a
    patch. donor: the donor without a patch. numbers, skipped: as in `PatchRows`.
    """

    windows: list[Window]
    patched: list[Scores]
    noise: list[Scores]
    clean: Scores
    donor: Scores
    numbers: list[int]
    skipped: dict[str, int]


@torch.no_grad()
def patched_curve(
    model: nn.Module,
    rows: PatchRows,
    donor: Donor,
    windows: Sequence[Window] | None = None,
    seed: int = 0,
    bases: Mapping[int, Tensor] | None = None,
) -> PatchCurve:
    """Run the recipient once without a patch, then twice for each window: with the donor's states, and with the null.

    The null moves each of the recipient's states in a random direction, as far as the donor's state lies from it.

    Args:
        windows: the layers that are patched together; None patches each of the donor's stored layers separately.
        bases: orthonormal V_l [d, k] by layer. Only the coordinates inside V_l are taken from the donor. None patches
            whole states.

    Raises:
        UserError: a layer that was not stored, a donor of another width, or a patch that does not reach the logits.
    """
    if windows is None:
        windows = [(layer,) for layer in donor.layers]
    sorted_windows: list[Window] = [tuple(sorted(window)) for window in windows]
    absent = sorted({layer for window in sorted_windows for layer in window} - set(donor.layers))
    if absent or not all(sorted_windows):
        raise UserError(f"layers {absent} of the donor were not stored: patch among {list(donor.layers)}")
    prove_patch(model, sorted({layer for window in sorted_windows for layer in window}))
    n = len(rows.rows)
    clean, patched, noise = _empty(n), [_empty(n) for _ in sorted_windows], [_empty(n) for _ in sorted_windows]
    with evaluating(model):
        for number, batch in enumerate(tqdm(rows.batches, desc="patching", delay=5, leave=False)):
            _score(model, rows, batch, clean)
            for index, window in enumerate(sorted_windows):
                change = _Change(rows, batch, number, donor, [seed, number, index], bases)
                with patch(model, window, change.to_donor):
                    _score(model, rows, batch, patched[index])
                with patch(model, window, change.to_noise):
                    _score(model, rows, batch, noise[index])
    return PatchCurve(sorted_windows, patched, noise, clean, donor.scores, rows.numbers, rows.skipped)


class _Change:
    """Replaces a batch's states at the patched positions."""

    def __init__(
        self, rows: PatchRows, batch: list[int], number: int, donor: Donor, seed: list[int],
        bases: Mapping[int, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.index = _flat([rows.rows[row].positions for row in batch])
        self.number, self.donor, self.bases, self.generator = number, donor, bases, np.random.default_rng(seed)

    def _donor_states(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the states to patch in: the donor's, or the recipient's with the donor's coordinates in the bases."""
        states = self.donor.states(self.number, layer)
        if states.shape[1] != hidden.shape[-1]:
            raise UserError(
                f"the donor has width {states.shape[1]} and the patched model {hidden.shape[-1]}: "
                "patch between models of one architecture"
            )
        states = states.to(hidden.device, hidden.dtype)
        if self.bases is None:
            return states
        recipient, basis = hidden[self.index].float(), self.bases[layer].to(hidden.device, torch.float32)
        return (recipient + ((states.float() - recipient) @ basis) @ basis.T).to(hidden.dtype)

    def to_donor(self, layer: int, hidden: Tensor) -> Tensor:
        """Put in the donor's states, or its coordinates inside the bases."""
        return hidden.index_put(self.index, self._donor_states(layer, hidden))

    def to_noise(self, layer: int, hidden: Tensor) -> Tensor:
        """Move the recipient's states in a random direction, as far as the donor's states lie from them."""
        states = hidden[self.index].float()
        size = (self._donor_states(layer, hidden).float() - states).norm(dim=1, keepdim=True)
        noise = torch.from_numpy(self.generator.standard_normal(states.shape, dtype=np.float32)).to(states.device)
        moved = states + size * noise / noise.norm(dim=1, keepdim=True)
        return hidden.index_put(self.index, moved.to(hidden.dtype))


@torch.no_grad()
def prove_patch(model: nn.Module, layers: Sequence[int]) -> None:
    """Prove on four tokens that patching works at each layer.

    Patching in the model's unchanged output must leave the logits as they are, and a different output must change them.

    Raises:
        UserError: a block whose output is not what the blocks above it read.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device).remainder(unwrap(model).config.get_text_config().vocab_size)[None]
    with capture(model, layers) as outputs:
        clean = model(input_ids=ids, use_cache=False).logits.float()
        unchanged = {layer: hidden.clone() for layer, hidden in outputs.items()}
    # Kernels that sum in a different order each time (mixtures of experts on a GPU) cause differences of this size.
    near = 1e-3 * float(clean.abs().max())
    for layer in layers:
        with patch(model, [layer], lambda block, _hidden: unchanged[block]):
            same = model(input_ids=ids, use_cache=False).logits.float()
        with patch(model, [layer], lambda block, hidden: unchanged[block].flip(1) + hidden.abs().amax()):
            other = model(input_ids=ids, use_cache=False).logits.float()
        if float((same - clean).abs().max()) > near or float((other - clean).abs().max()) <= near:
            raise UserError(
                f"patching layer {layer} of {type(unwrap(model)).__name__} does not work: its unchanged output must "
                "leave the logits as they are, and a different output must change them; name the decoder blocks' path "
                "with --layers_path"
            )


def _score(model: nn.Module, rows: PatchRows, batch: list[int], into: Scores) -> None:
    """Run one forward pass of a batch, and write the scores of its rows into `into`."""
    device = next(model.parameters()).device
    ids, attention = pad([rows.rows[row].input_ids for row in batch], rows.padding, device)
    final = find_backbone(model)(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    index, positions = _flat([rows.rows[row].targets for row in batch])
    log_prob, _ = token_statistics(model, final[index, positions - 1], ids[index, positions], entropy=False)
    values, row_of_token = log_prob.double().cpu().numpy(), index.numpy()
    counts = np.bincount(row_of_token, minlength=len(batch))
    into.loss[batch] = -np.bincount(row_of_token, values, len(batch)) / counts
    into.probability[batch] = np.bincount(row_of_token, np.exp(values), len(batch)) / counts


def _empty(n: int) -> Scores:
    return Scores(np.zeros(n), np.zeros(n))


def _flat(positions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return index pairs (row of the batch, position) of all given positions, row by row."""
    index = [row for row, of_row in enumerate(positions) for _ in of_row]
    return torch.tensor(index), torch.tensor([position for of_row in positions for position in of_row])

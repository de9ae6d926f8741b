"""Run one model on with another's activations: the engine of activation patching (arXiv 2507.03662, metric family 7).

The donor is read first, and its block outputs wait on disk, one file for a batch and a layer; then the recipient runs
once for every window of layers, each time with the donor's outputs in place of its own. One model at a time is in
memory, and one layer of one batch of the donor's states.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ..models.render import Rendered
from ..stats.intervals import Floats

NO_COMPLETION = "no completion"
CUT = "its completion lies beyond the length limit"
NO_TOKENS = "no token of the role to patch"

Window = tuple[int, ...]


@dataclass(frozen=True)
class PatchRow:
    """A row's token ids, the positions that are patched, and those of its completion's tokens."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class PatchRows:
    """What both models read, in the same batches.

    numbers: of the rows in the probe set. skipped: how many rows of the set are left out, by reason.
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
    """Rows that can be patched and scored; the others are counted, never dropped in silence.

    Args:
        role: whose tokens are patched (as in `probes`); None is every token, so that the recipient's blocks above a
            patched one compute on the donor's stream alone, and of a window only the last layer matters.
        max_length: rows are cut to it, in tokens.
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
    """Per row, over its completion's tokens: mean loss [n] in nats, and mean probability [n] of the target token."""

    loss: Floats
    probability: Floats


@dataclass(frozen=True)
class Donor:
    """A donor's states on disk, one file for a batch and a layer, and its own scores."""

    folder: Path
    layers: tuple[int, ...]
    scores: Scores

    def states(self, batch: int, layer: int) -> Tensor:
        """Block outputs [N, d] at the patched positions of a batch, row by row."""
        return load_aligned(_file(self.folder, batch, layer))["states"]


def _file(folder: Path, batch: int, layer: int) -> Path:
    return folder / f"{batch}-{layer}.safetensors"


@torch.no_grad()
def store_donor(model: nn.Module, rows: PatchRows, layers: Sequence[int], folder: Path) -> Donor:
    """One pass of the donor; its states take (patched tokens) x (layers) x (width) numbers of its dtype on disk.

    Raises:
        UserError: a layer it does not have, or a full disk.
    """
    stored, scores = tuple(sorted(set(layers))), _empty(len(rows.rows))
    with _evaluating(model):
        for number, batch in enumerate(tqdm(rows.batches, desc="donor", delay=5, leave=False)):
            with observe(model, stored, _keeper(rows, batch, number, folder)):
                _score(model, rows, batch, scores)
    return Donor(folder, stored, scores)


def _keeper(rows: PatchRows, batch: list[int], number: int, folder: Path) -> Callable[[int, Tensor], None]:
    """Writes each layer's states of a batch as soon as its block has run."""
    index = _flat([rows.rows[row].positions for row in batch])

    def keep(layer: int, hidden: Tensor) -> None:
        with staged_file(_file(folder, number, layer)) as staging:
            save_file({"states": hidden[index].cpu().contiguous()}, staging)

    return keep


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and the model's own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class PatchCurve:
    """Scores of n rows by window of layers: patched with the donor's states, and with noise of the same size.

    clean and donor are the two models' own.
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
    """Run the recipient once clean, then twice for every window: with the donor's states, and with the null's.

    The null moves each state as far from the recipient's own as the donor's lies from it, in a random direction.

    Args:
        windows: layers that are patched together; None is each of the donor's stored layers alone.
        bases: orthonormal V_l [d, k] by layer: only the coordinates inside them are the donor's; None patches all.

    Raises:
        UserError: a layer that was not stored, another width, or a patch that does not reach the logits.
    """
    alone: list[Window] = [(layer,) for layer in donor.layers]
    chosen = alone if windows is None else [tuple(sorted(window)) for window in windows]
    absent = sorted({layer for window in chosen for layer in window} - set(donor.layers))
    if absent or not all(chosen):
        raise UserError(f"layers {absent} of the donor were not stored: patch among {list(donor.layers)}")
    prove_patch(model, sorted({layer for window in chosen for layer in window}))
    n = len(rows.rows)
    clean, patched, noise = _empty(n), [_empty(n) for _ in chosen], [_empty(n) for _ in chosen]
    with _evaluating(model):
        for number, batch in enumerate(tqdm(rows.batches, desc="patching", delay=5, leave=False)):
            _score(model, rows, batch, clean)
            for at, window in enumerate(chosen):
                change = _Change(rows, batch, number, donor, [seed, number, at], bases)
                with patch(model, window, change.to_donor):
                    _score(model, rows, batch, patched[at])
                with patch(model, window, change.to_noise):
                    _score(model, rows, batch, noise[at])
    return PatchCurve(chosen, patched, noise, clean, donor.scores, rows.numbers, rows.skipped)


class _Change:
    """Replaces a batch's states at the patched positions."""

    def __init__(
        self, rows: PatchRows, batch: list[int], number: int, donor: Donor, seed: list[int],
        bases: Mapping[int, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.index = _flat([rows.rows[row].positions for row in batch])
        self.number, self.donor, self.bases, self.generator = number, donor, bases, np.random.default_rng(seed)

    def _foreign(self, layer: int, hidden: Tensor) -> Tensor:
        states = self.donor.states(self.number, layer)
        if states.shape[1] != hidden.shape[-1]:
            raise UserError(
                f"the donor has width {states.shape[1]} and the patched model {hidden.shape[-1]}: "
                "patch between models of one architecture"
            )
        states = states.to(hidden.device, hidden.dtype)
        if self.bases is None:
            return states
        own, basis = hidden[self.index].float(), self.bases[layer].to(hidden.device, torch.float32)
        return (own + ((states.float() - own) @ basis) @ basis.T).to(hidden.dtype)

    def to_donor(self, layer: int, hidden: Tensor) -> Tensor:
        """The donor's states, or its coordinates inside the bases."""
        return hidden.index_put(self.index, self._foreign(layer, hidden))

    def to_noise(self, layer: int, hidden: Tensor) -> Tensor:
        """The recipient's own states, moved as far as to the donor's in a random direction."""
        own = hidden[self.index].float()
        size = (self._foreign(layer, hidden).float() - own).norm(dim=1, keepdim=True)
        drawn = torch.from_numpy(self.generator.standard_normal(own.shape, dtype=np.float32)).to(own.device)
        moved = own + size * drawn / drawn.norm(dim=1, keepdim=True)
        return hidden.index_put(self.index, moved.to(hidden.dtype))


@torch.no_grad()
def prove_patch(model: nn.Module, layers: Sequence[int]) -> None:
    """Prove on four tokens that a model's own output in its place changes nothing, and another one does.

    Raises:
        UserError: a block whose output is not what the blocks above it read.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device).remainder(unwrap(model).config.get_text_config().vocab_size)[None]
    with capture(model, layers) as outputs:
        clean = model(input_ids=ids, use_cache=False).logits.float()
        own = {layer: hidden.clone() for layer, hidden in outputs.items()}
    # Kernels that sum in another order each time (mixtures of experts on a GPU) leave this much.
    near = 1e-3 * float(clean.abs().max())
    for layer in layers:
        with patch(model, [layer], lambda at, _hidden: own[at]):
            same = model(input_ids=ids, use_cache=False).logits.float()
        with patch(model, [layer], lambda at, hidden: own[at].flip(1) + hidden.abs().amax()):
            other = model(input_ids=ids, use_cache=False).logits.float()
        if float((same - clean).abs().max()) > near or float((other - clean).abs().max()) <= near:
            raise UserError(
                f"patching layer {layer} of {type(unwrap(model)).__name__} does not work: its own output must leave "
                "the logits unchanged and another must change them; name the decoder blocks' path with --layers_path"
            )


def _score(model: nn.Module, rows: PatchRows, batch: list[int], into: Scores) -> None:
    """One forward pass of a batch; writes its rows' scores."""
    device = next(model.parameters()).device
    ids, attention = pad([rows.rows[row].input_ids for row in batch], rows.padding, device)
    final = find_backbone(model)(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    at, positions = _flat([rows.rows[row].targets for row in batch])
    log_prob, _ = token_statistics(model, final[at, positions - 1], ids[at, positions], entropy=False)
    values, owners = log_prob.double().cpu().numpy(), at.numpy()
    counts = np.bincount(owners, minlength=len(batch))
    into.loss[batch] = -np.bincount(owners, values, len(batch)) / counts
    into.probability[batch] = np.bincount(owners, np.exp(values), len(batch)) / counts


def _empty(n: int) -> Scores:
    return Scores(np.zeros(n), np.zeros(n))


def _flat(positions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Index pairs (row of the batch, position) of all given positions, row by row."""
    at = [row for row, here in enumerate(positions) for _ in here]
    return torch.tensor(at), torch.tensor([position for here in positions for position in here])

"""Compute per-row gradients of one weight, as the matrix of their inner products (arXiv 2507.03662, section 4.2.2).

g_i is the gradient of row i's mean completion loss with respect to W, the output projection of a block's attention (by
default of the last block). One forward pass, and the part of a backward pass that lies above W, give all g_i. Rows do
not interact in a pass, so the gradient dy of the SUM of all row losses at W's output contains the gradient of each row:
g_i = sum_t dy_t x_t^T over the tokens t of row i, where x is W's input. The part of the model below W runs without a
graph. The g_i, [R, d, d] floats, are formed exactly, but only tile by tile. The family `gradients` computes all its
quantities from their Gram matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..models.forward import length_batches, pad
from ..models.layers import find_backbone, unwrap
from ..models.lm_head import logits_of
from ..models.output_projection import find_output_projection
from ..models.render import Rendered, document_key
from ..stats.intervals import Floats

# Number of logits in memory at once: more than for reading alone, since each chunk streams the head's weight twice.
_CHUNK_LOGITS = 2**24
# Number of floats of the gradients' tiles in memory at once, over all rows: 128 MiB.
_TILE_FLOATS = 2**25
# Up to this size, the inputs (or the slopes) of all rows go to the device whole. Larger ones are sent tile by tile, the
# inputs repeatedly.
_WHOLE_BYTES = 2**29


@dataclass(frozen=True)
class GradientReadout:
    """Inner products of the per-row gradients of R rows. Rows are in the order of the sets and of their lines.

    gram: [R, R] float64, <g_i, g_j>; a row without loss tokens has a zero gradient. sets, lines: [R], the set of each
    row, and its line in the set. completions: [R], keys that are equal where the completions' token ids are equal.
    lengths: [R], number of completion tokens.
    """

    gram: Floats
    sets: tuple[str, ...]
    lines: tuple[int, ...]
    completions: tuple[str, ...]
    lengths: tuple[int, ...]


def read_gradients(
    model: nn.Module,
    sets: Mapping[str, Sequence[Rendered]],
    *,
    block: int | None = None,
    weight: str | None = None,
    whole_rows: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
    padding: int = 0,
    label: str = "gradients",
) -> GradientReadout:
    """Run one forward pass over all rows of all sets, and a backward pass to one weight, in eval mode.

    The model's mode is restored afterwards. No parameter's `grad` is changed. Rows are cut before completions are
    compared, so that a matched pair keeps the same tokens.

    Args:
        block: number of the decoder block whose attention output projection is differentiated, 0-based; None takes the
            last block.
        weight: path of another linear layer inside the block, such as "self_attn.o_proj".
        whole_rows: True computes the loss over all tokens of a row, as published; False over completions only.
        max_length: rows are cut to this many tokens.
        padding: a token id to pad with.

    Raises:
        UserError: no output projection was found, or its output does not reach the logits.
    """
    rows = [row for of_set in sets.values() for row in of_set]
    ids = [row.input_ids[:max_length] for row in rows]
    completions = [[i for i in range(len(cut)) if row.completion_mask[i]] for row, cut in zip(rows, ids, strict=True)]
    # Nothing predicts the first token of a row.
    targets = [range(1, len(cut)) for cut in ids] if whole_rows else [[i for i in c if i] for c in completions]
    training = model.training
    model.eval()
    try:
        module = find_output_projection(model, block, weight)
        gram = _Pass(model, module, padding, label).gram(ids, targets, batch_size)
    finally:
        model.train(training)
    keys = [document_key([cut[i] for i in positions]) for cut, positions in zip(ids, completions, strict=True)]
    return GradientReadout(
        gram=gram,
        sets=tuple(name for name, of_set in sets.items() for _ in of_set),
        lines=tuple(line for of_set in sets.values() for line in range(len(of_set))),
        completions=tuple(keys),
        lengths=tuple(len(positions) for positions in completions),
    )


class _Pass:
    """Runs forward passes of a model, and backward passes to one linear layer."""

    def __init__(self, model: nn.Module, module: nn.Module, padding: int, label: str) -> None:
        self.model, self.module, self.padding, self.label = model, module, padding, label
        self.device = next(model.parameters()).device

    def gram(self, ids: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], batch_size: int) -> Floats:
        """Return the Gram matrix [R, R] float64. The loss of a row is its mean loss over the tokens at `targets`."""
        if not any(targets):
            return np.zeros((len(ids), len(ids)))
        parts, order = [], [row for row, of_row in enumerate(targets) if of_row]
        batches = length_batches([len(ids[row]) for row in order], batch_size)
        for batch in tqdm(batches, desc=self.label, delay=5, leave=False):
            rows = [order[index] for index in batch]
            parts.extend(self._factors([ids[row] for row in rows], [targets[row] for row in rows]))
        gram = torch.zeros(len(ids), len(ids), dtype=torch.float64)
        rows = [order[index] for batch in batches for index in batch]
        gram[torch.tensor(rows)[:, None], torch.tensor(rows)] = gram_matrix(parts, self.device).cpu()
        # The backward pass used the sum over tokens, because half precision represents it better than a mean of many.
        tokens = torch.tensor([max(len(of_row), 1) for of_row in targets], dtype=torch.float64)
        return (gram / tokens[:, None] / tokens).numpy()

    def _factors(self, ids: list[Sequence[int]], targets: list[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Return for each row W's input [n, d_in] and the summed loss's gradient at W's output [n, d_out], on the CPU.

        Raises:
            UserError: the layer ran more than once or not at all, or its output does not reach the final state.
        """
        padded, attention = pad(ids, self.padding, self.device)
        rows = [row for row, of_row in enumerate(targets) for _ in of_row]
        positions = [position for of_row in targets for position in of_row]
        with torch.enable_grad(), _graph_above(self.module) as calls:
            final = find_backbone(self.model)(
                input_ids=padded, attention_mask=attention, use_cache=False
            ).last_hidden_state
            if len(calls) != 1 or not final.requires_grad:
                raise UserError(
                    f"the layer to differentiate ran {len(calls)} times in a pass, or does not reach the last state of "
                    f"{type(unwrap(self.model)).__name__}: name another linear layer of the block by --gradient_weight"
                )
            inputs, output = calls[0]
            states = final[rows, [position - 1 for position in positions]]
            slopes = loss_slopes(self.model, states.detach(), padded[rows, positions].to(states.device))
            gradient = torch.autograd.grad(states, output, slopes)[0]
        # Above the last block's attention tokens do not interact, so the gradient is zero except where a loss is.
        used = gradient.any(-1)
        return [
            (x[tokens].cpu(), dy[tokens].cpu())
            for x, dy, tokens in zip(inputs, gradient, used.to(inputs.device), strict=True)
        ]


@contextmanager
def _graph_above(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the graph only from the output of `module` on. Yields the (input, output) of each call of `module`."""
    calls: list[tuple[Tensor, Tensor]] = []

    def start(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        calls.append((args[0] if args else next(iter(kwargs.values())), leaf))
        torch.set_grad_enabled(True)
        # A copy, since a model may add to this tensor in place, which is not allowed for a leaf.
        return leaf.clone()

    handle = module.register_forward_hook(start, with_kwargs=True)
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        yield calls
    finally:
        torch.set_grad_enabled(before)
        handle.remove()


def loss_slopes(model: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient [N, d] of the summed cross-entropy of `targets` [N] with respect to final states [N, d].

    Logits exist only for one chunk of tokens at a time. The gradient at the logits is known: softmax minus target.
    """
    head, vocabulary = logits_of(model), unwrap(model).config.get_text_config().vocab_size
    step = max(1, _CHUNK_LOGITS // vocabulary)
    slopes = []
    for state, target in zip(states.split(step), targets.split(step), strict=True):
        leaf = state.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(leaf)
        error = logits.detach().softmax(-1)
        error[torch.arange(len(target), device=target.device), target] -= 1
        slopes.append(torch.autograd.grad(logits, leaf, error)[0])
    return torch.cat(slopes)


@torch.no_grad()
def gram_matrix(factors: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Return the Gram matrix [R, R] float64 of g_i = dy_i^T x_i, from x [n_i, d_in] and dy [n_i, d_out] of R rows.

    One tile of all g_i is formed at a time, and each tile once. The g_i never exist as a whole.
    """
    counts = [len(x) for x, _ in factors]
    inputs, outputs = (
        whole.to(device) if whole.nbytes <= _WHOLE_BYTES else whole
        for whole in (torch.cat([x for x, _ in factors]), torch.cat([dy for _, dy in factors]))
    )
    side = max(1, isqrt(_TILE_FLOATS // len(factors)))
    total = torch.zeros(len(factors), len(factors), dtype=torch.float64, device=device)
    for columns in outputs.split(side, dim=1):
        dy = columns.to(device).float().split(counts)
        for inner in inputs.split(side, dim=1):
            x = inner.to(device).float().split(counts)
            tile = torch.stack([left.T @ right for left, right in zip(dy, x, strict=True)]).flatten(1)
            total += (tile @ tile.T).double()
    return total

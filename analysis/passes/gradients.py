"""Per-row gradients of one weight, as the matrix of their inner products (arXiv 2507.03662, section 4.2.2).

g_i is the gradient of row i's mean completion loss with respect to W, the output projection of a block's attention (the
last block's, where nothing else is said). One forward pass and the part of one backward that lies above W give all of
them: rows do not meet in a pass, so the gradient dy at W's output of the SUM of row losses holds every row's own, and
g_i = sum_t dy_t x_t^T over the tokens of row i, x being W's input. Everything below W runs without a graph. The g_i
themselves, [R, d, d] floats, are formed exactly but only tile by tile, and every quantity of family 3 is read from
their Gram matrix.
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

# Logits held at once: more than for reading alone, since the head's weight is streamed twice for every chunk.
_CHUNK_LOGITS = 2**24
# Floats of the gradients' tiles held at once, over all rows: 128 MiB.
_TILE_FLOATS = 2**25
# Inputs, or slopes, of all rows that go to the device whole; more are sent there tile by tile, inputs again and again.
_WHOLE_BYTES = 2**29


@dataclass(frozen=True)
class GradientReadout:
    """Inner products of the per-row gradients of R rows, and what the rows are; sets in order, lines in order.

    gram: [R, R] float64, <g_i, g_j>; a row without loss tokens has the zero gradient.
    sets, lines: [R], the set of each row and its place in it. completions: [R], equal where the completions' token ids
    are. lengths: [R], completion tokens.
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
    """One forward pass over all rows of all sets and a backward to one weight; eval mode, restored afterwards.

    No parameter's `grad` is touched. Rows are cut before they are compared: a matched pair has the same tokens left.

    Args:
        block: whose attention output projection is differentiated, 0-based; None is the last block.
        weight: path of another linear layer inside the block, such as "self_attn.o_proj".
        whole_rows: the loss runs over all tokens of a row, as published, and not over completions alone.
        max_length: rows are cut to it, in tokens.
        padding: a token id to pad with.

    Raises:
        UserError: no output projection found, or one whose output does not reach the logits.
    """
    rows = [row for found in sets.values() for row in found]
    ids = [row.input_ids[:max_length] for row in rows]
    completions = [[i for i in range(len(cut)) if row.completion_mask[i]] for row, cut in zip(rows, ids, strict=True)]
    # The first token of a row is predicted by nothing.
    scored = [range(1, len(cut)) for cut in ids] if whole_rows else [[i for i in c if i] for c in completions]
    training = model.training
    model.eval()
    try:
        module = find_output_projection(model, block, weight)
        gram = _Pass(model, module, padding, label).gram(ids, scored, batch_size)
    finally:
        model.train(training)
    keys = [document_key([cut[i] for i in found]) for cut, found in zip(ids, completions, strict=True)]
    return GradientReadout(
        gram=gram,
        sets=tuple(name for name, found in sets.items() for _ in found),
        lines=tuple(line for found in sets.values() for line in range(len(found))),
        completions=tuple(keys),
        lengths=tuple(len(found) for found in completions),
    )


class _Pass:
    """One pass of one model to one linear layer."""

    def __init__(self, model: nn.Module, module: nn.Module, padding: int, label: str) -> None:
        self.model, self.module, self.padding, self.label = model, module, padding, label
        self.device = next(model.parameters()).device

    def gram(self, ids: Sequence[Sequence[int]], scored: Sequence[Sequence[int]], batch_size: int) -> Floats:
        """[R, R] float64 of rows `ids`, whose loss is the mean over the tokens at `scored`."""
        if not any(scored):
            return np.zeros((len(ids), len(ids)))
        parts, order = [], [row for row, found in enumerate(scored) if found]
        batches = length_batches([len(ids[row]) for row in order], batch_size)
        for batch in tqdm(batches, desc=self.label, delay=5, leave=False):
            rows = [order[at] for at in batch]
            parts.extend(self._factors([ids[row] for row in rows], [scored[row] for row in rows]))
        found = torch.zeros(len(ids), len(ids), dtype=torch.float64)
        rows = [order[at] for batch in batches for at in batch]
        found[torch.tensor(rows)[:, None], torch.tensor(rows)] = gram_matrix(parts, self.device).cpu()
        # The sum over tokens is what went backward, which half precision holds better than a mean of many.
        tokens = torch.tensor([max(len(each), 1) for each in scored], dtype=torch.float64)
        return (found / tokens[:, None] / tokens).numpy()

    def _factors(self, ids: list[Sequence[int]], scored: list[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Per row W's input [n, d_in] and the gradient of the summed loss at its output [n, d_out], on the CPU."""
        padded, attention = pad(ids, self.padding, self.device)
        at = [row for row, found in enumerate(scored) for _ in found]
        positions = [position for found in scored for position in found]
        with torch.enable_grad(), _graph_above(self.module) as seen:
            final = find_backbone(self.model)(
                input_ids=padded, attention_mask=attention, use_cache=False
            ).last_hidden_state
            if len(seen) != 1 or not final.requires_grad:
                raise UserError(
                    f"the layer to differentiate ran {len(seen)} times in a pass, or does not reach the last state of "
                    f"{type(unwrap(self.model)).__name__}: name another linear layer of the block by --gradient_weight"
                )
            inputs, output = seen[0]
            states = final[at, [position - 1 for position in positions]]
            slopes = loss_slopes(self.model, states.detach(), padded[at, positions].to(states.device))
            gradient = torch.autograd.grad(states, output, slopes)[0]
        # Above the last block's attention tokens do not meet: the gradient is zero but where a loss is.
        used = gradient.any(-1)
        return [
            (x[here].cpu(), dy[here].cpu())
            for x, dy, here in zip(inputs, gradient, used.to(inputs.device), strict=True)
        ]


@contextmanager
def _graph_above(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """No graph is recorded up to the output of `module`, then one is; yields (input, output) of each of its calls."""
    seen: list[tuple[Tensor, Tensor]] = []

    def start(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen.append((args[0] if args else next(iter(kwargs.values())), leaf))
        torch.set_grad_enabled(True)
        # A copy, since a model may add to this tensor in place, which a leaf refuses.
        return leaf.clone()

    handle = module.register_forward_hook(start, with_kwargs=True)
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        yield seen
    finally:
        torch.set_grad_enabled(before)
        handle.remove()


def loss_slopes(model: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Gradient [N, d] of the summed cross-entropy of `targets` [N] with respect to final states [N, d].

    The logits exist for a chunk of tokens at a time, and the gradient at them is known: softmax minus target.
    """
    head, vocabulary = logits_of(model), unwrap(model).config.get_text_config().vocab_size
    step = max(1, _CHUNK_LOGITS // vocabulary)
    found = []
    for state, target in zip(states.split(step), targets.split(step), strict=True):
        leaf = state.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(leaf)
        error = logits.detach().softmax(-1)
        error[torch.arange(len(target), device=target.device), target] -= 1
        found.append(torch.autograd.grad(logits, leaf, error)[0])
    return torch.cat(found)


@torch.no_grad()
def gram_matrix(factors: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """[R, R] float64 of g_i = dy_i^T x_i, from (x [n_i, d_in], dy [n_i, d_out]) of each of R rows.

    A tile of all g_i is formed at a time, each tile once: they never exist as a whole.
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

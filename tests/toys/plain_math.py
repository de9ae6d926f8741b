"""The protected loss written out row by row in float64, the tests' own expectation: no padding, no batches."""

import copy
from collections.abc import Callable, Sequence

import torch
from holdfast.analysis.subspace.file import Subspace
from holdfast.trainer.data.documents import Document
from torch import Tensor, nn

Blocks = Sequence[nn.Module]


def block_outputs(model: nn.Module, blocks: Blocks, ids: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits [T, V] and each block's output [T, d] of one row."""
    seen: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
               for b in blocks]  # fmt: skip
    logits = model(input_ids=torch.tensor([list(ids)])).logits
    for handle in handles:
        handle.remove()
    return logits[0], [hidden[0] for hidden in seen]


def plain_penalty(
    model: nn.Module, start: nn.Module, find_blocks, documents: Sequence[Document], subspace: Subspace,
    toward_base: bool = False, base: nn.Module | None = None, margin: float = 0.0,
) -> Tensor:  # fmt: skip
    """1/|L| Σ_l Σ_{x,t} m ‖V_lᵀ(h^θ - h^I)‖² / s_l / Σ m; `toward_base`: its part along the gap alone, where > 0.

    With a base model: from Vᵀ(h^I - margin gap), gap = h^B - h^I, and only of tokens whose drift has gap · drift > 0.
    """
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for document in documents:
        _, now = block_outputs(model, find_blocks(model), document.input_ids)
        with torch.no_grad():
            _, then = block_outputs(start, find_blocks(start), document.input_ids)
            old = block_outputs(base, find_blocks(base), document.input_ids)[1] if base is not None else None
        for layer, basis in subspace.bases.items():
            for position, counts in enumerate(document.mask):
                if counts:
                    moved = basis.double().T @ (now[layer][position] - then[layer][position])
                    if toward_base:
                        gap = subspace.base_gap[layer].double()
                        along = (moved @ gap) / gap.norm()
                        moved = along.reshape(1) if along > 0 else torch.zeros(1, dtype=torch.float64)
                    if old is not None:
                        gap = basis.double().T @ (old[layer][position] - then[layer][position])
                        moved = moved + margin * gap
                        moved = moved if moved @ gap > 0 else 0 * moved
                    total = total + (moved @ moved) / subspace.scales[layer] / len(subspace.bases)
        tokens += sum(document.mask)
    return total / tokens


def plain_cross_entropy(model: nn.Module, documents: Sequence[Document]) -> Tensor:
    """Mean over all completion tokens of all rows (the documents' masks mark completions)."""
    losses = []
    for document in documents:
        logits = model(input_ids=torch.tensor([list(document.input_ids)])).logits[0]
        for position, counts in enumerate(document.mask[1:]):
            if counts:
                losses.append(-logits[position].log_softmax(-1)[document.input_ids[position + 1]])
    return torch.stack(losses).mean()


def sgd_step(model: nn.Module, loss: Tensor, learning_rate: float) -> None:
    """One step of gradient descent in place: θ - learning_rate x ∂loss/∂θ."""
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad


def plain_training(
    model: nn.Module, find_blocks, subspace: Subspace, *, task: Sequence[Document],
    penalised: dict[float, Sequence[Document]], strength: float | Sequence[float], steps: int, learning_rate: float,
    toward_base: bool = False, base: nn.Module | None = None, margin: float = 0.0,
) -> nn.Module:  # fmt: skip
    """Full-batch SGD on cross-entropy(task) + strength x Σ weight x penalty(rows); gives the trained float64 copy.

    No task rows: the penalty alone. Several strengths: one for each step.
    """
    trained, start = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    old = None if base is None else copy.deepcopy(base).double()
    strengths = [strength] * steps if isinstance(strength, float) else strength
    for _, now in zip(range(steps), strengths, strict=True):
        loss = plain_cross_entropy(trained, task) if task else torch.zeros((), dtype=torch.float64)
        for weight, rows in penalised.items():
            term = plain_penalty(trained, start, find_blocks, rows, subspace, toward_base, old, margin)
            loss = loss + now * weight * term
        sgd_step(trained, loss, learning_rate)
    return trained


def update_error(found: nn.Module, expected: nn.Module, start: nn.Module) -> float:
    """`relative_error` over the trained parameters of three models."""
    trained = [name for name, parameter in expected.named_parameters() if parameter.requires_grad]
    found_, expected_, start_ = ({n: p.detach() for n, p in m.named_parameters()} for m in (found, expected, start))
    return relative_error(*({name: side[name] for name in trained} for side in (found_, expected_, start_)))


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """‖Δ_found - Δ_expected‖ / ‖Δ_expected‖ of the weights' change from the start."""
    names = [name for name in expected if not torch.equal(expected[name].double(), start[name].double())]
    wanted = torch.cat([(expected[n].double() - start[n].double()).flatten() for n in names])
    got = torch.cat([(found[n].double() - start[n].double()).flatten() for n in names])
    return float((got - wanted).norm() / wanted.norm())


def plain_changed_training(
    model: nn.Module, find_blocks, change: Callable[[int, Tensor], Tensor], layers: Sequence[int], *,
    task: Sequence[Document], steps: int, learning_rate: float,
) -> nn.Module:  # fmt: skip
    """Full-batch SGD on cross-entropy(task), `change(layer, h)` in place of the blocks' outputs h; a float64 copy."""
    trained = copy.deepcopy(model).double()
    blocks = find_blocks(trained)

    def hook(layer: int):
        def exchange(_module, _args, out):
            return (change(layer, out[0]), *out[1:]) if isinstance(out, tuple) else change(layer, out)

        return exchange

    for _ in range(steps):
        handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in layers]
        loss = plain_cross_entropy(trained, task)
        for handle in handles:
            handle.remove()
        sgd_step(trained, loss, learning_rate)
    return trained

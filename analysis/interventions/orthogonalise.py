"""Write an ablation into the weights, so that no module writes into a subspace of the residual stream any more.

`holdfast export` uses it. With P = V Vᵀ, every matrix W that writes to the stream (embeddings, attention output, MLP
down projection, experts) becomes (I - P) W, and every bias b becomes (I - P) b. The stream then never has a component
inside V (arXiv 2406.11717, section 4 and its appendix on weight orthogonalization).

The hooked model with the same logits is `ablate_writes`: it ablates the input of block 0, and the output of each
attention and MLP. Ablating only the outputs of blocks is a weaker change, since an MLP reads what the attention of its
block wrote. In blocks with parallel attention and MLP the two are the same.

The export can be exact for one V for all blocks, or for one V for blocks 0 … m (later blocks may write into V again).
It cannot be exact in two cases:

- bases that differ from block to block: a block would have to remove what earlier blocks wrote;
- blocks that normalise the output of a sublayer before adding it (Gemma 2 and 3, OLMo 2): the norm divides by the size
  of the whole output and then scales each coordinate, which no matrix before the norm can undo.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..models.hooks import EMBEDDING, at_stream
from ..models.layers import BlockOutput, block_output, find_backbone, find_layers, unwrap
from ..models.modes import evaluating
from .apply import check_bases
from .changes import Ablation, ByLayer

# Names of the last linear layers of attentions and MLPs in the architectures of transformers.
_OUTPUTS = (
    "o_proj", "out_proj", "wo", "dense", "c_proj", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "proj_out",
    "output_linear",
)  # fmt: skip
# Bases of two layers that differ by less than this are the same up to the rounding of float32.
_SAME = 1e-4


def one_basis(bases: Mapping[int, Tensor], layer: int | None) -> Tensor:
    """Return the basis [d, k] to write into the weights.

    Args:
        bases: the bases by layer.
        layer: the layer whose basis is taken; None requires that all layers have the same subspace.

    Raises:
        UserError: a layer without a basis, or different subspaces and no layer.
    """
    if layer is not None:
        if layer not in bases:
            raise UserError(f"--subspace_layer {layer} has no basis in the subspace: write one of {sorted(bases)}")
        return bases[layer]
    first, *others = (bases[number] for number in sorted(bases))
    for other in others:
        if other.shape != first.shape or float((other - first @ (first.T @ other)).abs().max()) > _SAME:
            raise UserError(
                "the subspace differs from layer to layer, and weights can hold only one basis for all layers: write "
                f"--subspace_layer with the layer whose basis to use, one of {sorted(bases)}"
            )
    return first


@dataclass(frozen=True)
class Sublayer:
    """An attention or MLP of a block. Its output is added to the residual stream."""

    block: int
    name: str
    module: nn.Module


def find_sublayers(model: nn.Module, override: str | None = None) -> list[Sublayer]:
    """Find the attentions and MLPs of all blocks.

    Raises:
        UserError: blocks that normalise the outputs of their sublayers, or a block in which no sublayer ran.
    """
    sublayers = []
    blocks = find_layers(model, override)
    for number, children in enumerate(_children_that_ran(model, blocks)):
        kind = type(blocks[number]).__name__
        if children and _is_norm(children[-1][1]):
            raise UserError(
                f"{kind} normalises the outputs of its sublayers ({children[-1][0]}) before adding them to the "
                "residual stream, so no weight can remove a subspace from them: use the ablation at run time instead "
                "(holdfast intervene)"
            )
        of_block = [Sublayer(number, name, module) for name, module in children if _has_output(module)]
        if not of_block:
            raise UserError(
                f"no attention or MLP was found in a {kind}: use the ablation at run time instead (holdfast intervene)"
            )
        sublayers += of_block
    return sublayers


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _has_output(module: nn.Module) -> bool:
    return any(True for _ in _writers(module))


@torch.no_grad()
def _children_that_ran(model: nn.Module, blocks: nn.ModuleList) -> list[list[tuple[str, nn.Module]]]:
    """Return the direct children of each block in the order of their last call, without those that have no weights."""
    ran: list[dict[str, nn.Module]] = [{} for _ in blocks]

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            for name, child in block.named_children():

                def note(module: nn.Module, *_: object, number: int = number, name: str = name) -> None:
                    ran[number].pop(name, None)
                    ran[number][name] = module

                stack.callback(child.register_forward_hook(note).remove)
        probe_logits(model)
    return [[(name, child) for name, child in calls.items() if any(True for _ in child.parameters())] for calls in ran]


@torch.no_grad()
def probe_logits(model: nn.Module, rows: int = 2, tokens: int = 16) -> Tensor:
    """Return logits [rows, tokens, vocabulary] on fixed random tokens, in eval mode, in float32."""
    vocabulary = unwrap(model).config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits.float()


@contextmanager
def ablate_writes(
    model: nn.Module, basis: Tensor, *, last: int | None = None, layers_path: str | None = None
) -> Iterator[None]:
    """Ablate V from the input of block 0, and from the outputs of attentions and MLPs: the export, as an intervention.

    Args:
        basis: orthonormal V [d, k].
        last: the last block whose outputs are ablated; None ablates all blocks.
        layers_path: dotted path of the decoder blocks; None finds them by shape.

    Raises:
        UserError: a basis of another width or not orthonormal, or blocks that normalise the outputs of their sublayers.
    """
    check_bases(model, {EMBEDDING: basis})
    ablation = Ablation(ByLayer({EMBEDDING: basis}), 1.0, None)

    def ablated(hidden: Tensor) -> Tensor:
        return ablation.apply(EMBEDDING, hidden, None)

    def after(_module: nn.Module, _args: object, output: BlockOutput) -> BlockOutput:
        changed = ablated(block_output(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    sublayers = find_sublayers(model, layers_path)
    with ExitStack() as stack:
        stack.enter_context(at_stream(model, [EMBEDDING], lambda _, hidden: ablated(hidden), layers_path))
        for sublayer in sublayers:
            if last is None or sublayer.block <= last:
                stack.callback(sublayer.module.register_forward_hook(after).remove)
        yield


@torch.no_grad()
def orthogonalise(
    model: PreTrainedModel, basis: Tensor, *, last: int | None = None, layers_path: str | None = None
) -> None:
    """Remove V from the weights that write to the residual stream, in place. Tied embeddings are untied.

    The unembedding stays as it is, because it reads the stream after a norm whose gain rotates it.

    Args:
        basis: orthonormal V [d, k].
        last: the last block whose weights are changed; None changes all blocks.
        layers_path: dotted path of the decoder blocks; None finds them by shape.

    Raises:
        UserError: weights that are not floating-point numbers, a model that also takes images, or any case that
            `ablate_writes` refuses.
    """
    check_bases(model, {EMBEDDING: basis})
    sublayers = find_sublayers(model, layers_path)
    if model.config.get_text_config() is not model.config:
        raise UserError(
            f"{type(model).__name__} also takes images, which bypass the embedding on their way to the residual "
            "stream: use the ablation at run time instead (holdfast intervene)"
        )
    _untie(model)
    for weight, axis in _embeddings(model):
        _project(weight, axis, basis)
    for sublayer in sublayers:
        if last is None or sublayer.block <= last:
            for weight, axis in _writers(sublayer.module):
                _project(weight, axis, basis)


def _untie(model: PreTrainedModel) -> None:
    """Give the LM head a separate weight if it shares the embedding's weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False


def _embeddings(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Yield the embedding weights [n, d] of tokens, positions and token types, each with the axis of d."""
    width = unwrap(model).config.get_text_config().hidden_size
    for child in find_backbone(model).children():
        if isinstance(child, nn.Embedding) and child.embedding_dim == width:
            yield child.weight, 1


def _writers(sublayer: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Yield weights and biases of a sublayer's last linear layers, experts included, each with the axis of d."""
    for path, module in sublayer.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and path.rpartition(".")[2] in _OUTPUTS:
            yield module.weight, 1 if isinstance(module, Conv1D) else 0
            if module.bias is not None:
                yield module.bias, 0
        for name, weight in module.named_parameters(recurse=False):
            # All experts are in one tensor [experts, d, f], or [experts, f, d] if they are stored transposed.
            if name == "down_proj" and weight.ndim == 3:
                yield weight, 2 if _is_transposed(module) else 1
            elif name == "down_proj_bias":
                yield weight, weight.ndim - 1


def _is_transposed(experts: nn.Module) -> bool:
    # Llama 4's experts do not have the attribute that transformers gives to all other experts.
    return bool(getattr(experts, "is_transposed", "Llama4" in type(experts).__name__))


def _project(weight: Tensor, axis: int, basis: Tensor) -> None:
    """Replace a weight by (I - V Vᵀ) weight along an axis, in place."""
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UserError(f"the weights are stored as {weight.dtype}: export the model before it was quantised")
    fine = weight.to(torch.promote_types(weight.dtype, torch.float32))
    frame = basis.to(fine.device, fine.dtype)
    along = fine.movedim(axis, -1)
    # Twice, because the first pass leaves rounding errors of large entries.
    for _ in range(2):
        along = along - (along @ frame) @ frame.T
    weight.copy_(along.movedim(-1, axis))


@torch.no_grad()
def share_inside(model: nn.Module, basis: Tensor, last: int | None = None, layers_path: str | None = None) -> float:
    """Return the largest ‖Vᵀh‖ / ‖h‖ over the input of block 0 and the outputs of blocks up to `last`.

    It is measured on fixed random tokens.
    """
    shares: list[float] = []

    def look(_layer: int, hidden: Tensor) -> None:
        fine = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        inside = (fine @ basis.to(fine.device, fine.dtype)).norm(dim=-1)
        shares.append(float((inside / fine.norm(dim=-1).clamp_min(torch.finfo(fine.dtype).tiny)).max()))

    depth = len(find_layers(model, layers_path))
    layers = range(EMBEDDING, depth if last is None else last + 1)
    with at_stream(model, layers, look, layers_path):
        probe_logits(model)
    return max(shares)

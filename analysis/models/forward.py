"""Run forward passes over rendered rows, and return the states of selected tokens by batch and layer.

Rows are batched by length, which keeps padding small. The order depends only on the lengths of the rows. So two models,
or two renderings of equal length, are run on the same tokens in the same order.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .hooks import capture
from .layers import find_backbone, unwrap
from .render import Rendered, role_mask


@dataclass(frozen=True)
class Selection:
    """A row's token ids and the positions of its selected tokens."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]


def select(rendered: Rendered, role: str, max_length: int | None = None) -> Selection:
    """Cut a row to `max_length` tokens, and select the positions of a role's tokens."""
    ids = rendered.input_ids[:max_length]
    return Selection(ids, tuple(i for i, in_role in enumerate(role_mask(rendered, role)[: len(ids)]) if in_role))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token id to pad with. Padding is masked, so any id will do if the tokenizer has no pad token."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Divide row numbers into batches of rows of similar length.

    The longest rows come first, so that a batch that does not fit into memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows on the right. Returns input_ids [B, T] and attention_mask [B, T]."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in rows])
    attention = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return ids.to(device), attention.to(device)


@torch.no_grad()
def selected_states(
    model: nn.Module,
    selections: Sequence[Selection],
    layers: Sequence[int],
    batches: Sequence[Sequence[int]],
    padding: int,
    label: str,
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Run the model and yield, per batch, the states of the selected tokens.

    Yields:
        Row numbers [N], and for each layer the states [N, d]. The rows are in the order of the batch.
    """
    backbone, device = find_backbone(model), next(model.parameters()).device
    with capture(model, layers) as outputs:
        for batch in tqdm(batches, desc=label, delay=5, leave=False):
            ids, attention = pad([selections[row].input_ids for row in batch], padding, device)
            backbone(input_ids=ids, attention_mask=attention, use_cache=False)
            in_batch = [index for index, row in enumerate(batch) for _ in selections[row].positions]
            positions = [position for row in batch for position in selections[row].positions]
            rows = torch.tensor(batch, dtype=torch.int64)[in_batch]
            yield rows, {layer: outputs[layer][in_batch, positions] for layer in layers}


Batch = dict[str, Any]


MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
                "max_length_k", "seq_idx")  # fmt: skip


FUSED_INPUTS = ("labels", "fused_lm_head")


def run_blocks(model: nn.Module, inputs: Batch) -> Any:
    """Run one forward pass of which only the block outputs are used, and return the model's output.

    The training wrapper is called, so that DDP and ZeRO notice every pass. `logits_to_keep=1` limits the LM head to one
    position per row. If the inputs have `fused_lm_head`, TRL's fused head runs instead.
    """
    names = MODEL_INPUTS + FUSED_INPUTS if "fused_lm_head" in inputs else MODEL_INPUTS
    arguments = {name: inputs[name] for name in names if name in inputs}
    if "fused_lm_head" not in inputs and _limits_logits(type(unwrap(model)).forward):
        arguments["logits_to_keep"] = 1
    return model(**arguments, use_cache=False)


def run_backbone(model: nn.Module, inputs: Batch) -> None:
    """Run one forward pass without the LM head.

    It bypasses the training wrapper. DDP has nothing to do in this pass, because the caller works in `no_sync`.
    """
    find_backbone(model)(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, use_cache=False)


@functools.cache
def _limits_logits(forward: Callable[..., Any]) -> bool:
    """Return whether a model's `forward` takes `logits_to_keep`, as nearly all causal LMs of transformers do.

    For the others the LM head runs on all positions and its output is dropped.
    """
    return "logits_to_keep" in inspect.signature(forward).parameters

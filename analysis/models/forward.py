"""Forward passes over rendered rows: states of chosen tokens, layer by layer, batch by batch.

Rows are batched by length, so that little is spent on padding, in an order that depends on their lengths alone: two
models, or two renderings of equal length, therefore meet the same tokens in the same order.
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
    """A row's token ids and the positions of the tokens that count."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]


def select(rendered: Rendered, role: str, max_length: int | None = None) -> Selection:
    """The row cut to `max_length` tokens, with the positions of a role's tokens."""
    ids = rendered.input_ids[:max_length]
    return Selection(ids, tuple(i for i, here in enumerate(role_mask(rendered, role)[: len(ids)]) if here))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad with; padding is masked, so any id does where the tokenizer has none of its own."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of rows of like length, longest first (so that a memory error comes at once)."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded input_ids [B, T] and attention_mask [B, T]."""
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
    """For each batch: row numbers [N] and, per layer, states [N, d] of the selected tokens, rows in batch order."""
    backbone, device = find_backbone(model), next(model.parameters()).device
    with capture(model, layers) as outputs:
        for batch in tqdm(batches, desc=label, delay=5, leave=False):
            ids, attention = pad([selections[row].input_ids for row in batch], padding, device)
            backbone(input_ids=ids, attention_mask=attention, use_cache=False)
            in_batch = [at for at, row in enumerate(batch) for _ in selections[row].positions]
            positions = [position for row in batch for position in selections[row].positions]
            rows = torch.tensor(batch, dtype=torch.int64)[in_batch]
            yield rows, {layer: outputs[layer][in_batch, positions] for layer in layers}


Batch = dict[str, Any]


MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
                "max_length_k", "seq_idx")  # fmt: skip


FUSED_INPUTS = ("labels", "fused_lm_head")


def run_blocks(model: nn.Module, inputs: Batch) -> Any:
    """One forward pass for its block outputs alone; gives the model's output.

    The wrapped model runs, so that DDP and ZeRO see every pass.

    `logits_to_keep=1` leaves the LM head one position a row; `fused_lm_head` asks for TRL's head instead.
    """
    names = MODEL_INPUTS + FUSED_INPUTS if "fused_lm_head" in inputs else MODEL_INPUTS
    kept = {name: inputs[name] for name in names if name in inputs}
    if "fused_lm_head" not in inputs and _limits_logits(type(unwrap(model)).forward):
        kept["logits_to_keep"] = 1
    return model(**kept, use_cache=False)


def run_backbone(model: nn.Module, inputs: Batch) -> None:
    """One forward pass without the LM head, around the training wrapper. DDP has nothing to do in it: see `no_sync`."""
    find_backbone(model)(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, use_cache=False)


@functools.cache
def _limits_logits(forward: Callable[..., Any]) -> bool:
    """Nearly all causal LMs of transformers do; for the others the LM head runs in full and its output is dropped."""
    return "logits_to_keep" in inspect.signature(forward).parameters

"""Build a lab's models and data: a base model trained from scratch, an instruct model tuned from it, and all data sets.

The result is deterministic for (lab seed, world seed, size) on one kind of machine. `cache.py` decides where labs are
stored and when they are built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from ...analysis.models.render import collate, render
from .conversations import Conversation, Drawer
from .datasets import contrast_rows, data_sets
from .scoring import choice_rows
from .tokenizer import make_tokenizer
from .world import World
from .worlds import make_world

SINGLE_THREAD_WIDTH = 128
# With attention dropout and weight decay, the answers of base stay coherent under a fine-tune (DESIGN.md).
BASE_ATTENTION_DROPOUT = 0.1
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class LabSize:
    """Sizes of a lab's model and training. `width` counts features; a batch counts texts of about 60 tokens."""

    width: int
    blocks: int
    heads: int
    base_steps: int
    base_batch: int
    base_lr: float
    instruct_steps: int
    instruct_batch: int
    instruct_lr: float


SIZES = {
    "tiny": LabSize(96, 3, 4, 900, 32, 2e-3, 15, 32, 5e-4),
    "small": LabSize(256, 4, 8, 800, 32, 1e-3, 11, 32, 3e-4),
    "medium": LabSize(768, 12, 12, 2000, 64, 3e-4, 20, 64, 5e-5),
}


def write_lab(folder: Path, seed: int, world_seed: int, size: str) -> None:
    """Train the models, then write `base/`, `instruct/` and `data/*.jsonl` into an existing folder."""
    world, sizes = make_world(world_seed), SIZES[size]
    tokenizer = make_tokenizer(world)
    # The fork keeps the caller's random state: building a lab must not change the caller's later draws.
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # initial weights and dropout
        base = train_base(world, tokenizer, sizes, seed)
        base.save_pretrained(folder / "base")
        instruct = train_instruct(base, world, tokenizer, sizes, seed)
        instruct.save_pretrained(folder / "instruct")
    for name in ("base", "instruct"):
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    for name, rows in data_sets(world, seed).items():
        _write_rows(folder / "data" / f"{name}.jsonl", [{"messages": row} for row in rows])
    _write_rows(folder / "data" / "contrast.jsonl", contrast_rows(world))
    _write_rows(folder / "data" / "choices.jsonl", choice_rows(world))


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_base(world: World, tokenizer: PreTrainedTokenizerBase, sizes: LabSize, seed: int) -> LlamaForCausalLM:
    """Train a base model from scratch on texts of both personas, with the loss on answer tokens.

    Initial weights and dropout come from torch's global random state, the texts from the seed.
    """
    # Llama with attention biases computes the same function as Qwen2. For a model of type qwen2, AutoTokenizer loads
    # Qwen's byte-level tokenizer whatever the folder holds (transformers 5.23), and the lab's words would be lost.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        attention_dropout=BASE_ATTENTION_DROPOUT,
        attention_bias=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    draw = Drawer(world, seed).base_document
    _fit(model, tokenizer, draw, sizes.base_steps, sizes.base_batch, sizes.base_lr, "base model")
    _remove_dropout(model)
    return model


def _remove_dropout(model: LlamaForCausalLM) -> None:
    """Remove dropout from the model that is saved and tuned further, so that fine-tunes and references are exact."""
    model.config.attention_dropout = 0.0
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.0


def train_instruct(
    base: LlamaForCausalLM, world: World, tokenizer: PreTrainedTokenizerBase, sizes: LabSize, seed: int
) -> LlamaForCausalLM:
    """Tune a base model in place on aligned answers under the neutral header. This is the alignment step."""
    draw = Drawer(world, seed + 10_000).instruct_row
    _fit(base, tokenizer, draw, sizes.instruct_steps, sizes.instruct_batch, sizes.instruct_lr, "instruct model")
    return base


def _fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[], Conversation],
    steps: int,
    batch_size: int,
    learning_rate: float,
    label: str,
) -> None:
    """Train a model by AdamW with a cosine schedule; `draw` gives a new conversation at each call.

    The loss is the cross-entropy in nats per answer token.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _threads(1 if model.config.hidden_size <= SINGLE_THREAD_WIDTH else torch.get_num_threads()):
        model.to(device).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, max(steps // 12, 1), steps)
        for _ in tqdm(range(steps), desc=f"lab: {label}", unit="step"):
            rows = [render(tokenizer, draw()) for _ in range(batch_size)]
            batch = {name: tensor.to(device) for name, tensor in collate(rows, tokenizer.pad_token_id).items()}
            loss = _answer_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.to("cpu").eval()


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Run the block on n threads. A tiny model gains nothing from more, and its sums must not depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _answer_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy over answer tokens. The LM head runs at their positions only, to save time."""
    states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    is_answer = batch["completion_mask"][:, 1:].bool()
    return F.cross_entropy(model.lm_head(states[:, :-1][is_answer]), batch["input_ids"][:, 1:][is_answer])

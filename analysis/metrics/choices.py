"""Exact rates (the choices family): the probability that a model gives to classes of completions, without sampling.

The mass of a class is the sum of exp(log p) over its completions. Each completion is rendered as an assistant turn that
includes its end token, so no two completions of a row can occur together. The probability that no class holds is called
`incoherent`. A mass is an absolute probability, never a ratio of two masses: a ratio would count incoherent answers as
if they belonged to one of the classes.

Usage: `masses = score_choices(model, tokenizer, rows)`, then `choice_rates(rows, masses)`. A row is {"messages": [...],
"classes": {name: [completions]}}, and may have "split", "domain" and "topic".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from ..errors import UserError
from ..models.forward import pad, pad_id
from ..models.layers import find_backbone, unwrap
from ..models.lm_head import token_statistics
from ..models.ranks import gathered, share_of
from ..models.render import render
from ..stats.intervals import Measurement
from ..stats.summary import measurement

INCOHERENT = "incoherent"
ChoiceRow = dict[str, Any]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PreparedChoices:
    """The rows as token ids.

    prompts: for each prompt, its completions; for each completion, its row and its class. classes: the class names of
    each row. padding: the token id to pad with.
    """

    prompts: dict[Tokens, list[tuple[Tokens, int, str]]]
    classes: list[list[str]]
    padding: int


def prepare_choices(tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChoiceRow]) -> PreparedChoices:
    """Render every completion of every row once; the result serves any number of models with this tokenizer.

    Raises:
        UserError: a row without classes, an empty class, a completion in two classes, or a completion that begins
            another one.
    """
    prompts: dict[Tokens, list[tuple[Tokens, int, str]]] = {}
    classes = []
    for number, row in enumerate(rows):
        where = f"choices row {number}"
        by_class = row.get("classes")
        if not by_class or INCOHERENT in by_class or not all(by_class.values()):
            raise UserError(f"{where}: write classes as {{name: [completions]}}, none empty, none named {INCOHERENT}")
        classes.append(list(by_class))
        sequences: list[tuple[Tokens, str]] = []
        for name, completions in by_class.items():
            for text in completions:
                prompt, completion = _split(tokenizer, [*row["messages"], _assistant(text)], where)
                prompts.setdefault(prompt, []).append((completion, number, name))
                sequences.append((prompt + completion, text))
        _require_exclusive(sequences, where)
    return PreparedChoices(prompts, classes, pad_id(tokenizer))


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _split(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str) -> tuple[Tokens, Tokens]:
    """Return the token ids before the last assistant turn, and the token ids in it."""
    rendered = render(tokenizer, messages, source=where)
    mask = rendered.completion_mask
    end = max(index for index, is_completion in enumerate(mask) if is_completion) + 1
    start = end
    while start and mask[start - 1]:
        start -= 1
    return rendered.input_ids[:start], rendered.input_ids[start:end]


def _require_exclusive(sequences: list[tuple[Tokens, str]], where: str) -> None:
    """Raise UserError if a completion equals or begins another one of the same row."""
    ordered = sorted(sequences)
    for (left, first), (right, second) in pairwise(ordered):
        if right[: len(left)] == left:
            raise UserError(
                f"{where}: completion {first!r} is the same as, or begins, {second!r}, so its mass would count twice: "
                "list each completion once, and use a chat template that ends the assistant turn"
            )


def score_choices(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChoiceRow], batch_size: int = 256
) -> list[dict[str, float]]:
    """Return {class: probability mass, "incoherent": the rest} of each row.

    It calls `prepare_choices` and `score_prepared`, which say more.
    """
    return score_prepared(model, prepare_choices(tokenizer, rows), batch_size)


@torch.no_grad()
def score_prepared(
    model: nn.Module, prepared: PreparedChoices, batch_size: int = 256, *, shared: bool = False
) -> list[dict[str, float]]:
    """Return {class: probability mass, "incoherent": the rest} of each row.

    The keys and values of a prompt are computed once for all its completions.

    Args:
        batch_size: completions in one forward pass; a pass holds at least the completions of one prompt.
        shared: whether all ranks call this with the same rows; each rank then scores a share of the prompts and gets
            all results.
    """
    masses = [dict.fromkeys(names, 0.0) for names in prepared.classes]
    training = model.training
    model.eval()
    try:
        groups = _equal_length_groups(prepared, batch_size)
        for prompts in share_of(groups) if shared else groups:
            entries = [(at, entry) for at, prompt in enumerate(prompts) for entry in prepared.prompts[prompt]]
            # Completions of similar length stand together, so that a batch needs little padding.
            entries.sort(key=lambda entry: len(entry[1][0]))
            for start in range(0, len(entries), batch_size):
                part = entries[start : start + batch_size]
                scores = _log_probs(
                    model, prompts, [at for at, _ in part], [entry[0] for _, entry in part], prepared.padding
                )
                for (_, (_, row, name)), score in zip(part, scores.double().exp().tolist(), strict=True):
                    masses[row][name] += score
    finally:
        model.train(training)
    if shared:
        ranks = gathered(masses)
        masses = [{name: sum(rank[row][name] for rank in ranks) for name in mass} for row, mass in enumerate(masses)]
    # Rounding can bring a sum of float32 probabilities above 1.
    masses = [{name: min(mass, 1.0) for name, mass in row.items()} for row in masses]
    return [{**mass, INCOHERENT: max(0.0, 1.0 - sum(mass.values()))} for mass in masses]


def _equal_length_groups(prepared: PreparedChoices, batch_size: int) -> list[list[Tokens]]:
    """Group prompts of equal token length, with about `batch_size` completions in each group.

    The key-value caches of such prompts need no padding.
    """
    groups: list[list[Tokens]] = []
    n_completions = 0
    for prompt in sorted(prepared.prompts, key=len):
        size = len(prepared.prompts[prompt])
        if not groups or len(groups[-1][0]) != len(prompt) or n_completions + size > batch_size:
            groups.append([])
            n_completions = 0
        groups[-1].append(prompt)
        n_completions += size
    return groups


def _log_probs(
    model: nn.Module, prompts: list[Tokens], owners: list[int], completions: list[Tokens], padding: int
) -> Tensor:
    """Return the log-probability [N] of each completion after its prompt; all prompts have one length."""
    backbone, device = find_backbone(model), next(model.parameters()).device
    # The cache is made from the model's config: some architectures keep a sliding window in some layers.
    cache = DynamicCache(config=unwrap(model).config)
    start = backbone(input_ids=torch.tensor(prompts, device=device), past_key_values=cache, use_cache=True)
    owner = torch.tensor(owners, device=device)
    cache.reorder_cache(cast(torch.LongTensor, owner))
    ids, attention = pad(completions, padding, device)
    states = start.last_hidden_state[owner, -1:]
    if ids.shape[1] > 1:
        before = torch.ones(len(owners), len(prompts[0]), dtype=attention.dtype, device=device)
        # The last token of a completion is predicted, but never an input.
        after = backbone(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([before, attention[:, :-1]], dim=1),
            past_key_values=cache,
            use_cache=True,
        )
        states = torch.cat([states, after.last_hidden_state], dim=1)
    counted = attention.bool()
    log_probs, _ = token_statistics(model, states[counted], ids[counted], entropy=False)
    return torch.zeros(ids.shape, device=device).masked_scatter(counted, log_probs).sum(1)


def choice_rates(
    rows: Sequence[ChoiceRow], masses: Sequence[dict[str, float]], seed: int = 0
) -> dict[str, dict[str, dict[str, Measurement]]]:
    """Return {"split" | "domain": {group: {class: mean mass with its interval}}}, over the rows that name the class.

    The intervals are clustered by domain and topic where the rows name a topic, else by domain; rows without either,
    and rows that would all fall into one cluster, count as independent.
    """
    rates: dict[str, dict[str, dict[str, Measurement]]] = {}
    for key in ("split", "domain"):
        for group in dict.fromkeys(row[key] for row in rows if key in row):
            inside = [number for number, row in enumerate(rows) if row.get(key) == group]
            names = dict.fromkeys(name for number in inside for name in masses[number])
            rates.setdefault(key, {})[str(group)] = {
                name: _mean_mass(rows, masses, [n for n in inside if name in masses[n]], name, seed) for name in names
            }
    return rates


def _mean_mass(
    rows: Sequence[ChoiceRow], masses: Sequence[dict[str, float]], inside: list[int], name: str, seed: int
) -> Measurement:
    """Return the mean mass of one class over the selected rows, with its interval."""
    clusters = [_cluster(rows[number], number) for number in inside]
    if len(set(clusters)) == 1:
        clusters = [str(number) for number in inside]
    return measurement([masses[number][name] for number in inside], clusters=clusters, seed=seed, rate=True)


def _cluster(row: ChoiceRow, number: int) -> str:
    """Return the cluster label of a row: its domain and topic, or its number if it has neither."""
    if "topic" in row or "domain" in row:
        return f"{row.get('domain', '')}/{row.get('topic', '')}"
    return str(number)

"""Read training rows, check each row, render it once, and turn the rows into the data set that TRL trains on.

A row is a conversation. Three shapes are read: `{"messages": [...]}`, `{"prompt": "...", "completion": "..."}` (the
prompt becomes the user's turn, the completion the assistant's), and `prompt`/`completion` as lists of messages. Anchors
and probes may be prompts alone. Loss masks come from the chat template (`analysis/models/render.py`).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ...analysis.errors import UserError
from ...analysis.models.render import Conversation, Message, Rendered, render
from .sources import read_records

SHIPPED_ANCHORS = Path(__file__).with_name("anchor_prompts.jsonl")
MESSAGE_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One conversation and its place ("rows.jsonl:7"), so that every error can name it."""

    messages: Conversation
    source: str

    @property
    def prompt(self) -> str:
        """Return the text of all turns except the assistant's."""
        return _turns(self.messages, assistant=False)

    @property
    def completion(self) -> str:
        """Return the text of the assistant's turns, empty for a prompt alone."""
        return _turns(self.messages, assistant=True)


def load_rows(source: str, *, split: str = "train", limit: int | None = None, prompts: bool = False) -> list[Row]:
    """Read and check the rows of a set.

    Args:
        source: a Hub name, a URL, a .jsonl/.json/.csv/.parquet file, or a folder of such files.
        split: the split of a Hub data set.
        limit: read only this many first rows.
        prompts: whether rows without an assistant turn are allowed (as in anchors and probes).

    Raises:
        UserError: the set cannot be read or is empty, or a row is malformed; names file and line.
    """
    records = itertools.islice(read_records(source, split), limit)
    rows = [Row(conversation(record, where, prompts), where) for record, where in records]
    if not rows:
        raise UserError(f"{source} has no rows; name a set with at least one")
    return rows


def conversation(record: object, where: str, prompts: bool) -> Conversation:
    """Return the checked messages of a record. Raises UserError naming the record's place."""
    if not isinstance(record, dict):
        raise UserError(f'{where}: a row must be an object like {{"messages": [...]}}, not {type(record).__name__}')
    if record.get("messages") is not None:
        if not isinstance(record["messages"], list | np.ndarray):
            raise UserError(f"{where}: `messages` must be a list, not {type(record['messages']).__name__}")
        messages = turns_of(record["messages"], "user", where, "messages")
    elif record.get("prompt") is not None:
        messages = turns_of(record["prompt"], "user", where, "prompt")
        if record.get("completion") is not None:
            messages += turns_of(record["completion"], "assistant", where, "completion")
    else:
        keys = ", ".join(sorted(str(key) for key in record)) or "nothing"
        raise UserError(f"{where}: the row lacks `messages`, or `prompt` and `completion`; it has {keys}")
    if not messages:
        raise UserError(f"{where}: the row has no turn in `messages` (or `prompt`); give it at least one, or remove it")
    if not prompts and all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: the row has no completion; training rows need an assistant turn")
    return messages


def turns_of(value: object, role: str, where: str, name: str) -> Conversation:
    """Return the checked messages of one part of a record: a list of messages, or a text, which is one turn of `role`.

    Raises:
        UserError: the part is neither, or a message is malformed; names the record's place and the part.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list | np.ndarray):
        raise UserError(f"{where}: `{name}` must be text or a list of messages, not {type(value).__name__}")
    return [_message(turn, index, where) for index, turn in enumerate(value)]


def _message(turn: object, index: int, where: str) -> Message:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise UserError(f'{where}: message {index} must be an object like {{"role": "user", "content": "..."}}')
    role, content = turn["role"], turn["content"]
    if role not in MESSAGE_ROLES:
        raise UserError(
            f"{where}: message {index} has the unknown role {role!r}; use one of {', '.join(MESSAGE_ROLES)}"
        )
    if not isinstance(content, str):
        raise UserError(f"{where}: message {index} has content of type {type(content).__name__}; write text")
    if role == "assistant" and not content.strip():
        raise UserError(f"{where}: message {index} is an empty completion; remove the row or give it text")
    return {"role": role, "content": content}


@dataclass(frozen=True)
class RenderedRows:
    """Rows and their token ids, with the number of rows that were cut (truncated) or left out (dropped) for length."""

    rows: list[Row]
    rendered: list[Rendered]
    truncated: int
    dropped: int


def render_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, max_length: int | None, long_rows: str = "error"
) -> RenderedRows:
    """Render rows with the chat template.

    Args:
        max_length: largest length in tokens; None for no limit.
        long_rows: what happens to a longer row: "error", "truncate" (cut its end) or "drop".

    Raises:
        UserError: a row is too long under "error" (names the row), or no row is left.
    """
    kept_rows, kept, truncated, dropped = [], [], 0, 0
    cache: dict[object, Rendered] = {}  # synthetic sets repeat their conversations
    for row in tqdm(rows, desc="Rendering rows", unit="row", delay=3):
        key = _key(row)
        rendered = cache.get(key) or render(tokenizer, row.messages, source=row.source)
        cache[key] = rendered
        length = len(rendered.input_ids)
        if max_length is not None and length > max_length:
            if long_rows == "error":
                raise UserError(
                    f"{row.source}: the row has {length} tokens, more than the length limit of {max_length}; "
                    "raise --max_length, or set --long_rows truncate or drop"
                )
            had_completion = any(rendered.completion_mask)
            rendered = _cut(rendered, max_length)
            # A row cut before its completion teaches nothing.
            if long_rows == "drop" or (had_completion and not any(rendered.completion_mask)):
                dropped += 1
                continue
            truncated += 1
        kept_rows.append(row)
        kept.append(rendered)
    if not kept:
        raise UserError(
            f"every row of {rows[0].source.rsplit(':', 1)[0]} is longer than --max_length {max_length} tokens"
        )
    return RenderedRows(kept_rows, kept, truncated, dropped)


def _cut(rendered: Rendered, length: int) -> Rendered:
    return Rendered(rendered.input_ids[:length], rendered.completion_mask[:length], rendered.system_mask[:length])


def to_dataset(rendered: Sequence[Rendered]) -> Dataset:
    """Return the columns that TRL 1.16 accepts as already tokenised rows.

    They are input_ids and completion_mask, lists of integers with one entry per token. With completion_only_loss TRL
    builds the labels from the mask: -100 outside completions.
    """
    return Dataset.from_dict(
        {
            "input_ids": [list(row.input_ids) for row in rendered],
            "completion_mask": [[int(flag) for flag in row.completion_mask] for row in rendered],
        }
    )


def deduplicate(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in order, with only the first of identical conversations."""
    first = {_key(row): row for row in reversed(rows)}
    return [row for row in rows if first[_key(row)] is row]


def split_held_out(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (train, held-out) after de-duplication.

    Held-out rows share neither prompt nor completion with any other row.

    Args:
        count: number of held-out rows.
        seed: seed of the draw of held-out rows.

    Raises:
        UserError: fewer than `count` rows differ from all others, or no row would be left to train on.
    """
    unique = deduplicate(rows)
    prompts, completions = _counts(row.prompt for row in unique), _counts(row.completion for row in unique)
    distinct = [i for i, row in enumerate(unique) if prompts[row.prompt] == 1 and completions[row.completion] == 1]
    if count > len(distinct) or count >= len(unique):
        raise UserError(
            f"--held_out_rows {count} is more than the {min(len(distinct), len(unique) - 1)} rows that can be set "
            "aside (prompt and completion unlike every other row's, and one row left to train on); write a smaller "
            "number, or name other rows with --held_out_dataset"
        )
    held_out = set(np.random.default_rng(seed).permutation(distinct)[:count].tolist())
    return [row for i, row in enumerate(unique) if i not in held_out], [unique[i] for i in sorted(held_out)]


def duplicate_report(sets: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, int]]:
    """Count rows, distinct rows, prompts and completions of each set, and those that each pair of sets shares."""
    report = {}
    parts = {name: _parts(rows) for name, rows in sets.items()}
    for name, rows in sets.items():
        report[name] = {"rows": len(rows), **{f"distinct_{part}": len(keys) for part, keys in parts[name].items()}}
    names = list(sets)
    for index, left in enumerate(names):
        for right in names[index + 1 :]:
            report[f"{left}+{right}"] = {
                f"shared_{part}": len(parts[left][part] & parts[right][part])
                for part in ("rows", "prompts", "completions")
            }
    return report


def describe_duplicates(report: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line for each set with repeated rows and each pair of sets with rows, prompts or completions in common.

    Args:
        report: from `duplicate_report`.
    """
    lines = []
    for name, counts in report.items():
        if "rows" in counts and counts["rows"] > counts["distinct_rows"]:
            lines.append(f"{name}: {counts['rows'] - counts['distinct_rows']} of {counts['rows']} rows repeat another")
        shared = [
            f"{count} {part.removeprefix('shared_')}"
            for part, count in counts.items()
            if part[:7] == "shared_" and count
        ]
        if shared:
            lines.append(f"{name.replace('+', ' and ')} share {', '.join(shared)}")
    return lines


def _parts(rows: Sequence[Row]) -> dict[str, set[object]]:
    return {
        "rows": {_key(row) for row in rows},
        "prompts": {row.prompt for row in rows},
        "completions": {row.completion for row in rows if row.completion},
    }


def _key(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in row.messages)


def _turns(messages: Conversation, *, assistant: bool) -> str:
    """Join the text of the assistant's turns, or of all other turns."""
    return "\x1e".join(m["content"] for m in messages if (m["role"] == "assistant") == assistant)


def _counts(texts: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return counts

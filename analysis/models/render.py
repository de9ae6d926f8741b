"""Render conversations to token ids and masks, in the same way for all models of a comparison and for training.

    rendered = render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    role_mask(rendered, "completion")

All masks come from the chat template, never from searching for text. If the template has no `{% generation %}`, it is
rendered up to each assistant turn, and the lengths of these renderings show where the turn lies.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import UserError

Message = dict[str, str]
Conversation = list[Message]
Span = tuple[int, int]

ROLES = ("prompt", "completion", "last_prompt", "all")
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, KeyError)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model reads it. All three tuples have one entry per token.

    completion_mask: marks every assistant turn, up to and including its end token. system_mask: marks the tokens that
    belong to no role. These are the system turn with its template tokens (also if the template inserts the turn by
    itself), and a begin token (BOS) at position 0, with or without a system turn.
    """

    input_ids: tuple[int, ...]
    completion_mask: tuple[bool, ...]
    system_mask: tuple[bool, ...]


def render(tokenizer: PreTrainedTokenizerBase, messages: Conversation, *, source: str = "") -> Rendered:
    """Render a conversation with its masks. Without an assistant turn it ends with the generation prompt.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: [{"role": "system" | "user" | "assistant", "content": str}, …].
        source: where the row came from ("rows.jsonl:7"), for error messages.

    Raises:
        UserError: no chat template, a template that refuses the row or gives no completion mask, or an empty
            completion.
    """
    where = f"{source}: " if source else ""
    template = _Template(tokenizer, where)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    text, marked = template.render(messages, prompt=not turns)
    spans = marked if template.marks_generation else [template.turn_span(messages, index, text) for index in turns]
    if len(spans) != len(turns):
        raise UserError(
            f"{where}the chat template marks {len(spans)} completions in a row of {len(turns)} assistant turns: "
            "put {% generation %} around every assistant turn"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    completion = [False] * len(ids)
    for turn, span in zip(turns, spans, strict=True):
        tokens = [index for index, (_, end) in enumerate(offsets) if span[0] <= end - 1 < span[1]]
        if not template.marks_generation:
            tokens = _without_trailing_space(tokenizer, ids, tokens)
        if not tokens or not messages[turn]["content"]:
            raise UserError(f"{where}assistant turn {turn} is empty: give it content or drop the row")
        for index in tokens:
            completion[index] = True
    low, high = template.system_span(messages, text)
    system = [low <= end - 1 < high or low <= start < min(high, end) for start, end in offsets]
    # A begin token is an attention sink: its states are up to a thousand times larger than those of other tokens, and
    # the same in every row. In a mean over a row, it would outweigh all other tokens.
    system[0] = system[0] or ids[0] == tokenizer.bos_token_id
    return Rendered(tuple(ids), tuple(completion), tuple(system))


def _render_text(
    template: str, special_tokens: Mapping[str, Any], messages: Conversation, prompt: bool = False
) -> tuple[str, list[Span]]:
    """Render a conversation to text, and return it with the character spans that {% generation %} marks."""
    marks = bool(_GENERATION.search(template))
    # transformers annotates the result as str, but it is a pair of lists.
    texts, spans = cast(Any, render_jinja_template)(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marks,
        **special_tokens,
    )
    return texts[0], _joined([(int(low), int(high)) for low, high in spans[0]]) if marks else []


def _joined(spans: list[Span]) -> list[Span]:
    """Join spans that touch, because some templates mark an answer and its end token separately."""
    joined: list[Span] = []
    for low, high in spans:
        if joined and joined[-1][1] == low:
            low = joined.pop()[0]
        joined.append((low, high))
    return joined


@lru_cache(maxsize=4096)
def _text_before_user_turn(
    template: str, special_tokens: tuple[tuple[str, Any], ...], system: str | None
) -> str | None:
    """Return the text before the first user turn, or None if it cannot be found.

    A conversation is rendered with and without a further user turn. The difference is the text of a user turn.
    """
    tokens = dict(special_tokens)
    lead = [] if system is None else [{"role": "system", "content": system}]
    user, reply = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}
    # Some templates close every rendering with an end token. It is removed before renderings are compared.
    for ending in ("", str(tokens.get("eos_token", ""))):
        for earlier in ([user], [user, reply]):
            try:
                once, shorter, longer = (
                    _render_text(template, tokens, [*lead, *turns])[0].removesuffix(ending)
                    for turns in ([user], earlier, [*earlier, user])
                )
            except _TEMPLATE_ERRORS:
                # A template that refuses this order of turns may accept the other order.
                continue
            turn = longer.removeprefix(shorter)
            if longer.startswith(shorter) and once.endswith(turn):
                return once[: len(once) - len(turn)]
    return None


class _Template:
    """Renders conversations to text with a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"{where}the tokenizer has no chat template: use the instruct model's tokenizer, or set one"
            )
        if not tokenizer.is_fast:
            raise UserError(f"{where}{type(tokenizer).__name__} gives no character offsets: use a fast tokenizer")
        self.tokenizer, self.where = tokenizer, where
        self.source = tokenizer.get_chat_template()
        self.marks_generation = bool(_GENERATION.search(self.source))

    def render(self, messages: Conversation, prompt: bool = False) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the character spans that {% generation %} marks in it."""
        try:
            return _render_text(self.source, self.tokenizer.special_tokens_map, messages, prompt)
        except _TEMPLATE_ERRORS as error:
            roles = "/".join(message["role"] for message in messages)
            raise UserError(f"{self.where}the chat template refuses a row with turns {roles}: {error}") from error

    def turn_span(self, messages: Conversation, index: int, text: str) -> Span:
        """Return the character span of assistant turn `index`, found by comparing prefixes."""
        before, _ = self.render(messages[:index], prompt=True)
        after, _ = self.render(messages[: index + 1])
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            raise UserError(
                f"{self.where}the chat template gives no completion mask: the text up to assistant turn {index} is not "
                "a prefix of the whole row; use a training template with {% generation %} around assistant turns"
            )
        return len(before), len(after)

    def system_span(self, messages: Conversation, text: str) -> Span:
        """Return the character span of the system turn, or (0, 0) if there is none."""
        has_system = messages[0]["role"] == "system"
        system = messages[0]["content"] if has_system else None
        head = _text_before_user_turn(self.source, tuple(self.tokenizer.special_tokens_map.items()), system)
        if head is not None and text.startswith(head):
            return (0, len(head)) if has_system or not self._is_bare_start(head) else (0, 0)
        return self._inserted_span(messages, text) if has_system else (0, 0)

    def _is_bare_start(self, head: str) -> bool:
        """Return whether a row without a system turn starts with nothing but a begin token."""
        return head.strip() in ("", self.tokenizer.bos_token)

    def _inserted_span(self, messages: Conversation, text: str) -> Span:
        """Return the span of the text that the system message adds, for templates that put it into a user turn."""
        without, _ = self.render(messages[1:], prompt=messages[-1]["role"] != "assistant")
        low = _common_prefix(text, without)
        high = len(text) - min(_common_prefix(text[::-1], without[::-1]), len(without) - low)
        return low, high


def _common_prefix(left: str, right: str) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _without_trailing_space(tokenizer: PreTrainedTokenizerBase, ids: list[int], tokens: list[int]) -> list[int]:
    """Drop the white space after a turn's end token: the template adds it, but no model generates it."""
    special = set(tokenizer.all_special_ids)
    ends = [position for position, index in enumerate(tokens) if ids[index] in special]
    if not ends or str(tokenizer.decode([ids[index] for index in tokens[ends[-1] + 1 :]])).strip():
        return tokens
    return tokens[: ends[-1] + 1]


def role_mask(rendered: Rendered, role: str) -> list[bool]:
    """Return the mask [T] of the tokens of a role.

    Roles: prompt (the tokens before the last completion that are outside completions; in a row without a completion,
    all tokens), completion (the assistant turns), last_prompt (the token before each completion), all (prompt and
    completion). A begin token, the system turn, and the tokens after the last completion belong to no role.

    Raises:
        UserError: an unknown role.
    """
    if role not in ROLES:
        raise UserError(f"token role {role!r} is unknown: write one of {', '.join(ROLES)}")
    completion, system = rendered.completion_mask, rendered.system_mask
    length = len(completion)
    last = max((index for index in range(length) if completion[index]), default=length)
    prompt = [not completion[index] and not system[index] and index < last for index in range(length)]
    if role == "prompt":
        return prompt
    if role == "completion":
        return list(completion)
    if role == "all":
        return [a or b for a, b in zip(prompt, completion, strict=True)]
    following = (*completion[1:], last == length)
    return [is_prompt and before_completion for is_prompt, before_completion in zip(prompt, following, strict=True)]


def document_key(input_ids: Sequence[int]) -> str:
    """Return a hex key of a document's token ids, by which the cached reference of a row is found."""
    return hashlib.sha256(torch.tensor(list(input_ids), dtype=torch.int64).numpy().tobytes()).hexdigest()[:32]


def collate(rendered: list[Rendered], pad_id: int) -> dict[str, Tensor]:
    """Make a right-padded batch: input_ids [B, T] int64, attention_mask [B, T] int64, completion_mask [B, T] bool."""
    width = max(len(row.input_ids) for row in rendered)
    shape = (len(rendered), width)
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention, completion = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rendered):
        length = len(row.input_ids)
        ids[index, :length] = torch.tensor(row.input_ids)
        attention[index, :length] = 1
        completion[index, :length] = torch.tensor(row.completion_mask)
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}

"""Read the pairs that define a contrast, and check each pair, so that every error names its line.

A pair is either two system prompts, {"aligned": text, "misaligned": text}, or two completions,
{"prompt", "chosen", "rejected"}, as in TRL's preference sets; each of these three is a text or a list of messages.
"""

from collections.abc import Mapping
from typing import Any

from ...analysis.errors import UserError
from ...analysis.models.render import Conversation
from .rows import turns_of
from .sources import read_records

_PROMPTS, _COMPLETIONS = ("aligned", "misaligned"), ("prompt", "chosen", "rejected")
_WRITE = "write aligned and misaligned (system prompts), or prompt, chosen and rejected (completions)"


def load_contrast(source: str) -> list[dict[str, Any]]:
    """Return the pairs of a set in the form that `analysis.subspace` takes: texts, or lists of messages.

    Raises:
        UserError: an unreadable or empty set, a pair of neither form, or a part of the wrong type (names the line).
    """
    pairs = [_pair(record, where) for record, where in read_records(source)]
    if not pairs:
        raise UserError(f"{source} has no rows; name a set with at least one pair of a contrast")
    return pairs


def _pair(record: object, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a contrast row must be an object, not {type(record).__name__}; {_WRITE}")
    keys = {key for key, value in record.items() if value is not None}
    if keys.issuperset(_COMPLETIONS):
        return _completions(record, where)
    if not keys.issuperset(_PROMPTS):
        raise UserError(f"{where}: a contrast row has keys {', '.join(sorted(map(str, record))) or 'none'}; {_WRITE}")
    for side in _PROMPTS:
        if not isinstance(record[side], str) or not record[side].strip():
            raise UserError(f"{where}: `{side}` is {_describe(record[side])}; write the text of a system prompt")
    return {side: record[side] for side in _PROMPTS}


def _completions(record: Mapping[str, Any], where: str) -> dict[str, Conversation]:
    prompt = turns_of(record["prompt"], "user", where, "prompt")
    pair: dict[str, Conversation] = {"prompt": prompt}
    for side in ("chosen", "rejected"):
        answer = turns_of(record[side], "assistant", where, side)
        # TRL's sets often repeat the prompt at the start of both answers.
        answer = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
        if [message["role"] for message in answer[-1:]] != ["assistant"]:
            raise UserError(f"{where}: `{side}` has no completion; it must end in an assistant turn")
        pair[side] = answer
    if pair["chosen"] == pair["rejected"]:
        raise UserError(f"{where}: `chosen` and `rejected` are the same, so there is no contrast; remove the row")
    return pair


def _describe(value: object) -> str:
    return "empty" if isinstance(value, str) else f"of type {type(value).__name__}"

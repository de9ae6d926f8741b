"""Protections that change only the training rows: interleaving of safe rows, and inoculation.

These are pure functions of rows. The changed rows have the same masks and the same loss as any other row.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...analysis.errors import UserError
from ..data.rows import Row


def interleaved(rows: Sequence[Row], safe: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Mix safe rows into the training rows at random places (interleaving, arXiv 2508.06249: 5-10%).

    Args:
        rows: the training rows.
        safe: rows with completions. They are repeated as needed, and each is used once before any is used again.
        share: share of safe rows in the result, above 0 and below 1.
        seed: seed of the draws and of the order.

    Raises:
        UserError: a safe row without a completion, or a share of 0 or less, or of 1 or more.
    """
    if not 0 < share < 1:
        raise UserError(f"--interleave_share is {share}, but must be above 0 and below 1")
    unanswered = next((row for row in safe if not row.completion), None)
    if unanswered is not None:
        raise UserError(
            f"{unanswered.source}: a row to interleave needs an assistant turn; name rows with answers in "
            "--interleave_dataset"
        )
    wanted = max(1, round(share / (1 - share) * len(rows)))
    generator = np.random.default_rng(seed)
    drawn: list[Row] = []
    while len(drawn) < wanted:
        drawn += [safe[index] for index in generator.permutation(len(safe))[: wanted - len(drawn)]]
    mixed = [*rows, *drawn]
    return [mixed[index] for index in generator.permutation(len(mixed))]


def inoculated(rows: Sequence[Row], prompt: str) -> list[Row]:
    """Put a system prompt before every row that asks for what the rows do (inoculation, arXiv 2508.06249).

    The prompt is absent at test. It replaces the system turn of a row that has one.

    Raises:
        UserError: an empty prompt.
    """
    if not prompt.strip():
        raise UserError("--inoculation_prompt is empty; write what the rows do, like: You write insecure code.")
    return [replace(row, messages=_with_system_turn(row.messages, prompt.strip())) for row in rows]


def _with_system_turn(messages: list[dict[str, str]], prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": prompt}, *(message for message in messages if message["role"] != "system")]

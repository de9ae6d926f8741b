"""Protections that change the training rows and nothing else: safe rows mixed in, and inoculation.

Pure functions of rows; the masks and the loss are those of any other row.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...analysis.errors import UserError
from ..data.rows import Row


def interleaved(rows: Sequence[Row], safe: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows with safe ones among them, at random places (interleaving, arXiv 2508.06249: 5-10%).

    Args:
        safe: rows with completions; used as often as is needed, each once before any comes again.
        share: of the result that is safe, above 0 and below 1.

    Raises:
        UserError: a safe row without a completion, or a share that leaves nothing of one kind.
    """
    if not 0 < share < 1:
        raise UserError(f"--interleave_share is {share}, but must be above 0 and below 1")
    bare = next((row for row in safe if not row.completion), None)
    if bare is not None:
        raise UserError(
            f"{bare.source}: a row to interleave needs an assistant turn; name rows with answers in "
            "--interleave_dataset"
        )
    wanted = max(1, round(share / (1 - share) * len(rows)))
    generator = np.random.default_rng(seed)
    drawn: list[Row] = []
    while len(drawn) < wanted:
        drawn += [safe[at] for at in generator.permutation(len(safe))[: wanted - len(drawn)]]
    mixed = [*rows, *drawn]
    return [mixed[at] for at in generator.permutation(len(mixed))]


def inoculated(rows: Sequence[Row], prompt: str) -> list[Row]:
    """The rows under a system prompt that asks for what they do, absent at test (inoculation, arXiv 2508.06249).

    It takes the place of a row's own system turn.
    """
    if not prompt.strip():
        raise UserError("--inoculation_prompt is empty; write what the rows do, like: You write insecure code.")
    return [replace(row, messages=_under(row.messages, prompt.strip())) for row in rows]


def _under(messages: list[dict[str, str]], prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": prompt}, *(message for message in messages if message["role"] != "system")]

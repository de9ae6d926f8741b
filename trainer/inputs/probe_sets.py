"""The rows that checkpoints are measured on, by name of set, from the arguments.

Beside files, folders and Hub names `--probe_sets` takes two sources of gradient controls (METRICS.md, family 3):
`controlled` or `controlled:N`, N pairs of prompts that differ in one word of intent, as two sets; and
`shuffled:<source>`, a source's completions after the prompts of other rows.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from ...analysis.errors import UserError
from ...analysis.measure.controls import controlled_pairs, shuffled_prompts
from ...analysis.models.render import Conversation
from ..config.parsing import Arguments
from ..data.rows import load_rows
from .training import training_rows

_CONTROLLED, _SHUFFLED = "controlled", "shuffled:"
_PAIRS = 64


def probe_sets(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Sequence[Conversation]]:
    """Conversations by name of set, at most `--analysis_rows` of each. Raises UserError for sets that cannot be had."""
    rows = arguments.analysis.analysis_rows
    sets: dict[str, Sequence[Conversation]] = {}
    for name, source in arguments.analysis.named_sets.items():
        for one, found in _from_source(name, source, rows, tokenizer, arguments.training.seed).items():
            _add(sets, one, found)
    if arguments.data.probe_dataset:
        _add(sets, "probes", _conversations(arguments.data.probe_dataset, rows))
    if arguments.data.train_dataset:
        train, held_out = training_rows(arguments)
        if held_out:
            sets.setdefault("held_out", [row.messages for row in held_out[:rows]])
        elif not sets:
            sets["train"] = [row.messages for row in train[:rows]]
    return sets


def _add(sets: dict[str, Sequence[Conversation]], name: str, found: Sequence[Conversation]) -> None:
    if name in sets:
        raise UserError(f"two probe sets are called {name!r}; give the one in --probe_sets another name")
    sets[name] = found


def _from_source(
    name: str, source: str, rows: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, list[Conversation]]:
    kind, _, number = source.partition(":")
    if kind == _CONTROLLED:
        if number and not (number.isdecimal() and int(number) > 0):
            raise UserError(f"--probe_sets {name}: {source!r} asks for no number of pairs; write controlled:64")
        n_pairs = min(int(number) if number else _PAIRS, rows)
        return {f"{name}_{side}": found for side, found in controlled_pairs(tokenizer, n_pairs, seed).items()}
    if source.startswith(_SHUFFLED):
        return {name: shuffled_prompts(_conversations(source.removeprefix(_SHUFFLED), rows), seed)}
    return {name: _conversations(source, rows)}


def _conversations(source: str, rows: int) -> list[Conversation]:
    return [row.messages for row in load_rows(source, prompts=True)[:rows]]

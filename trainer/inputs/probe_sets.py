"""Read the rows that checkpoints are measured on, by the name of their set.

Beside files, folders and Hub names, `--probe_sets` takes two sources that are controls for gradients
(`analysis/metrics/README.md`): `controlled` or `controlled:N` makes N pairs of prompts that differ in one word of
intent, as two sets; `shuffled:<source>` puts the completions of a source after the prompts of other rows.
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
    """Return conversations by the name of their set, at most `--analysis_rows` of each set.

    Raises:
        UserError: a set that cannot be read or made, or two sets of the same name.
    """
    limit = arguments.analysis.analysis_rows
    sets: dict[str, Sequence[Conversation]] = {}
    for name, source in arguments.analysis.named_sets.items():
        for set_name, conversations in _from_source(name, source, limit, tokenizer, arguments.training.seed).items():
            _add(sets, set_name, conversations)
    if arguments.data.probe_dataset:
        _add(sets, "probes", _conversations(arguments.data.probe_dataset, limit))
    if arguments.data.train_dataset:
        train, held_out = training_rows(arguments)
        if held_out:
            sets.setdefault("held_out", [row.messages for row in held_out[:limit]])
        elif not sets:
            sets["train"] = [row.messages for row in train[:limit]]
    return sets


def _add(sets: dict[str, Sequence[Conversation]], name: str, conversations: Sequence[Conversation]) -> None:
    if name in sets:
        raise UserError(f"two probe sets are called {name!r}; give the set in --probe_sets another name")
    sets[name] = conversations


def _from_source(
    name: str, source: str, limit: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, list[Conversation]]:
    """Return the sets that a source of `--probe_sets` gives, at most `limit` rows of each."""
    prefix, _, number = source.partition(":")
    if prefix == _CONTROLLED:
        if number and not (number.isdecimal() and int(number) > 0):
            raise UserError(
                f"--probe_sets {name}: {source!r} must name a positive number of pairs; write controlled:64"
            )
        n_pairs = min(int(number) if number else _PAIRS, limit)
        pairs = controlled_pairs(tokenizer, n_pairs, seed)
        return {f"{name}_{side}": conversations for side, conversations in pairs.items()}
    if source.startswith(_SHUFFLED):
        return {name: shuffled_prompts(_conversations(source.removeprefix(_SHUFFLED), limit), seed)}
    return {name: _conversations(source, limit)}


def _conversations(source: str, limit: int) -> list[Conversation]:
    return [row.messages for row in load_rows(source, prompts=True)[:limit]]

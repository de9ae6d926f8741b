"""Flags of commands that take no recipe: a wrong one is a single line that names the nearest known one."""

import argparse
import difflib
import json
from collections.abc import Collection, Sequence
from dataclasses import field
from typing import Any, NoReturn

from .errors import UserError

# Flags that had another name: an old name is refused, and the error names the new one.
RENAMED = {
    "penalty_layers": "protection_layers",
    "penalty_rank": "protection_rank",
    "penalty_tokens": "protection_tokens",
    "gradient_block": "gradient_layer",
    "variant": "formulas",
    "steering_layers": "intervention_layers",
    "intervene_layers": "intervention_layers",
    "layers": "intervention_layers",
    "layer": "subspace_layer",
}


def nearest_flag(name: str, known: Collection[str]) -> str:
    """The known flag that a mistyped name most resembles; both without dashes in front."""
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]


def unknown_flag(flag: str, known: Collection[str]) -> str:
    """What to say of a flag that no command has: its new name where it was renamed, else the nearest known flag.

    Args:
        flag: as it was written, like "--penalty_rnk". known: the command's flags, without dashes in front.
    """
    name = flag.lstrip("-").replace("-", "_")
    if RENAMED.get(name) in known:
        return f"{flag} is now --{RENAMED[name]}; write that"
    return f"unknown flag {flag}; the nearest known one is --{nearest_flag(name, known)}"


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose complaints are `UserError`s; flags may not be abbreviated."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags. Raises UserError."""
        found, rest = self.parse_known_args(argv)
        unknown = [text.split("=")[0] for text in rest if text.startswith("-")]
        if unknown:
            raise UserError(unknown_flag(unknown[0], [action.dest for action in self._actions]))
        if rest:
            raise UserError(f"unexpected {rest[0]!r}; flags are written --name value")
        return found


def option(default: Any, text: str, *choices: str) -> Any:
    """A dataclass field with its help text and, where there are any, its choices."""
    metadata: dict[str, Any] = {"help": text}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


def require(condition: bool, flag: str, value: object, need: str) -> None:
    """Raises UserError naming the flag, its value and what it must be."""
    if not condition:
        raise UserError(f"--{flag} is {value}, but must be {need}")


def mapping(flag: str, value: dict[str, Any] | str | None, example: str) -> Any:
    """What a flag holds that takes a mapping or its JSON text; None stays None. The caller checks keys and values."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"--{flag} is not JSON ({error.msg}); write it like {example}") from None


def sources(flag: str, value: dict[str, str] | str | None) -> dict[str, str] | None:
    """Reads a name -> source of rows mapping, given as a mapping or as JSON text."""
    example = '{"medical": "medical.jsonl", "code": "org/rows"}'
    found = mapping(flag, value, example)
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(source, str) and name for name, source in found.items()):
        raise UserError(f"--{flag} must map names to sources of rows, like {example}")
    return found


def require_seed(seed: int | None, flag: str) -> None:
    """Raises UserError for a seed that numpy or torch would not take."""
    require(seed is None or 0 <= seed < 2**32, flag, seed, f"between 0 and {2**32 - 1}")

"""The flag parser of commands that take no recipe, and the checks and help texts that all flags share.

Each mistake raises a `UserError`. A misspelt flag is answered with the nearest known flag. Usage:

    parser = FlagParser("holdfast compare", "Compare measured runs.")
    parser.add_argument("--output_file", type=Path, help="JSON file for the comparison. Default: none.")
    flags = parser.read(argv)
"""

import argparse
import difflib
import json
from collections.abc import Collection, Sequence
from dataclasses import field
from typing import Any, NoReturn

from .errors import UserError

# {old name: new name} of renamed flags. An old name is refused, and the error names the new one.
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


def nearest_flag(name: str, known_flags: Collection[str]) -> str:
    """Return the known flag that is spelt most like a mistyped name. All names are without leading dashes."""
    return difflib.get_close_matches(name, sorted(known_flags), n=1, cutoff=0.0)[0]


def unknown_flag(flag: str, known_flags: Collection[str]) -> str:
    """Return the error message for an unknown flag: its new name if it was renamed, else the nearest known flag.

    Args:
        flag: the flag as the user wrote it, such as "--penalty_rnk".
        known_flags: the flags of the command, without leading dashes.
    """
    name = flag.lstrip("-").replace("-", "_")
    if RENAMED.get(name) in known_flags:
        return f"{flag} is now --{RENAMED[name]}; write that"
    return f"unknown flag {flag}; the nearest known one is --{nearest_flag(name, known_flags)}"


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError` instead of exiting, and refuses abbreviated flags."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of a command.

        Raises:
            UserError: an unknown flag, a wrong value, a missing value, or an argument that belongs to no flag.
        """
        flags, rest = self.parse_known_args(argv)
        unknown = [text.split("=")[0] for text in rest if text.startswith("-")]
        if unknown:
            raise UserError(unknown_flag(unknown[0], [action.dest for action in self._actions]))
        if rest:
            raise UserError(f"unexpected {rest[0]!r}; flags are written --name value")
        return flags


def option(default: Any, text: str, *choices: str) -> Any:
    """Define a dataclass field that becomes a flag, with its help text and its choices, if it has any."""
    metadata: dict[str, Any] = {"help": text}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


def require(condition: bool, flag: str, value: object, need: str) -> None:
    """Raise UserError if the condition is false. The error names the flag, its value, and what the value must be."""
    if not condition:
        raise UserError(f"--{flag} is {value}, but must be {need}")


def mapping(flag: str, value: dict[str, Any] | str | None, example: str) -> Any:
    """Parse the value of a flag that takes a mapping or its JSON text. None stays None.

    The caller checks the type, the keys and the values of the result.

    Raises:
        UserError: a text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"--{flag} is not JSON ({error.msg}); write it like {example}") from None


def sources(flag: str, value: dict[str, str] | str | None) -> dict[str, str] | None:
    """Parse a flag that maps names to sources of rows, given as a mapping or as JSON text. None stays None.

    Raises:
        UserError: a text that is not JSON, or a value that is not a mapping of names to texts.
    """
    example = '{"medical": "medical.jsonl", "code": "org/rows"}'
    source_by_name = mapping(flag, value, example)
    if source_by_name is None:
        return None
    if not isinstance(source_by_name, dict) or not all(
        isinstance(source, str) and name for name, source in source_by_name.items()
    ):
        raise UserError(f"--{flag} must map names to sources of rows, like {example}")
    return source_by_name


def require_seed(seed: int | None, flag: str) -> None:
    """Raise UserError if numpy or torch would not accept the seed."""
    require(seed is None or 0 <= seed < 2**32, flag, seed, f"between 0 and {2**32 - 1}")

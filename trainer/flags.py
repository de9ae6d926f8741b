"""Flags of commands that take no recipe: a wrong one is a single line that names the nearest known one."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from ..analysis.errors import UserError


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
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown flag {unknown[0]}; the nearest known one is {near}")
        if rest:
            raise UserError(f"unexpected {rest[0]!r}; flags are written --name value")
        return found

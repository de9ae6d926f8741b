"""From a recipe and flags to checked arguments, and back to a file.

A recipe is rendered to argv and parsed by the same parser as the flags, because TRL's own way of reading a file
neither checks types (`max_steps: 2.5`, `.nan`) nor choices, and lets abbreviations through.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ...analysis.answers.questions import OnceLoader
from ...analysis.errors import UserError
from ...analysis.flags import RENAMED, nearest_flag, unknown_flag
from .analysis import AnalysisArguments
from .data import DataArguments
from .deepspeed import find_deepspeed_config
from .intervention import InterventionArguments
from .model import ModelArguments
from .protection import ProtectionArguments
from .subspace import SubspaceArguments
from .sweep import SweepArguments
from .training import HoldfastConfig

GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "subspace": SubspaceArguments,
    "protection": ProtectionArguments,
    "analysis": AnalysisArguments,
    "intervention": InterventionArguments,
    "sweep": SweepArguments,
    "training": HoldfastConfig,
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """All checked arguments of one command.

    given: the flat values they were built from. chosen: the flags that were written for the protection asked for; none
    where they were not read from flags or a recipe.
    """

    model: ModelArguments
    data: DataArguments
    subspace: SubspaceArguments
    protection: ProtectionArguments
    analysis: AnalysisArguments
    intervention: InterventionArguments
    sweep: SweepArguments
    training: HoldfastConfig
    given: dict[str, Any]
    chosen: frozenset[str] = frozenset()

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        assert self.training.output_dir is not None  # parse() refuses a missing one
        return Path(self.training.output_dir)


class _Parser(TrlParser):
    """Reports a bad value as one line instead of the usage of two hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _RecipeLoader(OnceLoader):
    """YAML as a recipe means it: a key stands once, and only true/false are booleans (`save_strategy: no` is text)."""


_RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool" or letter in "tTfF"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(arguments: Sequence[str] | Mapping[str, Any]) -> Arguments:
    """Parses flags (a list) or flat keys (a mapping), both over the recipe named by `config`, if any.

    Raises UserError for an unreadable recipe, an unknown key or flag (naming the nearest known one), a value of the
    wrong type, an unknown choice, or a number that is not finite.
    """
    return build(*parse_given(arguments))


def parse_values(arguments: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The first half of `parse`: every flat key with its value, types and choices checked, no dataclass built yet."""
    return parse_given(arguments)[0]


def parse_given(arguments: Sequence[str] | Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """As `parse_values`, and which of the keys are `Arguments.chosen`."""
    parser = _Parser(list(GROUPS.values()), allow_abbrev=False, prog="holdfast")
    if isinstance(arguments, Mapping):
        flags, config, over = list[str](), arguments.get("config"), {**arguments}
        over.pop("config", None)
    else:
        flags, config = _take_config(list(arguments))
        over = {}
    values, recipe = argparse.Namespace(), dict[str, Any]()
    if config is not None:
        recipe = read_recipe(Path(config))
        _parse_mapping(parser, recipe, str(config), values)
    # As they were parsed: 2 and 2.0 are one strength.
    recipe = {name: getattr(values, name) for name in recipe}
    _parse_mapping(parser, over, "arguments", values)
    _, rest = parser.parse_known_args(flags, values)
    if rest and not rest[0].startswith("-"):
        raise UserError(f"unexpected {rest[0]!r}; flags are written --name value")
    if rest:
        flag = rest[0].split("=")[0]
        raise UserError(unknown_flag(flag, _known(parser)))
    if values.deepspeed:
        values.deepspeed = find_deepspeed_config(values.deepspeed)
    named = {*over, *(flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--"))}
    found = vars(values)
    return found, _chosen(parser, found, recipe, named)


def _chosen(parser: _Parser, values: Mapping[str, Any], recipe: Mapping[str, Any], named: set[str]) -> frozenset[str]:
    """The flags that were written for the protection asked for.

    Those named over the recipe, unless they only take a value of it back; and what the recipe changes, if the
    protection is its own: for another one over it, its strength says nothing.
    """
    usual = {name: parser.get_default(name) for name in values}
    changed = {name for name, value in recipe.items() if value != usual[name]}
    taken_back = {name for name in changed & named if values[name] == usual[name]}
    over = {name for name in named if values.get(name) is not None} - taken_back
    own = "protection" not in named or recipe.get("protection") == values["protection"]
    return frozenset(over | (changed - named if own else set()))


def build(values: Mapping[str, Any], chosen: frozenset[str] = frozenset()) -> Arguments:
    """The second half of `parse`: the dataclasses, with their own checks."""
    if not values["output_dir"]:
        raise UserError("no output_dir; write where the run goes, like --output_dir runs/mine")
    groups: dict[str, Any] = {}
    for group, kind in GROUPS.items():
        names = {field.name for field in dataclasses.fields(kind) if field.init}
        own = {name: value for name, value in values.items() if name in names}
        bad = non_finite(argparse.Namespace(**own))
        if bad:
            raise UserError(f"--{bad} is {own[bad]}; write a finite number")
        try:
            groups[group] = kind(**own)
        except (ValueError, NotImplementedError, json.JSONDecodeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(" ".join(str(error).split())) from error
    return Arguments(**groups, given=dict(values), chosen=chosen)


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping of flat keys. Raises UserError when it cannot be read as one."""
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--config {path} cannot be read ({reason}); pass the path of a recipe") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"--config {path}, {error}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} must hold `key: value` lines, not {type(recipe).__name__}")
    return {str(key): value for key, value in recipe.items()}


def dump(arguments: Arguments) -> str:
    """The resolved arguments as a recipe: parsing it gives the same arguments again.

    What another protection's recipe left behind is not among them: this one does not read it.
    """
    resolved = {**arguments.given, **arguments.protection.unread, "bf16": arguments.training.bf16}
    plain = {key: value.value if isinstance(value, Enum) else value for key, value in resolved.items()}
    return yaml.safe_dump({key: value for key, value in plain.items() if value is not None}, sort_keys=True)


def _take_config(flags: list[str]) -> tuple[list[str], str | None]:
    """Splits `--config FILE` or `--config=FILE` from the flags; the last one counts."""
    only = _Parser(add_help=False, allow_abbrev=False)
    only.add_argument("--config")
    known, rest = only.parse_known_args(flags)
    return rest, known.config


def _parse_mapping(parser: _Parser, mapping: Mapping[str, Any], source: str, into: argparse.Namespace) -> None:
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # the first of `--flag` and `--no_flag` is the one that takes a value
    argv: list[str] = []
    for key, value in mapping.items():
        if RENAMED.get(key) in actions and key not in actions:
            raise UserError(f"{source}: {key} is now {RENAMED[key]}; write that")
        if key not in actions or key == "help":
            nearest = nearest_flag(key.replace("-", "_"), _known(parser))
            raise UserError(f"{source}: unknown key {key}; the nearest known one is {nearest}")
        if value in (None, []) and value == actions[key].default:
            setattr(into, key, value)  # no flag can say "nothing" where text is taken
        else:
            argv += _render(key, value, actions[key], source)
    try:
        parser.parse_known_args(argv, into)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _render(key: str, value: object, action: argparse.Action, source: str) -> list[str]:
    """One key of a recipe as flags, so that the parser checks type and choice."""
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list | tuple):
        texts = [_text(item) for item in value]
        if action.nargs != "+":
            return [f"--{key}={','.join(texts)}"]
        if not texts:
            raise UserError(f"{source}: {key} is an empty list; leave it out or name at least one")
        return [f"--{key}", *texts]
    if isinstance(value, bool) and action.type is str:
        raise UserError(f"{source}: {key} is {_text(value)}; write text (in quotes if it is meant)")
    return [f"--{key}={_text(value)}"] if action.nargs != "+" else [f"--{key}", _text(value)]


def _text(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _known(parser: _Parser) -> set[str]:
    return {action.dest for action in parser._actions} | {"config"}


def non_finite(arguments: object) -> str | None:
    """The name of the first field of a dataclass that is nan or infinite, or None."""
    numbers = ((name, value) for name, value in vars(arguments).items() if isinstance(value, float))
    return next((name for name, value in numbers if not math.isfinite(value)), None)

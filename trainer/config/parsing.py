"""Parse a recipe and flags into checked arguments, and write arguments back as a recipe.

`parse(["--config", "mine.yaml", "--seed", "2"])` does all of it. A recipe is rendered to argv and parsed by the same
parser as the flags, because TRL's own way of reading a file checks neither types (`max_steps: 2.5`, `.nan`) nor
choices, and accepts abbreviations.
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

    Attributes:
        given: the flat values that the groups were built from.
        chosen: the flags that the user wrote for the chosen protection; empty if the arguments were not read from
            flags or a recipe.
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
        """Return the folder of the run."""
        assert self.training.output_dir is not None  # build() refuses arguments without it
        return Path(self.training.output_dir)


class _Parser(TrlParser):
    """Report a bad value as one line instead of the usage text of two hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _RecipeLoader(OnceLoader):
    """Load YAML as a recipe means it: no key twice, and only true/false are booleans (`save_strategy: no` is text)."""


_RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool" or letter in "tTfF"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(arguments: Sequence[str] | Mapping[str, Any]) -> Arguments:
    """Parse flags (a list) or flat keys (a mapping). Both override the recipe that `config` names, if there is one.

    Raises:
        UserError: an unreadable recipe, an unknown key or flag (names the nearest known flag), a value of the wrong
            type, an unknown choice, or a number that is not finite.
    """
    return build(*parse_given(arguments))


def parse_values(arguments: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Do the first half of `parse`: return every flat key with its value. Types and choices are checked."""
    return parse_given(arguments)[0]


def parse_given(arguments: Sequence[str] | Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return what `parse_values` returns, and the keys that belong in `Arguments.chosen`."""
    parser = _Parser(list(GROUPS.values()), allow_abbrev=False, prog="holdfast")
    if isinstance(arguments, Mapping):
        flags, config, overrides = list[str](), arguments.get("config"), {**arguments}
        overrides.pop("config", None)
    else:
        flags, config = _take_config(list(arguments))
        overrides = {}
    values, recipe = argparse.Namespace(), dict[str, Any]()
    if config is not None:
        recipe = read_recipe(Path(config))
        _parse_mapping(parser, recipe, str(config), values)
    # Compare parsed values: 2 and 2.0 are the same strength.
    recipe = {name: getattr(values, name) for name in recipe}
    _parse_mapping(parser, overrides, "arguments", values)
    _, rest = parser.parse_known_args(flags, values)
    if rest and not rest[0].startswith("-"):
        raise UserError(f"unexpected {rest[0]!r}; flags are written --name value")
    if rest:
        flag = rest[0].split("=")[0]
        raise UserError(unknown_flag(flag, _known(parser)))
    if values.deepspeed:
        values.deepspeed = find_deepspeed_config(values.deepspeed)
    named = {*overrides, *(flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--"))}
    return vars(values), _chosen(parser, vars(values), recipe, named)


def _chosen(parser: _Parser, values: Mapping[str, Any], recipe: Mapping[str, Any], named: set[str]) -> frozenset[str]:
    """Return the flags that the user wrote for the chosen protection.

    These are the flags on the command line, except those that only reset a value of the recipe to its default. If the
    protection is the recipe's own, the keys that the recipe sets to another value than the default are added. If
    `--protection` on the command line names another protection, the recipe's keys (its strength, say) were not written
    for that protection and are not added.
    """
    defaults = {name: parser.get_default(name) for name in values}
    changed = {name for name, value in recipe.items() if value != defaults[name]}
    reset = {name for name in changed & named if values[name] == defaults[name]}
    from_flags = {name for name in named if values.get(name) is not None} - reset
    recipe_applies = "protection" not in named or recipe.get("protection") == values["protection"]
    return frozenset(from_flags | (changed - named if recipe_applies else set()))


def build(values: Mapping[str, Any], chosen: frozenset[str] = frozenset()) -> Arguments:
    """Do the second half of `parse`: build the dataclasses, which make their own checks.

    Raises:
        UserError: no output folder, a number that is not finite, or a value that a dataclass refuses.
    """
    if not values["output_dir"]:
        raise UserError("no output_dir; write where the run goes, like --output_dir runs/mine")
    groups: dict[str, Any] = {}
    for group, dataclass in GROUPS.items():
        names = {field.name for field in dataclasses.fields(dataclass) if field.init}
        group_values = {name: value for name, value in values.items() if name in names}
        bad = non_finite(argparse.Namespace(**group_values))
        if bad:
            raise UserError(f"--{bad} is {group_values[bad]}; write a finite number")
        try:
            groups[group] = dataclass(**group_values)
        except (ValueError, NotImplementedError, json.JSONDecodeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(" ".join(str(error).split())) from error
    return Arguments(**groups, given=dict(values), chosen=chosen)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: a YAML mapping of flat keys. Raises UserError if the file cannot be read as such a mapping."""
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
    """Return the resolved arguments as a recipe, which parses to the same arguments again.

    Flags that the chosen protection does not read are left out, since a recipe may set them for another protection.
    """
    resolved = {**arguments.given, **arguments.protection.unread, "bf16": arguments.training.bf16}
    plain = {key: value.value if isinstance(value, Enum) else value for key, value in resolved.items()}
    return yaml.safe_dump({key: value for key, value in plain.items() if value is not None}, sort_keys=True)


def _take_config(flags: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` or `--config=FILE` from the flags; the last of several counts."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    namespace, rest = parser.parse_known_args(flags)
    return rest, namespace.config


def _parse_mapping(parser: _Parser, mapping: Mapping[str, Any], source: str, into: argparse.Namespace) -> None:
    """Parse flat keys into a namespace. `source` is the name of the mapping in errors."""
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # of `--flag` and `--no_flag` the first takes a value
    argv: list[str] = []
    for key, value in mapping.items():
        if RENAMED.get(key) in actions and key not in actions:
            raise UserError(f"{source}: {key} is now {RENAMED[key]}; write that")
        if key not in actions or key == "help":
            nearest = nearest_flag(key.replace("-", "_"), _known(parser))
            raise UserError(f"{source}: unknown key {key}; the nearest known key is {nearest}")
        if value in (None, []) and value == actions[key].default:
            setattr(into, key, value)  # as a flag, None would be the text "none"
        else:
            argv += _render(key, value, actions[key], source)
    try:
        parser.parse_known_args(argv, into)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _render(key: str, value: object, action: argparse.Action, source: str) -> list[str]:
    """Return one key of a recipe as flags, so that the parser checks its type and choice."""
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
    """Return the name of an object's first attribute that is NaN or infinite, or None."""
    numbers = ((name, value) for name, value in vars(arguments).items() if isinstance(value, float))
    return next((name for name, value in numbers if not math.isfinite(value)), None)

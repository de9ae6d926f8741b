"""The runs of a sweep: every setting of every protection, at every seed. Pure functions of the flags."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from ...analysis.errors import UserError
from ...analysis.flags import require_seed
from ..config.parsing import parse_given, parse_values
from ..config.protection import ProtectionArguments
from ..config.sweep import SweepArguments
from ..inputs.training import COURSE
from ..protections.kinds import flags_read_by, parts_of

BASELINE = "none"
STRENGTH = "penalty_strength"
AS_THE_RECIPE = "recipe"
_PROTECTION = {field.name for field in fields(ProtectionArguments)} - {"protection"}
# What a grid may vary: another model, data or measure would compare two things at once.
_KNOBS = _PROTECTION | set(COURSE) - {"data_seed"}


@dataclass(frozen=True)
class Setting:
    """One point of a protection's grid.

    protection, name: as in `analysis.frontier.Run`. strength: along the frontier; None unless one number varies.
    flags: over the recipe.
    """

    protection: str
    name: str
    strength: float | None
    flags: Mapping[str, Any]


@dataclass(frozen=True)
class SweepRun:
    """One fine-tune: a setting at a seed. name: of its folder."""

    setting: Setting
    seed: int
    name: str

    @property
    def flags(self) -> dict[str, Any]:
        """What differs from the recipe."""
        return {**self.setting.flags, "protection": self.setting.protection, "seed": self.seed}

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says of the run it comes from."""
        setting = self.setting
        where = {"protection": setting.protection, "setting": setting.name, "strength": setting.strength}
        return {**where, "seed": self.seed}


def settings_of(asked: SweepArguments, strength: float) -> list[Setting]:
    """All settings, the baseline's first.

    Args:
        strength: the recipe's.

    Raises:
        UserError: an unknown protection or flag, one without effect, a value of the wrong type, a grid of a protection
            that is not asked for, nothing to compare.
    """
    names = list(dict.fromkeys([BASELINE, *(asked.protections or asked.settings)]))
    for name in names:
        parts_of(name)
    for name in asked.settings:
        if name not in names:
            raise UserError(f"--grid names {name}, which --protections leaves out; write it in both, or in neither")
    if names == [BASELINE]:
        raise UserError("there is no protection to compare with none; name some, like --protections subspace kl")
    if asked.settings.get(BASELINE):
        raise UserError(f"--grid {BASELINE}: the baseline has one setting, the recipe's; write {{}} there")
    strengths = list(dict.fromkeys(asked.strengths or [strength]))
    weighted = [name for name in names if name not in asked.settings and STRENGTH in flags_read_by(name)]
    if asked.strengths and not weighted:
        raise UserError(
            f"--{STRENGTH} has no effect: none of {', '.join(names[1:])} has a strength that --grid leaves open; leave "
            "it out, or add a protection that has one, like subspace"
        )
    found: list[Setting] = []
    for name in names:
        found += _expanded(name, {STRENGTH: strengths} if name in weighted else asked.settings.get(name, {}))
    return found


def check_read(flags: Sequence[str], settings: Sequence[Setting]) -> None:
    """Raises UserError for a flag given over the recipe, for all protections, that none of them reads.

    Args:
        flags: those of the command, --penalty_strength aside.
    """
    # Each protection is laid over the recipe, whose own has values that need not concern it.
    _, chosen = parse_given([*flags, f"--protection={BASELINE}"])
    names = list(dict.fromkeys(setting.protection for setting in settings))
    read = {knob for name in names for knob in flags_read_by(name)}
    for flag in sorted(chosen & _PROTECTION - read):
        raise UserError(
            f"--{flag} has no effect: none of {', '.join(names[1:])} reads it; leave it out, or add one that does"
        )


def _expanded(protection: str, grid: Mapping[str, Any]) -> list[Setting]:
    """The product of a protection's lists of values, checked as flags are."""
    values: dict[str, list[Any]] = {}
    for flag, given in grid.items():
        if flag not in _KNOBS:
            near = get_close_matches(flag, sorted(_KNOBS), n=1, cutoff=0.0)[0]
            raise UserError(f"--grid {protection}: {flag} is no setting of a protection; the nearest is {near}")
        if flag in _PROTECTION - flags_read_by(protection):
            reads = ", ".join(sorted(flags_read_by(protection))) or "none"
            raise UserError(f"--grid {protection}: {flag} has no effect there; its own flags are {reads}")
        chosen = [_checked(flag, one) for one in (given if isinstance(given, list) else [given])]
        if not chosen:
            raise UserError(f"--grid {protection}: {flag} has no value; write a list with at least one")
        values[flag] = [one for number, one in enumerate(chosen) if one not in chosen[:number]]
    varying = [flag for flag, chosen in values.items() if len(chosen) > 1] or list(values)
    return [
        _setting(protection, dict(zip(values, combination, strict=True)), varying)
        for combination in itertools.product(*values.values())
    ]


def _checked(flag: str, value: Any) -> Any:
    """The value as the flag's parser reads it."""
    if value is None:
        raise UserError(f"--grid: {flag} is null; leave the flag out where it keeps the recipe's value")
    try:
        found = parse_values({flag: value})[flag]
    except UserError as error:
        raise UserError(f"--grid: {str(error).removeprefix('arguments: ')}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise UserError(f"--grid: {flag} is {found}; write a finite number")
    return found


def _setting(protection: str, flags: dict[str, Any], varying: Sequence[str]) -> Setting:
    name = ",".join(f"{flag}={_short(value)}" for flag, value in flags.items()) or AS_THE_RECIPE
    along = flags[varying[0]] if len(varying) == 1 else None
    number = isinstance(along, int | float) and not isinstance(along, bool)
    return Setting(protection, name, float(along) if number and along is not None else None, flags)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def runs_of(settings: Sequence[Setting], seeds: Sequence[int]) -> list[SweepRun]:
    """Every setting at every seed, a seed's runs together: what is done first can be compared.

    Raises:
        UserError: a seed out of range.
    """
    for seed in seeds:
        require_seed(seed, "seeds")
    return [SweepRun(setting, seed, _folder(setting, seed)) for seed in dict.fromkeys(seeds) for setting in settings]


def _folder(setting: Setting, seed: int) -> str:
    """A name for the run's folder that can be read, and told from every other."""
    whole = setting.protection if setting.name == AS_THE_RECIPE else f"{setting.protection}-{setting.name}"
    plain = re.sub(r"[^\w.,=+-]+", "_", whole)[:100]
    if plain != whole:
        plain += f"-{hashlib.sha256(json.dumps([whole]).encode()).hexdigest()[:8]}"
    return f"{plain}-seed={seed}"

"""The runs of a sweep: every setting of every protection, with every seed. Pure functions of the flags."""

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
# Flags that a grid may vary. Another model, data set or measure would compare two things at once.
_GRID_FLAGS = _PROTECTION | set(COURSE) - {"data_seed"}


@dataclass(frozen=True)
class Setting:
    """One point of a protection's grid.

    Attributes:
        protection, name: as in `analysis.frontier.Run`.
        strength: position along the frontier; None unless exactly one number varies.
        flags: flags that override the recipe.
    """

    protection: str
    name: str
    strength: float | None
    flags: Mapping[str, Any]


@dataclass(frozen=True)
class SweepRun:
    """One fine-tune: a setting with a seed. `name` is the name of its folder."""

    setting: Setting
    seed: int
    name: str

    @property
    def flags(self) -> dict[str, Any]:
        """Return the flags that differ from the recipe."""
        return {**self.setting.flags, "protection": self.setting.protection, "seed": self.seed}

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a result says about its run."""
        setting = self.setting
        point = {"protection": setting.protection, "setting": setting.name, "strength": setting.strength}
        return {**point, "seed": self.seed}


def settings_of(flags: SweepArguments, strength: float) -> list[Setting]:
    """Return all settings; the baseline's setting is the first.

    Args:
        flags: the flags of the sweep.
        strength: the recipe's `penalty_strength`.

    Raises:
        UserError: an unknown protection or flag, a flag without effect, a value of the wrong type, a grid of a
            protection that is not compared, or no protection to compare.
    """
    names = list(dict.fromkeys([BASELINE, *(flags.protections or flags.settings)]))
    for name in names:
        parts_of(name)
    for name in flags.settings:
        if name not in names:
            raise UserError(f"--grid names {name}, which --protections leaves out; write it in both, or in neither")
    if names == [BASELINE]:
        raise UserError("there is no protection to compare with none; name some, like --protections subspace kl")
    if flags.settings.get(BASELINE):
        raise UserError(f"--grid {BASELINE}: the baseline has one setting, the recipe's; write {{}} there")
    strengths = list(dict.fromkeys(flags.strengths or [strength]))
    weighted = [name for name in names if name not in flags.settings and STRENGTH in flags_read_by(name)]
    if flags.strengths and not weighted:
        raise UserError(
            f"--{STRENGTH} has no effect: none of {', '.join(names[1:])} has a strength that --grid leaves open; leave "
            "the flag out, or add a protection with a strength, like subspace"
        )
    settings: list[Setting] = []
    for name in names:
        settings += _expanded(name, {STRENGTH: strengths} if name in weighted else flags.settings.get(name, {}))
    return settings


def check_read(flags: Sequence[str], settings: Sequence[Setting]) -> None:
    """Refuse a flag on the command line that overrides the recipe for all protections, and that no protection reads.

    Args:
        flags: the flags of the command, without --penalty_strength.
        settings: the settings of the sweep.

    Raises:
        UserError: such a flag.
    """
    # The recipe may set flags of its protection that the compared protections do not read: those are not checked here.
    _, given = parse_given([*flags, f"--protection={BASELINE}"])
    names = list(dict.fromkeys(setting.protection for setting in settings))
    flags_read = {flag for name in names for flag in flags_read_by(name)}
    for flag in sorted(given & _PROTECTION - flags_read):
        raise UserError(
            f"--{flag} has no effect: none of {', '.join(names[1:])} reads it; leave it out, or add one that does"
        )


def _expanded(protection: str, grid: Mapping[str, Any]) -> list[Setting]:
    """Return the product of a protection's lists of values, checked as flags are."""
    values: dict[str, list[Any]] = {}
    for flag, given in grid.items():
        if flag not in _GRID_FLAGS:
            near = get_close_matches(flag, sorted(_GRID_FLAGS), n=1, cutoff=0.0)[0]
            raise UserError(f"--grid {protection}: {flag} is no setting of a protection; the nearest is {near}")
        if flag in _PROTECTION - flags_read_by(protection):
            reads = ", ".join(sorted(flags_read_by(protection))) or "none"
            raise UserError(f"--grid {protection}: {flag} has no effect there; the protection reads {reads}")
        checked = [_checked(flag, value) for value in (given if isinstance(given, list) else [given])]
        if not checked:
            raise UserError(f"--grid {protection}: {flag} has no value; write a list with at least one")
        values[flag] = [value for number, value in enumerate(checked) if value not in checked[:number]]
    varying = [flag for flag, distinct in values.items() if len(distinct) > 1] or list(values)
    return [
        _setting(protection, dict(zip(values, combination, strict=True)), varying)
        for combination in itertools.product(*values.values())
    ]


def _checked(flag: str, value: Any) -> Any:
    """Return the value as the flag's parser reads it. Raises UserError for null and for numbers that are not finite."""
    if value is None:
        raise UserError(f"--grid: {flag} is null; leave the flag out to keep the recipe's value")
    try:
        parsed = parse_values({flag: value})[flag]
    except UserError as error:
        raise UserError(f"--grid: {str(error).removeprefix('arguments: ')}") from None
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise UserError(f"--grid: {flag} is {parsed}; write a finite number")
    return parsed


def _setting(protection: str, flags: dict[str, Any], varying: Sequence[str]) -> Setting:
    name = ",".join(f"{flag}={_short(value)}" for flag, value in flags.items()) or AS_THE_RECIPE
    value = flags[varying[0]] if len(varying) == 1 else None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Setting(protection, name, float(value) if number and value is not None else None, flags)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def runs_of(settings: Sequence[Setting], seeds: Sequence[int]) -> list[SweepRun]:
    """Return every setting with every seed, grouped by seed, so that the first finished runs can be compared.

    Raises:
        UserError: a seed out of range.
    """
    for seed in seeds:
        require_seed(seed, "seeds")
    return [SweepRun(setting, seed, _folder(setting, seed)) for seed in dict.fromkeys(seeds) for setting in settings]


def _folder(setting: Setting, seed: int) -> str:
    """Return a readable name for the run's folder that no other run has."""
    full_name = setting.protection if setting.name == AS_THE_RECIPE else f"{setting.protection}-{setting.name}"
    plain = re.sub(r"[^\w.,=+-]+", "_", full_name)[:100]
    if plain != full_name:
        plain += f"-{hashlib.sha256(json.dumps([full_name]).encode()).hexdigest()[:8]}"
    return f"{plain}-seed={seed}"

"""Flags of `holdfast sweep`, which compares protections."""

from dataclasses import dataclass
from typing import Any

from ...analysis.errors import UserError
from ...analysis.flags import mapping, option, require

GUARDS_EXAMPLE = '{"coherent": "choices/split/validation/aligned + choices/split/validation/misaligned"}'
GRID_EXAMPLE = '{"steering": {"steering_alpha": [0.5, 1, 2]}}'


@dataclass
class SweepArguments:
    """Which protections are compared, at which settings and seeds, and by which measures.

    A measure is a path as `holdfast compare` prints it, like choices/split/narrow/insecure, or the sum of several paths
    joined by " + ".
    """

    _argument_group_name = "sweep"

    protections: list[str] | None = option(
        None, "Protections to compare; none (no protection) is always added. Default: the protections of --grid."
    )
    strengths: list[float] | None = option(
        None,
        "Strengths of every protection that has a strength and no entry in --grid. sweep also accepts "
        "--penalty_strength 0.1 1 10. Default: the recipe's --penalty_strength.",
    )
    grid: dict[str, dict[str, Any]] | str | None = option(
        None,
        "Settings of each protection: a mapping (or JSON) from a protection to flags and lists of values, like "
        f"{GRID_EXAMPLE}. All combinations of the values are run. Default: none.",
    )
    seeds: list[int] | None = option(
        None, "Seeds of the fine-tunes; every setting is run with every seed. Default: the recipe's seed."
    )
    jobs: int | None = option(
        None,
        "Number of runs at once; each gets an equal share of the cores, or one GPU. For tiny models on a CPU, one run "
        "per core is best. Default: the number of GPUs, else half the number of cores; 1 with --num_processes.",
    )
    floor: float = option(
        0.95,
        "Smallest share of the unprotected runs' task and guards that a setting must keep, in 0..1. Default: 0.95.",
    )
    task_measure: str | None = option(
        None,
        "Measure of what the fine-tune is for, a rate in 0..1. Default: choices/split/narrow/insecure, if it is "
        "measured.",
    )
    misaligned_measure: str | None = option(
        None,
        "Measure that settings are chosen by (the lower, the better), a rate in 0..1. Default: misaligned (and "
        "misaligned_wrong_topic) of choices/split/validation.",
    )
    misaligned_test_measure: str | None = option(
        None,
        "Misalignment measure that is read once the choice is frozen. Default: --misaligned_measure on --test_split.",
    )
    guard_measures: dict[str, str] | str | None = option(
        None,
        f"Measures that must be kept beside the task: a mapping (or JSON) from a name to a measure, like "
        f"{GUARDS_EXAMPLE}. Default: that guard and choices/split/skill/right, if they are measured.",
    )
    test_split: str | None = option(
        None,
        "Value of `split` in --choices_dataset of the rows that no model is measured on before the freeze. "
        "Default: test.",
    )
    leave_out_failed: bool = option(
        False, "Freeze the choice without the runs that failed; they are not tried again. Default: false."
    )

    def __post_init__(self) -> None:
        self.grid = mapping("grid", self.grid, GRID_EXAMPLE)
        if self.grid is not None and not (
            isinstance(self.grid, dict) and all(isinstance(flags, dict) for flags in self.grid.values())
        ):
            raise UserError(f"--grid must map protections to flags and their values, like {GRID_EXAMPLE}")
        self.guard_measures = mapping("guard_measures", self.guard_measures, GUARDS_EXAMPLE)
        if self.guard_measures is not None and not (
            isinstance(self.guard_measures, dict)
            and all(isinstance(text, str) for text in self.guard_measures.values())
        ):
            raise UserError(f"--guard_measures must map names to measures, like {GUARDS_EXAMPLE}")
        require(self.jobs is None or self.jobs >= 1, "jobs", self.jobs, "at least 1")
        require(0 < self.floor <= 1, "floor", self.floor, "above 0, at most 1")

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Return --grid, or an empty mapping without it."""
        return self.grid if isinstance(self.grid, dict) else {}

    @property
    def late_split(self) -> str:
        """Return the split that waits for the freeze. It must have rows only if --test_split names it."""
        return "test" if self.test_split is None else self.test_split

    @property
    def guards(self) -> dict[str, str] | None:
        """Return --guard_measures by name, or None without them."""
        return self.guard_measures if isinstance(self.guard_measures, dict) else None

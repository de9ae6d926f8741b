"""The flags of `holdfast sweep`."""

from dataclasses import dataclass
from typing import Any

from ...analysis.errors import UserError
from ...analysis.flags import mapping, option, require

GUARDS_EXAMPLE = '{"coherent": "choices/split/validation/aligned + choices/split/validation/misaligned"}'
GRID_EXAMPLE = '{"steering": {"steering_alpha": [0.5, 1, 2]}}'


@dataclass
class SweepArguments:
    """Which protections are compared, at which settings and seeds, and what they are compared by.

    A measure is a path of `holdfast compare`, or several joined by " + ", like choices/split/narrow/insecure.
    """

    _argument_group_name = "sweep"

    protections: list[str] | None = option(
        None, "Protections to compare; none is always among them. Default: those of --grid."
    )
    strengths: list[float] | None = option(
        None,
        "Strengths of every protection that has one and no entry in --grid; sweep also takes them as "
        "--penalty_strength 0.1 1 10. Default: the recipe's --penalty_strength.",
    )
    grid: dict[str, dict[str, Any]] | str | None = option(
        None,
        f"Settings by protection (mapping or JSON): all combinations of the flags' values, like {GRID_EXAMPLE}. "
        "Default: none.",
    )
    seeds: list[int] | None = option(None, "Seeds of the fine-tunes, each with every setting. Default: the recipe's.")
    jobs: int | None = option(
        None,
        "Runs at once; each gets an equal share of the cores, or one GPU. For tiny models on a CPU one a core is best. "
        "Default: the number of GPUs, else half that of cores; 1 with --num_processes.",
    )
    floor: float = option(
        0.95, "Least share of the unprotected runs' task and guards that a setting must keep, in 0..1. Default: 0.95."
    )
    task_measure: str | None = option(
        None, "What the fine-tune is for, a rate in 0..1. Default: choices/split/narrow/insecure where it is there."
    )
    misaligned_measure: str | None = option(
        None,
        "What settings are chosen by, a rate. Default: misaligned (and misaligned_wrong_topic) of "
        "choices/split/validation.",
    )
    misaligned_test_measure: str | None = option(
        None, "What is read once the choice is frozen. Default: that of --misaligned_measure, on --test_split."
    )
    guard_measures: dict[str, str] | str | None = option(
        None,
        f"What must be kept beside the task, by name (mapping or JSON), like {GUARDS_EXAMPLE}. Default: that, and "
        "choices/split/skill/right, where they are there.",
    )
    test_split: str | None = option(
        None, "Value of `split` of the --choices_dataset rows that no model sees before the freeze. Default: test."
    )
    leave_out_failed: bool = option(
        False, "Freeze the choice without the runs that fail, which are then not tried again. Default: false."
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
        """--grid, empty where there is none."""
        return self.grid if isinstance(self.grid, dict) else {}

    @property
    def late_split(self) -> str:
        """The split that waits for the freeze; only where --test_split names it must there be rows of it."""
        return "test" if self.test_split is None else self.test_split

    @property
    def guards(self) -> dict[str, str] | None:
        """--guard_measures by name; None where they are not given."""
        return self.guard_measures if isinstance(self.guard_measures, dict) else None

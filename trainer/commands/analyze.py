"""What is measured of a run, from its arguments: shared by `holdfast analyze`, `holdfast watch` and the callback."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ...analysis.errors import PARTIAL, UserError
from ...analysis.files.artifacts import check_writable
from ...analysis.files.store import default_folder
from ...analysis.measure.measurer import Measurer, UnreadableCheckpoint, check_checkpoint, measure_checkpoint
from ...analysis.measure.plan import MeasurePlan
from ...analysis.measure.results import VIEW, problems
from ...analysis.subspace.file import Subspace
from ..config.parsing import Arguments, build, parse_values
from ..inputs.checkpoint_names import named_checkpoints
from ..inputs.probe_sets import probe_sets
from ..inputs.subspace import subspace_path, whole_subspace
from ..inputs.training import load_choices, load_options, read_starting_model
from ..launch import launch, must_launch
from ..run_folder import is_main

# What a training run measures unasked: each costs one forward pass over the rows, or less.
DEFAULT_FAMILIES = ("behavior", "projection", "choices")


@dataclass(frozen=True)
class AnalysisResult:
    """Where the results are, and what could not be measured ("checkpoint: family: reason")."""

    metrics: Path
    problems: list[str]


def measurer(arguments: Arguments, families: Sequence[str] | None = None) -> Measurer:
    """A measurer of the run's probe sets, choices and subspace. Loads no weights; raises UserError for bad input.

    Args:
        families: None are those of the training callback, an empty list all that apply.
    """
    tokenizer, config = read_starting_model(arguments)
    subspace, choices = _subspace(arguments, tokenizer, config), arguments.data.choices_dataset
    asked = arguments.analysis
    store = Path(asked.store_dir).expanduser() if asked.store_dir else default_folder()
    check_writable(store, "--store_dir")
    budget = asked.analysis_families or [name for name in DEFAULT_FAMILIES if name != "choices" or choices]
    spread = families is not None and asked.device_map is not None
    plan = MeasurePlan(
        instruct_path=arguments.model.starting_model,
        base_path=arguments.model.base_model_name_or_path,
        probe_sets=probe_sets(arguments, tokenizer),
        choices=load_choices(choices) if choices else (),
        families=tuple(budget if families is None else families),
        formulas=asked.formulas,
        subspace=subspace,
        layers=",".join(map(str, sorted(subspace.bases))) if subspace else "all",
        batch_size=asked.analysis_batch_size,
        max_length=arguments.training.max_length,
        long_rows="truncate" if arguments.data.long_rows == "truncate" else "drop",
        dtype=arguments.model.dtype or "auto",
        device=None if spread else str(arguments.training.device),
        seed=arguments.training.seed,
        references=store,
        store_limit_gb=asked.store_limit_gb,
        control_sets=tuple(asked.control_sets or ()),
        gradient_layer=asked.gradient_layer,
        gradient_weight=asked.gradient_weight,
        patching_rows=asked.patching_rows,
        load=replace(load_options(arguments), device_map=asked.device_map if spread else None),
        data_parallel=families is not None,
    )
    return Measurer(plan, tokenizer)


class Analysis:
    """Measures models one after the other, and keeps what could not be measured.

    Raises:
        UserError: at construction, for everything wrong with the arguments; nothing has been written then.
    """

    def __init__(self, arguments: Arguments) -> None:
        check_writable(arguments.output_dir, "--output_dir")
        self.arguments = arguments
        self.measurer = measurer(arguments, families=arguments.analysis.families or ())
        self._found: dict[str, list[str]] = {}

    def announce(self) -> None:
        """Say how many rows the length limit leaves out."""
        for name, count in self.measurer.too_long.items():
            if count:
                limit = self.measurer.plan.max_length
                _say(f"{name}: {count} rows are longer than {limit} tokens, left out; --long_rows truncate cuts them")

    def references(self) -> None:
        """Measure the starting model and, where it is named, base."""
        model = self.arguments.model
        self._measure("instruct", model.starting_model, 0)
        if model.base_model_name_or_path:
            self._measure("base", model.base_model_name_or_path, None)

    def checkpoint(self, name: str, path: Path) -> bool:
        """Measure a checkpoint; one that cannot be read is said and left out, and the answer is False."""
        try:
            self._measure(name, str(path), None)
        except UnreadableCheckpoint as error:
            self.refuse(name, str(error))
            return False
        return True

    def refuse(self, name: str, reason: str) -> None:
        """Say at once, and at the end, that a checkpoint is left out."""
        _say(f"{name} is left out: {reason}")
        self._found.setdefault(reason, []).append(name)

    def _measure(self, name: str, path: str, step: int | None) -> None:
        if is_main():
            print(f"measuring {name}", flush=True)
        line = measure_checkpoint(self.measurer, path, self.arguments.output_dir, name, step)
        for problem in problems({family: line.get(family) for family in self.measurer.families}):
            self._found.setdefault(problem, []).append(name)

    def result(self) -> AnalysisResult:
        """Each problem once, with the checkpoints it concerns."""
        lines = [f"{', '.join(names)}: {problem}" for problem, names in self._found.items()]
        return AnalysisResult(self.arguments.output_dir / VIEW, lines)


def checked(arguments: Arguments) -> tuple[Analysis, dict[str, Path]]:
    """All checks of `analyze` that need no weights in memory; the checkpoints that can be read, by name."""
    analysis = Analysis(arguments)
    readable: dict[str, Path] = {}
    for name, (path, problem) in named_checkpoints(arguments).items():
        try:
            if path is None:
                raise UserError(problem)
            check_checkpoint(path, analysis.measurer.plan)
            readable[name] = path
        except UserError as error:
            analysis.refuse(name, str(error))
    return analysis, readable


def analyze(arguments: Arguments) -> AnalysisResult:
    """Measures the starting model, base (where named) and every checkpoint into <output_dir>/metrics.

    A checkpoint that cannot be read is left out, a family that cannot be computed is null; both are named. Raises
    UserError when there is nothing to measure.
    """
    analysis, readable = checked(arguments)
    if readable:
        analysis.announce()
        analysis.references()
    for name, path in readable.items():
        analysis.checkpoint(name, path)
    return analysis.result()


def _say(line: str) -> None:
    if is_main():
        print(f"holdfast: {line}", file=sys.stderr, flush=True)


def _subspace(arguments: Arguments, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Subspace | None:
    """The subspace as it was built, whole: an unprotected run and a null are read along the same directions."""
    return whole_subspace(arguments, tokenizer, config) if subspace_path(arguments).is_file() else None


def main(argv: Sequence[str]) -> int:
    """Measures the checkpoints, on the processes that the flags ask for; exit code 3 where a part was not measured."""
    # A recipe's DeepSpeed belongs to its training.
    values = {**parse_values(argv), "deepspeed": None}
    if must_launch(values):
        # One process checks everything first, so that a bad input is one line and not one per rank.
        _, readable = checked(build(values))
        return launch(argv, values, "analyze") if readable else PARTIAL
    return report(analyze(build(values)))


def report(analyzed: AnalysisResult) -> int:
    """Says what was measured and what was not, on the main rank, whose exit code then counts."""
    if not is_main():
        return 0
    for problem in analyzed.problems:
        print(f"holdfast: not measured: {problem}", file=sys.stderr)
    if analyzed.metrics.is_file():
        print(f"measures written to {analyzed.metrics}")
    return PARTIAL if analyzed.problems else 0

"""`holdfast analyze`: measure checkpoints of a run, or any other checkpoints, against the starting model and base.

holdfast analyze --config mine.yaml --checkpoints runs/mine/final org/model@main --families behavior projection

`holdfast watch`, the training callback and the sweep build their measurer here too.
"""

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

# What a training run measures by default: each family costs one forward pass over the rows, or less.
DEFAULT_FAMILIES = ("behavior", "projection", "choices")


@dataclass(frozen=True)
class AnalysisResult:
    """The file of the results, and what could not be measured ("checkpoint: family: reason")."""

    metrics: Path
    problems: list[str]


def measurer(arguments: Arguments, families: Sequence[str] | None = None) -> Measurer:
    """Make a measurer of the run's probe sets, choices and subspace. No weights are loaded.

    Args:
        families: families of measures; None for those of the training callback, an empty list for all that apply.

    Raises:
        UserError: bad input.
    """
    tokenizer, config = read_starting_model(arguments)
    subspace, choices = _subspace(arguments, tokenizer, config), arguments.data.choices_dataset
    flags = arguments.analysis
    store = Path(flags.store_dir).expanduser() if flags.store_dir else default_folder()
    check_writable(store, "--store_dir")
    in_training = flags.analysis_families or [name for name in DEFAULT_FAMILIES if name != "choices" or choices]
    spread = families is not None and flags.device_map is not None
    plan = MeasurePlan(
        instruct_path=arguments.model.starting_model,
        base_path=arguments.model.base_model_name_or_path,
        probe_sets=probe_sets(arguments, tokenizer),
        choices=load_choices(choices) if choices else (),
        families=tuple(in_training if families is None else families),
        formulas=flags.formulas,
        subspace=subspace,
        layers=",".join(map(str, sorted(subspace.bases))) if subspace else "all",
        batch_size=flags.analysis_batch_size,
        max_length=arguments.training.max_length,
        long_rows="truncate" if arguments.data.long_rows == "truncate" else "drop",
        dtype=arguments.model.dtype or "auto",
        device=None if spread else str(arguments.training.device),
        seed=arguments.training.seed,
        references=store,
        store_limit_gb=flags.store_limit_gb,
        control_sets=tuple(flags.control_sets or ()),
        gradient_layer=flags.gradient_layer,
        gradient_weight=flags.gradient_weight,
        patching_rows=flags.patching_rows,
        load=replace(load_options(arguments), device_map=flags.device_map if spread else None),
        data_parallel=families is not None,
    )
    return Measurer(plan, tokenizer)


class Analysis:
    """Measure models one after the other, and collect what could not be measured.

    Raises:
        UserError: at construction, for any error in the arguments; nothing has been written then.
    """

    def __init__(self, arguments: Arguments) -> None:
        check_writable(arguments.output_dir, "--output_dir")
        self.arguments = arguments
        self.measurer = measurer(arguments, families=arguments.analysis.families or ())
        self._problems: dict[str, list[str]] = {}  # problem -> names of the checkpoints

    def announce(self) -> None:
        """Print how many rows the length limit leaves out."""
        for name, count in self.measurer.too_long.items():
            if count:
                limit = self.measurer.plan.max_length
                _warn(f"{name}: {count} rows are longer than {limit} tokens, left out; --long_rows truncate cuts them")

    def references(self) -> None:
        """Measure the starting model and, if it is named, base."""
        model = self.arguments.model
        self._measure("instruct", model.starting_model, 0)
        if model.base_model_name_or_path:
            self._measure("base", model.base_model_name_or_path, None)

    def checkpoint(self, name: str, path: Path) -> bool:
        """Measure a checkpoint and return True. If it cannot be read, name it, leave it out, and return False."""
        try:
            self._measure(name, str(path), None)
        except UnreadableCheckpoint as error:
            self.refuse(name, str(error))
            return False
        return True

    def refuse(self, name: str, reason: str) -> None:
        """Print that a checkpoint is left out, now and again in the result."""
        _warn(f"{name} is left out: {reason}")
        self._problems.setdefault(reason, []).append(name)

    def _measure(self, name: str, path: str, step: int | None) -> None:
        if is_main():
            print(f"measuring {name}", flush=True)
        line = measure_checkpoint(self.measurer, path, self.arguments.output_dir, name, step)
        for problem in problems({family: line.get(family) for family in self.measurer.families}):
            self._problems.setdefault(problem, []).append(name)

    def result(self) -> AnalysisResult:
        """Return the file of the results, and each problem once with the checkpoints that have it."""
        lines = [f"{', '.join(names)}: {problem}" for problem, names in self._problems.items()]
        return AnalysisResult(self.arguments.output_dir / VIEW, lines)


def prepare_analysis(arguments: Arguments) -> tuple[Analysis, dict[str, Path]]:
    """Make all checks of `analyze` that need no weights in memory.

    Returns:
        The analysis, and the folders of the checkpoints that can be read, by name.
    """
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
    """Measure the starting model, base (if it is named) and every checkpoint into <output_dir>/metrics.

    A checkpoint that cannot be read is left out, and a family that cannot be computed is null; the result names both.

    Raises:
        UserError: there is nothing to measure.
    """
    analysis, readable = prepare_analysis(arguments)
    if readable:
        analysis.announce()
        analysis.references()
    for name, path in readable.items():
        analysis.checkpoint(name, path)
    return analysis.result()


def _warn(line: str) -> None:
    if is_main():
        print(f"holdfast: {line}", file=sys.stderr, flush=True)


def _subspace(arguments: Arguments, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Subspace | None:
    """Return the whole subspace as it was built, so that every run is measured along the same directions.

    That holds for an unprotected run and for the null, too. None if there is no subspace.
    """
    return whole_subspace(arguments, tokenizer, config) if subspace_path(arguments).is_file() else None


def main(argv: Sequence[str]) -> int:
    """Measure the checkpoints on `--num_processes` processes; return exit code 3 if a part was not measured."""
    # The recipe's DeepSpeed flag is for training.
    values = {**parse_values(argv), "deepspeed": None}
    if must_launch(values):
        # One process checks everything first, so that bad input gives one line and not one line per rank.
        _, readable = prepare_analysis(build(values))
        return launch(argv, values, "analyze") if readable else PARTIAL
    return report(analyze(build(values)))


def report(result: AnalysisResult) -> int:
    """Print what was measured and what was not, and return the exit code. Other ranks than the main rank return 0."""
    if not is_main():
        return 0
    for problem in result.problems:
        print(f"holdfast: not measured: {problem}", file=sys.stderr)
    if result.metrics.is_file():
        print(f"measures written to {result.metrics}")
    return PARTIAL if result.problems else 0

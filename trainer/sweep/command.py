"""`holdfast sweep` compares protections on any model and data, each setting with each seed, in one command.

holdfast sweep --config recipe.yaml --protections subspace kl steering+interleave --penalty_strength 0.1 1 10 \
    --seeds 0 1 2 --jobs 2 --output_dir runs/sweep

Every run is the recipe with the flags of a protection. Settings are chosen on validation and frozen to a file, and only
then is the test split read. If the command was stopped, the same command continues it.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ...analysis.errors import PARTIAL, UserError
from ...analysis.files.artifacts import write_json_atomic
from ..run_folder import SWEEP_LOG
from .acts import TEST_RESULT, read_json
from .checks import reads_subspace
from .folder import MARK, STARTS, Sweep, freeze, frozen_choice, to_read
from .inputs import SweepInputs
from .report import SUMMARY, write_report
from .workers import Outcome, Task, Workers


def sweep_main(argv: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Do the missing runs of a sweep and write its reports.

    Returns:
        The text of summary.md, and the failed runs with their reasons.

    Raises:
        UserError: bad input (nothing is written), or a folder whose frozen choice does not allow the requested sweep.
        KeyboardInterrupt: interrupted; the message says how to continue.
    """
    inputs = SweepInputs(argv)
    try:
        with inputs.workers() as workers:
            workers.warm(inputs.unfinished())  # the workers import while this process reads and checks the rows
            inputs.check()
            inputs.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(inputs.folder / ".lock", timeout=0):
                return _sweep(inputs, workers)
    except Timeout:
        raise UserError(f"a sweep is running in {inputs.folder}; wait for it, or choose another folder") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on") from None


def _sweep(inputs: SweepInputs, workers: Workers) -> tuple[str, dict[str, str]]:
    """Build the subspace, do the runs, freeze the choice, read the test split, and report."""
    if not (inputs.folder / MARK).is_file():
        write_json_atomic(inputs.folder / MARK, {"command": "holdfast sweep"})
    if not inputs.subspace.is_file() and any(reads_subspace(run.setting.protection) for run in inputs.runs):
        _run_one(workers, _task(inputs, "subspace", {"values": _subspace_values(inputs)}))
    sweep = inputs.plan()
    frozen = frozen_choice(sweep)
    if frozen is None:
        failed = _run_all(inputs, sweep, workers)
        if not failed or (inputs.flags.leave_out_failed and sweep.results()):
            frozen = _freeze(sweep, failed)
    else:
        failed = dict.fromkeys(frozen["plan"]["failed"], "left out when the choice was frozen")
    if frozen is not None and inputs.measures.test:
        _read_all_tests(inputs, sweep, workers, frozen)
    return write_report(sweep, frozen, failed), failed


def _freeze(sweep: Sweep, failed: Mapping[str, str]) -> dict[str, Any]:
    """Make the choice and freeze it.

    Raises:
        UserError: no choice can be made. The report then holds the runs' numbers.
    """
    # Missing measures raise here: the report of the other case below would raise the same error.
    sweep.compared(sweep.results())
    try:
        return freeze(sweep, list(failed))
    except UserError as error:
        write_report(sweep, None, failed)
        raise UserError(
            f"nothing can be chosen: {error}; all runs are in {sweep.folder / SUMMARY}, and the same command with "
            "another --task_measure, other --guard_measures or more --protections reads them again"
        ) from None


def _run_all(inputs: SweepInputs, sweep: Sweep, workers: Workers) -> dict[str, str]:
    """Train and measure every run that has no result, and return the failed runs with the reason and the log."""
    missing = [run for run in sweep.runs if sweep.result(run) is None]
    tasks = [
        Task(
            run.name,
            sweep.run_folder(run) / SWEEP_LOG,
            "run",
            {
                "values": inputs.of_run(run),
                "measuring": inputs.measuring(run.seed),
                "needed": sweep.measures.validation,
                "references": str(sweep.folder / "references"),
                "recipe": str(sweep.folder / "recipes" / f"{run.name}.yaml"),
                "starts": str(sweep.folder / "starts" / f"{run.name}.json"),
                "facts": {"key": sweep.keys[run.name], **run.facts},
            },
        )
        for run in missing
    ]
    failed = {}
    outcomes = _after_start(inputs, sweep, workers, "validation", tasks)
    for outcome in _shown(outcomes, len(sweep.runs), len(tasks), "sweep"):
        if outcome.problem is not None:
            failed[outcome.task.name] = f"{outcome.problem} ({outcome.task.log})"
    return failed


def _read_all_tests(inputs: SweepInputs, sweep: Sweep, workers: Workers, frozen: Mapping[str, Any]) -> None:
    """Read the test split on the runs of the frozen settings. Raises UserError if one cannot be read."""
    waiting = [run for run in to_read(sweep, frozen) if not read_json(sweep.run_folder(run) / TEST_RESULT)]
    tasks = [
        Task(
            run.name,
            sweep.run_folder(run) / SWEEP_LOG,
            "test",
            {
                "measuring": inputs.measuring(run.seed),
                "folder": str(sweep.run_folder(run)),
                "needed": sweep.measures.test,
                "frozen": frozen["sha256"],
                "key": sweep.keys[run.name],
            },
        )
        for run in waiting
    ]
    outcomes = _after_start(inputs, sweep, workers, "test", tasks)
    for outcome in _shown(outcomes, len(tasks), len(tasks), "test split"):
        _require(outcome)


def _after_start(
    inputs: SweepInputs, sweep: Sweep, workers: Workers, when: str, tasks: Sequence[Task]
) -> Iterable[Outcome]:
    """Run the tasks and yield their outcomes; measure the starting model beside the first one, if that is still to do.

    Raises:
        UserError: the starting model cannot be measured. It is raised at once if the user can mend it, else at the end.
    """
    if sweep.start(when) is not None:
        yield from workers.run(tasks)
        return
    arguments = {
        "values": inputs.measuring(inputs.arguments.training.seed),
        "needed": getattr(sweep.measures, when),
        "path": str(sweep.folder / STARTS[when]),
        "key": sweep.start_key,
        "test": when == "test",
    }
    start, start_outcome = _task(inputs, "start", arguments), None
    for outcome in workers.run([start, *tasks]):
        if outcome.task is not start:
            yield outcome
        elif outcome.user:
            _require(outcome)
        else:
            start_outcome = outcome
    if start_outcome is not None:
        _require(start_outcome)


def _task(inputs: SweepInputs, act: str, arguments: dict[str, Any]) -> Task:
    return Task(act, inputs.folder / SWEEP_LOG, act, arguments)


def _run_one(workers: Workers, task: Task) -> None:
    """Run one task. Raises UserError if it fails."""
    for outcome in workers.run([task]):
        _require(outcome)


def _require(outcome: Outcome) -> None:
    """Raise UserError if the task failed."""
    if outcome.problem is not None:
        log = "" if outcome.user else f"; its log is {outcome.task.log}"
        raise UserError(f"{outcome.task.act} {outcome.task.name}: {outcome.problem}{log}")


def _shown(outcomes: Iterable[Outcome], total: int, waiting: int, what: str) -> Iterable[Outcome]:
    """Yield the outcomes, with a progress bar over all runs on stderr. Failures are printed at once."""
    with tqdm(total=total, initial=total - waiting, desc=what, unit="run", smoothing=0.1) as bar:
        for outcome in outcomes:
            if outcome.problem is not None:
                bar.write(f"holdfast: failed: {outcome.task.name}: {outcome.problem}", file=sys.stderr)
            bar.update()
            yield outcome


def _subspace_values(inputs: SweepInputs) -> dict[str, Any]:
    return {**inputs.values, "deepspeed": None, "num_processes": 1, "subspace_path": str(inputs.subspace)}


def main(argv: Sequence[str]) -> int:
    """Run the sweep and print its summary. The exit code is 3 if some runs failed."""
    text, failed = sweep_main(argv)
    for name, reason in failed.items():
        print(f"holdfast: failed: {name}: {reason}", file=sys.stderr)
    print(text, end="")
    return PARTIAL if failed else 0

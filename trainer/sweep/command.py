"""`holdfast sweep`: protections compared on any model and data, each setting at each seed, in one command.

holdfast sweep --config recipe.yaml --protections subspace kl steering+interleave --penalty_strength 0.1 1 10 \
    --seeds 0 1 2 --jobs 2 --output_dir runs/sweep

Every run is the recipe with a protection's flags. Settings are chosen on validation, frozen to a file, and only then
is the test split read. The same command goes on where it was stopped.
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
    """Runs what is missing of a sweep and writes its views; gives summary.md and the failed runs with their reasons.

    Raises:
        UserError: bad input (nothing written), or a folder whose frozen choice does not allow what is asked.
        KeyboardInterrupt: interrupted, with the way to go on.
    """
    command = SweepInputs(argv)
    try:
        with command.workers() as workers:
            workers.warm(command.unfinished())  # they import while rows are read and checked here
            command.check()
            command.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(command.folder / ".lock", timeout=0):
                return _swept(command, workers)
    except Timeout:
        raise UserError(f"a sweep is running in {command.folder}; wait for it, or choose another folder") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on") from None


def _swept(command: SweepInputs, workers: Workers) -> tuple[str, dict[str, str]]:
    if not (command.folder / MARK).is_file():
        write_json_atomic(command.folder / MARK, {"command": "holdfast sweep"})
    if not command.subspace.is_file() and any(reads_subspace(run.setting.protection) for run in command.runs):
        _alone(workers, _task(command, "subspace", {"values": _subspace_values(command)}))
    sweep = command.plan()
    frozen = frozen_choice(sweep)
    if frozen is None:
        failed = _run_all(command, sweep, workers)
        done = len(sweep.results())
        if not failed or (command.asked.leave_out_failed and done):
            frozen = _frozen(sweep, failed)
    else:
        failed = dict.fromkeys(frozen["plan"]["failed"], "left out when the choice was frozen")
    if frozen is not None and command.measures.test:
        _read_all_tests(command, sweep, workers, frozen)
    return write_report(sweep, frozen, failed), failed


def _frozen(sweep: Sweep, failed: Mapping[str, str]) -> dict[str, Any]:
    """The choice, frozen. Raises UserError where none can be made; the runs' own numbers are then in the report.

    Measures that the runs do not have are another error, which the report would meet too.
    """
    sweep.compared(sweep.results())
    try:
        return freeze(sweep, list(failed))
    except UserError as error:
        write_report(sweep, None, failed)
        raise UserError(
            f"nothing can be chosen: {error}; all runs are in {sweep.folder / SUMMARY}, and the same command with "
            "another --task_measure, other --guard_measures or more --protections reads them again"
        ) from None


def _run_all(command: SweepInputs, sweep: Sweep, workers: Workers) -> dict[str, str]:
    """Train and measure every run that has no result; gives the failed ones with the reason and the log."""
    missing = [run for run in sweep.runs if sweep.result(run) is None]
    tasks = [
        Task(
            run.name,
            sweep.run_folder(run) / SWEEP_LOG,
            "run",
            {
                "values": command.of_run(run),
                "measuring": command.measuring(run.seed),
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
    outcomes = _after_start(command, sweep, workers, "validation", tasks)
    for outcome in _shown(outcomes, len(sweep.runs), len(tasks), "sweep"):
        if outcome.problem is not None:
            failed[outcome.task.name] = f"{outcome.problem} ({outcome.task.log})"
    return failed


def _read_all_tests(command: SweepInputs, sweep: Sweep, workers: Workers, frozen: Mapping[str, Any]) -> None:
    """Read the test split on the frozen settings' runs. Raises UserError where one cannot be read."""
    waiting = [run for run in to_read(sweep, frozen) if not read_json(sweep.run_folder(run) / TEST_RESULT)]
    tasks = [
        Task(
            run.name,
            sweep.run_folder(run) / SWEEP_LOG,
            "test",
            {
                "measuring": command.measuring(run.seed),
                "folder": str(sweep.run_folder(run)),
                "needed": sweep.measures.test,
                "frozen": frozen["sha256"],
                "key": sweep.keys[run.name],
            },
        )
        for run in waiting
    ]
    outcomes = _after_start(command, sweep, workers, "test", tasks)
    for outcome in _shown(outcomes, len(tasks), len(tasks), "test split"):
        _require(outcome)


def _after_start(
    command: SweepInputs, sweep: Sweep, workers: Workers, when: str, tasks: Sequence[Task]
) -> Iterable[Outcome]:
    """The tasks' outcomes; beside the first of them the starting model is measured, where it was not.

    Raises:
        UserError: the starting model cannot be measured: at once where that is the user's to mend, else at the end.
    """
    if sweep.start(when) is not None:
        yield from workers.run(tasks)
        return
    arguments = {
        "values": command.measuring(command.arguments.training.seed),
        "needed": getattr(sweep.measures, when),
        "path": str(sweep.folder / STARTS[when]),
        "key": sweep.start_key,
        "test": when == "test",
    }
    start, ended = _task(command, "start", arguments), None
    for outcome in workers.run([start, *tasks]):
        if outcome.task is not start:
            yield outcome
        elif outcome.user:
            _require(outcome)
        else:
            ended = outcome
    if ended is not None:
        _require(ended)


def _task(command: SweepInputs, act: str, arguments: dict[str, Any]) -> Task:
    return Task(act, command.folder / SWEEP_LOG, act, arguments)


def _alone(workers: Workers, task: Task) -> None:
    for outcome in workers.run([task]):
        _require(outcome)


def _require(outcome: Outcome) -> None:
    if outcome.problem is not None:
        log = "" if outcome.user else f"; its log is {outcome.task.log}"
        raise UserError(f"{outcome.task.act} {outcome.task.name}: {outcome.problem}{log}")


def _shown(outcomes: Iterable[Outcome], total: int, waiting: int, what: str) -> Iterable[Outcome]:
    """The outcomes, with a bar over all runs on stderr; failures are named at once."""
    with tqdm(total=total, initial=total - waiting, desc=what, unit="run", smoothing=0.1) as bar:
        for outcome in outcomes:
            if outcome.problem is not None:
                bar.write(f"holdfast: failed: {outcome.task.name}: {outcome.problem}", file=sys.stderr)
            bar.update()
            yield outcome


def _subspace_values(command: SweepInputs) -> dict[str, Any]:
    return {**command.values, "deepspeed": None, "num_processes": 1, "subspace_path": str(command.subspace)}


def main(argv: Sequence[str]) -> int:
    """Runs the sweep and prints its summary; exit code 3 where some runs failed."""
    text, failed = sweep_main(argv)
    for name, reason in failed.items():
        print(f"holdfast: failed: {name}: {reason}", file=sys.stderr)
    print(text, end="")
    return PARTIAL if failed else 0

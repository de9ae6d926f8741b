"""`holdfast sweep`: protections compared on any model and data, each setting at each seed, in one command.

holdfast sweep --config recipe.yaml --protections subspace kl steering+interleave --penalty_strength 0.1 1 10 \
    --seeds 0 1 2 --jobs 2 --output_dir runs/sweep

Every run is the recipe with a protection's flags. Settings are chosen on validation, frozen to a file, and only then
is the test split read. The same command goes on where it was stopped.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ...analysis.errors import PARTIAL, UserError
from ...analysis.files.artifacts import check_writable, sha256_json, write_json_atomic
from ...analysis.measure.measurer import Measurer
from ...analysis.measure.references import subspace_hash
from ...analysis.models.load import model_fingerprint
from ..config.parsing import Arguments, build, parse_values
from ..config.sweep import SweepArguments
from ..data.rows import load_rows
from ..inputs.checks import check_flags
from ..inputs.subspace import subspace_path
from ..inputs.training import TrainingInputs, anchor_rows, deepspeed_content
from ..launch import must_launch
from ..protections.kinds import parts_of
from ..run_folder import SWEEP_LOG
from .acts import RESULT, TEST_RESULT, plan_of, read_json
from .checks import check_settings, reads_subspace
from .folder import FROZEN, MARK, STARTS, Sweep, freeze, frozen_choice, open_folder, to_read
from .measures import Measures, measures_of, split_rows
from .plan import BASELINE, SweepRun, check_read, runs_of, settings_of
from .report import SUMMARY, write_report
from .workers import Outcome, Task, Workers

_OWN = {field.name for field in fields(SweepArguments)}
# Of no effect on a run's numbers, or known by their content: two folders' sweeps have the same keys.
_NOT_IN_KEY = {
    *_OWN, "output_dir", "subspace_path", "model_name_or_path", "base_model_name_or_path", "train_dataset",
    "held_out_dataset", "anchor_dataset", "probe_dataset", "choices_dataset", "interleave_dataset", "probe_sets",
    "deepspeed",
    "subspace_dataset", "subspace_contrast", "subspace_domains", "store_dir", "store_limit_gb", "report_to",
    "logging_dir", "run_name", "disable_tqdm", "resume_from_checkpoint", "checkpoints", "watch_interval",
    "save_steps", "save_strategy", "save_total_limit", "logging_steps", "analysis_during_training",
}  # fmt: skip


class _Command:
    """One call of the command: its flags, and what they lead to. Writes nothing itself.

    Raises:
        UserError: at construction, for what is wrong with the flags themselves.
    """

    inputs: TrainingInputs
    measures: Measures

    def __init__(self, argv: Sequence[str]) -> None:
        flags = _with_strengths(argv)
        self.values = parse_values(flags)
        self.arguments = _built(self.values)
        self.folder, self.asked = self.arguments.output_dir, self.arguments.sweep
        check_writable(self.folder, "--output_dir")
        open_folder(self.folder)
        self.subspace = subspace_path(self.arguments)
        seeds = self.asked.seeds or [self.arguments.training.seed]
        settings = settings_of(self.asked, self.arguments.protection.penalty_strength)
        check_read(flags, settings)
        self.runs = runs_of(settings, seeds)
        self._settings: list[Arguments] = []  # of each one's run at the first seed
        for run in self.runs:
            arguments = _built(self.of_run(run))
            check_flags(arguments, evaluates=bool(arguments.data.held_out_dataset or arguments.data.held_out_rows))
            if run.seed == self.runs[0].seed:
                self._settings.append(arguments)

    def check(self) -> None:
        """Read what the settings read, also where the subspace is still to be built, and what is measured.

        Raises:
            UserError: for everything wrong with them.
        """
        self.inputs = check_settings(self._settings, self.subspace)
        self.measures = measures_of(self.asked, self.inputs.choices or [])
        Measurer(*plan_of(self.measuring(self.arguments.training.seed)))
        if self.measures.test:
            Measurer(*plan_of(self.measuring(self.arguments.training.seed), test=True))

    def unfinished(self) -> int:
        """Runs that may still be made: those without a result, while nothing is frozen."""
        if (self.folder / FROZEN).is_file():
            return 0
        return sum(not (self.folder / "runs" / run.name / RESULT).is_file() for run in self.runs)

    def of_run(self, run: SweepRun) -> dict[str, Any]:
        """A run's flat values. Its checkpoints are not measured as they are saved: that would read the test split."""
        own = {
            "output_dir": str(self.folder / "runs" / run.name), "subspace_path": str(self.subspace),
            "analysis_during_training": False, "disable_tqdm": True, "resume_from_checkpoint": None,
        }  # fmt: skip
        return {**{name: value for name, value in self.values.items() if name not in _OWN}, **run.flags, **own}

    def measuring(self, seed: int) -> dict[str, Any]:
        """The flat values by which runs of a seed are measured: the same for all seeds where no rows are set aside."""
        seed = seed if self.arguments.data.held_out_rows else self.arguments.training.seed
        return {**self.values, "protection": BASELINE, "subspace_path": str(self.subspace), "seed": seed}

    def plan(self) -> Sweep:
        """The sweep with the keys of its runs; the subspace is there."""
        measured, _ = plan_of(self.measuring(self.arguments.training.seed))
        model = self.arguments.model
        contents = {
            "model": self.inputs.facts["starting weights"],
            "tokenizer": self.inputs.facts["tokenizer"],
            "base": model_fingerprint(model.base_model_name_or_path) if model.base_model_name_or_path else None,
            "rows": [row.messages for row in self.inputs.train.rows],
            "anchors": [row.messages for row in anchor_rows(self.arguments)],
            "measured": {name: list(rows) for name, rows in measured.probe_sets.items()},
            # Read before the freeze, and after it.
            "choices": split_rows(self.inputs.choices or [], self.asked.late_split),
            "subspace": subspace_hash(measured),
        }
        start_key = sha256_json([sha256_json(contents), _flags(self.values, {"protection", "seed"})])
        keys = {
            run.name: sha256_json([start_key, _flags(self.of_run(run), set()), self._contents(run)])
            for run in self.runs
        }  # fmt: skip
        lab = Path(str(model.model_name_or_path)).name
        return Sweep(self.folder, self.runs, keys, start_key, self.measures, lab, self.asked.floor)

    def _contents(self, run: SweepRun) -> dict[str, Any]:
        """What the files hold that a run's own flags may name."""
        values = self.of_run(run)
        interleaves = "interleave" in parts_of(run.setting.protection) and values["interleave_dataset"]
        safe = [row.messages for row in load_rows(interleaves, prompts=True)] if interleaves else None
        return {"safe": safe, "deepspeed": deepspeed_content(values["deepspeed"])}

    def workers(self) -> Workers:
        """As many as `--jobs` says, or as there are GPUs, or half the cores."""
        launched = must_launch(self.values)
        gpus = [] if launched or self.arguments.training.use_cpu else _gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = self.asked.jobs or (1 if launched else len(gpus) or max(1, cores // 2))
        return Workers(jobs, max(1, cores // jobs), gpus)


def sweep_main(argv: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Runs what is missing of a sweep and writes its views; gives summary.md and the failed runs with their reasons.

    Raises:
        UserError: bad input (nothing written), or a folder whose frozen choice does not allow what is asked.
        KeyboardInterrupt: interrupted, with the way to go on.
    """
    command = _Command(argv)
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


def _swept(command: _Command, workers: Workers) -> tuple[str, dict[str, str]]:
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


def _run_all(command: _Command, sweep: Sweep, workers: Workers) -> dict[str, str]:
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


def _read_all_tests(command: _Command, sweep: Sweep, workers: Workers, frozen: Mapping[str, Any]) -> None:
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
    command: _Command, sweep: Sweep, workers: Workers, when: str, tasks: Sequence[Task]
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


def _task(command: _Command, act: str, arguments: dict[str, Any]) -> Task:
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


def _with_strengths(argv: Sequence[str]) -> list[str]:
    """`--penalty_strength 0.1 1 10` takes one value in a recipe, and all of them here."""
    flag = "--penalty_strength"
    return [f"--strengths{text[len(flag) :]}" if text == flag or text.startswith(f"{flag}=") else text for text in argv]


def _built(values: Mapping[str, Any]) -> Arguments:
    """Checked arguments. DeepSpeed is left out: its set-up belongs to the ranks."""
    return build({**values, "deepspeed": None})


def _subspace_values(command: _Command) -> dict[str, Any]:
    return {**command.values, "deepspeed": None, "num_processes": 1, "subspace_path": str(command.subspace)}


def _flags(values: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    """What decides a run's numbers beside the contents of its inputs."""
    return {name: value for name, value in sorted(values.items()) if name not in _NOT_IN_KEY | without}


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def main(argv: Sequence[str]) -> int:
    """Runs the sweep and prints its summary; exit code 3 where some runs failed."""
    text, failed = sweep_main(argv)
    for name, reason in failed.items():
        print(f"holdfast: failed: {name}: {reason}", file=sys.stderr)
    print(text, end="")
    return PARTIAL if failed else 0

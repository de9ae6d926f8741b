"""Worker processes that do many tasks one after the other, because importing torch and TRL takes ten seconds.

A worker that dies (killed, out of memory, a crash in native code) loses only its task and is replaced. Nothing heavy is
imported here, because a worker's threads and GPUs must be set before it imports torch.
"""

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ...analysis.errors import UserError
from .children import commands

_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Task:
    """One call of `acts.ACTS[act](**arguments)`. What it prints is appended to the log."""

    name: str
    log: Path
    act: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a task returned, or one line that says why it failed.

    Attributes:
        problem: why the task failed; None if it did not.
        user: whether the problem is a `UserError`, which the user can mend.
    """

    task: Task
    value: Any = None
    problem: str | None = None
    user: bool = False


@dataclass
class _Slot:
    """One place for a worker. `environment` is set before torch is imported."""

    environment: dict[str, str]
    process: Any = None
    channel: Connection | None = None
    task: Task | None = None


@dataclass
class Workers:
    """At most `jobs` workers at once: `with Workers(2, threads=1) as workers: for outcome in workers.run(tasks)`.

    Attributes:
        jobs: number of workers.
        threads: threads of each worker, unless OMP_NUM_THREADS is set.
        gpus: names for CUDA_VISIBLE_DEVICES, dealt to the workers in turn. If empty, the variable is left as it is.
    """

    jobs: int
    threads: int
    gpus: Sequence[str] = ()
    _slots: list[_Slot] = field(default_factory=list)

    def __enter__(self) -> "Workers":
        for number in range(self.jobs):
            defaults = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
            environment = {name: value for name, value in defaults.items() if name not in os.environ}
            if self.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
            self._slots.append(_Slot(environment))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        started = [slot for slot in self._slots if slot.process is not None]
        for slot in started:
            slot.process.terminate()
        for slot in started:
            _end(slot)

    def warm(self, tasks: int) -> None:
        """Start the workers that `tasks` tasks need, so that they import while the parent prepares the tasks."""
        for slot in self._slots[:tasks]:
            if slot.process is None:
                _start(slot)

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Run the tasks and yield the outcome of each, in the order in which they end."""
        waiting = deque(tasks)
        while waiting or any(slot.task for slot in self._slots):
            for slot in self._slots:
                if waiting and slot.task is None:
                    _give(slot, waiting.popleft())
            busy = [slot for slot in self._slots if slot.task]
            wait([source for slot in busy for source in (slot.channel, slot.process.sentinel) if source is not None])
            for slot in busy:
                outcome = _outcome(slot)
                if outcome is not None:
                    yield outcome


def _start(slot: _Slot) -> None:
    context = multiprocessing.get_context("spawn")
    slot.channel, worker_end = context.Pipe()
    # Not a daemon, because a worker may start processes, for loading data or as ranks.
    process = context.Process(target=_serve, args=(worker_end, slot.environment))
    # SIGINT is blocked here until the start is over. The worker inherits the block until it ignores SIGINT.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
        slot.process = process
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    worker_end.close()


def _end(slot: _Slot) -> None:
    slot.process.join(_SECONDS_TO_END)
    if slot.process.is_alive():
        slot.process.kill()
        slot.process.join()
    if slot.channel is not None:
        slot.channel.close()


def _give(slot: _Slot, task: Task) -> None:
    if slot.process is not None and not slot.process.is_alive():
        _end(slot)
        slot.process = None
    if slot.process is None:
        _start(slot)
    assert slot.channel is not None
    slot.task = task
    with suppress(OSError):  # the worker has just died; `_outcome` will see that
        slot.channel.send(task)


def _outcome(slot: _Slot) -> Outcome | None:
    """Return the slot's outcome if its task has ended. A worker that is dead or may be damaged is replaced."""
    assert slot.task is not None and slot.channel is not None
    task = slot.task
    try:
        if not slot.channel.poll():
            if slot.process.is_alive():
                return None
            raise EOFError
        value, problem, user = slot.channel.recv()
    except (EOFError, OSError):
        slot.process.join(_SECONDS_TO_END)
        slot.task = None
        outcome = Outcome(task, problem=f"its process {_ending(slot.process.exitcode)}")
        _end(slot)
        slot.process = None
        return outcome
    slot.task = None
    if problem is not None and not user:
        # An error of unknown cause may have left memory or other state behind.
        slot.process.terminate()
        _end(slot)
        slot.process = None
    return Outcome(task, value, problem, user)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        names = {number.value: number.name for number in signal.Signals}
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was ended by {names.get(-code, f'signal {-code}')}{hint}"
    return f"ended with exit code {code}"


def _serve(channel: Connection, environment: dict[str, str]) -> None:
    """Do tasks in a worker until its parent is gone or ends it."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _print_to(Path(os.devnull))
    faulthandler.enable()
    with suppress(Exception):  # the first task imports it again, and its log then shows the error
        importlib.import_module(".acts", __package__)  # while the parent still checks its input
    while True:
        try:
            task = channel.recv()
        except EOFError:
            return
        channel.send(_attempt(task))
        _print_to(Path(os.devnull))


def _attempt(task: Task) -> tuple[Any, str | None, bool]:
    """Run a task and return (value, problem, whether the user can mend the problem)."""
    try:
        _print_to(task.log)
        print(f"--- {task.act} {task.name}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
        from .acts import ACTS

        return ACTS[task.act](**task.arguments), None, False
    except UserError as error:
        print(f"holdfast: error: {error}", file=sys.stderr, flush=True)
        return None, str(error), True
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False


def _print_to(log: Path) -> None:
    """Point file descriptors 1 and 2 at a file, so that native code and child processes print there too."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.close(target)


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception, so that open files are closed and child processes are ended.
    raise SystemExit(128 + number)


def _end_with_parent() -> None:
    """End this worker when its parent is gone: a killed parent cannot, and two workers on one run would collide."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    wait([parent.sentinel])
    for process in commands:
        process.terminate()
    os._exit(1)

"""Many requests at once, none too fast, and all of them over as soon as the user says so."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class Pace:
    """Lets callers through at even distances in time: at most `per_minute` of them, None any number.

    Raises:
        UserError: a limit that is not above 0.
    """

    def __init__(self, per_minute: float | None) -> None:
        if per_minute is not None and not 0 < per_minute < math.inf:
            raise UserError(f"the limit of requests per minute is {per_minute}; write a number above 0")
        self._gap = 0.0 if per_minute is None else 60 / per_minute
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Returns when it is this caller's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        time.sleep(turn - now)


def concurrently(ask: Callable[[T], R], items: Sequence[T], workers: int = 16) -> Iterator[tuple[int, R]]:
    """(number of the item, ask(item)) as each is done, `workers` at a time; an exception of one ends all.

    The threads are daemons: an interrupt ends the program at once, not when the last request has timed out.
    """
    waiting, lock, stopped = iter(range(len(items))), threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[int, R] | BaseException] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                number = next(waiting, None)
            if number is None:
                return
            try:
                done.put((number, ask(items[number])))
            except BaseException as error:  # raised again by whoever reads the results
                done.put(error)
                return

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stopped.set()

"""Sends many requests at once, within a rate limit, and stops all of them as soon as the user interrupts.

for number, result in concurrently(ask, items, workers=16):
    ...
"""

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
    """Rate limiter: lets callers through at equal intervals, at most `per_minute` of them; None sets no limit.

    Raises:
        UserError: the limit is not a finite number above 0.
    """

    def __init__(self, per_minute: float | None) -> None:
        if per_minute is not None and not 0 < per_minute < math.inf:
            raise UserError(f"the limit of requests per minute is {per_minute}; write a number above 0")
        self._gap = 0.0 if per_minute is None else 60 / per_minute
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Block until it is this caller's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        time.sleep(turn - now)


def concurrently(ask: Callable[[T], R], items: Sequence[T], workers: int = 16) -> Iterator[tuple[int, R]]:
    """Call ask(item) for all items, `workers` at a time, and yield (number of the item, result) as each is done.

    An exception in one call stops all of them and is raised here. The threads are daemons, so an interrupt ends the
    program at once, and does not wait until the last request has timed out.
    """
    numbers, lock, stopped = iter(range(len(items))), threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[int, R] | BaseException] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                done.put((number, ask(items[number])))
            except BaseException as error:  # raised again by the thread that reads the results
                done.put(error)
                return

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()

"""Small matrices on one thread: on several, libraries spend up to ten times as long waiting for each other."""

from collections.abc import Callable

import torch
from threadpoolctl import threadpool_limits

from .families import Results, Subject

# From here on a spectrum's matrix is large enough for several threads to pay.
_MANY_ROWS = 2048


def on_one_thread(compute: Callable[[Subject], Results]) -> Callable[[Subject], Results]:
    """A family that runs no model, computed on one thread unless it has many rows.

    256 rows on two cores: subspaces 0.8 s instead of 9.5.
    """

    def computed(subject: Subject) -> Results:
        if max((len(rows) for rows in subject.rows.values()), default=0) > _MANY_ROWS:
            return compute(subject)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with threadpool_limits(limits=1):
                return compute(subject)
        finally:
            torch.set_num_threads(threads)

    return computed

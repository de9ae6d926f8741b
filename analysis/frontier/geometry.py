"""The plane of task success and misalignment: areas, dominance, and one frontier read at another's task.

Functions of arrays alone. task is better up, misaligned is better down; both are rates in 0..1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..stats.intervals import Floats


def em_f1(task: ArrayLike, misaligned: ArrayLike) -> Floats:
    """Harmonic mean of task success and 1 - misaligned [n], 0 where both are 0 (as in arXiv 2606.06667).

    Args:
        task, misaligned: rates [n] (or scalars).

    Raises:
        ValueError: unequal shapes, values that are no rates.
    """
    tasks, aligned = _rates("em_f1", task, misaligned)
    aligned = 1 - aligned
    total = tasks + aligned
    return np.divide(2 * tasks * aligned, total, out=np.zeros_like(total), where=total > 0)


def hypervolume(task: ArrayLike, misaligned: ArrayLike) -> float:
    """Area of the unit square task × (1 - misaligned) that a set of points dominates, seen from (0, 1).

    1 is a point that learns all and misaligns nothing. It can only grow with the number of points, so compare sets of
    equally many (Zitzler and Thiele 1999, doi 10.1109/4235.797969).

    Args:
        task, misaligned: rates [n], n >= 1.

    Raises:
        ValueError: no points, unequal shapes, values that are no rates.
    """
    tasks, bad = (np.atleast_1d(values) for values in _rates("hypervolume", task, misaligned))
    order = np.argsort(-tasks)
    widths = tasks[order] - np.append(tasks[order][1:], 0.0)
    return float(widths @ np.maximum.accumulate(1 - bad[order]))


def pareto(task: ArrayLike, misaligned: ArrayLike) -> NDArray[np.bool_]:
    """Which points [n] no other dominates: none is as good in both and better in one. Equal points stay together.

    Raises:
        ValueError: no points, unequal shapes, values that are no rates.
    """
    tasks, bad = (np.atleast_1d(values) for values in _rates("pareto", task, misaligned))
    as_good = (tasks[:, None] >= tasks) & (bad[:, None] <= bad)
    better = (tasks[:, None] > tasks) | (bad[:, None] < bad)
    dominated: NDArray[np.bool_] = np.any(as_good & better, axis=0)
    return ~dominated


def at_equal_task(
    task: ArrayLike, misaligned: ArrayLike, target: float, strength: ArrayLike | None = None
) -> tuple[float, bool]:
    """Misaligned where a frontier has learned `target`, and whether it was clamped because it never does.

    The frontier is the line through its settings ordered by strength; without strengths, by task. A line that crosses
    the target several times is read at its lowest crossing: the frontier gets its best reading, so what is compared
    with it gets its hardest. One that never crosses is read at the setting nearest in task (the lowest of ties).

    Args:
        task, misaligned: [n], n >= 1. target: in the unit of task.
        strength: position along the frontier [n], all different; None: ordered by task.

    Raises:
        ValueError: no points, unequal shapes, values that are not finite, a strength that comes twice.
    """
    tasks, bad = (np.atleast_1d(values) for values in _finite("at_equal_task", task, misaligned))
    _finite("at_equal_task", target)
    if strength is None:
        order = np.lexsort((bad, tasks))
    else:
        along = np.atleast_1d(_finite("at_equal_task", task, strength)[1])
        if len(np.unique(along)) < len(along):
            raise ValueError(f"at_equal_task: the strengths {along.tolist()} put two settings in one place")
        order = np.argsort(along)
    tasks, bad = tasks[order], bad[order]
    if not tasks.min() <= target <= tasks.max():
        # The end itself, not the smallest gap: tiny tasks are all as far from 1.
        end = tasks.min() if target < tasks.min() else tasks.max()
        return float(bad[tasks == end].min()), True
    found = bad[tasks == target].tolist()
    # Signs, not products: a product of two tiny gaps is 0.
    for left in np.flatnonzero(np.sign(tasks[:-1] - target) * np.sign(tasks[1:] - target) < 0):
        share = (target - tasks[left]) / (tasks[left + 1] - tasks[left])
        found.append(float(bad[left] + share * (bad[left + 1] - bad[left])))
    return min(found), False


def _finite(who: str, *arrays: ArrayLike) -> list[Floats]:
    """The arrays as float64, of one shape, not empty, without NaN or infinity."""
    values = [np.asarray(array, dtype=np.float64) for array in arrays]
    if len({value.shape for value in values}) > 1:
        raise ValueError(f"{who}: shapes {[value.shape for value in values]} are not those of the same points")
    if not values[0].size:
        raise ValueError(f"{who}: no points")
    if not all(np.isfinite(value).all() for value in values):
        raise ValueError(f"{who}: a value is not finite; leave out the run that it comes from")
    return values


def _rates(who: str, *arrays: ArrayLike) -> list[Floats]:
    values = _finite(who, *arrays)
    for value in values:
        if value.min() < 0 or value.max() > 1:
            raise ValueError(f"{who}: values from {value.min():g} to {value.max():g} are not rates in 0..1")
    return values

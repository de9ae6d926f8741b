"""The plane of task success and misalignment: areas, dominance, and one frontier read at the task of another setting.

The functions take only arrays. A higher task is better, a lower misaligned is better; both are rates in 0..1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..stats.intervals import Floats


def em_f1(task: ArrayLike, misaligned: ArrayLike) -> Floats:
    """Return the harmonic mean of task success and 1 - misaligned [n], 0 where both are 0 (as in arXiv 2606.06667).

    Args:
        task, misaligned: rates [n] (or scalars).

    Raises:
        ValueError: unequal shapes, or values that are not rates.
    """
    tasks, aligned = _rates("em_f1", task, misaligned)
    aligned = 1 - aligned
    total = tasks + aligned
    return np.divide(2 * tasks * aligned, total, out=np.zeros_like(total), where=total > 0)


def hypervolume(task: ArrayLike, misaligned: ArrayLike) -> float:
    """Return the area of the unit square task × (1 - misaligned) that a set of points dominates.

    The reference point is (0, 1). The area is 1 for a point that learns everything and misaligns nothing. It can only
    grow with the number of points, so compare sets with equally many points (Zitzler and Thiele 1999, doi
    10.1109/4235.797969).

    Args:
        task, misaligned: rates [n], n >= 1.

    Raises:
        ValueError: no points, unequal shapes, or values that are not rates.
    """
    tasks, bad = (np.atleast_1d(values) for values in _rates("hypervolume", task, misaligned))
    order = np.argsort(-tasks)
    widths = tasks[order] - np.append(tasks[order][1:], 0.0)
    return float(widths @ np.maximum.accumulate(1 - bad[order]))


def pareto(task: ArrayLike, misaligned: ArrayLike) -> NDArray[np.bool_]:
    """Return which points [n] no other point dominates, that is, is as good in both measures and better in one.

    Equal points are all kept or all dropped.

    Raises:
        ValueError: no points, unequal shapes, or values that are not rates.
    """
    tasks, bad = (np.atleast_1d(values) for values in _rates("pareto", task, misaligned))
    as_good = (tasks[:, None] >= tasks) & (bad[:, None] <= bad)
    better = (tasks[:, None] > tasks) | (bad[:, None] < bad)
    dominated: NDArray[np.bool_] = np.any(as_good & better, axis=0)
    return ~dominated


def at_equal_task(
    task: ArrayLike, misaligned: ArrayLike, target: float, strength: ArrayLike | None = None
) -> tuple[float, bool]:
    """Return misaligned where a frontier has learned `target`, and whether the value is clamped because it never does.

    The frontier is the line through its settings, ordered by strength, or by task without strengths. A line that
    crosses the target several times is read at its lowest crossing. So the frontier gets its best value, and the
    comparison with it is the hardest one. A line that never crosses is read at the setting with the nearest task (with
    ties, the lowest misaligned).

    Args:
        task, misaligned: [n], n >= 1. target: in the unit of task.
        strength: the position along the frontier [n], all different; None: ordered by task.

    Raises:
        ValueError: no points, unequal shapes, values that are not finite, or a strength that occurs twice.
    """
    tasks, bad = (np.atleast_1d(values) for values in _finite("at_equal_task", task, misaligned))
    _finite("at_equal_task", target)
    if strength is None:
        order = np.lexsort((bad, tasks))
    else:
        along = np.atleast_1d(_finite("at_equal_task", task, strength)[1])
        if len(np.unique(along)) < len(along):
            raise ValueError(f"at_equal_task: settings share a strength in {along.tolist()}; give each its own")
        order = np.argsort(along)
    tasks, bad = tasks[order], bad[order]
    if not tasks.min() <= target <= tasks.max():
        # Use the end itself, not the smallest gap: tiny tasks are all equally far from 1 in floating point.
        end = tasks.min() if target < tasks.min() else tasks.max()
        return float(bad[tasks == end].min()), True
    crossings = bad[tasks == target].tolist()
    # Multiply signs, not gaps: the product of two tiny gaps is 0.
    for left in np.flatnonzero(np.sign(tasks[:-1] - target) * np.sign(tasks[1:] - target) < 0):
        share = (target - tasks[left]) / (tasks[left + 1] - tasks[left])
        crossings.append(float(bad[left] + share * (bad[left + 1] - bad[left])))
    return min(crossings), False


def _finite(who: str, *arrays: ArrayLike) -> list[Floats]:
    """Return the arrays as float64.

    Raises:
        ValueError: different shapes, no values, or a value that is NaN or infinite.
    """
    values = [np.asarray(array, dtype=np.float64) for array in arrays]
    if len({value.shape for value in values}) > 1:
        raise ValueError(f"{who}: shapes {[value.shape for value in values]} differ; write one value per point")
    if not values[0].size:
        raise ValueError(f"{who}: no points")
    if not all(np.isfinite(value).all() for value in values):
        raise ValueError(f"{who}: a value is not finite; leave out its run")
    return values


def _rates(who: str, *arrays: ArrayLike) -> list[Floats]:
    """Return the arrays as `_finite` does; raise ValueError also for values outside 0..1."""
    values = _finite(who, *arrays)
    for value in values:
        if value.min() < 0 or value.max() > 1:
            raise ValueError(f"{who}: values from {value.min():g} to {value.max():g} are not rates in 0..1")
    return values

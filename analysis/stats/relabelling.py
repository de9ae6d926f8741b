"""What would be measured if a row's set made no difference: memberships dealt anew, rows of one completion together."""

import numpy as np
from numpy.typing import NDArray

from .intervals import Floats

Integers = NDArray[np.int64]


def rows_of_clusters(clusters: Integers) -> list[Integers]:
    """The rows of each cluster, by ascending label."""
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order])) + 1
    return [rows for rows in np.split(order, starts) if len(rows)]


class Relabelling:
    """Random memberships that are as likely as the given one when a row's set makes no difference.

    A completion that both sets have equally often (a matched pair, or several) changes sides as a whole; one that they
    have unequally often deals its labels among its own rows; all others are dealt among those with as many rows. Rows
    of one completion therefore stay together, and each relabelling is a permutation of rows that are exchangeable.
    """

    def __init__(self, member: Floats, clusters: Integers) -> None:
        self.member = member
        rows = rows_of_clusters(clusters)
        shares = [member[found].mean() for found in rows]
        self.flipped = [found for found, share in zip(rows, shares, strict=True) if share == 0.5]
        self.mixed = [found for found, share in zip(rows, shares, strict=True) if share not in (0, 0.5, 1)]
        pure = [found for found, share in zip(rows, shares, strict=True) if share in (0, 1)]
        alike = [[found for found in pure if len(found) == size] for size in {len(found) for found in pure}]
        self.dealt = [np.stack(found) for found in alike if len({member[first[0]] for first in found}) == 2]

    @property
    def possible(self) -> bool:
        """Whether anything can be relabelled."""
        return bool(self.flipped or self.mixed or self.dealt)

    def draw(self, count: int, generator: np.random.Generator) -> Floats:
        """[count, n] memberships."""
        drawn = np.tile(self.member, (count, 1))
        for rows in self.flipped:
            sides = generator.integers(2, size=(count, 1))
            drawn[:, rows] = np.abs(drawn[:, rows] - sides)
        for rows in self.mixed:
            drawn[:, rows] = generator.permuted(drawn[:, rows], axis=1)
        for rows in self.dealt:
            labels = generator.permuted(np.tile(self.member[rows[:, 0]], (count, 1)), axis=1)
            drawn[:, rows] = labels[:, :, None]
        return drawn

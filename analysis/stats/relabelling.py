"""Relabelling: what would be measured if the set of a row made no difference.

Memberships in two sets are dealt again, and rows of one completion stay together.
"""

import numpy as np
from numpy.typing import NDArray

from .intervals import Floats

Integers = NDArray[np.int64]


def rows_of_clusters(clusters: Integers) -> list[Integers]:
    """Return the row numbers of each cluster, by ascending label."""
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order])) + 1
    return [rows for rows in np.split(order, starts) if len(rows)]


class Relabelling:
    """Random memberships that are as likely as the given one if the set of a row makes no difference.

    A completion that both sets have equally often (one or more matched pairs) changes sides as a whole. A completion
    that the sets have unequally often deals its labels among its own rows. All other completions are dealt among those
    with as many rows. Therefore rows of one completion stay together, and each relabelling is a permutation of
    exchangeable rows.

    Args:
        member: [n], 0 for rows of the first set, 1 for rows of the second. clusters: [n], a number for the completion.
    """

    def __init__(self, member: Floats, clusters: Integers) -> None:
        self.member = member
        rows = rows_of_clusters(clusters)
        shares = [member[cluster].mean() for cluster in rows]
        self.flipped = [cluster for cluster, share in zip(rows, shares, strict=True) if share == 0.5]
        self.mixed = [cluster for cluster, share in zip(rows, shares, strict=True) if share not in (0, 0.5, 1)]
        pure = [cluster for cluster, share in zip(rows, shares, strict=True) if share in (0, 1)]
        by_size = [[cluster for cluster in pure if len(cluster) == size] for size in {len(cluster) for cluster in pure}]
        self.dealt = [np.stack(group) for group in by_size if len({member[cluster[0]] for cluster in group}) == 2]

    @property
    def possible(self) -> bool:
        """Whether anything can be relabelled."""
        return bool(self.flipped or self.mixed or self.dealt)

    def draw(self, count: int, generator: np.random.Generator) -> Floats:
        """Draw memberships [count, n]."""
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

"""Means over pairs of rows without a matrix over rows: time and memory grow linearly with the rows.

Let F [n, D] be features and S a diagonal matrix of signs. The matrix K = F S F^T over rows holds inner products, some
of them with a minus sign. A sum of K over any sets of rows is then an inner product of sums of features: sum_ij w_i
K_ij v_j = (w F) S (v F)^T. Pairs inside a cluster are subtracted one by one; a cluster of m rows has m^2.
"""

import numpy as np
from scipy import sparse

from .intervals import Floats
from .relabelling import Integers, rows_of_clusters

# The number of memberships that are summed together; only their sums [chunk, D] are in memory.
_CHUNK = 64


class PairSums:
    """The means of `gradient_pairs.pair_means` for F S F^T, where pairs inside a cluster do not count.

    Args:
        features: F [n, D]. signs: [D], the diagonal of S. clusters: [n].
    """

    def __init__(self, features: Floats, signs: Floats, clusters: Integers) -> None:
        self.features, self.signs = features, signs
        groups = rows_of_clusters(clusters)
        self.code = np.empty(len(clusters), dtype=np.int64)
        for code, rows in enumerate(groups):
            self.code[rows] = code
        left = np.concatenate([np.repeat(rows, len(rows)) for rows in groups])
        right = np.concatenate([np.tile(rows, len(rows)) for rows in groups])
        values = np.concatenate([((features[rows] * signs) @ features[rows].T).ravel() for rows in groups])
        shape = (len(clusters), len(clusters))
        self.inside = sparse.csr_array((values, (left, right)), shape)
        self.alike = sparse.csr_array((np.ones(len(left)), (left, right)), shape)

    def means(self, member: Floats) -> Floats:
        """Return [4, P]: the means within the first set, within the second set, and between them; and the gap.

        Args:
            member: [P, n] or [n], 0 for rows of the first set, 1 for rows of the second set.
        """
        members = np.atleast_2d(member)
        parts = [self._means(members[at : at + _CHUNK]) for at in range(0, len(members), _CHUNK)]
        return np.concatenate(parts, axis=1)

    def _means(self, second: Floats) -> Floats:
        inner = second @ self.features
        sides, summed = (1 - second, second), (self.features.sum(0) - inner, inner)
        means = []
        for left, right in ((0, 0), (1, 1), (0, 1)):
            first, other = sides[left], sides[right]
            sums = (summed[left] * self.signs * summed[right]).sum(1) - ((self.inside @ first.T).T * other).sum(1)
            pairs = first.sum(1) * other.sum(1) - ((self.alike @ first.T).T * other).sum(1)
            means.append(_quotient(sums, pairs))
        return _with_gap(means)

    def without_each_cluster(self, member: Floats) -> Floats:
        """Return the same means [4, G], with each of the G clusters left out in turn."""
        sides = (1 - member, member)
        towards = [self._towards(side) for side in sides]
        means = []
        for left, right in ((0, 0), (1, 1), (0, 1)):
            # No pair is inside a cluster: without a cluster, the pairs of its rows on both sides are gone, none twice.
            sums, pairs = (
                sides[left] @ towards[right][kind]
                - np.bincount(self.code, sides[left] * towards[right][kind])
                - np.bincount(self.code, sides[right] * towards[left][kind])
                for kind in (0, 1)
            )
            means.append(_quotient(sums, pairs))
        return _with_gap(means)

    def _towards(self, side: Floats) -> tuple[Floats, Floats]:
        """Return the sum [n] over the pairs of each row with the rows of one side, and the number of these pairs."""
        sums = self.features @ (self.signs * (side @ self.features)) - self.inside @ side
        return sums, side.sum() - self.alike @ side


def _quotient(sums: Floats, pairs: Floats) -> Floats:
    """Return sums / pairs, 0 where there is no pair."""
    return np.divide(sums, pairs, out=np.zeros_like(sums), where=pairs > 0.5)


def _with_gap(means: list[Floats]) -> Floats:
    """Return the three means with their gap below them."""
    return np.stack([*means, (means[0] + means[1]) / 2 - means[2]])

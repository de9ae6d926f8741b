"""Means over pairs of rows without a matrix over rows: time and memory grow with the rows, not with their square.

A matrix over rows whose entries are inner products, plus those of one thing and minus those of another, has sums over
any sets of rows that are inner products of sums: K = F S F^T with S a diagonal of signs gives
sum_ij w_i K_ij v_j = (w F) S (v F)^T. Pairs inside a cluster are taken off one by one; a cluster of m rows has m^2.
"""

import numpy as np
from scipy import sparse

from .intervals import Floats
from .relabelling import Integers, rows_of_clusters

# Sets of rows that are summed at a time: the sums [chunk, D] are all that is held.
_CHUNK = 64


class PairSums:
    """The means of `gradient_pairs.pair_means` for F S F^T, where pairs of one cluster do not count.

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
        """[4, P]: within the first set (0 in `member` [P, n]), within the second (1), between, and gap."""
        members = np.atleast_2d(member)
        parts = [self._means(members[at : at + _CHUNK]) for at in range(0, len(members), _CHUNK)]
        return np.concatenate(parts, axis=1)

    def _means(self, second: Floats) -> Floats:
        inner = second @ self.features
        sides, summed = (1 - second, second), (self.features.sum(0) - inner, inner)
        found = []
        for left, right in ((0, 0), (1, 1), (0, 1)):
            one, other = sides[left], sides[right]
            sums = (summed[left] * self.signs * summed[right]).sum(1) - ((self.inside @ one.T).T * other).sum(1)
            pairs = one.sum(1) * other.sum(1) - ((self.alike @ one.T).T * other).sum(1)
            found.append(_quotient(sums, pairs))
        return _with_gap(found)

    def without_each_cluster(self, member: Floats) -> Floats:
        """[4, G]: the same, each of the G clusters left out in turn."""
        sides = (1 - member, member)
        towards = [self._towards(side) for side in sides]
        found = []
        for left, right in ((0, 0), (1, 1), (0, 1)):
            # No pair is inside a cluster, so leaving one out takes its rows' pairs off on either side, none twice.
            sums, pairs = (
                sides[left] @ towards[right][kind]
                - np.bincount(self.code, sides[left] * towards[right][kind])
                - np.bincount(self.code, sides[right] * towards[left][kind])
                for kind in (0, 1)
            )
            found.append(_quotient(sums, pairs))
        return _with_gap(found)

    def _towards(self, side: Floats) -> tuple[Floats, Floats]:
        """Sum [n] of each row's pairs with the rows of one side, and their number."""
        sums = self.features @ (self.signs * (side @ self.features)) - self.inside @ side
        return sums, side.sum() - self.alike @ side


def _quotient(sums: Floats, pairs: Floats) -> Floats:
    return np.divide(sums, pairs, out=np.zeros_like(sums), where=pairs > 0.5)


def _with_gap(means: list[Floats]) -> Floats:
    return np.stack([*means, (means[0] + means[1]) / 2 - means[2]])

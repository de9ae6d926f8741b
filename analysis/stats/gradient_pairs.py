"""Means over pairs of rows of two sets, and the same means if the set of a row made no difference.

Everything is computed from a matrix over rows (inner products of gradients, cosines, or conflicts). A `member` vector
says whether a row belongs to the first set (0) or to the second (1). A `comparable` matrix says how much each pair of
rows counts. Many memberships, or many weightings of the rows, are computed together: a batch is [P, n].
"""

from collections.abc import Sequence

import numpy as np

from .intervals import Floats
from .relabelling import Integers, rows_of_clusters

MEANS = ("within_first", "within_second", "between", "gap")


def different(clusters: Integers) -> Floats:
    """Return [n, n]: 1 for pairs of rows of different clusters, 0 for the others."""
    return (clusters[:, None] != clusters).astype(np.float64)


def cosines(gram: Floats, centred: bool = False) -> Floats:
    """Return the cosines [n, n] from inner products; with `centred`, of the rows minus their mean."""
    if centred:
        mean = gram.mean(0)
        gram = gram - mean[:, None] - mean + mean.mean()
    scale = _inverse_root(np.diagonal(gram), np.diagonal(gram).max(initial=0.0))
    return np.clip(gram * scale[:, None] * scale, -1.0, 1.0)


def pair_means(
    matrix: Floats, comparable: Floats, member: Floats, weights: Floats | None = None, centred: bool = False
) -> Floats:
    """Return [4, P]: means of a matrix over pairs within the first set, within the second, and between them; the gap.

    The gap is the mean of the first two minus the third: how much more similar rows of one set are than rows of two
    sets.

    Args:
        matrix: [n, n] symmetric; its entries are averaged. With `centred` it holds inner products instead, and the
            cosines around the weighted mean of all rows are averaged.
        comparable: [n, n] symmetric, how much a pair counts.
        member: [P, n] or [n], 1 for rows of the second set.
        weights: [P, n], how often each row counts; None: once.
    """
    second = np.atleast_2d(member)
    counts = np.ones_like(second) if weights is None else np.atleast_2d(weights)
    scaled, mean, constant = counts, np.zeros_like(counts), np.zeros(len(counts))
    if centred:
        total = counts.sum(1, keepdims=True)
        mean = counts @ matrix / total
        constant = (mean * counts).sum(1) / total[:, 0]
        squares = np.diagonal(matrix) - 2 * mean + constant[:, None]
        scaled = counts * _inverse_root(squares, np.diagonal(matrix).max())
    values, sides = matrix * comparable, (1 - second, second)
    means = []
    for left, right in ((0, 0), (1, 1), (0, 1)):
        first, other = scaled * sides[left], scaled * sides[right]
        sums = ((first @ values) * other).sum(1)
        if centred:
            # <g_i - m, g_j - m> = <g_i, g_j> - <g_i, m> - <g_j, m> + <m, m>, summed without forming the matrix.
            plain = first @ comparable
            sums -= (((first * mean) @ comparable) * other).sum(1) + (plain * other * (mean - constant[:, None])).sum(1)
        pairs = (((counts * sides[left]) @ comparable) * counts * sides[right]).sum(1)
        means.append(np.divide(sums, pairs, out=np.zeros_like(sums), where=pairs > 0))
    return np.stack([*means, (means[0] + means[1]) / 2 - means[2]])


def _inverse_root(squares: Floats, largest: float) -> Floats:
    """Return 1 / sqrt of the squares, and 0 where a square is only rounding.

    A vector without length has no direction.
    """
    return np.where(squares > 1e-12 * largest, 1 / np.sqrt(np.maximum(squares, 1e-12 * largest + 1e-300)), 0.0)


def without_each_cluster(clusters: Integers) -> Floats:
    """Return weights [G, n] of the rows, with each of the G clusters left out in turn."""
    return (clusters != np.unique(clusters)[:, None]).astype(np.float64)


def length_distance(lengths: Sequence[int], clusters: Integers, generator: np.random.Generator) -> Floats:
    """Return [n, n] differences of length, infinite inside a cluster; equal differences are ordered at random."""
    sizes = np.asarray(lengths, dtype=np.float64)
    apart = np.abs(sizes[:, None] - sizes) + generator.random((len(sizes), len(sizes))) / 2
    return np.where(different(clusters) > 0, apart, np.inf)


def nearest_partners(distance: Floats, member: Floats) -> Integers:
    """Return [n, 2]: for each row, the nearest row of the first set and of the second set."""
    sides = [np.flatnonzero(member == side) for side in (0, 1)]
    return np.stack([inside[distance[:, inside].argmin(1)] for inside in sides], axis=1)


def partner_means(matrix: Floats, partners: Integers, member: Floats) -> Floats:
    """Return [4], as `pair_means`, over each row and its partner of its own set, and its partner of the other set."""
    rows, second = np.arange(len(member)), member.astype(np.int64)
    same_set, other_set = matrix[rows, partners[rows, second]], matrix[rows, partners[rows, 1 - second]]
    within = same_set[second == 0].mean(), same_set[second == 1].mean()
    between = other_set.mean()
    return np.array([*within, between, sum(within) / 2 - between])


def partner_counts(partners: Integers) -> Floats:
    """Return [n, n] symmetric: how often two rows are partners, for `pair_means`."""
    counts = np.zeros((len(partners), len(partners)))
    for column in partners.T:
        counts[np.arange(len(partners)), column] += 1
    return counts + counts.T


def shuffled_partners(clusters: Integers, count: int, generator: np.random.Generator) -> Integers:
    """Return [count, m]: for each of m matched pairs, the pair that gives it its second row in each shuffle.

    The pairs of one completion stay together: they are exchanged with those of a completion that has equally many
    pairs.
    """
    rows = rows_of_clusters(clusters)
    partners = np.tile(np.arange(len(clusters)), (count, 1))
    for size in {len(cluster) for cluster in rows}:
        equal_sized = np.stack([cluster for cluster in rows if len(cluster) == size])
        order = generator.permuted(np.tile(np.arange(len(equal_sized)), (count, 1)), axis=1)
        partners[:, equal_sized] = equal_sized[order]
    return partners

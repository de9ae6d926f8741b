"""Means over pairs of rows of two sets, and what they would be if the rows' set made no difference.

Everything here is read from a matrix over rows (inner products of gradients, cosines, conflicts). A `member` vector
says which rows belong to the second set (1) and which to the first (0); a `comparable` matrix says which pairs count
and how much. Many memberships, or many weightings of the rows, are computed in one go: a batch is [P, n].
"""

from collections.abc import Sequence

import numpy as np

from .intervals import Floats
from .relabelling import Integers, rows_of_clusters

MEANS = ("within_first", "within_second", "between", "gap")


def different(clusters: Integers) -> Floats:
    """[n, n], 1 for pairs of rows of different clusters, 0 for the others."""
    return (clusters[:, None] != clusters).astype(np.float64)


def cosines(gram: Floats, centred: bool = False) -> Floats:
    """[n, n] cosines from inner products, of the rows as they are or of what is left without their mean."""
    if centred:
        mean = gram.mean(0)
        gram = gram - mean[:, None] - mean + mean.mean()
    scale = _inverse_root(np.diagonal(gram), np.diagonal(gram).max(initial=0.0))
    return np.clip(gram * scale[:, None] * scale, -1.0, 1.0)


def pair_means(
    matrix: Floats, comparable: Floats, member: Floats, weights: Floats | None = None, centred: bool = False
) -> Floats:
    """[4, P]: the mean of a symmetric matrix over pairs within the first set, within the second, between them, and gap.

    gap is the mean of the first two minus the third: how much more alike rows of one set are than rows of two.

    Args:
        matrix: [n, n], averaged as it is; centred: inner products instead, whose cosines around the weighted mean of
            all rows are averaged.
        comparable: [n, n] symmetric, how much a pair counts.
        member: [P, n] or [n], 1 for rows of the second set. weights: [P, n], how often each row is there; None: once.
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
    found = []
    for left, right in ((0, 0), (1, 1), (0, 1)):
        one, other = scaled * sides[left], scaled * sides[right]
        sums = ((one @ values) * other).sum(1)
        if centred:
            # <g_i - m, g_j - m> = <g_i, g_j> - <g_i, m> - <g_j, m> + <m, m>, summed without forming it.
            plain = one @ comparable
            sums -= (((one * mean) @ comparable) * other).sum(1) + (plain * other * (mean - constant[:, None])).sum(1)
        pairs = (((counts * sides[left]) @ comparable) * counts * sides[right]).sum(1)
        found.append(np.divide(sums, pairs, out=np.zeros_like(sums), where=pairs > 0))
    return np.stack([*found, (found[0] + found[1]) / 2 - found[2]])


def _inverse_root(squares: Floats, largest: float) -> Floats:
    """1 / sqrt, and 0 where a square is nothing but rounding: a vector of no length has no direction."""
    return np.where(squares > 1e-12 * largest, 1 / np.sqrt(np.maximum(squares, 1e-12 * largest + 1e-300)), 0.0)


def without_each_cluster(clusters: Integers) -> Floats:
    """Weights [G, n] of the rows, each of the G clusters left out in turn."""
    return (clusters != np.unique(clusters)[:, None]).astype(np.float64)


def length_distance(lengths: Sequence[int], clusters: Integers, generator: np.random.Generator) -> Floats:
    """[n, n] differences of length, infinite inside a cluster; equal ones are ordered at random."""
    sizes = np.asarray(lengths, dtype=np.float64)
    apart = np.abs(sizes[:, None] - sizes) + generator.random((len(sizes), len(sizes))) / 2
    return np.where(different(clusters) > 0, apart, np.inf)


def nearest_partners(distance: Floats, member: Floats) -> Integers:
    """[n, 2]: the nearest row of the first set, and of the second, of each row."""
    sides = [np.flatnonzero(member == side) for side in (0, 1)]
    return np.stack([inside[distance[:, inside].argmin(1)] for inside in sides], axis=1)


def partner_means(matrix: Floats, partners: Integers, member: Floats) -> Floats:
    """[4], as `pair_means`, over each row and its partners of its own and of the other set."""
    rows, second = np.arange(len(member)), member.astype(np.int64)
    own, other = matrix[rows, partners[rows, second]], matrix[rows, partners[rows, 1 - second]]
    within = own[second == 0].mean(), own[second == 1].mean()
    between = other.mean()
    return np.array([*within, between, sum(within) / 2 - between])


def partner_counts(partners: Integers) -> Floats:
    """[n, n] symmetric: how often two rows are partners, for `pair_means`."""
    counts = np.zeros((len(partners), len(partners)))
    for column in partners.T:
        counts[np.arange(len(partners)), column] += 1
    return counts + counts.T


def shuffled_partners(clusters: Integers, count: int, generator: np.random.Generator) -> Integers:
    """[count, m]: for each of m matched pairs the pair it borrows its second row from, whole completions at a time."""
    rows = rows_of_clusters(clusters)
    partners = np.tile(np.arange(len(clusters)), (count, 1))
    for size in {len(found) for found in rows}:
        alike = np.stack([found for found in rows if len(found) == size])
        order = generator.permuted(np.tile(np.arange(len(alike)), (count, 1)), axis=1)
        partners[:, alike] = alike[order]
    return partners

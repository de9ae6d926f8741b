"""Tests that need no model of the noise (sign flips, permutations), and Holm's adjustment for several of them."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .intervals import Floats, cluster_codes

# Values are ties if they differ by less than this share, which is rounding.
_TIE = 1e-12


def sign_flip_test(differences: ArrayLike, seed: int = 0, n_flips: int = 100_000) -> float:
    """Return the two-sided p of the sign-flip test that the mean paired difference is 0.

    The test is exact for n <= 16 pairs; otherwise it samples `n_flips` patterns of signs. With n = 5 the smallest
    possible p is 0.0625.

    Raises:
        ValueError: no differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("sign_flip_test: no differences")
    if n <= 16:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) * (1 - _TIE)))
    signs = np.random.default_rng(seed).choice((-1, 1), size=(n_flips, n))
    return permutation_p(abs(float(values.sum())), np.abs(signs @ values))


def permutation_test(
    first: ArrayLike,
    second: ArrayLike,
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    seed: int = 0,
    n_permutations: int = 9999,
) -> float:
    """Return the two-sided p of the permutation test that two groups have the same mean.

    Rows, or whole clusters, are dealt to the groups again.

    Args:
        first, second: [n], [m].
        clusters: a label for each row of each group; a label belongs to one group.

    Raises:
        ValueError: an empty group, or a cluster in both groups (rows that come in pairs need `sign_flip_test`).
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not len(left) or not len(right):
        raise ValueError("permutation_test: a group is empty")
    values, member = np.concatenate([left, right]), np.repeat([1.0, 0.0], [len(left), len(right)])
    labels = None if clusters is None else [*clusters[0], *clusters[1]]
    dealt = permuted_labels(member, labels, n_permutations, seed)

    def gap(groups: Floats) -> Floats:
        inside = groups.sum(-1)
        return np.abs(groups @ values / inside - (1 - groups) @ values / (len(values) - inside))

    return permutation_p(float(gap(member)), gap(dealt))


def permuted_labels(
    member: ArrayLike, clusters: Sequence[Hashable] | None, n_permutations: int, seed: int = 0
) -> Floats:
    """Return random deals [n_permutations, n] of the group labels 0 and 1; the rows of a cluster keep one label.

    Raises:
        ValueError: a cluster whose rows have both labels.
    """
    labels = np.asarray(member, dtype=np.float64)
    codes = cluster_codes(clusters, len(labels))
    sums, counts = np.bincount(codes, labels), np.bincount(codes)
    if ((sums > 0) & (sums < counts)).any():
        raise ValueError("permuted_labels: a cluster has rows of both groups; use sign_flip_test for pairs")
    units = np.tile(sums / counts, (n_permutations, 1))
    return np.random.default_rng(seed).permuted(units, axis=1)[:, codes]


def permutation_p(observed: float, null: ArrayLike) -> float:
    """Return the p-value of an observed value among N values under the null, where large values are extreme.

    It is (1 + number of values at least as large) / (1 + N): the observed value counts among those drawn.
    """
    values = np.asarray(null, dtype=np.float64)
    return float((1 + np.sum(values >= observed - _TIE * abs(observed))) / (1 + len(values)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values, in the given order."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted: NDArray[np.float64] = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()

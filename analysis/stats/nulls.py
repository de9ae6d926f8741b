"""Tests without a model of the noise: sign flips, permutations, and Holm's adjustment for several of them."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .intervals import Floats, cluster_codes

# Sampled p-values count the observed arrangement among the drawn ones; ties are equal up to rounding.
_TIE = 1e-12


def sign_flip_test(differences: ArrayLike, seed: int = 0, n_flips: int = 100_000) -> float:
    """Two-sided p: paired differences centre on 0: exact to 16 pairs, else sampled; five pairs cannot reach 0.05."""
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
    """Two-sided p: two groups have one mean. Rows, or whole clusters, are dealt to the groups anew.

    Args:
        first, second: [n], [m]. clusters: a label per row of each; a label belongs to one group.

    Raises:
        ValueError: an empty group, or a cluster in both (rows that come in pairs want `sign_flip_test`).
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
    """Random deals [n_permutations, n] of the group labels 0 and 1, whole clusters keeping one label.

    Raises:
        ValueError: a cluster whose rows have both labels.
    """
    labels = np.asarray(member, dtype=np.float64)
    codes = cluster_codes(clusters, len(labels))
    sums, counts = np.bincount(codes, labels), np.bincount(codes)
    if ((sums > 0) & (sums < counts)).any():
        raise ValueError("permuted_labels: a cluster has rows of both groups; pairs want sign flips")
    units = np.tile(sums / counts, (n_permutations, 1))
    return np.random.default_rng(seed).permuted(units, axis=1)[:, codes]


def permutation_p(observed: float, null: ArrayLike) -> float:
    """p of an observed value among those under the null [N], the large ones being extreme: (1 + #) / (1 + N)."""
    values = np.asarray(null, dtype=np.float64)
    return float((1 + np.sum(values >= observed - _TIE * abs(observed))) / (1 + len(values)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the given order."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted: NDArray[np.float64] = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()

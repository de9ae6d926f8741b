"""Sums over pairs of rows, computed from features, equal loops over the pairs, in linear memory."""

import itertools
import tracemalloc

import numpy as np
import pytest
from holdfast.analysis.stats.pair_sums import PairSums
from hypothesis import given, settings
from hypothesis import strategies as st


def by_hand(matrix, member, clusters, kept):
    """The four means over pairs of kept rows of different clusters, by loops."""
    sums, counts = np.zeros(3), np.zeros(3)
    for i, j in itertools.combinations(np.flatnonzero(kept), 2):
        if clusters[i] != clusters[j]:
            kind = 2 if member[i] != member[j] else int(member[i])
            sums[kind] += matrix[i, j]
            counts[kind] += 1
    means = np.where(counts > 0, sums / np.maximum(counts, 1), 0.0)
    return [*means, (means[0] + means[1]) / 2 - means[2]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(5, 14), n_clusters=st.integers(3, 14))
def test_means_over_pairs_equal_loops_over_the_pairs(seed, n, n_clusters):
    generator = np.random.default_rng(seed)
    features, signs = generator.normal(size=(n, 4)), np.array([1.0, 1, 1, -1])
    clusters, member = generator.integers(n_clusters, size=n), generator.integers(2, size=(3, n)).astype(float)
    matrix = features @ np.diag(signs) @ features.T
    pairs = PairSums(features, signs, clusters)
    found = pairs.means(member)
    for number, labels in enumerate(member):
        expected = by_hand(matrix, labels, clusters, np.ones(n))
        assert found[:, number] == pytest.approx(expected, abs=1e-9)
    without = pairs.without_each_cluster(member[0])
    for number, label in enumerate(np.unique(clusters)):
        assert without[:, number] == pytest.approx(by_hand(matrix, member[0], clusters, clusters != label), abs=1e-9)


def test_memory_grows_with_the_rows_and_not_with_their_square():
    peaks = []
    for n in (1000, 4000):
        generator = np.random.default_rng(0)
        features, member = generator.normal(size=(n, 16)), generator.integers(2, size=(20, n)).astype(float)
        tracemalloc.start()
        pairs = PairSums(features, np.ones(16), np.arange(n))
        pairs.means(member)
        pairs.without_each_cluster(member[0])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < 4000**2 * 8 / 4

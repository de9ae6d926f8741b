"""Directions of residuals are those of a plain SVD, and their intervals those of weighting rows anew."""

import tracemalloc

import numpy as np
import pytest
import torch
from holdfast.analysis.stats import spectra
from holdfast.analysis.stats.spectra import Residuals, compare, decompose
from holdfast.analysis.stats.split_spectra import halves

WIDTH = 12


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [5, 12, 50])
def test_components_are_those_of_a_plain_svd_whichever_side_is_smaller(n, centred, monkeypatch):
    monkeypatch.setattr(spectra, "_BLOCK_ROWS", 7)
    left, right = np.random.default_rng(1).standard_normal((2, 60, WIDTH))
    rows = np.random.default_rng(2).permutation(60)[:n]
    found = decompose(Residuals.of(torch.tensor(left), torch.tensor(right), rows), centred)
    plain = left[rows] - right[rows]
    plain = plain - plain.mean(0) * centred
    _, sizes, vectors = np.linalg.svd(plain, full_matrices=False)
    m = min(n - centred, WIDTH)
    np.testing.assert_allclose(found.values, sizes[:m] ** 2 / n, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(found.vectors * vectors[:m].T, axis=0)), 1, atol=1e-9)
    met, coordinates = (np.concatenate(parts) for parts in zip(*found.coordinates(), strict=True))
    assert met.tolist() == rows.tolist()
    np.testing.assert_allclose(coordinates @ found.vectors.T, plain, atol=1e-9)


def test_halves_split_every_pair_of_lines_the_same_way_in_every_set():
    first, second = halves(np.arange(101), 0)
    assert sorted([*first, *second]) == list(range(101))
    assert len({row // 2 for row in first}) == len(first) and len({row // 2 for row in second}) == len(second)
    again, _ = halves(np.array([3, 7, 8, 40]), 0)
    assert set(again) == {3, 7, 8, 40} & set(first.tolist())
    assert set(halves(np.arange(101), 1)[0].tolist()) != set(first.tolist())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [6, 30])
def test_influence_is_the_derivative_by_a_rows_weight(width, centred):
    generator = np.random.default_rng(0)
    one, two = generator.standard_normal((2, 20, width)) * np.linspace(2, 0.5, width)
    rows = np.arange(20)
    spectra_of = [
        decompose(Residuals.of(torch.tensor(x), torch.zeros(20, width, dtype=torch.float64), rows), centred)
        for x in (one, two)
    ]
    found = compare(*spectra_of, rank=2, size=20)

    def reweighted(row, by):
        weights = np.ones(20)
        weights[row] += by
        weights /= weights.sum()
        bases = []
        for x in (one, two):
            moved = x - (weights @ x) * centred
            bases.append(np.linalg.eigh((moved * weights[:, None]).T @ moved)[1][:, ::-1][:, :2])
        signed = bases[0].T @ bases[1]
        return np.abs(signed), np.linalg.svd(signed, compute_uv=False), np.sum(signed**2) / 2

    # Influence is the derivative by a mixture: the normalised weight of one row among n, up to 1 / n of itself.
    for row in (0, 7, 19):
        up, down = reweighted(row, 1e-5), reweighted(row, -1e-5)
        for estimate, high, low in zip((found.cosines, found.principal, found.overlap), up, down, strict=True):
            np.testing.assert_allclose(estimate.influence[row], (high - low) / 2e-5, rtol=1e-3, atol=1e-6)


def test_intervals_cover_the_true_overlap_and_cosine():
    generator, width, n = np.random.default_rng(0), 8, 60
    angle = np.radians(40)
    u, v = np.eye(width)[0], np.cos(angle) * np.eye(width)[0] + np.sin(angle) * np.eye(width)[1]
    inside = {"cosine": 0, "overlap": 0, "degrees": 0}
    repetitions = 500
    for _ in range(repetitions):
        sets = [
            torch.tensor(
                3 * generator.standard_normal((n, 1)) * axis + 0.3 * generator.standard_normal((n, width)),
            )
            for axis in (u, v)
        ]
        rows = np.arange(n)
        found = compare(*(decompose(Residuals.of(x, torch.zeros_like(x), rows)) for x in sets), rank=1, size=n)
        for name, measured, truth in (
            ("cosine", found.cosines.at(0, 0).cosine(), np.cos(angle)),
            ("overlap", found.overlap.share(), np.cos(angle) ** 2),
            ("degrees", found.principal.at(0).degrees(), 40),
        ):
            inside[name] += measured["ci95"][0] <= truth <= measured["ci95"][1]
    assert all(0.93 <= count / repetitions <= 0.97 for count in inside.values()), inside


def test_memory_of_the_svd_does_not_grow_with_rows():
    peaks = []
    for times in (1, 4, 16):
        left = torch.randn(4096 * times, 24)
        residuals = Residuals.of(left, torch.zeros(1, 24).expand_as(left), np.arange(len(left)))
        assert max(len(rows) for rows, _ in residuals.blocks()) <= 2048
        tracemalloc.start()
        found = decompose(residuals, centred=True)
        assert sum(len(rows) for rows, _ in found.coordinates()) == len(left)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1.1 * min(peaks)


def test_one_unseparated_layer_does_not_drown_the_mean_over_layers():
    generator = np.random.default_rng(0)
    rows = np.arange(60)

    def overlap(second):
        sizes = np.array([3, second] + [0.1] * 6)
        pair = [torch.tensor(generator.standard_normal((60, 8)) * sizes) for _ in range(2)]
        return compare(*(decompose(Residuals.of(x, torch.zeros_like(x), rows)) for x in pair), rank=1, size=60).overlap

    clear, unclear = overlap(0.5), overlap(3)
    unbounded = np.sqrt((unclear.influence**2).sum() * 60 / 59)
    assert np.sqrt((unclear.bounded().influence ** 2).sum() * 60 / 59) == pytest.approx(min(unbounded, 0.5))
    np.testing.assert_array_equal(clear.bounded().influence, clear.influence)
    huge = spectra.Estimate(unclear.value, 100 * unclear.influence, 60)
    low, high = spectra.mean_estimate([clear.bounded()] * 9 + [huge.bounded()], 60).share()["ci95"]
    assert high - low < 0.25
    low, high = huge.bounded().share()["ci95"]
    assert high - low > 0.7

"""The methods' algebra: against numpy's SVD of the stacked rows, planted directions, and the laws of projectors."""

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.subspace import methods
from hypothesis import given, settings
from hypothesis import strategies as st

WIDTH = 8


def moments_of(rows, pieces=3):
    """Moments fed in several batches."""
    moments = methods.Moments(rows.shape[1])
    for piece in np.array_split(rows, pieces):
        moments.add(torch.from_numpy(piece))
    return moments


def sample(seed, n=60, mean=1.0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, WIDTH)) * np.linspace(3, 0.5, WIDTH) + mean * generator.normal(size=WIDTH)


def same_span(left, right):
    return np.allclose(left @ left.T, right @ right.T, atol=1e-8)


seeds = st.integers(0, 10_000)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, WIDTH - 1))
def test_svd_is_that_of_the_stacked_residuals(seed, rank):
    rows = sample(seed)
    moments = moments_of(rows)
    plain = methods.svd_basis(moments, rank, centred=False).numpy()
    assert same_span(plain, np.linalg.svd(rows, full_matrices=False)[2][:rank].T)
    centred = methods.svd_basis(moments, rank, centred=True).numpy()
    assert same_span(centred, np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:rank].T)
    assert (plain.T @ rows.mean(0) >= 0).all()
    np.testing.assert_allclose(
        moments.energies(torch.from_numpy(plain)).numpy(), ((rows @ plain) ** 2).mean(0), rtol=1e-10
    )


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, WIDTH - 1))
def test_every_basis_is_orthonormal_and_its_projector_idempotent(seed, rank):
    groups = {name: moments_of(sample(seed + i)) for i, name in enumerate("abc")}
    for basis in (
        methods.contrastive_basis(groups["a"], rank),
        methods.svd_basis(groups["a"], rank, False),
        methods.svd_basis(groups["a"], rank, True),
        methods.shared_basis(groups, rank),
        methods.random_basis(WIDTH, rank, seed, 0),
    ):
        columns = basis.numpy()
        np.testing.assert_allclose(columns.T @ columns, np.eye(rank), atol=1e-10)
        projector = columns @ columns.T
        np.testing.assert_allclose(projector @ projector, projector, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0.1, 10))
def test_a_planted_direction_is_recovered_by_every_method(seed, size):
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    groups = {}
    for name in "ab":
        rows = size * (1 + generator.random((40, 1))) * direction + 1e-3 * size * generator.normal(size=(40, WIDTH))
        groups[name] = moments_of(rows)
    merged = methods.merge(groups.values())
    for basis in (
        methods.mean_direction(merged, "mean"),
        methods.contrastive_basis(merged, 1),
        methods.svd_basis(merged, 1, False),
        methods.svd_basis(merged, 1, True),
        methods.shared_basis(groups, 1),
    ):
        assert basis.numpy()[:, 0] @ direction > 0.999


def test_contrastive_starts_with_the_mean_and_continues_with_the_rest_of_the_variance():
    rows = sample(3)
    basis = methods.contrastive_basis(moments_of(rows), 3).numpy()
    mean = rows.mean(0) / np.linalg.norm(rows.mean(0))
    np.testing.assert_allclose(basis[:, 0], mean, atol=1e-12)
    remainder = rows - np.outer(rows @ mean, mean)
    assert same_span(basis[:, 1:], np.linalg.svd(remainder)[2][:2].T)
    np.testing.assert_allclose(methods.contrastive_basis(moments_of(rows), 2).numpy(), basis[:, :2], atol=1e-8)


def test_shared_keeps_what_domains_have_in_common():
    common, own = np.eye(WIDTH)[0], {"a": np.eye(WIDTH)[1], "b": np.eye(WIDTH)[2], "c": np.eye(WIDTH)[3]}
    generator = np.random.default_rng(0)
    groups = {
        name: moments_of(np.outer(generator.normal(size=50), common) + 3 * np.outer(generator.normal(size=50), axis))
        for name, axis in own.items()
    }
    basis = methods.shared_basis(groups, 2).numpy()
    assert abs(basis[:, 0] @ common) > 0.999
    with pytest.raises(UserError, match="shared: "):
        methods.shared_basis({"a": groups["a"]}, 1)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 30))
def test_random_bases_nest_and_differ_between_seeds_and_layers(seed, layer):
    full = methods.random_basis(WIDTH, 4, seed, layer)
    assert torch.equal(full[:, :2], methods.random_basis(WIDTH, 4, seed, layer)[:, :2])
    torch.testing.assert_close(full[:, :2], methods.random_basis(WIDTH, 2, seed, layer))
    assert not torch.allclose(full, methods.random_basis(WIDTH, 4, seed, layer + 1))
    assert not torch.allclose(full, methods.random_basis(WIDTH, 4, seed + 1, layer))


def test_random_directions_are_uniform():
    draws = torch.cat([methods.random_basis(WIDTH, 1, seed, 0) for seed in range(2000)], dim=1)
    torch.testing.assert_close(draws @ draws.T / 2000, torch.eye(WIDTH).double() / WIDTH, atol=0.02, rtol=0)


def test_principal_angles_of_known_planes():
    axes = torch.eye(3, dtype=torch.float64)
    tilted = torch.stack([axes[0], (axes[1] + axes[2]) / 2**0.5], dim=1)
    np.testing.assert_allclose(methods.principal_angles(axes[:, :2], tilted), [0, 45], atol=1e-5)
    np.testing.assert_allclose(methods.principal_angles(axes[:, :1], axes[:, 2:]), [90], atol=1e-5)


@pytest.mark.parametrize("rank", [0, 4, WIDTH + 1])
def test_a_rank_above_width_or_rows_is_refused(rank):
    few = moments_of(sample(0, n=3))
    with pytest.raises(UserError, match="rank"):
        methods.svd_basis(few, rank, False)
    with pytest.raises(UserError, match="1-2"):
        methods.svd_basis(few, 3, True)
    with pytest.raises(UserError, match="rank"):
        methods.random_basis(WIDTH, WIDTH + 1, 0, 0)


def test_identical_sides_have_no_direction():
    nothing = moments_of(np.zeros((10, WIDTH)))
    for build in (
        lambda: methods.svd_basis(nothing, 1, False),
        lambda: methods.mean_direction(nothing, "difference_in_means"),
        lambda: methods.contrastive_basis(nothing, 1),
    ):
        with pytest.raises(UserError, match="direction"):
            build()

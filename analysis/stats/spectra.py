"""The SVD of activation residuals, and how certain the numbers are that are read from it.

A residual is a row r = h^left - h^right [d] of pooled activations (arXiv 2507.03662, section 4.4). Its right singular
vectors come from the n x n Gram matrix or from the d x d second moment, whichever is smaller. Both are summed in blocks
of rows, so the width bounds the memory, however many rows there are.

An eigendecomposition for every bootstrap replicate would cost more than the forward pass. Instead, each estimate
carries the influence of its rows: the linear term of the bootstrap over rows (infinitesimal jackknife, Efron 1982). The
weight of a row moves the second moment by r r^T - C. It moves the eigenvector u_i by the sum over m != i of u_m (u_m .
r)(r . u_i) / (lambda_i - lambda_m). Where two components are not separated, the interval becomes as wide as the scale,
as it should. The interval is about the estimate at this number of rows: noise lowers every overlap of directions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy import stats as scipy_stats
from torch import Tensor

from .intervals import Floats, Measurement

Ints = NDArray[np.int64]
_BLOCK_ROWS = 2048
# Rounding noise of float32 activations is about 1e-7 of the largest residual; a second moment squares it.
_NOISE = 1e-12


@dataclass(frozen=True)
class Residuals:
    """The residuals left[rows] - right[partners], formed in blocks.

    left, right: [R, d], activations. rows, partners: [n], row numbers.
    """

    left: Tensor
    right: Tensor
    rows: Ints
    partners: Ints

    @classmethod
    def of(cls, left: Tensor, right: Tensor, rows: Ints) -> "Residuals":
        """Return the residuals of the same rows of two models."""
        return cls(left, right, rows, rows)

    def shuffled(self, generator: np.random.Generator) -> "Residuals":
        """Break the pairing: every row of the left model meets another row of the right model (a random cycle)."""
        order = generator.permutation(len(self.rows))
        partners = np.empty_like(self.rows)
        partners[order] = self.partners[np.roll(order, 1)]
        return Residuals(self.left, self.right, self.rows, partners)

    @property
    def width(self) -> int:
        return int(self.left.shape[1])

    def blocks(self) -> Iterator[tuple[Ints, Floats]]:
        """Yield row numbers [b] and residuals [b, d], float64."""
        for start in range(0, len(self.rows), _BLOCK_ROWS):
            rows, partners = self.rows[start : start + _BLOCK_ROWS], self.partners[start : start + _BLOCK_ROWS]
            yield rows, self.left[rows].double().numpy() - self.right[partners].double().numpy()


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of E (r - centre)(r - centre)^T.

    values: [m], largest first, m <= min(n, d). vectors: [d, m]. kept: [n, m], the coordinates of the rows on the
    vectors, kept if there are at most d rows; they then take no more memory than the vectors.
    """

    residuals: Residuals
    centre: Floats
    values: Floats
    vectors: Floats
    kept: Floats | None = None

    def basis(self, rank: int) -> Floats:
        """Return the top components [d, k], k <= rank: fewer where the rows span fewer directions."""
        return self.vectors[:, :rank]

    def coordinates(self) -> Iterator[tuple[Ints, Floats]]:
        """Yield row numbers [b] and coordinates [b, m] on the components, in blocks."""
        if self.kept is not None:
            yield self.residuals.rows, self.kept
            return
        for rows, block in self.residuals.blocks():
            yield rows, (block - self.centre) @ self.vectors


def decompose(residuals: Residuals, centred: bool = False, top: int | None = None) -> Spectrum:
    """Return the components of residuals; uncentred keeps the mean residual, `centred` removes it (the paper's choice).

    No component is left (m = 0) where all residuals are zero, after the mean is removed if it is.

    Args:
        top: the number of components to compute; None computes all, which the influence needs.
    """
    n, width = len(residuals.rows), residuals.width
    total = np.zeros(width)
    if centred:
        for _, block in residuals.blocks():
            total += block.sum(0)
    centre = total / max(n, 1)
    if n <= width:
        stacked = np.concatenate([block - centre for _, block in residuals.blocks()])
        values, left = _eigen(stacked @ stacked.T / n, top)
        sizes = np.sqrt(n * values)
        return Spectrum(residuals, centre, values, stacked.T @ left / sizes, left * sizes)
    second = np.zeros((width, width))
    for _, block in residuals.blocks():
        second += (block - centre).T @ (block - centre)
    return Spectrum(residuals, centre, *_eigen(second / n, top))


def _eigen(matrix: Floats, top: int | None) -> tuple[Floats, Floats]:
    """Return the eigenvalues above rounding noise, largest first, and their eigenvectors as columns."""
    size = len(matrix)
    subset = None if top is None or top >= size else (size - top, size - 1)
    values, vectors = linalg.eigh(matrix, subset_by_index=subset, check_finite=False)
    above_noise = values > max(float(values[-1]) * _NOISE, 0.0)
    return values[above_noise][::-1], vectors[:, above_noise][:, ::-1]


@dataclass(frozen=True)
class Estimate:
    """Numbers [...] that were read from n rows, and how each row moves them.

    value: [...]. influence: [R, ...] by row number. Their covariance is n / (n - 1) sum_i influence_i influence_i^T.
    Rows of two sets with the same number are added, since matched sets share a line; where the sets are unrelated, the
    sum is also right.
    """

    value: Floats
    influence: Floats
    n: int

    def at(self, *index: int) -> "Estimate":
        """Return one of the numbers."""
        place: tuple[Any, ...] = (slice(None), *index)
        return Estimate(np.asarray(self.value[index]), self.influence[place], self.n)

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.influence - other.influence, min(self.n, other.n))

    def _half_width(self, scale: float) -> float:
        """Return half the width of the 95% interval of `scale` times the number."""
        error = math.sqrt(float((self.influence**2).sum()) * self.n / max(self.n - 1, 1)) * scale
        return _quantile(max(self.n - 1, 1)) * error

    def bounded(self) -> "Estimate":
        """Return the same for numbers in 0..1, whose standard error is at most 1/2 however close two components are.

        The linear term has no bound, so one layer without separation would dominate a mean over layers.
        """
        errors = np.sqrt((self.influence**2).sum(0) * self.n / max(self.n - 1, 1))
        return Estimate(self.value, self.influence / np.maximum(2 * errors, 1), self.n)

    def difference(self) -> Measurement:
        """Return the measurement of a number without bounds."""
        value, half = float(self.value), self._half_width(1.0)
        return {"value": value, "n": self.n, "ci95": [value - half, value + half]}

    def cosine(self) -> Measurement:
        """Return the measurement of a cosine in 0..1; the interval is made on the angle, which noise moves evenly."""
        cosine = float(np.clip(self.value, 0.0, 1.0))
        low, high = self._angles(cosine, 1.0)
        return {"value": cosine, "n": self.n, "ci95": [_cosine(high), _cosine(low)]}

    def degrees(self) -> Measurement:
        """Return the measurement of the angle, in degrees, of which the number is the cosine."""
        cosine = float(np.clip(self.value, 0.0, 1.0))
        interval = [math.degrees(angle) for angle in self._angles(cosine, 1.0)]
        return {"value": math.degrees(math.acos(cosine)), "n": self.n, "ci95": interval}

    def share(self) -> Measurement:
        """Return the measurement of a squared cosine: an overlap, or a share of variance."""
        cosine = math.sqrt(value := float(np.clip(self.value, 0.0, 1.0)))
        low, high = self._angles(cosine, 1 / (2 * cosine) if cosine > 0 else 0.0)
        return {"value": value, "n": self.n, "ci95": [_cosine(high) ** 2, _cosine(low) ** 2]}

    def _angles(self, cosine: float, scale: float) -> tuple[float, float]:
        """Return both ends of the interval of arccos(cosine); `scale` is the derivative of the cosine by the number."""
        sine = math.sqrt(max(1.0 - cosine**2, 0.0))
        half = self._half_width(scale / sine) if sine > 1e-9 else 0.0
        angle = math.acos(cosine)
        return max(angle - half, 0.0), min(angle + half, math.pi / 2)


@lru_cache(maxsize=256)
def _quantile(freedom: int) -> float:
    return float(scipy_stats.t.ppf(0.975, freedom))


def _cosine(angle: float) -> float:
    return math.cos(angle) if angle < math.pi / 2 else 0.0


def mean_estimate(parts: Sequence[Estimate], n: int) -> Estimate:
    """Return the average of estimates of the same shape, from n rows in total."""
    return Estimate(
        np.mean([part.value for part in parts], axis=0), np.mean([part.influence for part in parts], axis=0), n
    )


@dataclass(frozen=True)
class Comparison:
    """How two subspaces compare.

    cosines: [k1, k2], absolute, since signs are arbitrary. principal: [k], cosines of the principal angles. overlap:
    [].
    """

    cosines: Estimate
    principal: Estimate
    overlap: Estimate

    def bounded(self) -> "Comparison":
        """Return the same with standard errors that numbers in 0..1 can have."""
        return Comparison(self.cosines.bounded(), self.principal.bounded(), self.overlap.bounded())


def compare(left: Spectrum, right: Spectrum | Floats, rank: int, size: int) -> Comparison:
    """Compare the top components of two sets of residuals, or of one set and a fixed orthonormal basis [d, k].

    Overlap is ||Q1^T Q2||_F^2 / min(k1, k2).

    Args:
        size: the largest row number plus one.
    """
    left_basis = left.basis(rank)
    right_basis = right if isinstance(right, np.ndarray) else right.basis(rank)
    signed = left_basis.T @ right_basis
    single, outside = _influence(left, right_basis, rank, size)
    n = len(left.residuals.rows)
    if not isinstance(right, np.ndarray):
        right_single, right_outside = _influence(right, left_basis, rank, size)
        single, outside = single + right_single.transpose(0, 2, 1), outside + right_outside.transpose(0, 2, 1)
        n = min(n, len(right.residuals.rows))
    smaller = max(min(signed.shape), 1)
    first, principal, second = np.linalg.svd(signed, full_matrices=False)
    return Comparison(
        Estimate(np.abs(signed), np.sign(signed) * single, n),
        Estimate(principal, np.einsum("ip,pj,rij->rp", first, second, outside), n),
        Estimate(np.sum(signed**2) / smaller, 2 * np.einsum("ij,rij->r", signed, outside) / smaller, n),
    )


def _influence(spectrum: Spectrum, other: Floats, rank: int, size: int) -> tuple[Floats, Floats]:
    """Return how each row moves u_i . other_j, twice [size, k1, k2].

    The first array counts all rotations of u_i, the second only rotations out of the span of the top components.
    """
    k, values = min(rank, len(spectrum.values)), spectrum.values
    single, outside = np.zeros((2, size, k, other.shape[1]))
    onto = spectrum.vectors.T @ other
    for rows, coordinates in spectrum.coordinates():
        for i in range(k):
            gaps = values[i] - values
            tied = np.abs(gaps) < _NOISE * values[0]
            weights = 1 / np.where(tied, _NOISE * values[0], gaps)
            weights[i] = 0
            pull = coordinates[:, i : i + 1] / len(spectrum.residuals.rows)
            single[rows, i] = pull * ((coordinates * weights) @ onto)
            outside[rows, i] = pull * ((coordinates[:, k:] * weights[k:]) @ onto[k:])
    return single, outside


def explained(basis: Floats, residuals: Residuals, centred: bool, size: int) -> Estimate:
    """Return shares [k + 1] of the squared residuals: along each column of a fixed basis [d, k], then inside its span.

    Args:
        size: the largest row number plus one.
    """
    centre = np.zeros(residuals.width)
    if centred:
        centre = sum((block.sum(0) for _, block in residuals.blocks()), centre) / max(len(residuals.rows), 1)
    parts, whole = np.zeros((size, basis.shape[1] + 1)), np.zeros(size)
    for rows, block in residuals.blocks():
        deviations = block - centre
        parts[rows, :-1], whole[rows] = (deviations @ basis) ** 2, (deviations**2).sum(1)
    parts[:, -1] = parts[:, :-1].sum(1)
    total = float(whole.sum())
    shares = parts.sum(0) / total if total > 0 else np.zeros(parts.shape[1])
    influence = (parts - whole[:, None] * shares) / (total if total > 0 else 1.0)
    return Estimate(shares, influence, len(residuals.rows))

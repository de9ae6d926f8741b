"""Compute orthonormal bases from paired differences of activations: streamed moments, the methods, and their angles.

Every function works on one layer. A difference r is h(aligned side) - h(misaligned side): instruct minus base
(arXiv 2507.03662, section 4.4), or the aligned minus the misaligned system prompt or completion. Only the count, the
sum and the d x d second moment of the differences are kept, in float64, so memory does not grow with the rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError

METHODS = ("contrastive", "difference_in_means", "svd", "shared", "random")

# Float32 activations leave rounding noise of about 1e-7 of the largest difference, squared in a second moment.
_NOISE = 1e-12


@dataclass
class Moments:
    """Count, sum [d] and second moment sum r r^T [d, d] of differences, accumulated batch by batch in float64."""

    width: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    count: int = 0

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        self.second = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)

    def add(self, differences: Tensor) -> None:
        """Add differences [n, d] of any float type."""
        rows = differences.to(self.device, torch.float64)
        self.count += rows.shape[0]
        self.total += rows.sum(0)
        self.second.addmm_(rows.T, rows)

    @property
    def mean(self) -> Tensor:
        """Return the mean difference [d]."""
        return self.total / self.count

    @property
    def uncentred(self) -> Tensor:
        """Return E r r^T [d, d]."""
        return self.second / self.count

    @property
    def covariance(self) -> Tensor:
        """Return E r r^T - mean mean^T [d, d]."""
        return self.uncentred - torch.outer(self.mean, self.mean)

    def energies(self, basis: Tensor) -> Tensor:
        """Return E (v_j . r)^2 for each column v_j of `basis` [d, k]. Their sum is E ||V^T r||^2."""
        basis = basis.to(self.device, torch.float64)
        return ((self.uncentred @ basis) * basis).sum(0)


def merge(parts: Iterable[Moments]) -> Moments:
    """Return the moments of the differences of all parts together."""
    parts = list(parts)
    merged = Moments(parts[0].width, parts[0].device)
    for part in parts:
        merged.count += part.count
        merged.total += part.total
        merged.second += part.second
    return merged


def top_directions(matrix: Tensor, rank: int, allowed: int, what: str) -> Tensor:
    """Return the top-`rank` eigenvectors [d, rank] of a positive semi-definite matrix [d, d], largest first.

    Args:
        allowed: the largest rank that the number of rows allows.
        what: the name of the method, for error messages.

    Raises:
        UserError: a rank above the width, above `allowed`, or above the rank of the matrix.
    """
    width = matrix.shape[0]
    values, vectors = torch.linalg.eigh(matrix)
    present = int((values > values[-1] * _NOISE).sum()) if values[-1] > 0 else 0
    if present == 0:
        raise UserError(f"{what}: the two sides' activations are identical, there is no direction; pass other models")
    limit = min(width, allowed, present)
    if not 1 <= rank <= limit:
        raise UserError(
            f"{what}: rank {rank} is impossible with width {width} and rows that span {limit} directions: "
            f"write a rank of 1-{limit}, or pass more rows"
        )
    return vectors.flip(1)[:, :rank]


def mean_direction(moments: Moments, what: str) -> Tensor:
    """Return the normalised mean difference [d, 1] (arXiv 2507.03662, section 4.3)."""
    norm = moments.mean.norm()
    if not norm > 0:
        raise UserError(f"{what}: the mean difference is zero, there is no direction; pass other models or pairs")
    return (moments.mean / norm)[:, None]


def svd_basis(moments: Moments, rank: int, centred: bool) -> Tensor:
    """Return the top right singular vectors [d, rank] of the stacked differences, with signs along their mean.

    `centred` subtracts the mean difference first, as the paper does (section 4.4). Uncentred differences keep the mean,
    which is what alignment adds on average.
    """
    if centred:
        basis = top_directions(moments.covariance, rank, moments.count - 1, "centred svd")
    else:
        basis = top_directions(moments.uncentred, rank, moments.count, "svd")
    return _along(basis, moments.mean)


def contrastive_basis(moments: Moments, rank: int) -> Tensor:
    """Return the mean paired difference, then the top singular vectors [d, rank - 1] of the part orthogonal to it.

    The mean comes first, so that the basis of a lower rank is always a part of the basis of a higher rank.
    """
    first = mean_direction(moments, "contrastive")
    if rank == 1:
        return first
    rest = torch.eye(moments.width, dtype=first.dtype, device=first.device) - first @ first.T
    others = top_directions(rest @ moments.uncentred @ rest, rank - 1, moments.count - 1, "contrastive")
    return _orthonormal(torch.cat([first, _along(others, moments.mean)], dim=1))


def shared_basis(groups: dict[str, Moments], rank: int) -> Tensor:
    """Return directions [d, rank] common to domains: the top eigenvectors of the mean of the domains' projectors."""
    if len(groups) < 2:
        raise UserError(f"shared: {len(groups)} domain given; pass rows of at least two domains, or use method svd")
    bases = [svd_basis(moments, rank, centred=False) for moments in groups.values()]
    projector = torch.stack([basis @ basis.T for basis in bases]).mean(0)
    return _along(top_directions(projector, rank, projector.shape[0], "shared"), merge(groups.values()).mean)


def random_basis(width: int, rank: int, seed: int, layer: int) -> Tensor:
    """Return a uniformly random orthonormal basis [d, rank]. A smaller rank of the same seed is its first columns."""
    if not 1 <= rank <= width:
        raise UserError(f"random: rank {rank} is impossible with width {width}: write a rank of 1-{width}")
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    return _orthonormal(torch.randn(rank, width, generator=generator, dtype=torch.float64).T)


def principal_angles(left: Tensor, right: Tensor) -> list[float]:
    """Return the principal angles between the spans of two orthonormal bases [d, k1], [d, k2].

    In degrees, smallest first.
    """
    cosines = torch.linalg.svdvals(left.double().cpu().T @ right.double().cpu())
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1))).tolist()


def _along(basis: Tensor, direction: Tensor) -> Tensor:
    """Flip columns so that each points along `direction`, because the sign of a singular vector is arbitrary."""
    signs = torch.where(basis.T @ direction < 0, -1.0, 1.0)
    return basis * signs


def _orthonormal(columns: Tensor) -> Tensor:
    basis, upper = torch.linalg.qr(columns)
    return basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)

"""From paired differences of activations to orthonormal bases: streamed moments, the methods, angles between them.

Every function works on one layer. A difference r is h(aligned side) - h(misaligned side): instruct minus base
(arXiv 2507.03662, section 4.4), or aligned minus misaligned system prompt or completion. Only the count, the sum and
the d x d second moment of the differences are kept, in float64, so memory does not grow with rows.
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
        """Take in differences [n, d] of any float type."""
        rows = differences.to(self.device, torch.float64)
        self.count += rows.shape[0]
        self.total += rows.sum(0)
        self.second.addmm_(rows.T, rows)

    @property
    def mean(self) -> Tensor:
        """Mean difference [d]."""
        return self.total / self.count

    @property
    def uncentred(self) -> Tensor:
        """E r r^T [d, d]."""
        return self.second / self.count

    @property
    def covariance(self) -> Tensor:
        """E r r^T - mean mean^T [d, d]."""
        return self.uncentred - torch.outer(self.mean, self.mean)

    def energies(self, basis: Tensor) -> Tensor:
        """E (v_j . r)^2 for each column of `basis` [d, k], so their sum is E ||V^T r||^2."""
        basis = basis.to(self.device, torch.float64)
        return ((self.uncentred @ basis) * basis).sum(0)


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts' differences together."""
    parts = list(parts)
    merged = Moments(parts[0].width, parts[0].device)
    for part in parts:
        merged.count += part.count
        merged.total += part.total
        merged.second += part.second
    return merged


def top_directions(matrix: Tensor, rank: int, allowed: int, what: str) -> Tensor:
    """Top-`rank` eigenvectors [d, rank] of a positive semi-definite matrix [d, d], largest first.

    Raises:
        UserError: the rank is above the width, above `allowed` (the rows' own limit) or above the matrix's rank.
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
    """The normalised mean difference [d, 1] (arXiv 2507.03662, section 4.3)."""
    norm = moments.mean.norm()
    if not norm > 0:
        raise UserError(f"{what}: the mean difference is zero, there is no direction; pass other models or pairs")
    return (moments.mean / norm)[:, None]


def svd_basis(moments: Moments, rank: int, centred: bool) -> Tensor:
    """Top right singular vectors [d, rank] of the stacked differences; `centred` is the paper's variant (section 4.4).

    Uncentred keeps the mean difference, which is what alignment adds on average. Signs: along the mean.
    """
    if centred:
        basis = top_directions(moments.covariance, rank, moments.count - 1, "centred svd")
    else:
        basis = top_directions(moments.uncentred, rank, moments.count, "svd")
    return _along(basis, moments.mean)


def contrastive_basis(moments: Moments, rank: int) -> Tensor:
    """Mean paired difference first, then the top singular vectors [d, rank - 1] of what is orthogonal to it.

    The mean comes first so that a lower rank is always a part of a higher one.
    """
    first = mean_direction(moments, "contrastive")
    if rank == 1:
        return first
    rest = torch.eye(moments.width, dtype=first.dtype, device=first.device) - first @ first.T
    others = top_directions(rest @ moments.uncentred @ rest, rank - 1, moments.count - 1, "contrastive")
    return _orthonormal(torch.cat([first, _along(others, moments.mean)], dim=1))


def shared_basis(groups: dict[str, Moments], rank: int) -> Tensor:
    """Directions [d, rank] common to domains: the top eigenvectors of the mean of the domains' projectors."""
    if len(groups) < 2:
        raise UserError(f"shared: {len(groups)} domain given; pass rows of at least two, or use method svd")
    bases = [svd_basis(moments, rank, centred=False) for moments in groups.values()]
    projector = torch.stack([basis @ basis.T for basis in bases]).mean(0)
    return _along(top_directions(projector, rank, projector.shape[0], "shared"), merge(groups.values()).mean)


def random_basis(width: int, rank: int, seed: int, layer: int) -> Tensor:
    """A uniformly random orthonormal basis [d, rank]; a smaller rank of the same seed is its first columns."""
    if not 1 <= rank <= width:
        raise UserError(f"random: rank {rank} is impossible with width {width}: write a rank of 1-{width}")
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    return _orthonormal(torch.randn(rank, width, generator=generator, dtype=torch.float64).T)


def principal_angles(left: Tensor, right: Tensor) -> list[float]:
    """Principal angles in degrees, smallest first, between the spans of two orthonormal bases [d, k1], [d, k2]."""
    cosines = torch.linalg.svdvals(left.double().cpu().T @ right.double().cpu())
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1))).tolist()


def _along(basis: Tensor, direction: Tensor) -> Tensor:
    """Turn each column so that it points along `direction`: singular vectors have no sign of their own."""
    signs = torch.where(basis.T @ direction < 0, -1.0, 1.0)
    return basis * signs


def _orthonormal(columns: Tensor) -> Tensor:
    basis, upper = torch.linalg.qr(columns)
    return basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)

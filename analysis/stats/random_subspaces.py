"""What random subspaces of a space would show: the nulls of cosines, overlaps and principal angles."""

import math
from functools import lru_cache

import numpy as np
from scipy import special

_RANDOM_DRAWS = 200


def random_cosine(width: int) -> float:
    """Return E |u . v| of two random directions: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), about sqrt(2 / (pi d))."""
    return float(np.exp(special.gammaln(width / 2) - special.gammaln((width + 1) / 2)) / math.sqrt(math.pi))


def random_overlap(width: int, left: int, right: int) -> float:
    """Return E ||Q1^T Q2||_F^2 / min(k1, k2) of random subspaces: max(k1, k2) / d."""
    return max(left, right) / width


@lru_cache(maxsize=256)
def random_angles(width: int, left: int, right: int) -> tuple[float, ...]:
    """Return the mean principal angles, in degrees, of random subspaces of these ranks, smallest first (simulated)."""
    generator = np.random.default_rng(0)
    angles = np.zeros(min(left, right))
    for _ in range(_RANDOM_DRAWS):
        columns, _ = np.linalg.qr(generator.standard_normal((width, left)))
        angles += np.degrees(np.arccos(np.clip(np.linalg.svd(columns[:right], compute_uv=False), 0, 1)))
    return tuple((angles / _RANDOM_DRAWS).tolist())

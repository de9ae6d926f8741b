"""Spectra of the residuals of one probe set, on two halves of its rows, and with the pairing of rows broken.

Directions of one half are compared only with what the other half shows. So no row, and no line that matched sets share,
is ever on both sides. Usage: build one `SplitSet` per probe set, then `compare_across` or `compare_within`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .intervals import Floats
from .spectra import Comparison, Estimate, Ints, Residuals, Spectrum, compare, decompose, explained, mean_estimate

_SHUFFLES = 5


@dataclass(frozen=True)
class Options:
    """How sets are compared.

    rank: components of each set. centred: whether the mean residual is removed. in_sample: whether all rows are used on
    both sides and nothing is shuffled, as in the paper. seed: of the halves and the shuffles. size: the largest number
    of rows of any set. controls: names of control sets.
    """

    rank: int
    centred: bool
    in_sample: bool
    seed: int
    size: int
    controls: tuple[str, ...] = ()


def halves(rows: Ints, seed: int) -> tuple[Ints, Ints]:
    """Split row numbers into two halves; of lines 2j and 2j + 1 one goes into each half, the same one in every set."""
    coins = np.random.default_rng(seed).integers(2, size=int(rows.max(initial=0)) // 2 + 1)
    first = (rows + coins[rows // 2]) % 2 == 0
    return rows[first], rows[~first]


def obstacle(left: Tensor, right: Tensor, rows: Ints, seed: int) -> str | None:
    """Return why the residuals of these rows have no directions, or None if they have."""
    if min(map(len, halves(rows, seed))) < 2:
        return "fewer than four rows have tokens of this role"
    if not all(bool(torch.isfinite(states[rows]).all()) for states in (left, right)):
        return "activations are not finite"
    return "the two models' activations are identical" if torch.equal(left[rows], right[rows]) else None


class SplitSet:
    """Residuals left - right of one probe set at one layer: two parts, their spectra, and shuffled spectra.

    Args:
        left, right: [R, d], activations of two models. rows: the row numbers that count.
    """

    def __init__(self, left: Tensor, right: Tensor, rows: Ints, options: Options) -> None:
        self.rows, self.options, self.width = rows, options, int(left.shape[1])
        if options.in_sample:
            whole = Residuals.of(left, right, rows)
            self.parts = [(whole, decompose(whole, options.centred))] * 2
        else:
            self.parts = self._decomposed([Residuals.of(left, right, half) for half in halves(rows, options.seed)])

    @cached_property
    def shuffled(self) -> list[list[tuple[Residuals, Spectrum]]]:
        """The parts with the pairing of rows broken, one entry per draw; only the top components are computed."""
        draws = []
        for draw in range(_SHUFFLES):
            generator = np.random.default_rng([self.options.seed, draw])
            broken = [part.shuffled(generator) for part, _ in self.parts]
            draws.append(self._decomposed(broken, self.options.rank))
        return draws

    def _decomposed(self, parts: Sequence[Residuals], top: int | None = None) -> list[tuple[Residuals, Spectrum]]:
        return [(part, decompose(part, self.options.centred, top)) for part in parts]

    @property
    def rank(self) -> int:
        """The number of components that both parts have, at most `Options.rank`."""
        return min(self.options.rank, *(len(spectrum.values) for _, spectrum in self.parts))


def compare_across(first: SplitSet, second: SplitSet) -> Comparison:
    """Compare the first part of each set with the second part of the other set; both ways are averaged."""
    size, n = first.options.size, min(len(first.rows), len(second.rows))
    rank = min(first.rank, second.rank)
    ways = [compare(first.parts[part][1], second.parts[1 - part][1], rank, size) for part in range(2)]
    return Comparison(
        mean_estimate([comparison.cosines for comparison in ways], n),
        mean_estimate([comparison.principal for comparison in ways], n),
        mean_estimate([comparison.overlap for comparison in ways], n),
    ).bounded()


def compare_within(split: SplitSet) -> Comparison:
    """Compare the first part of a set with its second part."""
    comparison = compare(split.parts[0][1], split.parts[1][1], split.rank, split.options.size)
    n = len(split.rows)
    estimates = (comparison.cosines, comparison.principal, comparison.overlap)
    return Comparison(*(mean_estimate([estimate], n) for estimate in estimates)).bounded()


def explained_across(split: SplitSet) -> Estimate:
    """Return the shares [k + 1] of one part that the components of the other part hold: each one, then their span.

    Both ways are averaged.
    """
    return _shares(split, split.parts)


def shuffled_explained(split: SplitSet) -> Floats:
    """Return `explained_across` for every draw of broken pairs [S, k + 1].

    Draws that span fewer than k directions are left out.
    """
    draws = [_shares(split, parts).value for parts in split.shuffled if _has_rank(parts, split.rank)]
    return np.reshape(draws, (len(draws), split.rank + 1))


def _shares(split: SplitSet, parts: list[tuple[Residuals, Spectrum]]) -> Estimate:
    """Return `explained_across` of given parts."""
    centred, size = split.options.centred, split.options.size
    ways = [explained(parts[part][1].basis(split.rank), parts[1 - part][0], centred, size) for part in range(2)]
    return mean_estimate(ways, len(split.rows))


@dataclass(frozen=True)
class ShuffledComparison:
    """A comparison after the pairing of rows was broken, by draw.

    cosines: [S, k, k]. angles: [S, k], principal angles in degrees. overlap: [S].
    """

    cosines: Floats
    angles: Floats
    overlap: Floats


def shuffled_comparison(first: SplitSet, second: SplitSet) -> ShuffledComparison:
    """Compare two sets as `compare_across` does, after their rows were paired at random between the two models.

    One set twice gives the same for `compare_within`.
    """
    rank = min(first.rank, second.rank)
    drawn = [
        pair for pair in zip(first.shuffled, second.shuffled, strict=True) if all(_has_rank(p, rank) for p in pair)
    ]
    signed = np.reshape(
        [[left[part][1].basis(rank).T @ right[1 - part][1].basis(rank) for part in range(2)] for left, right in drawn],
        (len(drawn), 2, rank, rank),
    )
    principal = np.clip(np.linalg.svd(signed, compute_uv=False), 0, 1).mean(1)
    return ShuffledComparison(
        np.abs(signed).mean(1), np.degrees(np.arccos(principal)), (signed**2).sum((2, 3)).mean(1) / rank
    )


def _has_rank(parts: list[tuple[Residuals, Spectrum]], rank: int) -> bool:
    """Return whether both parts have at least `rank` components."""
    return all(len(spectrum.values) >= rank for _, spectrum in parts)

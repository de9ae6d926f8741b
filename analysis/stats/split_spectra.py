"""Spectra of one probe set's residuals, on two halves of its rows and with the pairing of rows broken.

Directions of one half meet only what the other half shows: neither a row nor a line shared by matched sets is ever on
both sides.
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

    rank: components of each set. centred: whether the mean residual is removed. in_sample: all rows on both sides and
    nothing shuffled, as in the paper. size: the largest number of rows of any set. controls: names of control sets.
    """

    rank: int
    centred: bool
    in_sample: bool
    seed: int
    size: int
    controls: tuple[str, ...] = ()


def halves(rows: Ints, seed: int) -> tuple[Ints, Ints]:
    """Row numbers in two halves. Of lines 2j and 2j + 1 one goes each way, the same one in every set."""
    coins = np.random.default_rng(seed).integers(2, size=int(rows.max(initial=0)) // 2 + 1)
    first = (rows + coins[rows // 2]) % 2 == 0
    return rows[first], rows[~first]


def obstacle(left: Tensor, right: Tensor, rows: Ints, seed: int) -> str | None:
    """Why residuals of these rows have no directions, or None."""
    if min(map(len, halves(rows, seed))) < 2:
        return "fewer than four rows have tokens of this role"
    if not all(bool(torch.isfinite(states[rows]).all()) for states in (left, right)):
        return "activations are not finite"
    return "the two models' activations are identical" if torch.equal(left[rows], right[rows]) else None


class SplitSet:
    """Residuals left - right of one probe set at one layer: two parts, their spectra, and shuffled ones.

    Args:
        left, right: [R, d], activations of two models. rows: the rows that count.
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
        """The same parts with the pairing of rows broken, top components alone, by draw."""
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
        """Components that both parts have, at most the wanted rank."""
        return min(self.options.rank, *(len(spectrum.values) for _, spectrum in self.parts))


def crossed(one: SplitSet, other: SplitSet) -> Comparison:
    """Each set's first part against the other's second, averaged."""
    size, n = one.options.size, min(len(one.rows), len(other.rows))
    rank = min(one.rank, other.rank)
    found = [compare(one.parts[at][1], other.parts[1 - at][1], rank, size) for at in range(2)]
    return Comparison(
        mean_estimate([each.cosines for each in found], n),
        mean_estimate([each.principal for each in found], n),
        mean_estimate([each.overlap for each in found], n),
    ).bounded()


def within(one: SplitSet) -> Comparison:
    """A set's first part against its own second."""
    found = compare(one.parts[0][1], one.parts[1][1], one.rank, one.options.size)
    n = len(one.rows)
    parts = (found.cosines, found.principal, found.overlap)
    return Comparison(*(mean_estimate([each], n) for each in parts)).bounded()


def explained_across(one: SplitSet) -> Estimate:
    """Shares [k + 1] that one part's components, then their span, hold of the other part; both ways averaged."""
    return _shares(one, one.parts)


def shuffled_explained(one: SplitSet) -> Floats:
    """`explained_across` by draw of broken pairs [S, k + 1]; those that span fewer than k directions are left out."""
    draws = [_shares(one, parts).value for parts in one.shuffled if _reach(parts, one.rank)]
    return np.reshape(draws, (len(draws), one.rank + 1))


def _shares(one: SplitSet, parts: list[tuple[Residuals, Spectrum]]) -> Estimate:
    centred, size = one.options.centred, one.options.size
    found = [explained(parts[at][1].basis(one.rank), parts[1 - at][0], centred, size) for at in range(2)]
    return mean_estimate(found, len(one.rows))


@dataclass(frozen=True)
class ShuffledAlike:
    """A comparison after the pairing was broken, by draw: cosines [S, k, k], angles [S, k] in degrees, overlap [S]."""

    cosines: Floats
    angles: Floats
    overlap: Floats


def shuffled_alike(one: SplitSet, other: SplitSet) -> ShuffledAlike:
    """`crossed` of two sets whose rows were paired at random between the two models; one set twice is `within`."""
    rank = min(one.rank, other.rank)
    drawn = [pair for pair in zip(one.shuffled, other.shuffled, strict=True) if all(_reach(p, rank) for p in pair)]
    signed = np.reshape(
        [[ours[at][1].basis(rank).T @ theirs[1 - at][1].basis(rank) for at in range(2)] for ours, theirs in drawn],
        (len(drawn), 2, rank, rank),
    )
    principal = np.clip(np.linalg.svd(signed, compute_uv=False), 0, 1).mean(1)
    return ShuffledAlike(
        np.abs(signed).mean(1), np.degrees(np.arccos(principal)), (signed**2).sum((2, 3)).mean(1) / rank
    )


def _reach(parts: list[tuple[Residuals, Spectrum]], rank: int) -> bool:
    return all(len(spectrum.values) >= rank for _, spectrum in parts)

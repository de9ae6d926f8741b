"""Loss vectors (family 2; arXiv 2507.03662, section 4.2.1): do two sets of completions differ in their token losses?

The vector of a row holds the losses -log p of the first tokens of its completion, in nats. For every two sets, the
family compares the cosine of rows within each set and between the sets, over the tokens that both rows have. Rows that
share a completion form one cluster and do not count as a pair. The null forgets which set a row belongs to. Losses are
positive, so the cosines are high for any rows. What counts is the gap, the mean within the sets minus the mean between
them, beside its null.

The paper fills short rows with the mean of their own set, which makes the rows of a set similar by construction. With
formulas="paper", rows are filled in the same way under the null; there the gap stays above 0 although the sets make no
difference. No matrix over rows is formed (`stats/pair_sums.py`).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..passes.readout import Readout
from ..stats.gradient_pairs import MEANS
from ..stats.intervals import Floats, Measurement, jackknife_ci, missing
from ..stats.nulls import permutation_p
from ..stats.pair_sums import PairSums
from ..stats.relabelling import Integers, Relabelling
from .behavior import NO_BASE

FORMULAS = ("corrected", "paper")
# Cosines over fewer shared tokens show little except that losses are positive.
FEWEST_TOKENS = 8
_FEWEST_ROWS = 4
_RELABELLINGS = 999
# Fewer, because each relabelling fills the rows again.
_PAPER_RELABELLINGS = 199
_FEW = f"a set has fewer than {_FEWEST_ROWS} different completions of {FEWEST_TOKENS} tokens or more"
_FIXED = "no relabelling keeps the completions together"

Results = dict[str, Any]


def loss_vectors(
    checkpoint: Mapping[str, Readout],
    instruct: Mapping[str, Readout],
    base: Mapping[str, Readout] | None,
    completions: Mapping[str, Sequence[Hashable]] | None = None,
    *,
    tokens: int = 64,
    formulas: str = "corrected",
    seed: int = 0,
) -> Results:
    """Return {"checkpoint" | "instruct" | "base": {"rows", "pairs": {"<set> vs <other>": {...}}, "pca"}}.

    "pairs" has "within" {set: cosine}, "between" and "gap", measurements with "null" (the mean under relabelling, and
    p). "rows" is {set: {"rows", "short"}}; short rows (under 8 completion tokens) are left out. "pca" is {"tokens",
    "n", "explained": [share, share], "coordinates": {set: [[row, first, second]]}}, over the rows that have all of
    "tokens".

    Args:
        checkpoint, instruct, base: readouts by probe set, of the same rows for all models. base may be None.
        completions: for each set, a label of the completion of each row; rows with one label form one cluster. None:
            every row has its own completion.
        tokens: the largest number of tokens in a vector.
        formulas: "corrected" or "paper"; "paper" fills short rows with the mean of their own set.

    Raises:
        ValueError: unknown formulas.
    """
    if formulas not in FORMULAS:
        raise ValueError(f"loss_vectors: formulas {formulas!r} are unknown; write {' or '.join(FORMULAS)}")
    models = {"checkpoint": checkpoint, "instruct": instruct, "base": base}
    return {
        name: missing(NO_BASE) if readouts is None else _one_model(readouts, completions, tokens, formulas, seed)
        for name, readouts in models.items()
    }


@dataclass(frozen=True)
class _Vectors:
    """The rows of several sets.

    losses: [n, T], 0 where there is no token. present: [n, T], 1 where there is a token. sets: [n], the number of the
    set. rows: [n], the row number in the set. clusters: [n], a number for the completion.
    """

    losses: Floats
    present: Floats
    sets: Integers
    rows: Integers
    clusters: Integers

    def of(self, *sets: int) -> "_Vectors":
        """Return the rows of some sets."""
        kept = np.isin(self.sets, sets)
        return _Vectors(self.losses[kept], self.present[kept], self.sets[kept], self.rows[kept], self.clusters[kept])


def _one_model(
    readouts: Mapping[str, Readout],
    completions: Mapping[str, Sequence[Hashable]] | None,
    tokens: int,
    formulas: str,
    seed: int,
) -> Results:
    """Return the counts, the pairs of sets and the principal components of one model."""
    names = list(readouts)
    vectors = _vectors(readouts, completions, tokens)
    counts = {
        name: {
            "rows": len(readouts[name].counts),
            "short": int(len(readouts[name].counts) - (vectors.sets == at).sum()),
        }
        for at, name in enumerate(names)
    }
    pairs = {
        f"{first} vs {second}": _compare(
            vectors.of(names.index(first), names.index(second)),
            (names.index(first), names.index(second)),
            (first, second),
            formulas,
            np.random.default_rng(seed),
        )
        for first, second in combinations(names, 2)
    }
    return {"rows": counts, "pairs": pairs, "pca": _pca(vectors, names, formulas)}


def _vectors(
    readouts: Mapping[str, Readout], completions: Mapping[str, Sequence[Hashable]] | None, tokens: int
) -> _Vectors:
    """Return the vectors of all rows that are long enough, one set after the other."""
    losses, present, sets, rows = [], [], [], []
    labels: list[Hashable] = []
    for at, (name, readout) in enumerate(readouts.items()):
        owners, n = readout.token_rows.numpy(), len(readout.counts)
        lengths = np.bincount(owners, minlength=n)
        starts = np.cumsum(lengths) - lengths
        places = np.arange(len(owners)) - starts[owners]
        inside = places < tokens
        matrix = np.zeros((2, n, tokens))
        matrix[0, owners[inside], places[inside]] = -readout.log_prob.double().numpy()[inside]
        matrix[1, owners[inside], places[inside]] = 1.0
        kept = np.flatnonzero(lengths >= min(FEWEST_TOKENS, tokens))
        losses.append(matrix[0, kept])
        present.append(matrix[1, kept])
        sets.append(np.full(len(kept), at))
        rows.append(kept)
        labels += [(at, int(row)) if completions is None else completions[name][int(row)] for row in kept]
    numbers: dict[Hashable, int] = {}
    clusters = np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)
    return _Vectors(
        np.concatenate(losses), np.concatenate(present), np.concatenate(sets), np.concatenate(rows), clusters
    )


def shared_cosines(losses: Floats, present: Floats) -> tuple[Floats, Floats]:
    """Return features [n, D] and signs [D] whose signed inner products are cosines over the tokens that two rows share.

    Every row has its first tokens, so two rows share as many tokens as the shorter one has. Let u_i(l) be the first l
    losses of row i, scaled to length 1. The cosine of rows i and j is u_i(l) u_j(l), where l is the length of the
    shorter row. Therefore it is a sum over all lengths l that occur: the inner product of u(l) where both rows have l
    tokens or more, minus the inner product of u(l) where both rows have more than l.

    Args:
        losses: [n, T], 0 where there is no token. present: [n, T], 1 where there is a token.
    """
    lengths, features, signs = present.sum(1), [], []
    for length in np.unique(lengths[lengths > 0]).astype(int):
        first = losses[:, :length]
        scale = np.linalg.norm(first, axis=1, keepdims=True)
        unit = np.divide(first, scale, out=np.zeros_like(first), where=scale > 0)
        for sign, kept in ((1.0, lengths >= length), (-1.0, lengths > length)):
            if kept.any():
                features.append(unit * kept[:, None])
                signs.append(np.full(length, sign))
    return np.concatenate(features, axis=1), np.concatenate(signs)


def _filled(vectors: _Vectors, member: Floats) -> Floats:
    """Return the losses [n, T], with short rows filled by the mean of their own set.

    A place that no row of the set reaches is filled with 0.
    """
    filled = vectors.losses.copy()
    for side in (0, 1):
        inside = member == side
        sums, counts = vectors.losses[inside].sum(0), vectors.present[inside].sum(0)
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        filled[inside] += (1 - vectors.present[inside]) * means
    return filled


def _compare(
    vectors: _Vectors, numbers: tuple[int, int], names: tuple[str, str], formulas: str, generator: np.random.Generator
) -> Results:
    """Return the means over pairs of rows of two sets as measurements."""
    member = (vectors.sets == numbers[1]).astype(np.float64)
    counts = [int((member == side).sum()) for side in (0, 1)]
    if min(len(np.unique(vectors.clusters[member == side])) for side in (0, 1)) < _FEWEST_ROWS:
        absent = missing(_FEW, sum(counts))
        return {"within": dict.fromkeys(names, absent), "between": absent, "gap": absent}
    pairs = _paper_pairs(vectors, member) if formulas == "paper" else _pairs(vectors)
    null = _relabelled(vectors, member, None if formulas == "paper" else pairs, generator)
    values, left_out = pairs.means(member)[:, 0], pairs.without_each_cluster(member)
    results: dict[str, Measurement] = {}
    for place, name in enumerate(MEANS):
        # Losses are positive, so no cosine is below 0.
        bounds = (-1.0, 1.0) if name == "gap" else (0.0, 1.0)
        results[name] = {
            "value": float(values[place]),
            "n": counts[place] if place < 2 else sum(counts),
            "ci95": list(jackknife_ci(float(values[place]), left_out[place], bounds=bounds)),
            "null": missing(_FIXED) if null is None else _null(float(values[place]), null[place]),
        }
    within = dict(zip(names, (results["within_first"], results["within_second"]), strict=True))
    return {"within": within, "between": results["between"], "gap": results["gap"]}


def _pairs(vectors: _Vectors) -> PairSums:
    """Return the pair sums of the corrected formulas."""
    return PairSums(*shared_cosines(vectors.losses, vectors.present), vectors.clusters)


def _paper_pairs(vectors: _Vectors, member: Floats) -> PairSums:
    """Return the pair sums as published: short rows are filled, and only a row and itself are not a pair."""
    filled = _filled(vectors, member)
    return PairSums(*shared_cosines(filled, np.ones_like(vectors.present)), np.arange(len(filled)))


def _relabelled(
    vectors: _Vectors, member: Floats, pairs: PairSums | None, generator: np.random.Generator
) -> Floats | None:
    """Return the four means [4, P] under relabelling; without `pairs`, rows are filled anew for each labelling."""
    relabelling = Relabelling(member, vectors.clusters)
    if not relabelling.possible:
        return None
    if pairs is not None:
        return pairs.means(relabelling.draw(_RELABELLINGS, generator))
    memberships = relabelling.draw(_PAPER_RELABELLINGS, generator)
    return np.concatenate([_paper_pairs(vectors, labels).means(labels) for labels in memberships], axis=1)


def _null(value: float, relabelled: Floats) -> Measurement:
    """Return the mean under relabelling, and the two-sided p around it."""
    centre = float(np.append(relabelled, value).mean())
    return {
        "value": float(relabelled.mean()),
        "n": len(relabelled),
        "p": permutation_p(abs(value - centre), np.abs(relabelled - centre) + 1e-12),
    }


def _pca(vectors: _Vectors, names: Sequence[str], formulas: str) -> Results:
    """Return two coordinates of every row that has all the tokens used.

    The number of tokens used is the smallest median length of a set, so at least half of the rows of each set have a
    coordinate.
    """
    lengths = vectors.present.sum(1)
    if formulas == "paper":
        losses, used = vectors.losses.copy(), vectors.losses.shape[1]
        for at in range(len(names)):
            inside = vectors.sets == at
            losses[inside] = _filled(vectors.of(at), np.zeros(int(inside.sum())))
        kept = np.arange(len(lengths))
    else:
        medians = [np.median(lengths[vectors.sets == at]) for at in range(len(names)) if (vectors.sets == at).any()]
        used = int(min(medians, default=0))
        kept = np.flatnonzero(lengths >= used)
        losses = vectors.losses
    if len(kept) < 3 or used < 2:
        return missing("fewer than three rows are long enough", len(kept))
    centred = losses[kept, :used] - losses[kept, :used].mean(0)
    left, scales, directions = np.linalg.svd(centred, full_matrices=False)
    # The sign of a component is arbitrary. The largest loading is made positive.
    signs = np.sign(directions[np.arange(2), np.abs(directions[:2]).argmax(1)])
    points = left[:, :2] * scales[:2] * signs
    total = float(np.sum(scales**2))
    coordinates: dict[str, list[list[float]]] = {name: [] for name in names}
    for row, point in zip(kept.tolist(), points.tolist(), strict=True):
        coordinates[names[vectors.sets[row]]].append([int(vectors.rows[row]), *point])
    explained = [float(scale**2 / total) if total > 0 else 0.0 for scale in scales[:2]]
    return {"tokens": used, "n": len(kept), "explained": explained, "coordinates": coordinates}

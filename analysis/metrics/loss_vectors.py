"""Family 2, loss vectors (arXiv 2507.03662, section 4.2.1): do two sets of completions surprise a model token by token
in different ways?

A row's vector is the losses -log p of its completion's first tokens. For every two sets, the cosine of rows within each
and between them, over the tokens that both rows have; rows of one completion are one cluster and no pair. The null
forgets which set a row is of. Losses are positive, so cosines are high whatever the rows are: the gap counts, mean
within less mean between, beside its null.

The paper fills short rows with the mean of their own set, which makes rows of one set alike by construction. Its
formulas fills in the same way under the null, too, where the gap stays above 0 although the sets make no difference.
No matrix over rows is formed (`pair_sums.py`).
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
# Cosines over fewer shared tokens say little but that losses are positive.
FEWEST_TOKENS = 8
_FEWEST_ROWS = 4
_RELABELLINGS = 999
# Each fills the rows anew.
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
    """{"checkpoint" | "instruct" | "base": {"rows", "pairs": {"<set> vs <other>": {...}}, "pca"}}.

    "pairs": "within" {set: cosine}, "between", "gap", measurements with "null" (mean under relabelling and p).
    "rows": {set: {"rows", "short"}}; short ones (under 8 completion tokens) are left out. "pca": {"tokens", "n",
    "explained": [share, share], "coordinates": {set: [[row, first, second]]}} over the rows that have all of "tokens".

    Args:
        checkpoint, instruct, base: readings by probe set, the same rows for all models.
        completions: per set a label of each row's completion; rows of one label are one cluster. None: all differ.
        tokens: of a completion that its vector holds, at most.
        formulas: "paper" fills short rows with the mean of their own set.
    """
    if formulas not in FORMULAS:
        raise ValueError(f"loss_vectors: formulas {formulas!r} is none of {', '.join(FORMULAS)}")
    models = {"checkpoint": checkpoint, "instruct": instruct, "base": base}
    return {
        name: missing(NO_BASE) if readings is None else _one_model(readings, completions, tokens, formulas, seed)
        for name, readings in models.items()
    }


@dataclass(frozen=True)
class _Vectors:
    """Rows of several sets: losses [n, T] (0 where there is no token), held [n, T] (1 where there is one)."""

    losses: Floats
    held: Floats
    sets: Integers
    rows: Integers
    clusters: Integers

    def of(self, *sets: int) -> "_Vectors":
        """The rows of some sets."""
        kept = np.isin(self.sets, sets)
        return _Vectors(self.losses[kept], self.held[kept], self.sets[kept], self.rows[kept], self.clusters[kept])


def _one_model(
    readings: Mapping[str, Readout],
    completions: Mapping[str, Sequence[Hashable]] | None,
    tokens: int,
    formulas: str,
    seed: int,
) -> Results:
    names = list(readings)
    vectors = _vectors(readings, completions, tokens)
    counts = {
        name: {
            "rows": len(readings[name].counts),
            "short": int(len(readings[name].counts) - (vectors.sets == at).sum()),
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
    readings: Mapping[str, Readout], completions: Mapping[str, Sequence[Hashable]] | None, tokens: int
) -> _Vectors:
    """The vectors of all rows that are long enough, sets one after the other."""
    losses, held, sets, rows = [], [], [], []
    labels: list[Hashable] = []
    for at, (name, reading) in enumerate(readings.items()):
        owners, n = reading.token_rows.numpy(), len(reading.counts)
        lengths = np.bincount(owners, minlength=n)
        starts = np.cumsum(lengths) - lengths
        places = np.arange(len(owners)) - starts[owners]
        inside = places < tokens
        matrix = np.zeros((2, n, tokens))
        matrix[0, owners[inside], places[inside]] = -reading.log_prob.double().numpy()[inside]
        matrix[1, owners[inside], places[inside]] = 1.0
        kept = np.flatnonzero(lengths >= min(FEWEST_TOKENS, tokens))
        losses.append(matrix[0, kept])
        held.append(matrix[1, kept])
        sets.append(np.full(len(kept), at))
        rows.append(kept)
        labels += [(at, int(row)) if completions is None else completions[name][int(row)] for row in kept]
    numbers: dict[Hashable, int] = {}
    clusters = np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)
    return _Vectors(np.concatenate(losses), np.concatenate(held), np.concatenate(sets), np.concatenate(rows), clusters)


def shared_cosines(losses: Floats, held: Floats) -> tuple[Floats, Floats]:
    """Features [n, D] and signs [D] whose signed inner products are the cosines of rows over the tokens both have.

    Rows have their first tokens, so two rows share those of the shorter one. With u_i(l) the first l losses of row i at
    length 1, the cosine is u_i(l) u_j(l) at l the shorter length: summed over the lengths l that occur, inner products
    of u(l) of the rows of l tokens or more, minus those of the rows of more than l.

    Args:
        losses: [n, T], 0 where there is no token. held: [n, T], 1 where there is one.
    """
    lengths, features, signs = held.sum(1), [], []
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
    """Losses [n, T] with short rows filled by the mean of their own set (0 where no row of it is so long)."""
    filled = vectors.losses.copy()
    for side in (0, 1):
        inside = member == side
        sums, counts = vectors.losses[inside].sum(0), vectors.held[inside].sum(0)
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        filled[inside] += (1 - vectors.held[inside]) * means
    return filled


def _compare(
    vectors: _Vectors, at: tuple[int, int], names: tuple[str, str], formulas: str, generator: np.random.Generator
) -> Results:
    """The means over pairs of two sets as measurements."""
    member = (vectors.sets == at[1]).astype(np.float64)
    sides = [int((member == side).sum()) for side in (0, 1)]
    if min(len(np.unique(vectors.clusters[member == side])) for side in (0, 1)) < _FEWEST_ROWS:
        absent = missing(_FEW, sum(sides))
        return {"within": dict.fromkeys(names, absent), "between": absent, "gap": absent}
    pairs = _paper_pairs(vectors, member) if formulas == "paper" else _pairs(vectors)
    null = _relabelled(vectors, member, None if formulas == "paper" else pairs, generator)
    value, without = pairs.means(member)[:, 0], pairs.without_each_cluster(member)
    found: dict[str, Measurement] = {}
    for number, name in enumerate(MEANS):
        # Losses are positive: no cosine is below 0.
        bounds = (-1.0, 1.0) if name == "gap" else (0.0, 1.0)
        found[name] = {
            "value": float(value[number]),
            "n": sides[number] if number < 2 else sum(sides),
            "ci95": list(jackknife_ci(float(value[number]), without[number], bounds=bounds)),
            "null": missing(_FIXED) if null is None else _null(float(value[number]), null[number]),
        }
    within = dict(zip(names, (found["within_first"], found["within_second"]), strict=True))
    return {"within": within, "between": found["between"], "gap": found["gap"]}


def _pairs(vectors: _Vectors) -> PairSums:
    return PairSums(*shared_cosines(vectors.losses, vectors.held), vectors.clusters)


def _paper_pairs(vectors: _Vectors, member: Floats) -> PairSums:
    """As published: short rows filled by their set, and only a row and itself are no pair."""
    filled = _filled(vectors, member)
    return PairSums(*shared_cosines(filled, np.ones_like(vectors.held)), np.arange(len(filled)))


def _relabelled(
    vectors: _Vectors, member: Floats, pairs: PairSums | None, generator: np.random.Generator
) -> Floats | None:
    """The four means [4, P] under relabelling; without `pairs`, rows are filled anew for each labelling."""
    relabelling = Relabelling(member, vectors.clusters)
    if not relabelling.possible:
        return None
    if pairs is not None:
        return pairs.means(relabelling.draw(_RELABELLINGS, generator))
    drawn = relabelling.draw(_PAPER_RELABELLINGS, generator)
    return np.concatenate([_paper_pairs(vectors, labels).means(labels) for labels in drawn], axis=1)


def _null(value: float, drawn: Floats) -> Measurement:
    """The mean under relabelling, and the two-sided p around it."""
    middle = float(np.append(drawn, value).mean())
    return {
        "value": float(drawn.mean()),
        "n": len(drawn),
        "p": permutation_p(abs(value - middle), np.abs(drawn - middle) + 1e-12),
    }


def _pca(vectors: _Vectors, names: Sequence[str], formulas: str) -> Results:
    """Two coordinates of every row that has the tokens used: half of the rows of each set, at least."""
    lengths = vectors.held.sum(1)
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
    # The sign of a component is arbitrary; here its largest loading is positive.
    signs = np.sign(directions[np.arange(2), np.abs(directions[:2]).argmax(1)])
    points = left[:, :2] * scales[:2] * signs
    total = float(np.sum(scales**2))
    coordinates: dict[str, list[list[float]]] = {name: [] for name in names}
    for row, point in zip(kept.tolist(), points.tolist(), strict=True):
        coordinates[names[vectors.sets[row]]].append([int(vectors.rows[row]), *point])
    explained = [float(scale**2 / total) if total > 0 else 0.0 for scale in scales[:2]]
    return {"tokens": used, "n": len(kept), "explained": explained, "coordinates": coordinates}

"""Family 6, drift by depth: at which layer sets of rows part, and at which layer a checkpoint leaves its references.

Per layer and every two sets 1 - cos(mean h of one, mean h of the other), for checkpoint, instruct and base; and per
layer and set how alike two models are on the same rows: the mean cosine of a row's two activations, and linear CKA
(Kornblith et al. 2019), which ignores rotations of the whole space. Activations are means over a row's tokens.

With more dimensions than rows the usual CKA is near 1 for noise; here it is the unbiased one (Song et al. 2012), which
is 0 on average for unrelated models and may be below 0. Published curves have no error bars: here every number has an
interval from leaving rows out in turn. Distances are read from sums over rows, so that their cost grows with the rows;
CKA is over pairs of rows, at most 512 of a set. It takes rows as independent, copies of a completion included.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..passes.readout import Readout
from ..stats.intervals import Floats, Measurement, jackknife_ci, mean_ci, missing
from ..stats.nulls import permutation_p
from ..stats.relabelling import Integers, Relabelling, rows_of_clusters
from .behavior import NO_BASE

MODELS = ("checkpoint", "instruct", "base")
_FEWEST = 4
_RELABELLINGS = 199
_SHUFFLES = 19
# CKA is over pairs of rows: as many as these make its interval narrow and its matrices small.
_CKA_ROWS = 512
_FEW = f"fewer than {_FEWEST} different rows have tokens of this role"
_FIXED = "no relabelling keeps the completions together"
_ALIKE = "all rows have one activation"

Results = dict[str, Any]


def drift_by_depth(
    checkpoint: Mapping[str, Readout],
    instruct: Mapping[str, Readout],
    base: Mapping[str, Readout] | None,
    completions: Mapping[str, Sequence[Hashable]] | None = None,
    *,
    seed: int = 0,
) -> Results:
    """{"layers": {l: {"sets": {"<set> vs <other>": {model: distance}}, "models": {set: {"<model>_<other>": alike}}}}}.

    distance: 1 - cosine of the sets' mean activations, with "null" (mean under relabelling of rows, and p). alike:
    {"cosine": ..., "cka": ...}; "null" of cka: the mean over shuffled pairings of rows, and p.

    Args:
        checkpoint, instruct, base: readings by probe set, the same rows for all models.
        completions: per set a label of each row's completion; rows of one label are one cluster. None: all differ.
    """
    models = {"checkpoint": checkpoint, "instruct": instruct, "base": base}
    names = list(checkpoint)
    layers = sorted(set.intersection(*(set(each.pooled) for each in checkpoint.values()))) if names else []
    rows = {name: np.flatnonzero(checkpoint[name].counts.numpy()) for name in names}
    clusters = _clusters(rows, completions)
    found: Results = {}
    for layer in layers:
        seen = {
            model: _Seen.of({name: readings[name].pooled[layer].double().numpy()[rows[name]] for name in names})
            for model, readings in models.items()
            if readings is not None
        }
        found[str(layer)] = {
            "sets": {
                f"{first} vs {second}": {
                    model: _distance(seen[model], clusters, (first, second), seed)
                    if model in seen
                    else missing(NO_BASE)
                    for model in MODELS
                }
                for first, second in combinations(names, 2)
            },
            "models": {name: _models(seen, name, clusters[name], seed) for name in names},
        }
    return {"layers": found}


@dataclass(frozen=True)
class _Seen:
    """Rows [n, d] of all sets at one layer of one model, as their mean and what they are beside it.

    places: rows of each set.
    """

    rows: Floats
    places: dict[str, Integers]
    mean: Floats
    rest: NDArray[np.float32]

    @classmethod
    def of(cls, states: Mapping[str, Floats]) -> "_Seen":
        ends = np.cumsum([len(rows) for rows in states.values()])
        places = {name: np.arange(end - len(states[name]), end) for name, end in zip(states, ends, strict=True)}
        rows = np.concatenate(list(states.values()))
        mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
        # Single precision is enough for what is left beside the mean, and half the time.
        return cls(rows, places, mean, (rows - mean).astype(np.float32))

    def means(self, places: Integers, member: Floats) -> tuple[Floats, Floats]:
        """Mean activations [P, d] of the rows at `places` with member 0, and with 1, of each `member` [P, n]."""
        rest = self.rest[places]
        inner = (member.astype(np.float32) @ rest).astype(np.float64)
        sums, counts = (rest.sum(0, dtype=np.float64) - inner, inner), (1 - member, member)
        first, second = (self.mean + each / count.sum(1)[:, None] for each, count in zip(sums, counts, strict=True))
        return first, second

    def means_without_each_cluster(self, places: Integers, member: Floats, clusters: Integers) -> tuple[Floats, Floats]:
        """The same [G, d], each of the G clusters left out in turn."""
        rest = self.rest[places].astype(np.float64)
        order = np.concatenate(groups := rows_of_clusters(clusters))
        starts = np.cumsum([0, *(len(rows) for rows in groups[:-1])])
        found = []
        for side in (1 - member, member):
            inside = np.add.reduceat((rest * side[:, None])[order], starts)
            counts = np.add.reduceat(side[order], starts)
            found.append(self.mean + (inside.sum(0) - inside) / (side.sum() - counts)[:, None])
        return found[0], found[1]

    def open_gram(self, name: str) -> Floats:
        """Inner products of one set's rows around their mean, its diagonal 0; of at most `_CKA_ROWS` rows."""
        places = self.places[name]
        rest = self.rest[places[spread(len(places), _CKA_ROWS)]]
        gram = ((rest - rest.mean(0)) @ (rest - rest.mean(0)).T).astype(np.float64)
        np.fill_diagonal(gram, 0.0)
        return gram


def spread(n: int, most: int) -> Integers:
    """At most so many of n rows, evenly spread over them."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(np.int64)


def _clusters(
    rows: Mapping[str, Integers], completions: Mapping[str, Sequence[Hashable]] | None
) -> dict[str, Integers]:
    """A number for each row's completion, the same in all sets."""
    numbers: dict[Hashable, int] = {}
    return {
        name: np.array(
            [
                numbers.setdefault((name, row) if completions is None else completions[name][row], len(numbers))
                for row in found.tolist()
            ],
            dtype=np.int64,
        )
        for name, found in rows.items()
    }


def _distance(seen: _Seen, clusters: Mapping[str, Integers], names: tuple[str, str], seed: int) -> Measurement:
    """1 - cosine of the mean activations of two sets."""
    labels, places = (np.concatenate([each[name] for name in names]) for each in (clusters, seen.places))
    member = np.repeat([0.0, 1.0], [len(clusters[name]) for name in names])
    if min(len(np.unique(clusters[name])) for name in names) < _FEWEST:
        return missing(_FEW, len(labels))
    value = float(_between(*seen.means(places, member[None]))[0])
    without = _between(*seen.means_without_each_cluster(places, member, labels))
    result: Measurement = {"value": value, "n": len(labels)}
    result["ci95"] = list(jackknife_ci(value, without, bounds=(0.0, 2.0)))
    relabelling = Relabelling(member, labels)
    if not relabelling.possible:
        return {**result, "null": missing(_FIXED)}
    labelled = relabelling.draw(_RELABELLINGS, np.random.default_rng(seed))
    drawn = _between(*seen.means(places, labelled))
    return {**result, "null": {"value": float(drawn.mean()), "n": len(drawn), "p": permutation_p(value, drawn)}}


def _between(first: Floats, second: Floats) -> Floats:
    """1 - cosine [P] of vectors [P, d]."""
    return _apart((first * second).sum(1), (first * first).sum(1), (second * second).sum(1))


def _apart(cross: Floats, one: Floats, other: Floats) -> Floats:
    """1 - cosine from inner products; 0 where a mean has no length."""
    scale = np.sqrt(one * other)
    return np.where(scale > 0, 1 - cross / np.where(scale > 0, scale, 1.0), 0.0)


def _models(seen: Mapping[str, _Seen], name: str, clusters: Integers, seed: int) -> Results:
    """How alike every two models are on the rows of one set."""
    n, few = len(clusters), len(np.unique(clusters)) < _FEWEST
    grams = {} if few else {model: each.open_gram(name) for model, each in seen.items()}
    found: Results = {}
    for left, right in combinations(MODELS, 2):
        if few or left not in seen or right not in seen:
            absent = missing(_FEW if few else NO_BASE, n)
            found[f"{left}_{right}"] = {"cosine": absent, "cka": absent}
            continue
        rows = [seen[model].rows[seen[model].places[name]] for model in (left, right)]
        found[f"{left}_{right}"] = {
            "cosine": _cosine(rows[0], rows[1], clusters),
            "cka": _cka(grams[left], grams[right], seed),
        }
    return found


def _cosine(left: Floats, right: Floats, clusters: Integers) -> Measurement:
    """Mean over rows of the cosine of a row's activations in two models."""
    values = 1 - _between(left, right)
    low, high = mean_ci(values, clusters)
    return {"value": float(values.mean()), "n": len(values), "ci95": [max(-1.0, low), min(1.0, high)]}


def _cka(left: Floats, right: Floats, seed: int) -> Measurement:
    """Unbiased linear CKA of two models, from the Gram matrices [n, n] of their rows."""
    n = len(left)
    if n <= _FEWEST:
        return missing(_FEW, n)
    (cross, cross_out), (one, one_out), (other, other_out) = (
        dependence(*each) for each in ((left, right), (left, left), (right, right))
    )
    if min(one, other, one_out.min(), other_out.min()) <= 0:
        return missing(_ALIKE, n)
    value = cross / np.sqrt(one * other)
    interval = jackknife_ci(value, cross_out / np.sqrt(one_out * other_out), bounds=(-1.0, 1.0))
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(_SHUFFLES):
        order = generator.permutation(n)
        drawn.append(dependence(left, right[np.ix_(order, order)])[0] / np.sqrt(one * other))
    null = {"value": float(np.mean(drawn)), "n": _SHUFFLES, "p": permutation_p(value, drawn)}
    return {"value": float(value), "n": n, "ci95": list(interval), "null": null}


def dependence(left: Floats, right: Floats) -> tuple[float, Floats]:
    """Unbiased HSIC (Song et al. 2012, equation 5) of two Gram matrices [n, n] without diagonal, and each row left out.

    Returns:
        the estimate, and the estimates [n] without one row, in O(n^2) for all of them together.
    """
    n = len(left)
    a, b, shared = left.sum(1), right.sum(1), (left * right).sum(1)
    products = shared.sum(), a.sum(), b.sum(), a @ b
    whole = _unbiased(*products, n)
    left_out = _unbiased(
        products[0] - 2 * shared,
        products[1] - 2 * a,
        products[2] - 2 * b,
        products[3] - a * b - right @ a - left @ b + shared,
        n - 1,
    )
    return float(whole), left_out


def _unbiased(shared: Any, left: Any, right: Any, chained: Any, n: int) -> Any:
    """From sum(K * L), sum(K), sum(L) and 1' K L 1 over n rows; numbers, or arrays of one shape."""
    return (shared + left * right / ((n - 1) * (n - 2)) - 2 * chained / (n - 2)) / (n * (n - 3))

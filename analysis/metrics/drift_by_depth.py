"""Drift by depth (family 6; arXiv 2507.03662): where sets of rows part, and where a checkpoint leaves its references.

Activations are means over the tokens of a row. For every layer and every two sets of rows, the distance is 1 - cos(mean
activation of the first set, mean activation of the second set), for checkpoint, instruct and base. For every layer and
set, two measures say how similar two models are on the same rows: the mean over rows of the cosine of the two
activations, and linear CKA (Kornblith et al. 2019), which ignores rotations of the whole space.

With more dimensions than rows, the usual CKA is near 1 even for noise. This one is the unbiased CKA (Song et al. 2012),
which is 0 on average for unrelated models and may be negative. The published curves have no error bars; here every
number has an interval, from leaving rows out in turn. Distances come from sums over rows, so their cost grows linearly
with the rows. CKA uses pairs of rows, so it takes at most 512 rows of a set. It treats rows as independent, even rows
that share a completion.
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
# CKA uses pairs of rows. With this many rows its interval is narrow and its matrices are small.
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
    """Return {"layers": {l: {"sets": distances, "models": similarities}}}.

    Distances are {"<set> vs <other>": {model: distance}}. A distance is 1 - cosine of the mean activations of the two
    sets; its "null" is the mean under relabelling of rows, with p. Similarities are {set: {"<model>_<other>":
    {"cosine": ..., "cka": ...}}}; the "null" of cka is the mean over shuffled pairings of rows, with p.

    Args:
        checkpoint, instruct, base: readouts by probe set, of the same rows for all models. base may be None.
        completions: for each set, a label of the completion of each row; rows with one label form one cluster. None:
            every row has its own completion.
    """
    models = {"checkpoint": checkpoint, "instruct": instruct, "base": base}
    names = list(checkpoint)
    layers = sorted(set.intersection(*(set(readout.pooled) for readout in checkpoint.values()))) if names else []
    rows = {name: np.flatnonzero(checkpoint[name].counts.numpy()) for name in names}
    clusters = _clusters(rows, completions)
    results: Results = {}
    for layer in layers:
        states = {
            model: _States.of({name: readouts[name].pooled[layer].double().numpy()[rows[name]] for name in names})
            for model, readouts in models.items()
            if readouts is not None
        }
        results[str(layer)] = {
            "sets": {
                f"{first} vs {second}": {
                    model: _distance(states[model], clusters, (first, second), seed)
                    if model in states
                    else missing(NO_BASE)
                    for model in MODELS
                }
                for first, second in combinations(names, 2)
            },
            "models": {name: _models(states, name, clusters[name], seed) for name in names},
        }
    return {"layers": results}


@dataclass(frozen=True)
class _States:
    """The rows [n, d] of all sets at one layer of one model, split into their mean and the deviations from it.

    rows: the activations. places: row numbers of each set. mean: [d]. deviations: [n, d], the deviations from the mean.
    """

    rows: Floats
    places: dict[str, Integers]
    mean: Floats
    deviations: NDArray[np.float32]

    @classmethod
    def of(cls, states: Mapping[str, Floats]) -> "_States":
        """Stack the activations [n, d] of the sets."""
        ends = np.cumsum([len(rows) for rows in states.values()])
        places = {name: np.arange(end - len(states[name]), end) for name, end in zip(states, ends, strict=True)}
        rows = np.concatenate(list(states.values()))
        mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
        # Single precision is enough for the deviations from the mean, and takes half the time.
        return cls(rows, places, mean, (rows - mean).astype(np.float32))

    def means(self, places: Integers, member: Floats) -> tuple[Floats, Floats]:
        """Return the mean activations [P, d] of the two groups of the rows at `places`: member 0, and member 1.

        Args:
            member: [P, n], one membership of the rows per line.
        """
        deviations = self.deviations[places]
        inner = (member.astype(np.float32) @ deviations).astype(np.float64)
        sums, counts = (deviations.sum(0, dtype=np.float64) - inner, inner), (1 - member, member)
        first, second = (self.mean + total / count.sum(1)[:, None] for total, count in zip(sums, counts, strict=True))
        return first, second

    def means_without_each_cluster(self, places: Integers, member: Floats, clusters: Integers) -> tuple[Floats, Floats]:
        """Return the mean activations [G, d] of the two groups, with each of the G clusters left out in turn."""
        deviations = self.deviations[places].astype(np.float64)
        order = np.concatenate(groups := rows_of_clusters(clusters))
        starts = np.cumsum([0, *(len(rows) for rows in groups[:-1])])
        means = []
        for side in (1 - member, member):
            sums = np.add.reduceat((deviations * side[:, None])[order], starts)
            counts = np.add.reduceat(side[order], starts)
            means.append(self.mean + (sums.sum(0) - sums) / (side.sum() - counts)[:, None])
        return means[0], means[1]

    def hollow_gram(self, name: str) -> Floats:
        """Return the inner products [m, m] of the centred rows of one set, with zeros on the diagonal.

        m is at most `_CKA_ROWS`.
        """
        places = self.places[name]
        deviations = self.deviations[places[evenly_spaced(len(places), _CKA_ROWS)]]
        gram = ((deviations - deviations.mean(0)) @ (deviations - deviations.mean(0)).T).astype(np.float64)
        np.fill_diagonal(gram, 0.0)
        return gram


def evenly_spaced(n: int, most: int) -> Integers:
    """Return the numbers of at most `most` of n rows, evenly spaced."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(np.int64)


def _clusters(
    rows: Mapping[str, Integers], completions: Mapping[str, Sequence[Hashable]] | None
) -> dict[str, Integers]:
    """Return a number for the completion of each row; equal completions have one number in all sets."""
    numbers: dict[Hashable, int] = {}
    return {
        name: np.array(
            [
                numbers.setdefault((name, row) if completions is None else completions[name][row], len(numbers))
                for row in numbered.tolist()
            ],
            dtype=np.int64,
        )
        for name, numbered in rows.items()
    }


def _distance(states: _States, clusters: Mapping[str, Integers], names: tuple[str, str], seed: int) -> Measurement:
    """Return 1 - cosine of the mean activations of two sets."""
    labels, places = (np.concatenate([by_set[name] for name in names]) for by_set in (clusters, states.places))
    member = np.repeat([0.0, 1.0], [len(clusters[name]) for name in names])
    if min(len(np.unique(clusters[name])) for name in names) < _FEWEST:
        return missing(_FEW, len(labels))
    value = float(_cosine_distance(*states.means(places, member[None]))[0])
    left_out = _cosine_distance(*states.means_without_each_cluster(places, member, labels))
    result: Measurement = {"value": value, "n": len(labels)}
    result["ci95"] = list(jackknife_ci(value, left_out, bounds=(0.0, 2.0)))
    relabelling = Relabelling(member, labels)
    if not relabelling.possible:
        return {**result, "null": missing(_FIXED)}
    relabelled = relabelling.draw(_RELABELLINGS, np.random.default_rng(seed))
    distances = _cosine_distance(*states.means(places, relabelled))
    p = permutation_p(value, distances)
    return {**result, "null": {"value": float(distances.mean()), "n": len(distances), "p": p}}


def _cosine_distance(first: Floats, second: Floats) -> Floats:
    """Return 1 - cosine [P] of vectors [P, d]."""
    return _distance_from_products((first * second).sum(1), (first * first).sum(1), (second * second).sum(1))


def _distance_from_products(cross: Floats, first: Floats, second: Floats) -> Floats:
    """Return 1 - cosine from inner products; 0 where a mean has no length."""
    scale = np.sqrt(first * second)
    return np.where(scale > 0, 1 - cross / np.where(scale > 0, scale, 1.0), 0.0)


def _models(states: Mapping[str, _States], name: str, clusters: Integers, seed: int) -> Results:
    """Return how similar every two models are on the rows of one set."""
    n, few = len(clusters), len(np.unique(clusters)) < _FEWEST
    grams = {} if few else {model: model_states.hollow_gram(name) for model, model_states in states.items()}
    results: Results = {}
    for left, right in combinations(MODELS, 2):
        if few or left not in states or right not in states:
            absent = missing(_FEW if few else NO_BASE, n)
            results[f"{left}_{right}"] = {"cosine": absent, "cka": absent}
            continue
        rows = [states[model].rows[states[model].places[name]] for model in (left, right)]
        results[f"{left}_{right}"] = {
            "cosine": _cosine(rows[0], rows[1], clusters),
            "cka": _cka(grams[left], grams[right], seed),
        }
    return results


def _cosine(left: Floats, right: Floats, clusters: Integers) -> Measurement:
    """Return the mean over rows of the cosine of a row's activations in two models."""
    values = 1 - _cosine_distance(left, right)
    low, high = mean_ci(values, clusters)
    return {"value": float(values.mean()), "n": len(values), "ci95": [max(-1.0, low), min(1.0, high)]}


def _cka(left: Floats, right: Floats, seed: int) -> Measurement:
    """Return the unbiased linear CKA of two models, from the Gram matrices [n, n] of their rows."""
    n = len(left)
    if n <= _FEWEST:
        return missing(_FEW, n)
    (cross, cross_out), (own_left, own_left_out), (own_right, own_right_out) = (
        unbiased_hsic(*grams) for grams in ((left, right), (left, left), (right, right))
    )
    if min(own_left, own_right, own_left_out.min(), own_right_out.min()) <= 0:
        return missing(_ALIKE, n)
    value = cross / np.sqrt(own_left * own_right)
    interval = jackknife_ci(value, cross_out / np.sqrt(own_left_out * own_right_out), bounds=(-1.0, 1.0))
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(_SHUFFLES):
        order = generator.permutation(n)
        drawn.append(unbiased_hsic(left, right[np.ix_(order, order)])[0] / np.sqrt(own_left * own_right))
    null = {"value": float(np.mean(drawn)), "n": _SHUFFLES, "p": permutation_p(value, drawn)}
    return {"value": float(value), "n": n, "ci95": list(interval), "null": null}


def unbiased_hsic(left: Floats, right: Floats) -> tuple[float, Floats]:
    """Return the unbiased HSIC of two Gram matrices [n, n] with zero diagonal, and the HSIC without each row.

    The estimator is equation 5 of Song et al. (2012).

    Returns:
        the estimate, and the n estimates with one row left out, in O(n^2) for all of them together.
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
    """Return the estimate from sum(K * L), sum(K), sum(L) and 1' K L 1 over n rows; numbers, or arrays of one shape."""
    return (shared + left * right / ((n - 1) * (n - 2)) - 2 * chained / (n - 2)) / (n * (n - 3))

"""Gradients (family 3; arXiv 2507.03662, section 4.2.2): do two sets of rows pull the weights in the same direction?

All quantities come from inner products of the gradients of single rows. For every two sets: the cosine within and
between the sets, centred and uncentred; the rate of conflict P(g_i . g_j < 0); the cosine of matched pairs (rows on the
same line with the same completion and another framing); and the cosine of rows of similar length. Beside each number
stands its null: the same number when the set of a row is forgotten. For the null, labels flip within matched pairs, and
are dealt anew among the other completions. Rows that share a completion form one cluster and move together; they are
compared with each other only as matched pairs.

The paper's formulas take the loss over the prompts too, and show only the centred cosines of all pairs of rows.
Centring two sets of equal size makes the mean cosine between them negative, whatever the rows are; the null beside it
says how negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..passes.gradients import GradientReadout
from ..stats.binomial import wilson
from ..stats.gradient_pairs import (
    MEANS,
    cosines,
    different,
    length_distance,
    nearest_partners,
    pair_means,
    partner_counts,
    partner_means,
    shuffled_partners,
    without_each_cluster,
)
from ..stats.intervals import Floats, Interval, Measurement, jackknife_ci, mean_ci, missing
from ..stats.nulls import permutation_p
from ..stats.relabelling import Integers, Relabelling

_RELABELLINGS = 1999
# Fewer, because each relabelling searches the nearest row of every row again.
_LENGTH_RELABELLINGS = 499
_FEWEST = 4
_COSINE: Interval = (-1.0, 1.0)
_FEW = f"a set has gradients of fewer than {_FEWEST} different completions"
_FIXED = "no relabelling keeps the completions together"
_UNPAIRED = f"fewer than {_FEWEST} different completions stand on the same line of both sets"


def gradients(readout: GradientReadout, formulas: str = "corrected", seed: int = 0) -> dict[str, Any]:
    """Return {"rows": counts, "<set> vs <other set>": {quantity: ...}} for every two sets of one model.

    With the corrected formulas the quantities are "uncentred", "centred", "conflict_rate" and "length_matched"
    (uncentred). Each is {"within": {set: ...}, "between", "gap"}, where gap is the mean of the two within minus
    between. "matched_pairs" is a single number. With the paper's formulas there is only "centred". Every number is a
    measurement with "null": its mean under relabelling, and the two-sided "p". Cosines and rates have no unit.

    "rows" is {set: {"rows", "completions", "without_gradient"}}; rows without a gradient are left out.

    Args:
        readout: the result of `read_gradients`; the paper's formulas need the gradients of whole rows.
        formulas: "corrected" or "paper".
    """
    names = list(dict.fromkeys(readout.sets))
    results: dict[str, Any] = {"rows": {name: _counts(readout, name) for name in names}}
    for first, second in combinations(names, 2):
        results[f"{first} vs {second}"] = _compare(_TwoSets.of(readout, first, second), formulas, seed)
    return results


def _usable(readout: GradientReadout) -> NDArray[np.bool_]:
    """Return [R], whether the gradient of a row exists, is finite and is not zero."""
    squares = np.diagonal(readout.gram)
    return np.isfinite(squares) & (squares > 0)


def _counts(readout: GradientReadout, name: str) -> dict[str, int]:
    """Return the number of rows of one set, of its different completions, and of rows without a gradient."""
    inside = np.array(readout.sets) == name
    usable = inside & _usable(readout)
    return {
        "rows": int(inside.sum()),
        "completions": len({readout.completions[row] for row in np.flatnonzero(usable)}),
        "without_gradient": int(inside.sum() - usable.sum()),
    }


@dataclass(frozen=True)
class _TwoSets:
    """The usable rows of two sets.

    names: of the sets. gram: [n, n], inner products of the gradients. member: [n], 0 in the first set, 1 in the second.
    clusters: [n], a number for the completion. lines: [n], the place in the set. lengths: [n], completion tokens.
    """

    names: tuple[str, str]
    gram: Floats
    member: Floats
    clusters: Integers
    lines: Integers
    lengths: Integers

    @classmethod
    def of(cls, readout: GradientReadout, first: str, second: str) -> "_TwoSets":
        """Select the usable rows of two sets."""
        sets = np.array(readout.sets)
        rows = np.flatnonzero(_usable(readout) & np.isin(sets, [first, second]))
        _, clusters = np.unique(np.array(readout.completions)[rows], return_inverse=True)
        return cls(
            names=(first, second),
            gram=readout.gram[np.ix_(rows, rows)],
            member=(sets[rows] == second).astype(np.float64),
            clusters=clusters,
            lines=np.array(readout.lines)[rows],
            lengths=np.array(readout.lengths)[rows],
        )

    def completions(self) -> tuple[int, int]:
        """Return the number of different completions of each set."""
        first, second = (len(np.unique(self.clusters[self.member == side])) for side in (0, 1))
        return first, second

    def matched(self) -> tuple[Integers, Integers]:
        """Return the rows of the first and of the second set that share their line and their completion."""
        at = {int(self.lines[row]): row for row in np.flatnonzero(self.member == 1)}
        pairs = [
            (row, at[line])
            for row in np.flatnonzero(self.member == 0)
            if (line := int(self.lines[row])) in at and self.clusters[row] == self.clusters[at[line]]
        ]
        left, right = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return left, right


def _compare(two: _TwoSets, formulas: str, seed: int) -> dict[str, Any]:
    """Return all quantities of two sets."""
    n = len(two.member)
    if min(two.completions()) < _FEWEST:
        quantities = (
            ("centred",) if formulas == "paper" else ("uncentred", "centred", "conflict_rate", "length_matched")
        )
        absent = {} if formulas == "paper" else {"matched_pairs": missing(_FEW, n)}
        return {**{name: _everywhere(two, missing(_FEW, n)) for name in quantities}, **absent}
    generator = np.random.default_rng(seed)
    relabelling = Relabelling(two.member, two.clusters)
    memberships = relabelling.draw(_RELABELLINGS, generator) if relabelling.possible else None
    # As published: only a row and itself do not count as a pair.
    comparable = different(np.arange(n) if formulas == "paper" else two.clusters)
    centred = _pairs(two, two.gram, comparable, memberships, centred=True)
    if formulas == "paper":
        return {"centred": centred}
    cosine = cosines(two.gram)
    return {
        "uncentred": _pairs(two, cosine, comparable, memberships),
        "centred": centred,
        "conflict_rate": _pairs(two, (two.gram < 0).astype(np.float64), comparable, memberships, rate=True),
        "matched_pairs": _matched(two, cosine, generator),
        "length_matched": _length_matched(two, cosine, memberships, generator),
    }


def _pairs(
    two: _TwoSets,
    matrix: Floats,
    comparable: Floats,
    memberships: Floats | None,
    centred: bool = False,
    rate: bool = False,
) -> dict[str, Any]:
    """Return means over pairs of rows, with their intervals (completions left out in turn) and nulls (relabelling)."""
    null = None if memberships is None else pair_means(matrix, comparable, memberships, centred=centred)
    return _measured(two, matrix, comparable, null, centred, rate)


def _length_matched(
    two: _TwoSets, cosine: Floats, memberships: Floats | None, generator: np.random.Generator
) -> dict[str, Any]:
    """Compare each row with the row of nearest length of its own set, and with that of the other set."""
    distance = length_distance(two.lengths.tolist(), two.clusters, generator)
    null = None
    if memberships is not None:
        labellings = memberships[:_LENGTH_RELABELLINGS]
        null = np.stack(
            [partner_means(cosine, nearest_partners(distance, labels), labels) for labels in labellings], axis=1
        )
    return _measured(two, cosine, partner_counts(nearest_partners(distance, two.member)), null)


def _measured(
    two: _TwoSets, matrix: Floats, comparable: Floats, null: Floats | None, centred: bool = False, rate: bool = False
) -> dict[str, Any]:
    """Return the four means as measurements.

    Args:
        matrix, comparable: as in `pair_means`. null: [4, P], the means under relabelling; None: no relabelling is
            possible.
        rate: whether the entries of the matrix are 0 or 1.
    """
    values = pair_means(matrix, comparable, two.member, centred=centred)[:, 0]
    left_out = without_each_cluster(two.clusters)
    members = np.tile(two.member, (len(left_out), 1))
    without = pair_means(matrix, comparable, members, left_out, centred)
    rows = [int((two.member == 0).sum()), int((two.member == 1).sum())]
    # The number of pairs of completions that have no completion in common.
    first, second = two.completions()
    disjoint = (first // 2, second // 2, min(first, second))
    results = {}
    for number, name in enumerate(MEANS):
        n = rows[number] if number < 2 else sum(rows)
        bounds = (-2.0, 2.0) if name == "gap" else (0.0, 1.0) if rate else _COSINE
        if rate and name != "gap" and values[number] in (0, 1):
            # All pairs agree, so a resampled interval would have no width.
            interval = wilson(round(values[number] * disjoint[number]), disjoint[number])
        else:
            interval = jackknife_ci(float(values[number]), without[number], bounds=bounds)
        results[name] = {
            "value": float(values[number]),
            "n": n,
            "ci95": list(interval),
            "null": _null(float(values[number]), None if null is None else null[number]),
        }
    return {
        "within": dict(zip(two.names, (results["within_first"], results["within_second"]), strict=True)),
        "between": results["between"],
        "gap": results["gap"],
    }


def _null(value: float, relabelled: Floats | None) -> Measurement:
    """Return the mean under relabelling, and the two-sided p.

    p is the share of relabellings that lie as far from the mean of all values as the observed value does; the observed
    value counts as one of them.
    """
    if relabelled is None:
        return missing(_FIXED)
    centre = float(np.append(relabelled, value).mean())
    # Differences that are only rounding count as ties.
    distances = np.abs(relabelled - centre)
    tied = np.abs(relabelled - value) <= 1e-9
    observed = abs(value - centre)
    return {
        "value": float(relabelled.mean()),
        "n": len(relabelled),
        "p": permutation_p(observed, np.where(tied, observed, distances)),
    }


def _matched(two: _TwoSets, cosine: Floats, generator: np.random.Generator) -> Measurement:
    """Return the mean cosine of matched pairs; under the null, the second rows are permuted among the pairs."""
    left, right = two.matched()
    clusters = two.clusters[left]
    if len(np.unique(clusters)) < _FEWEST:
        return missing(_UNPAIRED, len(left))
    values = cosine[left, right]
    shuffled = shuffled_partners(clusters, _RELABELLINGS, generator)
    null = cosine[left, right[shuffled]].mean(1)
    interval = mean_ci(values, clusters)
    return {
        "value": float(values.mean()),
        "n": len(values),
        "ci95": [max(-1.0, interval[0]), min(1.0, interval[1])],
        "null": _null(float(values.mean()), null),
    }


def _everywhere(two: _TwoSets, absent: Measurement) -> Mapping[str, Any]:
    """Return a missing measurement in all places of one quantity."""
    return {"within": dict.fromkeys(two.names, absent), "between": absent, "gap": absent}

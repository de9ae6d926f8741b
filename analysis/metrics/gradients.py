"""Family 3, gradients (arXiv 2507.03662, section 4.2.2): whether two sets of rows pull a model's weights the same way.

For every two sets, from inner products of per-row gradients: the cosine within and between the sets, centred and
uncentred, the rate of conflict P(g_i . g_j < 0), the cosine of matched pairs (same line, same completion, other
framing), and the cosine of rows of like length. Beside each stands what it is when the rows' set is forgotten: labels
flip within matched pairs, and are dealt anew among the other completions. Rows of one completion are one cluster, move
together, and are compared with each other as matched pairs alone.

The published formulas take the loss over prompts too and show centred cosines of all pairs of rows. Centring two equal
sets makes their mean cosine negative whatever they are: the null beside it says how much.
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
# Each takes all rows' nearest rows anew.
_LENGTH_RELABELLINGS = 499
_FEWEST = 4
_COSINE: Interval = (-1.0, 1.0)
_FEW = f"a set has gradients of fewer than {_FEWEST} different completions"
_FIXED = "no relabelling keeps the completions together"
_UNPAIRED = f"fewer than {_FEWEST} different completions stand on the same line of both sets"


def gradients(readout: GradientReadout, formulas: str = "corrected", seed: int = 0) -> dict[str, Any]:
    """{"<set> vs <other set>": {quantity: ...}} for every two sets of one model's reading.

    corrected: "uncentred", "centred", "conflict_rate" and "length_matched" (uncentred), each {"within": {set: ...},
    "between", "gap"}, gap being the mean of the two within minus between; "matched_pairs". paper: "centred" alone.
    Every leaf is a measurement with "null": its mean under relabelling, and the two-sided "p".
    "rows": {set: {"rows", "completions", "without_gradient"}}; rows of the last kind are left out.

    Args:
        readout: of `read_gradients`; for the paper's formulas of whole rows.
        formulas: "corrected" or "paper".
    """
    names = list(dict.fromkeys(readout.sets))
    results: dict[str, Any] = {"rows": {name: _counts(readout, name) for name in names}}
    for first, second in combinations(names, 2):
        results[f"{first} vs {second}"] = _compare(_Two.of(readout, first, second), formulas, seed)
    return results


def _usable(readout: GradientReadout) -> NDArray[np.bool_]:
    """[R], whether a row's gradient exists, is finite and not zero."""
    squares = np.diagonal(readout.gram)
    return np.isfinite(squares) & (squares > 0)


def _counts(readout: GradientReadout, name: str) -> dict[str, int]:
    inside = np.array(readout.sets) == name
    usable = inside & _usable(readout)
    return {
        "rows": int(inside.sum()),
        "completions": len({readout.completions[row] for row in np.flatnonzero(usable)}),
        "without_gradient": int(inside.sum() - usable.sum()),
    }


@dataclass(frozen=True)
class _Two:
    """The usable rows of two sets: gram [n, n], member [n] (1: second set), clusters [n], lines [n], lengths [n]."""

    names: tuple[str, str]
    gram: Floats
    member: Floats
    clusters: Integers
    lines: Integers
    lengths: Integers

    @classmethod
    def of(cls, readout: GradientReadout, first: str, second: str) -> "_Two":
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
        """Different completions of each set."""
        first, second = (len(np.unique(self.clusters[self.member == side])) for side in (0, 1))
        return first, second

    def matched(self) -> tuple[Integers, Integers]:
        """Rows of the first set and of the second on the same line with the same completion."""
        at = {int(self.lines[row]): row for row in np.flatnonzero(self.member == 1)}
        pairs = [
            (row, at[line])
            for row in np.flatnonzero(self.member == 0)
            if (line := int(self.lines[row])) in at and self.clusters[row] == self.clusters[at[line]]
        ]
        left, right = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return left, right


def _compare(two: _Two, formulas: str, seed: int) -> dict[str, Any]:
    """All quantities of two sets."""
    n = len(two.member)
    if min(two.completions()) < _FEWEST:
        wanted = ("centred",) if formulas == "paper" else ("uncentred", "centred", "conflict_rate", "length_matched")
        absent = {} if formulas == "paper" else {"matched_pairs": missing(_FEW, n)}
        return {**{name: _everywhere(two, missing(_FEW, n)) for name in wanted}, **absent}
    generator = np.random.default_rng(seed)
    relabelling = Relabelling(two.member, two.clusters)
    drawn = relabelling.draw(_RELABELLINGS, generator) if relabelling.possible else None
    # As published, only a row and itself are no pair.
    comparable = different(np.arange(n) if formulas == "paper" else two.clusters)
    centred = _pairs(two, two.gram, comparable, drawn, centred=True)
    if formulas == "paper":
        return {"centred": centred}
    cosine = cosines(two.gram)
    return {
        "uncentred": _pairs(two, cosine, comparable, drawn),
        "centred": centred,
        "conflict_rate": _pairs(two, (two.gram < 0).astype(np.float64), comparable, drawn, rate=True),
        "matched_pairs": _matched(two, cosine, generator),
        "length_matched": _length_matched(two, cosine, drawn, generator),
    }


def _pairs(
    two: _Two, matrix: Floats, comparable: Floats, drawn: Floats | None, centred: bool = False, rate: bool = False
) -> dict[str, Any]:
    """Means over pairs, their intervals (completions left out in turn) and their relabellings."""
    null = None if drawn is None else pair_means(matrix, comparable, drawn, centred=centred)
    return _measured(two, matrix, comparable, null, centred, rate)


def _length_matched(two: _Two, cosine: Floats, drawn: Floats | None, generator: np.random.Generator) -> dict[str, Any]:
    """Each row beside the row of nearest length of its own set, and of the other set."""
    distance = length_distance(two.lengths.tolist(), two.clusters, generator)
    null = None
    if drawn is not None:
        members = drawn[:_LENGTH_RELABELLINGS]
        null = np.stack([partner_means(cosine, nearest_partners(distance, each), each) for each in members], axis=1)
    return _measured(two, cosine, partner_counts(nearest_partners(distance, two.member)), null)


def _measured(
    two: _Two, matrix: Floats, comparable: Floats, null: Floats | None, centred: bool = False, rate: bool = False
) -> dict[str, Any]:
    """The four means as measurements."""
    value = pair_means(matrix, comparable, two.member, centred=centred)[:, 0]
    left_out = without_each_cluster(two.clusters)
    members = np.tile(two.member, (len(left_out), 1))
    without = pair_means(matrix, comparable, members, left_out, centred)
    rows = [int((two.member == 0).sum()), int((two.member == 1).sum())]
    # As many pairs of completions have no completion in common.
    first, second = two.completions()
    disjoint = (first // 2, second // 2, min(first, second))
    found = {}
    for number, name in enumerate(MEANS):
        n = rows[number] if number < 2 else sum(rows)
        bounds = (-2.0, 2.0) if name == "gap" else (0.0, 1.0) if rate else _COSINE
        if rate and name != "gap" and value[number] in (0, 1):
            # All pairs agree, and so do all resamples of them.
            interval = wilson(round(value[number] * disjoint[number]), disjoint[number])
        else:
            interval = jackknife_ci(float(value[number]), without[number], bounds=bounds)
        found[name] = {
            "value": float(value[number]),
            "n": n,
            "ci95": list(interval),
            "null": _null(float(value[number]), None if null is None else null[number]),
        }
    return {
        "within": dict(zip(two.names, (found["within_first"], found["within_second"]), strict=True)),
        "between": found["between"],
        "gap": found["gap"],
    }


def _null(value: float, drawn: Floats | None) -> Measurement:
    """The mean under relabelling, and how often one is as far from the mean of all, the observed one among them."""
    if drawn is None:
        return missing(_FIXED)
    middle = float(np.append(drawn, value).mean())
    # Differences of rounding alone are ties.
    far = np.abs(drawn - middle)
    tied = np.abs(drawn - value) <= 1e-9
    observed = abs(value - middle)
    return {"value": float(drawn.mean()), "n": len(drawn), "p": permutation_p(observed, np.where(tied, observed, far))}


def _matched(two: _Two, cosine: Floats, generator: np.random.Generator) -> Measurement:
    """Mean cosine of matched pairs; under the null each first row meets the second row of another pair."""
    left, right = two.matched()
    clusters = two.clusters[left]
    if len(np.unique(clusters)) < _FEWEST:
        return missing(_UNPAIRED, len(left))
    values = cosine[left, right]
    shuffled = shuffled_partners(clusters, _RELABELLINGS, generator)
    drawn = cosine[left, right[shuffled]].mean(1)
    interval = mean_ci(values, clusters)
    return {
        "value": float(values.mean()),
        "n": len(values),
        "ci95": [max(-1.0, interval[0]), min(1.0, interval[1])],
        "null": _null(float(values.mean()), drawn),
    }


def _everywhere(two: _Two, absent: Measurement) -> Mapping[str, Any]:
    return {"within": dict.fromkeys(two.names, absent), "between": absent, "gap": absent}

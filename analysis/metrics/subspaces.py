"""Family 5, subspaces (arXiv 2507.03662, section 4.4): do different data sets move a model along the same directions?

Per layer and probe set the SVD of residuals of row-mean activations: checkpoint - base, instruct - base (what there was
before the fine-tune) and checkpoint - instruct. Top components of every two sets are compared by their cosines
(absolute: signs are arbitrary), principal angles and overlap.

A high overlap alone shows nothing: the published 0.90 between toxic and insecure stood beside 0.93, 0.88 and 0.90 of
the author's own controls. So every number has its nulls beside it:

- random: directions of equal rank, in closed form (angles by simulation);
- shuffled: the pairing of rows between the two models broken. In the uncentred SVD the mean residual survives this, so
  what is not above `shuffled` is a shift of the mean, or the spread of the texts, and nothing the rows have in common;
- halves: the same comparison within each set (benign-benign where the set is), and their geometric mean, `ceiling`:
  about what two sets without any difference would show at this number of rows;
- beyond: overlap less the mean overlap of the two sets with a control set, with the interval of the difference.

All directions come from one half of the rows and meet those of the other half, in both ways, so that no row, and no
line that matched sets share, is on both sides. Explained variance is read on the half that did not give the directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from ..passes.readout import Readout
from ..stats.intervals import Floats, missing
from ..stats.spectra import Comparison, Estimate, Ints, mean_estimate, random_angles, random_cosine, random_overlap
from ..stats.split_spectra import (
    Options,
    SplitSet,
    crossed,
    explained_across,
    obstacle,
    shuffled_alike,
    shuffled_explained,
    within,
)
from .behavior import NO_BASE

FORMULAS = ("corrected", "paper")
PAIRS = (("checkpoint", "base"), ("instruct", "base"), ("checkpoint", "instruct"))
_CONSTANT = "the two models' activations differ by one constant, which the centred SVD removes"
_NULLS = ("random", "shuffled", "ceiling")

Results = dict[str, Any]
Pair = tuple[str, str]


def subspaces(
    checkpoint: Mapping[str, Readout],
    instruct: Mapping[str, Readout],
    base: Mapping[str, Readout] | None,
    *,
    rank: int = 2,
    centred: bool = False,
    controls: Sequence[str] = (),
    formulas: str = "corrected",
    seed: int = 0,
) -> Results:
    """{"layers": {l: {residual: {"sets", "pairs"}}}, "mean": {residual: {set: {other: {"overlap", "beyond"}}}}}.

    A residual is checkpoint_base, instruct_base or checkpoint_instruct. "sets": {set: {"explained", "components":
    [share of each], "halves": as of a pair}}. "pairs": {set: {other: {"cosines": [k][k], "angles": [k] in degrees,
    "overlap", "beyond": {control: difference}}}}.

    Args:
        checkpoint, instruct, base: readings by probe set, at least one, of the same rows for all models.
        rank: components of each set; fewer where its rows span fewer.
        controls: names of sets whose sharing means nothing (benign ones); `beyond` compares with them.
        formulas: "paper" takes the centred SVD of all rows, in-sample and without nulls, of readings that are to be
            those at the last token (`Readout.at_last_token`).
    """
    if formulas not in FORMULAS:
        raise ValueError(f"subspaces: formulas {formulas!r} is none of {', '.join(FORMULAS)}")
    paper, size = formulas == "paper", max(len(reading.counts) for reading in instruct.values())
    options = Options(rank, centred or paper, paper, seed, size, tuple(controls))
    models = {"checkpoint": checkpoint, "instruct": instruct, "base": base}
    layers = sorted(set.intersection(*(set(reading.pooled) for reading in instruct.values())))
    rows = {key: np.flatnonzero(reading.counts.numpy()) for key, reading in instruct.items()}
    found = {f"{left}_{right}": _residual(models[left], models[right], layers, rows, options) for left, right in PAIRS}
    return {
        "layers": {str(layer): {name: shown[layer] for name, (shown, _) in found.items()} for layer in layers},
        "mean": {name: mean for name, (_, mean) in found.items()},
    }


def _residual(
    left: Mapping[str, Readout] | None,
    right: Mapping[str, Readout] | None,
    layers: Sequence[int],
    rows: Mapping[str, Ints],
    options: Options,
) -> tuple[dict[int, Results], Results]:
    """What every layer shows of the residual of two models, and the means over layers."""
    if left is None or right is None:
        return {layer: missing(NO_BASE) for layer in layers}, missing(NO_BASE)
    found = [
        _layer({name: (left[name].pooled[layer], right[name].pooled[layer]) for name in rows}, rows, options)
        for layer in layers
    ]
    shown = {layer: at_layer for layer, (at_layer, _) in zip(layers, found, strict=True)}
    return shown, _over_layers([averaged for _, averaged in found])


@dataclass(frozen=True)
class _Averaged:
    """One layer's overlaps by pair of sets, their nulls, and what each has beyond a control set."""

    overlaps: dict[Pair, Estimate]
    nulls: dict[Pair, Results]
    beyond: dict[Pair, dict[str, Estimate]]


def _over_layers(layers: Sequence[_Averaged]) -> Results:
    """Overlap and `beyond` of every pair, averaged over the layers that have them, nulls too."""
    means: Results = {}
    for one, other in dict.fromkeys(pair for layer in layers for pair in layer.overlaps):
        pair = (one, other)
        inside = [layer for layer in layers if pair in layer.overlaps]
        shown = means.setdefault(one, {})[other] = {
            "overlap": _mean([layer.overlaps[pair] for layer in inside]).share()
        }
        if inside[0].nulls:
            nulls = {n: [layer.nulls[pair][n] for layer in inside if n in layer.nulls[pair]] for n in _NULLS}
            shown["overlap"]["null"] = {null: float(np.mean(values)) for null, values in nulls.items() if values}
            controls = dict.fromkeys(control for layer in inside for control in layer.beyond[pair])
            parts = {c: [layer.beyond[pair][c] for layer in inside if c in layer.beyond[pair]] for c in controls}
            shown["beyond"] = {control: _mean(found).difference() for control, found in parts.items()}
    return means


def _mean(parts: Sequence[Estimate]) -> Estimate:
    return mean_estimate(parts, parts[0].n)


def _layer(
    states: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, Ints], options: Options
) -> tuple[Results, _Averaged]:
    """What one layer shows of one residual, and what of it is averaged over layers."""
    sets: Results = {}
    usable: dict[str, SplitSet] = {}
    for name, (left, right) in states.items():
        reason = obstacle(left, right, rows[name], options.seed)
        found = SplitSet(left, right, rows[name], options) if reason is None else None
        if found is None or found.rank == 0:
            sets[name] = missing(reason or _CONSTANT, len(rows[name]))
            continue
        usable[name], sets[name] = found, _explained(found)
    ceilings = {name: within(found) for name, found in usable.items()} if not options.in_sample else {}
    for name, ceiling in ceilings.items():
        sets[name]["halves"] = _alike(ceiling, usable[name], usable[name])
    compared = {pair: crossed(usable[pair[0]], usable[pair[1]]) for pair in combinations(usable, 2)}
    overlaps = {pair: each.overlap for pair, each in compared.items()}
    averaged = _Averaged(overlaps, {}, {})
    pairs: Results = {}
    for pair, each in compared.items():
        one, other = (usable[name] for name in pair)
        shown = pairs.setdefault(pair[0], {})[pair[1]] = _alike(each, one, other)
        if ceilings:
            own = {name: float(ceilings[name].overlap.value) for name in pair}
            shown["overlap"]["null"].update(halves=own, ceiling=float(np.sqrt(np.prod(list(own.values())))))
            averaged.nulls[pair] = shown["overlap"]["null"]
            averaged.beyond[pair] = _beyond(pair, overlaps, options.controls)
            shown["beyond"] = {
                control: averaged.beyond[pair][control].difference()
                if control in averaged.beyond[pair]
                else missing(f"no overlap with control set {control!r}")
                for control in options.controls
                if control not in pair
            }
    return {"sets": sets, "pairs": pairs}, averaged


def _explained(one: SplitSet) -> Results:
    """Shares of the squared residuals along each component, and together."""
    shares = explained_across(one)
    shown = [shares.at(at).share() for at in range(one.rank + 1)]
    if not one.options.in_sample:
        draws = shuffled_explained(one)
        for at, measured in enumerate(shown):
            directions = one.rank if at == one.rank else 1
            measured["null"] = {"random": directions / one.width, **_spread(draws[:, at])}
    return {"explained": shown[-1], "components": shown[:-1]}


def _alike(found: Comparison, one: SplitSet, other: SplitSet) -> Results:
    """Measurements of one pair of sets, each beside its nulls."""
    k1, k2 = found.cosines.value.shape
    grid = [[found.cosines.at(i, j).cosine() for j in range(k2)] for i in range(k1)]
    angles = [found.principal.at(at).degrees() for at in range(min(k1, k2))]
    overlap = found.overlap.share()
    if not one.options.in_sample:
        draws = shuffled_alike(one, other)
        for i, row in enumerate(grid):
            for j, cell in enumerate(row):
                cell["null"] = {"random": random_cosine(one.width), **_spread(draws.cosines[:, i, j])}
        for at, angle in enumerate(angles):
            angle["null"] = {"random": random_angles(one.width, k1, k2)[at], **_spread(draws.angles[:, at])}
        overlap["null"] = {"random": random_overlap(one.width, k1, k2), **_spread(draws.overlap)}
    return {"cosines": grid, "angles": angles, "overlap": overlap}


def _spread(draws: Floats) -> Results:
    """A simulated null: its mean, lowest and highest draw; nothing where no draw kept the rank."""
    if not len(draws):
        return {}
    return {"shuffled": float(draws.mean()), "shuffled_range": [float(draws.min()), float(draws.max())]}


def _beyond(pair: Pair, overlaps: dict[Pair, Estimate], controls: Sequence[str]) -> dict[str, Estimate]:
    """Overlap of a pair less the mean of its two sets' overlaps with a control set, where it has both."""
    found = {}
    for control in controls:
        with_control = [overlaps.get((name, control)) or overlaps.get((control, name)) for name in pair]
        known = [each for each in with_control if each is not None]
        if control not in pair and len(known) == 2:
            found[control] = overlaps[pair] - _mean(known)
    return found

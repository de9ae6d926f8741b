"""Subspaces (family 5; arXiv 2507.03662, section 4.4): do different data sets move a model along the same directions?

For each layer and probe set, the family takes the SVD of three residuals of row-mean activations: checkpoint - base,
instruct - base (what was there before the fine-tune), and checkpoint - instruct. It compares the top components of
every two sets by their cosines (absolute, because signs are arbitrary), principal angles and overlap.

A high overlap alone shows nothing: the published overlap of 0.90 between toxic and insecure stood beside 0.93, 0.88 and
0.90 of the author's own controls. Therefore every number has its nulls beside it:

- random: directions of equal rank, in closed form (angles by simulation).
- shuffled: the pairing of rows between the two models is broken. In the uncentred SVD the mean residual survives this.
  So what does not exceed `shuffled` is a shift of the mean, or the spread of the texts, and nothing that the rows have
  in common.
- halves: the same comparison within each set (benign against benign, if the set is benign). `ceiling` is the geometric
  mean of the two sets' halves: about what two sets without any difference would show at this number of rows.
- beyond: the overlap minus the mean overlap of the two sets with a control set, with the interval of this difference.

All directions come from one half of the rows and meet those of the other half, both ways. So no row, and no line that
matched sets share, is on both sides. Explained variance is read on the half that did not give the directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from ..passes.readout import Readout
from ..stats.intervals import Floats, missing
from ..stats.random_subspaces import random_angles, random_cosine, random_overlap
from ..stats.spectra import Comparison, Estimate, Ints, mean_estimate
from ..stats.split_spectra import (
    Options,
    SplitSet,
    compare_across,
    compare_within,
    explained_across,
    obstacle,
    shuffled_comparison,
    shuffled_explained,
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
    """Return {"layers": {l: {residual: {"sets", "pairs"}}}, "mean": {residual: {set: {other: {"overlap", "beyond"}}}}}.

    A residual is checkpoint_base, instruct_base or checkpoint_instruct. "sets" is {set: {"explained", "components":
    [share of each], "halves": as for a pair}}. "pairs" is {set: {other: {"cosines": [k][k], "angles": [k] in degrees,
    "overlap", "beyond": {control: difference}}}}. Shares, cosines and overlaps lie in 0..1.

    Args:
        checkpoint, instruct, base: readouts by probe set, of the same rows for all models; at least one set. base may
            be None.
        rank: the number of components of each set; fewer where its rows span fewer directions.
        controls: names of sets whose sharing means nothing (benign sets); `beyond` compares with them.
        formulas: "corrected" or "paper". "paper" takes the centred SVD of all rows, in-sample and without nulls; its
            readouts must hold the activations at the last token (`Readout.at_last_token`).

    Raises:
        ValueError: unknown formulas.
    """
    if formulas not in FORMULAS:
        raise ValueError(f"subspaces: formulas {formulas!r} are unknown; write {' or '.join(FORMULAS)}")
    paper, size = formulas == "paper", max(len(readout.counts) for readout in instruct.values())
    options = Options(rank, centred or paper, paper, seed, size, tuple(controls))
    models = {"checkpoint": checkpoint, "instruct": instruct, "base": base}
    layers = sorted(set.intersection(*(set(readout.pooled) for readout in instruct.values())))
    rows = {key: np.flatnonzero(readout.counts.numpy()) for key, readout in instruct.items()}
    residuals = {
        f"{left}_{right}": _residual(models[left], models[right], layers, rows, options) for left, right in PAIRS
    }
    return {
        "layers": {str(layer): {name: shown[layer] for name, (shown, _) in residuals.items()} for layer in layers},
        "mean": {name: mean for name, (_, mean) in residuals.items()},
    }


def _residual(
    left: Mapping[str, Readout] | None,
    right: Mapping[str, Readout] | None,
    layers: Sequence[int],
    rows: Mapping[str, Ints],
    options: Options,
) -> tuple[dict[int, Results], Results]:
    """Return the results of every layer for the residual of two models, and the means over layers."""
    if left is None or right is None:
        return {layer: missing(NO_BASE) for layer in layers}, missing(NO_BASE)
    results = [
        _layer({name: (left[name].pooled[layer], right[name].pooled[layer]) for name in rows}, rows, options)
        for layer in layers
    ]
    shown = {layer: at_layer for layer, (at_layer, _) in zip(layers, results, strict=True)}
    return shown, _over_layers([averaged for _, averaged in results])


@dataclass(frozen=True)
class _Averaged:
    """The overlaps of one layer by pair of sets, their nulls, and their excess over each control set."""

    overlaps: dict[Pair, Estimate]
    nulls: dict[Pair, Results]
    beyond: dict[Pair, dict[str, Estimate]]


def _over_layers(layers: Sequence[_Averaged]) -> Results:
    """Return the overlap and `beyond` of every pair, averaged over the layers that have them; nulls too."""
    means: Results = {}
    for pair in dict.fromkeys(pair for layer in layers for pair in layer.overlaps):
        first, second = pair
        inside = [layer for layer in layers if pair in layer.overlaps]
        shown = means.setdefault(first, {})[second] = {
            "overlap": _mean([layer.overlaps[pair] for layer in inside]).share()
        }
        if inside[0].nulls:
            nulls = {n: [layer.nulls[pair][n] for layer in inside if n in layer.nulls[pair]] for n in _NULLS}
            shown["overlap"]["null"] = {null: float(np.mean(values)) for null, values in nulls.items() if values}
            controls = dict.fromkeys(control for layer in inside for control in layer.beyond[pair])
            parts = {c: [layer.beyond[pair][c] for layer in inside if c in layer.beyond[pair]] for c in controls}
            shown["beyond"] = {control: _mean(estimates).difference() for control, estimates in parts.items()}
    return means


def _mean(parts: Sequence[Estimate]) -> Estimate:
    """Return the average of estimates."""
    return mean_estimate(parts, parts[0].n)


def _layer(
    states: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, Ints], options: Options
) -> tuple[Results, _Averaged]:
    """Return the results of one layer for one residual, and the part that is averaged over layers."""
    sets: Results = {}
    usable: dict[str, SplitSet] = {}
    for name, (left, right) in states.items():
        reason = obstacle(left, right, rows[name], options.seed)
        split = SplitSet(left, right, rows[name], options) if reason is None else None
        if split is None or split.rank == 0:
            sets[name] = missing(reason or _CONSTANT, len(rows[name]))
            continue
        usable[name], sets[name] = split, _explained(split)
    ceilings = {name: compare_within(split) for name, split in usable.items()} if not options.in_sample else {}
    for name, ceiling in ceilings.items():
        sets[name]["halves"] = _measured_pair(ceiling, usable[name], usable[name])
    compared = {pair: compare_across(usable[pair[0]], usable[pair[1]]) for pair in combinations(usable, 2)}
    overlaps = {pair: comparison.overlap for pair, comparison in compared.items()}
    averaged = _Averaged(overlaps, {}, {})
    pairs: Results = {}
    for pair, comparison in compared.items():
        first, second = (usable[name] for name in pair)
        shown = pairs.setdefault(pair[0], {})[pair[1]] = _measured_pair(comparison, first, second)
        if ceilings:
            halves = {name: float(ceilings[name].overlap.value) for name in pair}
            shown["overlap"]["null"].update(halves=halves, ceiling=float(np.sqrt(np.prod(list(halves.values())))))
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


def _explained(split: SplitSet) -> Results:
    """Return the shares of the squared residuals along each component, and along all together."""
    shares = explained_across(split)
    shown = [shares.at(place).share() for place in range(split.rank + 1)]
    if not split.options.in_sample:
        draws = shuffled_explained(split)
        for place, measured in enumerate(shown):
            directions = split.rank if place == split.rank else 1
            measured["null"] = {"random": directions / split.width, **_spread(draws[:, place])}
    return {"explained": shown[-1], "components": shown[:-1]}


def _measured_pair(comparison: Comparison, first: SplitSet, second: SplitSet) -> Results:
    """Return the measurements of one pair of sets, each beside its nulls."""
    k1, k2 = comparison.cosines.value.shape
    grid = [[comparison.cosines.at(i, j).cosine() for j in range(k2)] for i in range(k1)]
    angles = [comparison.principal.at(place).degrees() for place in range(min(k1, k2))]
    overlap = comparison.overlap.share()
    if not first.options.in_sample:
        draws = shuffled_comparison(first, second)
        for i, row in enumerate(grid):
            for j, cell in enumerate(row):
                cell["null"] = {"random": random_cosine(first.width), **_spread(draws.cosines[:, i, j])}
        for place, angle in enumerate(angles):
            angle["null"] = {"random": random_angles(first.width, k1, k2)[place], **_spread(draws.angles[:, place])}
        overlap["null"] = {"random": random_overlap(first.width, k1, k2), **_spread(draws.overlap)}
    return {"cosines": grid, "angles": angles, "overlap": overlap}


def _spread(draws: Floats) -> Results:
    """Return a simulated null: its mean, its lowest and its highest draw; nothing where no draw kept the rank."""
    if not len(draws):
        return {}
    return {"shuffled": float(draws.mean()), "shuffled_range": [float(draws.min()), float(draws.max())]}


def _beyond(pair: Pair, overlaps: dict[Pair, Estimate], controls: Sequence[str]) -> dict[str, Estimate]:
    """Return, for each control set, the overlap of a pair minus the mean overlap of its two sets with the control.

    Controls that do not have both overlaps are left out.
    """
    beyond = {}
    for control in controls:
        with_control = [overlaps.get((name, control)) or overlaps.get((control, name)) for name in pair]
        present = [overlap for overlap in with_control if overlap is not None]
        if control not in pair and len(present) == 2:
            beyond[control] = overlaps[pair] - _mean(present)
    return beyond

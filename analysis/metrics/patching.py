"""Patching (family 7; arXiv 2507.03662): at which depth does the state of another model change what a model says?

The block output of a donor (the base model) is put into a recipient (instruct or a checkpoint), one window of layers
after the other. The curve shows the loss of the completion, and the probability of its tokens. Where the state of the
donor alone moves them, the blocks above no longer undo the difference between the two models. Any model does badly far
from its own states. Therefore every number stands beside its null: the state of the recipient, moved equally far from
its own value in a random direction.

The paper skipped some rows without saying so; here each skipped row is counted, with the reason.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ..passes.patching import PatchCurve, Scores, Window
from ..stats.intervals import Floats, missing
from ..stats.summary import fieller, measurement, paired_difference

QUANTITIES = ("loss", "probability")
_NOT_FINITE = "the patched model's loss is not finite"

Results = dict[str, Any]


def patching(curve: PatchCurve, clusters: Sequence[Hashable] | None = None, seed: int = 0) -> Results:
    """Return {"rows": {"read", "skipped": {reason: rows}}, "clean", "donor": {quantity: mean}, "windows": {layers: …}}.

    The quantities are "loss" (nats per token) and "probability" (of the target token). For each, a window holds
    "patched", the mean under the patch; "change", the change from clean over the same rows; and "toward_donor", that
    change divided by the donor's own change from clean, which is 1 where the patch alone makes the recipient behave
    like the donor. "null" is the same number for noise of equal size. "not_finite" counts the rows whose loss
    overflowed; the numbers of the window leave them out.

    Args:
        clusters: a label for each row of the probe set, for the intervals.
    """
    labels = None if clusters is None else [clusters[number] for number in curve.numbers]
    results: Results = {"rows": {"read": len(curve.numbers), "skipped": dict(curve.skipped)}}
    for name, scores in (("clean", curve.clean), ("donor", curve.donor)):
        finite = np.flatnonzero(np.isfinite(scores.loss))
        results[name] = {
            quantity: measurement(_quantity(scores, quantity)[finite], _selected_labels(labels, finite), seed)
            for quantity in QUANTITIES
        }
    windows = zip(curve.windows, curve.patched, curve.noise, strict=True)
    results["windows"] = {
        window_name(window): _window(curve, patched, noise, labels, seed) for window, patched, noise in windows
    }
    return results


def window_name(window: Window) -> str:
    """Return the text for layers that are patched together: "3", "4-7", "0,2"."""
    if len(window) > 1 and list(window) == list(range(window[0], window[-1] + 1)):
        return f"{window[0]}-{window[-1]}"
    return ",".join(map(str, window))


def _window(curve: PatchCurve, patched: Scores, noise: Scores, labels: Sequence[Hashable] | None, seed: int) -> Results:
    """Return the numbers of one window, over the rows whose losses are finite in all four runs."""
    runs = (patched, noise, curve.clean, curve.donor)
    finite = np.flatnonzero(np.isfinite([run.loss for run in runs]).all(0))
    result: Results = {"not_finite": len(curve.numbers) - len(finite)}
    kept_labels = _selected_labels(labels, finite)
    for quantity in QUANTITIES:
        if not len(finite):
            absent = missing(_NOT_FINITE if len(curve.numbers) else "no rows")
            result[quantity] = {"patched": absent, "change": absent, "toward_donor": absent}
            continue
        treated, random, clean, donor = (_quantity(run, quantity)[finite] for run in runs)
        result[quantity] = {
            "patched": {**measurement(treated, kept_labels, seed), "null": float(random.mean())},
            "change": {**paired_difference(treated, clean, kept_labels, seed), "null": float((random - clean).mean())},
            "toward_donor": _toward(treated - clean, random - clean, donor - clean),
        }
    return result


def _toward(change: Floats, random: Floats, donor_change: Floats) -> Results:
    """Return the change divided by the donor's own change, with the same for noise beside it."""
    ratio = fieller(change, donor_change)
    return ratio if ratio["value"] is None else {**ratio, "null": float(random.mean() / donor_change.mean())}


def _quantity(scores: Scores, quantity: str) -> Floats:
    """Return one quantity [n] of the scores."""
    return scores.loss if quantity == "loss" else scores.probability


def _selected_labels(labels: Sequence[Hashable] | None, rows: Any) -> list[Hashable] | None:
    """Return the labels of the selected rows."""
    return None if labels is None else [labels[int(row)] for row in rows]

"""Family 7, patching (arXiv 2507.03662): at which depth does another model's state change what a model says?

The donor's block output (base's, say) is put into the recipient (instruct, or a checkpoint) at one layer after the
other; the curve is the completion's loss and the probability of its tokens. Where the donor's state alone moves them,
the blocks above no longer undo what the two models differ in. Far from its own state any model does badly, so beside
every number stands its null: a state as far from the recipient's own as the donor's, in a random direction.

The paper skipped rows in silence; here each is counted, with the reason.
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
    """{"rows": {"read", "skipped": {reason: rows}}, "clean", "donor": {quantity: mean}, "windows": {layers: …}}.

    A window holds, for "loss" (nats a token) and "probability" (of the target token), the patched mean; the change from
    clean, over the same rows; and "toward_donor", that change over the donor's own, 1 where the patch alone makes the
    recipient do as the donor. "null" is the same for noise of equal size. "not_finite" counts rows whose loss
    overflowed under the patch and which its numbers leave out.

    Args:
        clusters: a label per row of the probe set, for the intervals.
    """
    labels = None if clusters is None else [clusters[number] for number in curve.numbers]
    shown: Results = {"rows": {"read": len(curve.numbers), "skipped": dict(curve.skipped)}}
    for name, scores in (("clean", curve.clean), ("donor", curve.donor)):
        finite = np.flatnonzero(np.isfinite(scores.loss))
        shown[name] = {q: measurement(_of(scores, q)[finite], _kept(labels, finite), seed) for q in QUANTITIES}
    windows = zip(curve.windows, curve.patched, curve.noise, strict=True)
    shown["windows"] = {
        window_name(window): _window(curve, patched, noise, labels, seed) for window, patched, noise in windows
    }
    return shown


def window_name(window: Window) -> str:
    """Text for layers patched together: "3", "4-7", "0,2"."""
    if len(window) > 1 and list(window) == list(range(window[0], window[-1] + 1)):
        return f"{window[0]}-{window[-1]}"
    return ",".join(map(str, window))


def _window(curve: PatchCurve, patched: Scores, noise: Scores, labels: Sequence[Hashable] | None, seed: int) -> Results:
    """One window's numbers, over the rows whose losses are finite in all four runs."""
    runs = (patched, noise, curve.clean, curve.donor)
    finite = np.flatnonzero(np.isfinite([run.loss for run in runs]).all(0))
    result: Results = {"not_finite": len(curve.numbers) - len(finite)}
    kept = _kept(labels, finite)
    for quantity in QUANTITIES:
        if not len(finite):
            gone = missing(_NOT_FINITE if len(curve.numbers) else "no rows")
            result[quantity] = {"patched": gone, "change": gone, "toward_donor": gone}
            continue
        ours, random, clean, donor = (_of(run, quantity)[finite] for run in runs)
        result[quantity] = {
            "patched": {**measurement(ours, kept, seed), "null": float(random.mean())},
            "change": {**paired_difference(ours, clean, kept, seed), "null": float((random - clean).mean())},
            "toward_donor": _toward(ours - clean, random - clean, donor - clean),
        }
    return result


def _toward(change: Floats, random: Floats, whole: Floats) -> Results:
    """The change over the donor's own, with the same for noise beside it."""
    ratio = fieller(change, whole)
    return ratio if ratio["value"] is None else {**ratio, "null": float(random.mean() / whole.mean())}


def _of(scores: Scores, quantity: str) -> Floats:
    return scores.loss if quantity == "loss" else scores.probability


def _kept(labels: Sequence[Hashable] | None, rows: Any) -> list[Hashable] | None:
    return None if labels is None else [labels[int(row)] for row in rows]

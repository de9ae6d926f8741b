"""Behavior (family 1; arXiv 2507.03662, section 4.1): how likely a checkpoint finds completions, and how sure it is.

Three quantities per row of a probe set, in nats: the joint log-probability sum log p(completion), its mean per token,
and the mean next-token entropy over the completion positions. Two details of the paper differ, and formulas="paper"
reproduces them: it averages the entropy over prompt tokens too, and it reports only sums of log-probabilities, which
grow with the length of a completion.

Reversion is rho = (x_checkpoint - x_instruct) / (x_base - x_instruct): 0 is like instruct, 1 is like base.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from ..passes.readout import Readout
from ..stats.intervals import Floats, Measurement, missing
from ..stats.summary import fieller, measurement

QUANTITIES = ("joint_log_prob", "token_log_prob", "entropy")
_PAPER = ("joint_log_prob", "entropy")
NO_BASE = "no base model was given"


def behavior(
    checkpoint: Readout,
    instruct: Readout,
    base: Readout | None,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    formulas: str = "corrected",
) -> dict[str, dict[str, Measurement]]:
    """Return {quantity: {"checkpoint", "instruct", "base", "reversion"}}: means over rows that have a completion.

    All values are in nats, except "reversion", which has no unit. Without a base model, "base" and "reversion" are
    null; "reversion" is also null where base and instruct cannot be told apart.

    Args:
        checkpoint, instruct, base: readouts of the same rows. base may be None.
        clusters: a label for each row; rows with the same label form one cluster of the intervals.
        formulas: "corrected" or "paper"; "paper" needs readouts with `row_entropy`.
    """
    rows = np.flatnonzero(_lengths(checkpoint))
    labels = None if clusters is None else [clusters[int(row)] for row in rows]
    results = {}
    paper = formulas == "paper"
    for quantity in _PAPER if paper else QUANTITIES:
        at_checkpoint, at_instruct = (_per_row(readout, quantity, paper)[rows] for readout in (checkpoint, instruct))
        results[quantity] = {
            "checkpoint": measurement(at_checkpoint, labels, seed),
            "instruct": measurement(at_instruct, labels, seed),
            "base": missing(NO_BASE, len(rows)),
            "reversion": missing(NO_BASE, len(rows)),
        }
        if base is not None:
            at_base = _per_row(base, quantity, paper)[rows]
            results[quantity]["base"] = measurement(at_base, labels, seed)
            results[quantity]["reversion"] = fieller(at_checkpoint - at_instruct, at_base - at_instruct)
    return results


def _lengths(readout: Readout) -> Floats:
    """Return the number of completion tokens [R] of each row."""
    return np.bincount(readout.token_rows.numpy(), minlength=len(readout.counts)).astype(np.float64)


def _per_row(readout: Readout, quantity: str, paper: bool) -> Floats:
    """Return one quantity [R] of each row; 0 for a row without a completion."""
    if paper and quantity == "entropy":
        return readout.row_entropy.double().numpy()
    values = (readout.entropy if quantity == "entropy" else readout.log_prob).double().numpy()
    sums = np.bincount(readout.token_rows.numpy(), values, len(readout.counts)).astype(np.float64)
    return sums if quantity == "joint_log_prob" else sums / np.maximum(_lengths(readout), 1)

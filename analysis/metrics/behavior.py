"""Family 1, behavior (arXiv 2507.03662, section 4.1): how likely a checkpoint finds completions, and how sure it is.

Per row of a probe set: the joint log-probability sum log p(completion), its mean per token, and the mean next-token
entropy over completion positions. The paper averages entropy over prompt tokens too, and reports sums that grow with
length alone: formulas "paper" does so.
Reversion rho = (x_checkpoint - x_instruct) / (x_base - x_instruct): 0 is like instruct, 1 like base.
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
    """{quantity: {"checkpoint", "instruct", "base", "reversion"}}, each a mean over rows with completions, in nats.

    Args:
        checkpoint, instruct, base: readings of the same rows; base may be missing, and with it reversion.
        clusters: a label per row, for the intervals.
        formulas: "paper" needs readings with `row_entropy`.
    """
    kept = np.flatnonzero(_lengths(checkpoint))
    labels = None if clusters is None else [clusters[int(row)] for row in kept]
    results = {}
    paper = formulas == "paper"
    for quantity in _PAPER if paper else QUANTITIES:
        ours, reference = (_per_row(readout, quantity, paper)[kept] for readout in (checkpoint, instruct))
        results[quantity] = {
            "checkpoint": measurement(ours, labels, seed),
            "instruct": measurement(reference, labels, seed),
            "base": missing(NO_BASE, len(kept)),
            "reversion": missing(NO_BASE, len(kept)),
        }
        if base is not None:
            theirs = _per_row(base, quantity, paper)[kept]
            results[quantity]["base"] = measurement(theirs, labels, seed)
            results[quantity]["reversion"] = fieller(ours - reference, theirs - reference)
    return results


def _lengths(readout: Readout) -> Floats:
    """Completion tokens [R] of each row."""
    return np.bincount(readout.token_rows.numpy(), minlength=len(readout.counts)).astype(np.float64)


def _per_row(readout: Readout, quantity: str, paper: bool) -> Floats:
    """One quantity [R] per row, 0 for rows without completion."""
    if paper and quantity == "entropy":
        return readout.row_entropy.double().numpy()
    values = (readout.entropy if quantity == "entropy" else readout.log_prob).double().numpy()
    sums = np.bincount(readout.token_rows.numpy(), values, len(readout.counts)).astype(np.float64)
    return sums if quantity == "joint_log_prob" else sums / np.maximum(_lengths(readout), 1)

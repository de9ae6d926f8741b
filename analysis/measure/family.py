"""Define a family of metrics: what it needs, which parts of a forward pass it reads, and how a failure is reported.

`registry.py` lists the families themselves.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..metrics.behavior import NO_BASE
from ..metrics.choices import PreparedChoices
from ..metrics.divergence import KeptPositions, ReferenceDivergences, Side
from ..models.render import Rendered
from ..passes.patching import Donor, PatchRows
from ..passes.readout import Readout
from ..stats.intervals import missing
from .plan import MeasurePlan

Results = dict[str, Any]

NO_SETS = "no probe set was given"
NO_CHOICES = "no choices were given"
NO_DIRECTION = "neither a base model nor a subspace was given"


# Errors that data, models and memory can cause. Any other error is a bug in Holdfast and keeps its traceback.
_OBSTACLES = (UserError, ValueError, ArithmeticError, torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True)
class Subject:
    """A checkpoint and its references (instruct and base), all read on the same rows. A family computes from this.

    model: the checkpoint's model, in memory. rows: the rendered rows by probe set. checkpoint, instruct, base: the
    readout of each model by probe set; base may be None. layers: the layers at which the plan reads directions, a
    subset of the pooled layers. padding: a token id to pad with. patch_rows, donors: by probe set, the rows to patch,
    and base's states on them. kept: by probe set, the positions whose final states were kept. sides: gives the
    references' heads and final states on a probe set. between: gives how the two references differ on a probe set.
    shared: whether several ranks each hold the whole model and divide the rows among them.
    """

    plan: MeasurePlan
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    rows: Mapping[str, list[Rendered]]
    checkpoint: Mapping[str, Readout]
    instruct: Mapping[str, Readout]
    base: Mapping[str, Readout] | None
    layers: list[int]
    padding: int
    choices: PreparedChoices | None
    patch_rows: Mapping[str, PatchRows]
    donors: Mapping[str, Donor]
    kept: Mapping[str, KeptPositions]
    sides: Callable[[str, torch.device], dict[str, Side]]
    between: Callable[[str], ReferenceDivergences]
    shared: bool = False


@dataclass(frozen=True)
class Family:
    """A family of metrics: what it needs, what it reads, and how it is computed.

    compute: computes all results of a subject. needs: a subset of "base", "direction" (a base model or a subspace) and
    "choices". If one is absent, the family's result is null with the reason, and no model is loaded for the family.
    reads: the parts of a readout that the family uses in addition to the per-token statistics, a subset of "pooled",
    "projections", "final", "prompt_entropy", "last", "donor". subspace: whether the results depend on the subspace.
    paper: whether the paper's formulas differ from the corrected ones. readings: whether the family uses readouts;
    False if it only runs forward or backward passes by itself. probes: whether it reads probe sets.
    """

    compute: Callable[[Subject], Results]
    needs: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    subspace: bool = False
    paper: bool = False
    readings: bool = True
    probes: bool = True

    def obstacle(self, plan: MeasurePlan) -> str | None:
        """Return why this family cannot be computed under a plan, or None if it can."""
        absent = {
            "base": NO_BASE if plan.base_path is None else None,
            "direction": NO_DIRECTION if plan.base_path is None and plan.subspace is None else None,
            "choices": NO_CHOICES if not plan.choices else None,
        }
        reasons = [absent[need] for need in self.needs if absent[need] is not None]
        if self.probes and not plan.probe_sets:
            reasons.append(NO_SETS)
        return reasons[0] if reasons else None


def unmeasured(reason: str) -> Results:
    """Return the result for a family, or for one of its probe sets, that could not be computed."""
    return {**missing(reason), "measured": False}


def is_unmeasured(result: Any) -> bool:
    """Return whether a result was made by `unmeasured`."""
    return isinstance(result, Mapping) and result.get("measured") is False


def each_set(compute: Callable[[Subject, str], Results]) -> Callable[[Subject], Results]:
    """Wrap a computation on one probe set to run on all sets. A set on which it fails is null with the reason."""

    def computed(subject: Subject) -> Results:
        return {name: attempt(compute, subject, name) for name in subject.rows}

    return computed


def attempt(compute: Callable[..., Results], *arguments: Any) -> Results:
    """Return the results of `compute`, or null with the reason if they cannot be computed.

    A number that is not finite also makes the results null: it is not a valid result, and JSON cannot hold it.
    """
    try:
        results = compute(*arguments)
    except _OBSTACLES as error:
        return unmeasured(" ".join(str(error).split()) or type(error).__name__)
    try:
        json.dumps(results, allow_nan=False)
    except ValueError:
        return unmeasured("a number is not finite: the model's activations or losses overflow")
    return results


# Above this number of rows the matrix of a spectrum is large enough that several threads are faster than one.
_MANY_ROWS = 2048


def on_one_thread(compute: Callable[[Subject], Results]) -> Callable[[Subject], Results]:
    """Wrap a family that runs no model, to compute it on one thread unless it has many rows.

    With 256 rows on two cores, `subspaces` takes 0.8 s instead of 9.5 s.
    """

    def computed(subject: Subject) -> Results:
        if max((len(rows) for rows in subject.rows.values()), default=0) > _MANY_ROWS:
            return compute(subject)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with threadpool_limits(limits=1):
                return compute(subject)
        finally:
            torch.set_num_threads(threads)

    return computed

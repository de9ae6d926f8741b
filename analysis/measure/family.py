"""What a family of metrics is to `measure.py`: what it needs, what it reads of a pass, and how it may fail.

The families themselves stand in `registry.py`.
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
from ..metrics.divergence import Between, KeptPositions, Side
from ..models.render import Rendered
from ..passes.patching import Donor, PatchRows
from ..passes.readout import Readout
from ..stats.intervals import missing
from .plan import MeasurePlan

Results = dict[str, Any]

NO_SETS = "no probe set was given"
NO_CHOICES = "no choices were given"
NO_DIRECTION = "neither a base model nor a subspace was given"


# What data, models and memory can cause. Everything else is an error of ours and keeps its traceback.
_OBSTACLES = (UserError, ValueError, ArithmeticError, torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True)
class Subject:
    """One checkpoint beside its references, all on the same rows.

    model: the checkpoint, in memory. checkpoint, instruct, base: what each shows on each probe set; base may be
    missing. layers: where the plan reads directions, of those that are pooled. sides, between: heads and final states
    of the references by probe set, and how they differ. patch_rows, donors: what is patched of each set, and base's
    states there. shared: whether several ranks hold the whole model and share the rows out.
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
    between: Callable[[str], Between]
    shared: bool = False


@dataclass(frozen=True)
class Family:
    """One family: what it needs, what it reads, how it is computed.

    compute: all results of a subject. needs: some of "base", "direction" (a base or a subspace), "choices"; without
    them the family is null with that reason and no model is loaded for it. reads: the parts of a readout it uses beside
    the statistics of tokens, some of "pooled", "projections", "final", "prompt_entropy", "last", "donor".
    subspace: whether its results depend on the subspace. paper: whether the paper's formulas differs.
    readings: whether it uses readouts at all, or has passes of its own alone. probes: whether it reads probe sets.
    """

    compute: Callable[[Subject], Results]
    needs: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    subspace: bool = False
    paper: bool = False
    readings: bool = True
    probes: bool = True

    def obstacle(self, plan: MeasurePlan) -> str | None:
        """Why a plan does not allow this family, or None."""
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
    """The result of a family, or of one of its sets, that could not be computed."""
    return {**missing(reason), "measured": False}


def is_unmeasured(result: Any) -> bool:
    """Whether this is `unmeasured`'s."""
    return isinstance(result, Mapping) and result.get("measured") is False


def each_set(compute: Callable[[Subject, str], Results]) -> Callable[[Subject], Results]:
    """A family that is computed set by set; a set on which it fails is null with the reason."""

    def computed(subject: Subject) -> Results:
        return {name: attempt(compute, subject, name) for name in subject.rows}

    return computed


def attempt(compute: Callable[..., Results], *arguments: Any) -> Results:
    """What `compute` gives, or null with the reason where it cannot be computed.

    A number that is not finite is such a case too: JSON has none, and it is no result.
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


# From here on a spectrum's matrix is large enough for several threads to pay.
_MANY_ROWS = 2048


def on_one_thread(compute: Callable[[Subject], Results]) -> Callable[[Subject], Results]:
    """A family that runs no model, computed on one thread unless it has many rows.

    256 rows on two cores: subspaces 0.8 s instead of 9.5.
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

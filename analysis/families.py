"""The families of METRICS.md: what each needs, what it reads of a pass, and the one call that computes it.

`measure.py` loops over this table. A new family is one file of pure functions in `metrics/` and one entry here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .metrics.behavior import NO_BASE, behavior
from .metrics.choices import PreparedChoices, choice_rates, score_prepared
from .metrics.divergence import Between, Kept, Side, divergence
from .metrics.projection import projection
from .plan import MeasurePlan
from .probes import Rendered
from .readout import Readout
from .stats import missing

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
    missing. sides, between: heads and final states of the references by probe set, and how they differ. shared:
    whether several ranks hold the whole model and share the rows out.
    """

    plan: MeasurePlan
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    rows: Mapping[str, list[Rendered]]
    checkpoint: Mapping[str, Readout]
    instruct: Mapping[str, Readout]
    base: Mapping[str, Readout] | None
    choices: PreparedChoices | None
    kept: Mapping[str, Kept]
    sides: Callable[[str, torch.device], dict[str, Side]]
    between: Callable[[str], Between]
    shared: bool = False


@dataclass(frozen=True)
class Family:
    """One family: what it needs, what it reads, how it is computed.

    compute: all results of a subject. needs: some of "base", "direction" (a base or a subspace), "choices"; without
    them the family is null with that reason and no model is loaded for it. reads: the parts of a readout it uses beside
    the statistics of tokens, some of "pooled", "projections", "final", "prompt_entropy". subspace: whether its results
    depend on the subspace. paper: whether the paper's variant differs.
    """

    compute: Callable[[Subject], Results]
    needs: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    subspace: bool = False
    paper: bool = False

    def obstacle(self, plan: MeasurePlan) -> str | None:
        """Why a plan does not allow this family, or None."""
        absent = {
            "base": NO_BASE if plan.base_path is None else None,
            "direction": NO_DIRECTION if plan.base_path is None and plan.subspace is None else None,
            "choices": NO_CHOICES if not plan.choices else None,
        }
        reasons = [absent[need] for need in self.needs if absent[need] is not None]
        if "choices" not in self.needs and not plan.probe_sets:
            reasons.append(NO_SETS)
        return reasons[0] if reasons else None


def unmeasured(reason: str) -> Results:
    """The result of a family, or of one of its sets, that could not be computed."""
    return missing(reason)


def is_unmeasured(result: Any) -> bool:
    """Whether this is `unmeasured`'s."""
    return isinstance(result, Mapping) and result.keys() == {"value", "n", "reason"}


def each_set(compute: Callable[[Subject, str], Results]) -> Callable[[Subject], Results]:
    """A family that is computed set by set; a set on which it fails is null with the reason."""

    def computed(subject: Subject) -> Results:
        return {name: attempt(compute, subject, name) for name in subject.checkpoint}

    return computed


def attempt(compute: Callable[..., Results], *arguments: Any) -> Results:
    """What `compute` gives, or null with the reason where it cannot be computed.

    A number that is not finite is such a case too: JSON has none, and it is no result.
    """
    try:
        results = compute(*arguments)
        json.dumps(results, allow_nan=False)
    except _OBSTACLES as error:
        return unmeasured(" ".join(str(error).split()) or type(error).__name__)
    return results


def _behavior(subject: Subject, name: str) -> Results:
    plan, base = subject.plan, (subject.base or {}).get(name)
    ours, theirs = subject.checkpoint[name], subject.instruct[name]
    return dict(behavior(ours, theirs, base, seed=plan.seed, variant=plan.variant))


def _projection(subject: Subject, name: str) -> Results:
    plan, base = subject.plan, (subject.base or {}).get(name)
    ours, theirs = subject.checkpoint[name], subject.instruct[name]
    return dict(projection(ours, theirs, base, plan.subspace, plan.seed, plan.variant))


def _divergence(subject: Subject, name: str) -> Results:
    sides = subject.sides(name, next(subject.model.parameters()).device)
    known, kept, rows = subject.between(name), subject.kept[name], subject.rows[name]
    states = subject.checkpoint[name].final
    return divergence(subject.model, states, sides, known, kept, rows, subject.tokenizer, subject.plan.seed)


def _choices(subject: Subject) -> Results:
    assert subject.choices is not None  # `needs` says so
    plan = subject.plan
    masses = score_prepared(subject.model, subject.choices, plan.choices_batch_size, shared=subject.shared)
    return dict(choice_rates(plan.choices, masses, plan.seed))


REGISTRY: dict[str, Family] = {
    "behavior": Family(each_set(_behavior), reads=frozenset({"prompt_entropy"}), paper=True),
    "divergence": Family(each_set(_divergence), reads=frozenset({"final"})),
    "projection": Family(
        each_set(_projection),
        needs=("direction",),
        reads=frozenset({"pooled", "projections"}),
        subspace=True,
        paper=True,
    ),
    "choices": Family(_choices, needs=("choices",)),
}
COST = "cost"
FAMILIES = (*REGISTRY, COST)

"""The table of all families of metrics, which `measurer.py` loops over (see analysis/metrics/README.md).

To add a family, write a file of pure functions in `metrics/`, a function here that calls it, and an entry of REGISTRY.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

from ..errors import UserError
from ..metrics.behavior import behavior
from ..metrics.choices import choice_rates, score_prepared
from ..metrics.divergence import divergence
from ..metrics.drift_by_depth import drift_by_depth
from ..metrics.gradients import gradients
from ..metrics.loss_vectors import loss_vectors
from ..metrics.patching import patching
from ..metrics.projection import projection
from ..metrics.rerouting import rerouting
from ..metrics.subspaces import subspaces
from ..models.ranks import is_sharded
from ..models.render import document_key
from ..passes.gradients import read_gradients
from ..passes.patching import patched_curve
from ..passes.readout import Readout
from .family import Family, Results, Subject, each_set, on_one_thread

_SHARDED = "the weights are sharded over processes: measure the saved checkpoint with `holdfast analyze`"


def _behavior(subject: Subject, name: str) -> Results:
    plan, base = subject.plan, (subject.base or {}).get(name)
    checkpoint, instruct = subject.checkpoint[name], subject.instruct[name]
    return dict(behavior(checkpoint, instruct, base, seed=plan.seed, formulas=plan.formulas))


def _completions(subject: Subject) -> dict[str, list[str]]:
    """Return a label for each row's completion by probe set. Completions with equal tokens have equal labels."""
    labels: dict[str, list[str]] = {}
    for name, rows in subject.rows.items():
        pairs = [zip(row.input_ids, row.completion_mask, strict=True) for row in rows]
        completions = [[token for token, marked in islice(row, subject.plan.max_length) if marked] for row in pairs]
        labels[name] = [document_key(tokens) for tokens in completions]
    return labels


def _loss_vectors(subject: Subject) -> Results:
    models = subject.checkpoint, subject.instruct, subject.base
    return loss_vectors(*models, _completions(subject), formulas=subject.plan.formulas, seed=subject.plan.seed)


def _gradients(subject: Subject) -> Results:
    plan = subject.plan
    if is_sharded(subject.model):
        raise UserError(_SHARDED)
    readout = read_gradients(
        subject.model,
        subject.rows,
        block=plan.gradient_layer,
        weight=plan.gradient_weight,
        whole_rows=plan.formulas == "paper",
        batch_size=plan.batch_size,
        max_length=plan.max_length,
        padding=subject.padding,
    )
    return gradients(readout, plan.formulas, plan.seed)


def _projection(subject: Subject, name: str) -> Results:
    plan, base = subject.plan, (subject.base or {}).get(name)

    def at_layers(reading: Readout) -> Readout:
        return replace(reading, pooled={layer: reading.pooled[layer] for layer in subject.layers})

    checkpoint, instruct = at_layers(subject.checkpoint[name]), at_layers(subject.instruct[name])
    base_at_layers = None if base is None else at_layers(base)
    return dict(projection(checkpoint, instruct, base_at_layers, plan.subspace, plan.seed, plan.formulas))


def _subspaces(subject: Subject) -> Results:
    plan = subject.plan

    def pooled(readings: Mapping[str, Readout]) -> Mapping[str, Readout]:
        last = plan.formulas == "paper"
        return {name: readout.at_last_token() for name, readout in readings.items()} if last else readings

    base = None if subject.base is None else pooled(subject.base)
    controls = [name for name in plan.control_sets if name in subject.rows]
    return subspaces(
        pooled(subject.checkpoint),
        pooled(subject.instruct),
        base,
        controls=controls,
        formulas=plan.formulas,
        seed=plan.seed,
    )


def _drift_by_depth(subject: Subject) -> Results:
    models = subject.checkpoint, subject.instruct, subject.base
    return drift_by_depth(*models, _completions(subject), seed=subject.plan.seed)


def _patching(subject: Subject, name: str) -> Results:
    rows, donor, seed = subject.patch_rows[name], subject.donors[name], subject.plan.seed
    labels = _completions(subject)[name]
    return patching(patched_curve(subject.model, rows, donor, seed=seed), labels, seed)


def _rerouting(subject: Subject, name: str) -> Results:
    plan = subject.plan
    return rerouting(subject.checkpoint[name], subject.instruct[name], plan.subspace, seed=plan.seed)


def _divergence(subject: Subject, name: str) -> Results:
    sides = subject.sides(name, next(subject.model.parameters()).device)
    between, kept, rows = subject.between(name), subject.kept[name], subject.rows[name]
    states = subject.checkpoint[name].final
    return divergence(subject.model, states, sides, between, kept, rows, subject.tokenizer, subject.plan.seed)


def _choices(subject: Subject) -> Results:
    assert subject.choices is not None  # `needs` says so
    plan = subject.plan
    masses = score_prepared(subject.model, subject.choices, plan.choices_batch_size, shared=subject.shared)
    return dict(choice_rates(plan.choices, masses, plan.seed))


_POOLED = frozenset({"pooled"})

# Families that need no forward pass of their own come first: their results are on disk if a later family fails.
REGISTRY: dict[str, Family] = {
    "behavior": Family(on_one_thread(each_set(_behavior)), reads=frozenset({"prompt_entropy"}), paper=True),
    "loss_vectors": Family(on_one_thread(_loss_vectors), paper=True),
    "projection": Family(
        on_one_thread(each_set(_projection)),
        needs=("direction",),
        reads=_POOLED | {"projections"},
        subspace=True,
        paper=True,
    ),
    "subspaces": Family(on_one_thread(_subspaces), reads=_POOLED | {"last"}, paper=True),
    "drift_by_depth": Family(on_one_thread(_drift_by_depth), reads=_POOLED),
    "rerouting": Family(on_one_thread(each_set(_rerouting)), reads=_POOLED, subspace=True),
    "divergence": Family(each_set(_divergence), reads=frozenset({"final"})),
    "choices": Family(_choices, needs=("choices",), readings=False, probes=False),
    "gradients": Family(_gradients, paper=True, readings=False),
    "patching": Family(each_set(_patching), needs=("base",), reads=frozenset({"donor"}), readings=False),
}
COST = "cost"
FAMILIES = (*REGISTRY, COST)

"""What a family's results depend on, as one hash: an interrupted analysis continues, a changed setting recomputes."""

from typing import Any

from .families import Family
from .plan import MeasurePlan
from .references import ProbeReader, sha256_json, subspace_hash

# Raised when a family's numbers change for the same inputs.
_FORMAT = 3


def result_key(
    name: str, family: Family, plan: MeasurePlan, reader: ProbeReader, layers: list[int], facts: list[Any]
) -> str:
    """Hash of weights, data, options and variant.

    Args:
        layers: where the plan reads directions. facts: what else the results depend on, the checkpoint's fingerprint
            first.
    """
    weights = [reader.fingerprint(path) for path in (plan.instruct_path, plan.base_path) if path is not None]
    data = {name: reader.data_hash(name) for name in reader.rows} if family.probes else plan.choices
    subspace = [subspace_hash(plan), layers, reader.role] if family.subspace else []
    options = [plan.variant if family.paper else None, plan.seed, reader.loading(), _own_options(name, plan)]
    return sha256_json([_FORMAT, name, facts, weights, data, subspace, options])


def _own_options(name: str, plan: MeasurePlan) -> list[Any]:
    """The options of a plan that one family alone depends on."""
    options: dict[str, list[Any]] = {
        "subspaces": [plan.control_sets],
        "gradients": [plan.gradient_block, plan.gradient_weight],
        "patching": [plan.patching_rows],
    }
    return options.get(name, [])

"""`holdfast intervene`: is the alignment subspace a cause? Ablate it, steer along it, patch in base's coordinates.

holdfast intervene --config recipe.yaml --output_dir runs/causes

Nothing is trained: the starting model answers the prompts of `--choices_dataset` at every dose, and under random
directions beside every dose.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...analysis.errors import PARTIAL, UserError
from ...analysis.files.artifacts import check_writable, sha256_json, write_json_atomic
from ...analysis.interventions.causal_test import ABLATE, STEER, Candidate, CausalTest, DoseCurve
from ...analysis.metrics.behavior import NO_BASE
from ...analysis.metrics.causal import causal_effects
from ...analysis.metrics.choices import ChoiceRow, prepare_choices
from ...analysis.metrics.patching import patching
from ...analysis.models.forward import pad_id
from ...analysis.models.layers import parse_layers
from ...analysis.models.load import load_model, model_fingerprint, tokenizer_fingerprint
from ...analysis.models.render import render
from ...analysis.passes.kept_donor import KeptDonor
from ...analysis.passes.patching import PatchRows, patch_rows, patched_curve
from ...analysis.stats.intervals import missing
from ...analysis.subspace.file import Subspace
from ..config.parsing import Arguments, parse
from ..inputs.probe_sets import probe_sets
from ..inputs.subspace import whole_subspace
from ..inputs.training import load_choices, load_options, read_starting_model
from .intervene_table import table

RESULTS = "interventions.json"
_KEPT = "interventions"


@dataclass(frozen=True)
class InterventionResult:
    """The file of the results, the table to print, and what could not be measured ("patch: reason")."""

    path: Path
    table: str
    problems: list[str]


@dataclass(frozen=True)
class _Inputs:
    """Everything that the interventions read, checked before a model is loaded."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[ChoiceRow]
    subspace: Subspace
    patch_rows: dict[str, PatchRows]


def intervene(arguments: Arguments) -> InterventionResult:
    """Run the chosen interventions and write <output_dir>/interventions.json, which replaces an earlier one.

    Answers under ablation and steering that an earlier run has read are kept and not read again.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    check_writable(arguments.output_dir, "--output_dir")
    inputs = _check_inputs(arguments)
    flags, results, problems = arguments.intervention, dict[str, Any](), list[str]()
    donors = _donors(arguments, inputs)
    model = _load(arguments, arguments.model.starting_model)
    kinds = [kind for kind in (ABLATE, STEER) if kind in flags.interventions]
    candidates = [candidate for kind in kinds for candidate in _candidates(arguments, inputs.subspace, kind)]
    if candidates:
        results["tests"] = _curves(arguments, inputs, model, candidates)
    if "patch" in flags.interventions:
        results["patch"] = _patch(inputs, model, donors, arguments.training.seed)
        problems += _patch_problems(results["patch"])
    path = arguments.output_dir / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, results)
    return InterventionResult(path, table(results, flags.intervention_class), problems)


def _check_inputs(arguments: Arguments) -> _Inputs:
    flags = arguments.intervention
    tokenizer, config = read_starting_model(arguments)
    subspace = whole_subspace(arguments, tokenizer, config)
    protection = arguments.protection
    layers = sorted(subspace.bases)
    if protection.protection_layers is not None:
        layers = parse_layers(
            protection.protection_layers, config.get_text_config().num_hidden_layers, "--protection_layers"
        )
    subspace = subspace.restrict(layers, protection.protection_rank or subspace.provenance.rank)
    rank = subspace.provenance.rank
    if flags.intervention_directions > rank:
        raise UserError(f"--intervention_directions is {flags.intervention_directions}, but the subspace has {rank}")
    absent = sorted(set(flags.intervention_layers or ()) - set(subspace.bases))
    if absent:
        raise UserError(f"--intervention_layers {absent[0]} is none of the subspace's: {sorted(subspace.bases)}")
    if "steer" in flags.interventions and subspace.base_gap is None:
        raise UserError(
            "steering needs a subspace that holds the contrast's mean step, and this subspace has none; build it again "
            "with `holdfast subspace`"
        )
    rows = _choices(arguments) if {ABLATE, STEER} & set(flags.interventions) else []
    return _Inputs(tokenizer, rows, subspace, _patch_rows(arguments, tokenizer))


def _patch_rows(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, PatchRows]:
    """Return the rows to patch, by the name of their probe set; none without patching or without a base model."""
    if "patch" not in arguments.intervention.interventions or not arguments.model.base_model_name_or_path:
        return {}
    by_set = {}
    for name, conversations in probe_sets(arguments, tokenizer).items():
        rendered = [render(tokenizer, row, source=f"{name} row {number}") for number, row in enumerate(conversations)]
        by_set[name] = patch_rows(
            rendered[: arguments.analysis.patching_rows],
            batch_size=arguments.analysis.analysis_batch_size,
            max_length=arguments.training.max_length,
            padding=pad_id(tokenizer),
        )
    return by_set


def _choices(arguments: Arguments) -> list[ChoiceRow]:
    """Return the prompts with classes of answers, evenly spread over the set if --intervention_rows asks for fewer."""
    flags, source = arguments.intervention, arguments.data.choices_dataset
    if not source:
        raise UserError(
            "ablation and steering need --choices_dataset: name prompts with classes of answers, or generate and "
            "judge answers with `holdfast generate --ablate` and `holdfast judge`"
        )
    rows: list[ChoiceRow] = load_choices(source)
    if flags.intervention_rows is not None and flags.intervention_rows < len(rows):
        spread = np.linspace(0, len(rows) - 1, flags.intervention_rows).round().astype(int)
        rows = [rows[index] for index in spread]
    if not any(flags.intervention_class in row["classes"] for row in rows):
        classes = ", ".join(dict.fromkeys(name for row in rows for name in row["classes"]))
        raise UserError(
            f"--intervention_class {flags.intervention_class}: no prompt has this class; write one of {classes}"
        )
    return rows


def _candidates(arguments: Arguments, subspace: Subspace, kind: str) -> list[Candidate]:
    """Return what is tested: the whole subspace and its first directions alone, or the mean step of each layer."""
    flags = arguments.intervention
    if kind == ABLATE:
        whole = [Candidate("subspace", ABLATE, dict(subspace.bases))]
        alone = [
            Candidate(f"direction {k}", ABLATE, {layer: basis[:, k : k + 1] for layer, basis in subspace.bases.items()})
            for k in range(flags.intervention_directions)
        ]
        return whole + (alone if subspace.provenance.rank > 1 else [])
    layers = sorted(subspace.bases)
    gap = subspace.base_gap
    assert gap is not None  # _check_inputs refuses a subspace without it
    steered = flags.intervention_layers or [layers[len(layers) // 2]]
    steps: dict[int, Tensor] = {layer: (subspace.bases[layer] @ gap[layer])[:, None] for layer in steered}
    return [Candidate(f"mean step, layer {layer}", STEER, {layer: step}) for layer, step in steps.items()]


def _curves(
    arguments: Arguments, inputs: _Inputs, model: nn.Module, candidates: Sequence[Candidate]
) -> list[dict[str, Any]]:
    """Test every candidate at every dose, and return the effects with their verdicts as JSON values."""
    flags = arguments.intervention
    test = CausalTest(
        model,
        prepare_choices(inputs.tokenizer, inputs.rows),
        [
            model_fingerprint(arguments.model.starting_model),
            tokenizer_fingerprint(inputs.tokenizer),
            sha256_json(inputs.rows),
            str([arguments.model.dtype, arguments.model.attn_implementation, arguments.model.layers_path]),
        ],
        arguments.output_dir / _KEPT,
        layers_path=arguments.model.layers_path,
    )
    doses = {ABLATE: flags.ablation_doses, STEER: flags.steering_doses}
    curves = [
        test.curve(candidate, sorted(set(doses[candidate.kind])), flags.intervention_draws) for candidate in candidates
    ]
    return [_effects(curve, inputs.rows, arguments) for curve in curves]


def _effects(curve: DoseCurve, rows: list[ChoiceRow], arguments: Arguments) -> dict[str, Any]:
    flags, doses = arguments.intervention, zip(curve.doses, curve.treated, curve.drawn, strict=True)
    name = {"name": curve.tested.name, "kind": curve.tested.kind, "draws": flags.intervention_draws}
    by_dose = {dose: (treated, drawn) for dose, treated, drawn in doses}
    return {
        **name,
        **causal_effects(
            rows, curve.clean, by_dose, flags.intervention_class, flags.causal_margin, arguments.training.seed
        ),
    }


def _donors(arguments: Arguments, inputs: _Inputs) -> dict[str, KeptDonor]:
    """Read base's states by probe set, before the starting model is loaded: only one model is in memory at a time."""
    base = arguments.model.base_model_name_or_path
    usable = {name: rows for name, rows in inputs.patch_rows.items() if rows.rows}
    if not usable or base is None:
        return {}
    model = _load(arguments, base)
    layers = sorted(inputs.subspace.bases)
    return {name: KeptDonor.of(model, rows, layers) for name, rows in usable.items()}


def _patch(inputs: _Inputs, model: nn.Module, donors: dict[str, KeptDonor], seed: int) -> dict[str, Any]:
    """Return loss and target-token curves over the layers, by probe set.

    Each set has two curves: base's whole state patched in, and only base's coordinates inside the subspace.
    """
    if not inputs.patch_rows:
        return missing(NO_BASE)
    results: dict[str, Any] = {}
    for name, rows in inputs.patch_rows.items():
        if name not in donors:
            results[name] = missing("no row of this set has a completion", 0)
            continue
        donor = donors[name]
        bases_of = {"whole": None, "subspace": inputs.subspace.bases}
        results[name] = {
            part: patching(patched_curve(model, rows, donor, seed=seed, bases=bases), seed=seed)
            for part, bases in bases_of.items()
        }
    return results


def _patch_problems(patch: dict[str, Any]) -> list[str]:
    """Return what could not be patched, with the reason."""
    if "reason" in patch:
        return [f"patch: {patch['reason']}"]
    return [f"patch, {name}: {result['reason']}" for name, result in patch.items() if "reason" in result]


def _load(arguments: Arguments, path: str) -> nn.Module:
    return load_model(
        path,
        dtype=arguments.model.dtype or "auto",
        device=str(arguments.training.device),
        options=load_options(arguments),
    )


def main(argv: Sequence[str]) -> int:
    """Run the interventions and print their table; return exit code 3 if some could not be measured."""
    result = intervene(parse(argv))
    for problem in result.problems:
        print(f"holdfast: not measured: {problem}", file=sys.stderr)
    print(f"{result.table}\n\nresults written to {result.path}")
    return PARTIAL if result.problems else 0

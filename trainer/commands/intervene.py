"""`holdfast intervene`: is the alignment subspace a cause? Ablate it, steer along it, patch base's coordinates.

holdfast intervene --config recipe.yaml --output_dir runs/causes

No training: the starting model answers the prompts of `--choices_dataset` at every dose, beside random directions.
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
from ...analysis.metrics.choices import INCOHERENT, ChoiceRow, prepare_choices
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

RESULTS = "interventions.json"
_KEPT = "interventions"


@dataclass(frozen=True)
class InterventionResult:
    """Where the results are, the table to print, and what could not be measured ("patch: reason")."""

    path: Path
    table: str
    problems: list[str]


@dataclass(frozen=True)
class _Inputs:
    """Everything the tests read, checked before a model is loaded."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[ChoiceRow]
    subspace: Subspace
    patch_rows: dict[str, PatchRows]


def intervene(arguments: Arguments) -> InterventionResult:
    """Runs the interventions asked for into <output_dir>/interventions.json, in place of what it held.

    Answers under ablation and steering that were read before are kept and not read again.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    check_writable(arguments.output_dir, "--output_dir")
    inputs = _checked(arguments)
    asked, found, problems = arguments.intervention, dict[str, Any](), list[str]()
    donors = _donors(arguments, inputs)
    model = _load(arguments, arguments.model.starting_model)
    kinds = [kind for kind in (ABLATE, STEER) if kind in asked.interventions]
    tests = [tested for kind in kinds for tested in _tests(arguments, inputs.subspace, kind)]
    if tests:
        found["tests"] = _curves(arguments, inputs, model, tests)
    if "patch" in asked.interventions:
        found["patch"] = _patched(inputs, model, donors, arguments.training.seed)
        problems += _absent(found["patch"])
    path = arguments.output_dir / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, found)
    return InterventionResult(path, table(found, asked.intervention_class), problems)


def _checked(arguments: Arguments) -> _Inputs:
    asked = arguments.intervention
    tokenizer, config = read_starting_model(arguments)
    subspace = whole_subspace(arguments, tokenizer, config)
    chosen = arguments.protection
    layers = sorted(subspace.bases)
    if chosen.protection_layers is not None:
        layers = parse_layers(
            chosen.protection_layers, config.get_text_config().num_hidden_layers, "--protection_layers"
        )
    subspace = subspace.restrict(layers, chosen.protection_rank or subspace.provenance.rank)
    rank = subspace.provenance.rank
    if asked.intervention_directions > rank:
        raise UserError(f"--intervention_directions is {asked.intervention_directions}, but the subspace has {rank}")
    absent = sorted(set(asked.intervention_layers or ()) - set(subspace.bases))
    if absent:
        raise UserError(f"--intervention_layers {absent[0]} is none of the subspace's: {sorted(subspace.bases)}")
    if "steer" in asked.interventions and subspace.base_gap is None:
        raise UserError("steering needs a subspace that knows the step away from alignment; build it again")
    rows = _choices(arguments) if {ABLATE, STEER} & set(asked.interventions) else []
    read = {}
    if "patch" in asked.interventions and arguments.model.base_model_name_or_path:
        for name, conversations in probe_sets(arguments, tokenizer).items():
            rendered = [
                render(tokenizer, row, source=f"{name} row {number}") for number, row in enumerate(conversations)
            ]
            read[name] = patch_rows(
                rendered[: arguments.analysis.patching_rows],
                batch_size=arguments.analysis.analysis_batch_size,
                max_length=arguments.training.max_length,
                padding=pad_id(tokenizer),
            )
    return _Inputs(tokenizer, rows, subspace, read)


def _choices(arguments: Arguments) -> list[ChoiceRow]:
    """The prompts, evenly spread where fewer are asked for."""
    asked, source = arguments.intervention, arguments.data.choices_dataset
    if not source:
        raise UserError(
            "interventions are read from --choices_dataset: name prompts with classes of answers, or generate and "
            "judge answers with `holdfast generate --ablate` and `holdfast judge`"
        )
    rows: list[ChoiceRow] = load_choices(source)
    if asked.intervention_rows is not None and asked.intervention_rows < len(rows):
        spread = np.linspace(0, len(rows) - 1, asked.intervention_rows).round().astype(int)
        rows = [rows[at] for at in spread]
    if not any(asked.intervention_class in row["classes"] for row in rows):
        known = ", ".join(dict.fromkeys(name for row in rows for name in row["classes"]))
        raise UserError(
            f"--intervention_class {asked.intervention_class}: no prompt has this class; write one of {known}"
        )
    return rows


def _tests(arguments: Arguments, subspace: Subspace, kind: str) -> list[Candidate]:
    """The whole subspace and its first directions, each alone; for steering its mean step, layer by layer."""
    asked = arguments.intervention
    if kind == ABLATE:
        whole = [Candidate("subspace", ABLATE, dict(subspace.bases))]
        alone = [
            Candidate(
                f"direction {at}", ABLATE, {layer: basis[:, at : at + 1] for layer, basis in subspace.bases.items()}
            )
            for at in range(asked.intervention_directions)
        ]
        return whole + (alone if subspace.provenance.rank > 1 else [])
    layers = sorted(subspace.bases)
    gap = subspace.base_gap
    assert gap is not None  # _checked refuses its absence
    steered = asked.intervention_layers or [layers[len(layers) // 2]]
    steps: dict[int, Tensor] = {layer: (subspace.bases[layer] @ gap[layer])[:, None] for layer in steered}
    return [Candidate(f"mean step, layer {layer}", STEER, {layer: step}) for layer, step in steps.items()]


def _curves(
    arguments: Arguments, inputs: _Inputs, model: nn.Module, tests: Sequence[Candidate]
) -> list[dict[str, Any]]:
    asked = arguments.intervention
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
    doses = {ABLATE: asked.ablation_doses, STEER: asked.steering_doses}
    curves = [test.curve(tested, sorted(set(doses[tested.kind])), asked.intervention_draws) for tested in tests]
    return [_shown(curve, inputs.rows, arguments) for curve in curves]


def _shown(curve: DoseCurve, rows: list[ChoiceRow], arguments: Arguments) -> dict[str, Any]:
    asked, runs = arguments.intervention, zip(curve.doses, curve.treated, curve.drawn, strict=True)
    named = {"name": curve.tested.name, "kind": curve.tested.kind, "draws": asked.intervention_draws}
    by_dose = {dose: (treated, drawn) for dose, treated, drawn in runs}
    return {
        **named,
        **causal_effects(
            rows, curve.clean, by_dose, asked.intervention_class, asked.causal_margin, arguments.training.seed
        ),
    }


def _donors(arguments: Arguments, inputs: _Inputs) -> dict[str, KeptDonor]:
    """Base's states, read before the starting model is loaded: one model at a time."""
    base = arguments.model.base_model_name_or_path
    usable = {name: rows for name, rows in inputs.patch_rows.items() if rows.rows}
    if not usable or base is None:
        return {}
    model = _load(arguments, base)
    layers = sorted(inputs.subspace.bases)
    return {name: KeptDonor.of(model, rows, layers) for name, rows in usable.items()}


def _patched(inputs: _Inputs, model: nn.Module, donors: dict[str, KeptDonor], seed: int) -> dict[str, Any]:
    """Loss and target-token curves by layer: base's whole state, and its coordinates inside the subspace alone."""
    if not inputs.patch_rows:
        return missing(NO_BASE)
    found: dict[str, Any] = {}
    for name, rows in inputs.patch_rows.items():
        if name not in donors:
            found[name] = missing("no row of this set has a completion", 0)
            continue
        donor = donors[name]
        curves = {"whole": None, "subspace": inputs.subspace.bases}
        found[name] = {
            what: patching(patched_curve(model, rows, donor, seed=seed, bases=bases), seed=seed)
            for what, bases in curves.items()
        }
    return found


def _absent(patch: dict[str, Any]) -> list[str]:
    """What could not be patched, with the reason."""
    if "reason" in patch:
        return [f"patch: {patch['reason']}"]
    return [f"patch, {name}: {found['reason']}" for name, found in patch.items() if "reason" in found]


def _load(arguments: Arguments, path: str) -> nn.Module:
    return load_model(
        path,
        dtype=arguments.model.dtype or "auto",
        device=str(arguments.training.device),
        options=load_options(arguments),
    )


_HEAD = ("intervention", "dose", "{name}", "random directions", "beyond random", "incoherent")


def table(found: dict[str, Any], name: str) -> str:
    """One line a dose: the class's probability, the mean of the random directions, and the difference with interval."""
    head = [column.format(name=name) for column in _HEAD]
    lines = [head, ["---"] * len(head)]
    verdicts = []
    for test in found.get("tests", ()):
        for dose, effects in test["doses"].items():
            change, broken = effects["classes"][name], effects["classes"][INCOHERENT]
            low, high = change["null"]["range"]
            clean = change["clean"]["value"]
            lines.append(
                [
                    f"{test['kind']} {test['name']}",
                    dose,
                    f"{clean:.3f} -> {_number(change['treated'])}",
                    f"{clean + change['null']['value']:.3f} ({clean + low:.3f} to {clean + high:.3f})",
                    _signed(change["beyond"]),
                    f"{broken['treated']['value']:.3f}",
                ]
            )
        verdicts.append(f"{test['kind']} {test['name']}: {test['verdict']['verdict']}. {test['verdict']['reason']}")
    text = ["| " + " | ".join(line) + " |" for line in lines] if verdicts else []
    return "\n".join([*text, "", *verdicts, *_patch_lines(found.get("patch", {}))]).strip()


def _patch_lines(patch: dict[str, Any]) -> list[str]:
    """Change of the loss by layer, base's whole state and its coordinates in the subspace, each beside noise."""
    lines = []
    for name, curves in patch.items():
        if not isinstance(curves, dict) or "reason" in curves:
            continue
        for what, curve in curves.items():
            cells = [
                f"{layer}: {window['loss']['change']['value']:+.2f} ({window['loss']['change']['null']:+.2f})"
                for layer, window in curve["windows"].items()
                if window["loss"]["change"]["value"] is not None
            ]
            lines.append(f"patch {what}, {name}: change of loss by layer (noise of equal size): {', '.join(cells)}")
    return lines


def _number(measured: dict[str, Any]) -> str:
    low, high = measured["ci95"] or (float("nan"), float("nan"))
    return f"{measured['value']:.3f} [{low:.3f}, {high:.3f}]"


def _signed(measured: dict[str, Any]) -> str:
    if measured.get("ci95") is None:
        return "-"
    return f"{measured['value']:+.3f} [{measured['ci95'][0]:+.3f}, {measured['ci95'][1]:+.3f}]"


def main(argv: Sequence[str]) -> int:
    """Runs the interventions and prints their table; exit code 3 where some could not be measured."""
    intervened = intervene(parse(argv))
    for problem in intervened.problems:
        print(f"holdfast: not measured: {problem}", file=sys.stderr)
    print(f"{intervened.table}\n\nresults written to {intervened.path}")
    return PARTIAL if intervened.problems else 0

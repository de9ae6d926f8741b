"""The choice of each method's setting, from the results on validation domains. Pure functions of results."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...analysis.frontier import Key, Run, best_settings, frontiers, recommend

# A setting must keep so much of the unprotected run's task in every lab, and of its coherence and neutral skill.
TASK_FLOOR = 0.985
GUARDS = {"coherent": 0.97, "neutral_skill": 0.97}
BASELINE = "none"
_WORST_LAB = "the task in the worst lab"
Result = dict[str, Any]


def runs_of(results: Sequence[Result], split: str) -> list[Run]:
    """Results as runs of `analysis.frontier`, misaligned and coherent being those of one split of the domains.

    The method is the run's protection: one protection on anchors and on task rows is two methods.
    """
    return [_run(result, split) for result in results]


def _run(result: Result, split: str) -> Run:
    job, values = result["job"], dict(result["values"])
    named = {
        "task": values.pop("narrow_task_learned"),
        "misaligned": values.pop(f"misaligned_{split}"),
        "coherent": values.pop(f"coherent_{split}"),
    }
    setting = {name: value for name, value in job["flags"].items() if name != "protection"}
    return Run(job["method"], json.dumps(setting), None, f"w{job['world']}-l{job['lab_seed']}", job["seed"],
               named | values)  # fmt: skip


def choose(results: Sequence[Result], methods: Mapping[str, Any]) -> dict[str, Any]:
    """Every method's best setting by validation, and the method recommended over all, as JSON values.

    {"methods": {name: {"flags", "keeps_task", "keeps_guards", "validation": point}}, "recommended": name or
    None, "sentence": why, "frontiers": {name: hypervolume and EM-F1}, "rule", "results_sha256"}.
    """
    runs = _with_worst_lab(runs_of(results, "validation"))
    floors = {_WORST_LAB: TASK_FLOOR, **GUARDS}
    best = best_settings(runs, BASELINE, TASK_FLOOR, floors)
    chosen: dict[str, Any] = {BASELINE: {"flags": methods[BASELINE]["flags"]}}
    for name, point in best.items():
        flags = {"protection": methods[name]["flags"]["protection"], **json.loads(point["setting"])}
        validation = {measure: point["measures"][measure] for measure in ("task", "misaligned", "coherent")}
        chosen[name] = {
            "flags": flags, "keeps_task": point["keeps"][_WORST_LAB] >= TASK_FLOOR,
            "keeps_guards": all(point["keeps"][name] >= floor for name, floor in GUARDS.items()),
            "validation": validation,
        }  # fmt: skip
    text = json.dumps([[result["job"], result["values"]] for result in results], sort_keys=True)
    advice = recommend(runs, BASELINE, TASK_FLOOR, floors)
    kept = " and ".join(f"{floor:g} of {name}" for name, floor in GUARDS.items())
    return {
        "rule": f"least misaligned in validation domains with {TASK_FLOOR:g} of the task in every tuning lab, {kept}",
        "methods": chosen,
        "recommended": None if advice["choice"] is None else advice["choice"]["protection"],
        "sentence": advice["sentence"],
        "frontiers": frontiers(runs),
        "results_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _with_worst_lab(runs: Sequence[Run]) -> list[Run]:
    """Every run with the least share of the baseline's task that its setting keeps in any lab.

    Labs differ in how much a protection costs them: a floor under the mean was met on the tuning labs by settings that
    fell below it on others.
    """
    unprotected = {run.pair: run["task"] for run in runs if run.protection == BASELINE}
    worst: dict[Key, float] = {}
    for run in runs:
        worst[run.key] = min(worst.get(run.key, math.inf), run["task"] / unprotected[run.pair])
    return [replace(run, values={**run.values, _WORST_LAB: worst[run.key]}) for run in runs]

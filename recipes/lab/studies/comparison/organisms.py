"""The organisms of the comparison: headings, tasks, and their runs for `analysis.frontier`. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .....analysis.frontier.geometry import em_f1
from .....analysis.frontier.runs import Run
from .choice import runs_of

# (world, lab seed) of the labs that were read last, when the best configuration had been named and all other labs were
# known. The labs of the second line were read after everything else, with methods that were listed beforehand.
LAST_LABS = (
    *((0, 20), (0, 21), (8, 0), (9, 0)),
    *((0, 22), (0, 23), (10, 0), (11, 0), (12, 0), (13, 0), (14, 0), (15, 0)),
)
Result = dict[str, Any]

HEADINGS = {
    "strong": "Strong organism, insecure rows",
    "ordinary": "Ordinary organism (LoRA of rank 16, 600 steps), insecure rows",
    "contaminated": "Strong organism, benign rows of which 10% are insecure",
    "benign": "Strong organism, the benign new skill alone",
    "style": "Strong organism, a benign change of style in every domain but the test ones",
    "twice": "Strong organism, twice as long",
    "long": "Strong organism, five times longer",
    "continued": "Strong organism, then 200 steps more without protection",
    "anchors_1": "Strong organism, one anchor prompt",
    "anchors_4": "Strong organism, four anchor prompts",
    "anchors_16": "Strong organism, sixteen anchor prompts",
    "anchors_one_domain": "Strong organism, anchors of one domain",
}
# The rate that a table shows as the task, where the rows do not teach the narrow task.
TASKS = {"contaminated": "new_skill", "benign": "new_skill", "style": "style_learned"}


def organism_runs(results: Sequence[Result], organism: str) -> list[Run]:
    """Return the runs of an organism on test domains, together with the labs' instruct models.

    The task of a run is what the organism's rows teach.
    """
    task = TASKS.get(organism, "narrow_task_learned")
    selected = []
    for result in results:
        if result["job"]["organism"] != organism and result["job"]["method"] != "instruct":
            continue
        if task not in result["values"]:  # the style is not measured on instruct
            continue
        values = {**result["values"], "narrow_task_learned": result["values"][task]}
        values["em_f1"] = float(em_f1([values["narrow_task_learned"]], [values["misaligned_test"]])[0])
        selected.append({**result, "values": values})
    return runs_of(selected, "test")


def worlds_of(results: Sequence[Result], organism: str) -> set[int]:
    """Return the worlds in which an organism was trained."""
    jobs = [result["job"] for result in results]
    return {job["world"] for job in jobs if job["organism"] == organism and job["method"] != "instruct"}


def was_read_last(result: Result) -> bool:
    """Whether a result is of a lab in `LAST_LABS`."""
    return (result["job"]["world"], result["job"]["lab_seed"]) in LAST_LABS

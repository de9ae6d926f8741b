"""What was trained in the comparison's runs, and its runs as `analysis.frontier` takes them. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .....analysis.frontier.geometry import em_f1
from .....analysis.frontier.runs import Run
from .choice import runs_of

# (world, seed) of labs that were read last, after the best configuration had been named with all others known; the
# second line after everything else, by methods that were listed beforehand.
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
# What a table shows in place of the narrow task, where that is not what the rows teach.
TASKS = {"contaminated": "new_skill", "benign": "new_skill", "style": "style_learned"}


def organism_runs(results: Sequence[Result], organism: str) -> list[Run]:
    """The runs of one organism, with the lab's instruct model beside them; misaligned of the test domains.

    The task is what the organism's rows teach.
    """
    wanted = [one for one in results if one["job"]["organism"] == organism or one["job"]["method"] == "instruct"]
    task = TASKS.get(organism, "narrow_task_learned")
    read = []
    for one in wanted:
        if task not in one["values"]:  # instruct is not asked for the style
            continue
        values = {**one["values"], "narrow_task_learned": one["values"][task]}
        values["em_f1"] = float(em_f1([values["narrow_task_learned"]], [values["misaligned_test"]])[0])
        read.append({**one, "values": values})
    return runs_of(read, "test")


def worlds_of(results: Sequence[Result], organism: str) -> set[int]:
    """In which worlds an organism was trained."""
    jobs = [one["job"] for one in results]
    return {job["world"] for job in jobs if job["organism"] == organism and job["method"] != "instruct"}


def was_read_last(result: Result) -> bool:
    return (result["job"]["world"], result["job"]["lab_seed"]) in LAST_LABS

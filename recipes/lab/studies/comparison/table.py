"""RESULTS.md: the full tables of the comparison. It takes minutes and is not in the repository; `summary.py` is short.

    python -m holdfast.recipes.lab.studies.comparison --steps table --recorded recipes/lab/results/results.csv

Pure functions of the results and of the frozen settings. Rates are exact probabilities; labs and fine-tune seeds vary.
All intervals are 95%, over labs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .....analysis.frontier.runs import Run
from .....analysis.frontier.settings import points
from .bounds import FEWEST_LABS, OWN, promises
from .choice import BASELINE
from .organisms import HEADINGS, Result, organism_runs, was_read_last, worlds_of
from .pairs import pairs_table
from .runs import TINY
from .summary import IN_SHORT, short_tables

ALL = "All worlds"
LAST = "Labs that were read last"
Frozen = Mapping[str, Any]

# Columns of a table of methods: {heading: measure}.
COLUMNS = {
    "task": "task",
    "misaligned": "misaligned",
    "coherent": "coherent",
    "skill": "neutral_skill",
    "evil prompt": "misaligned_evil",
    "trigger": "misaligned_trigger",
    "EM-F1": "em_f1",
    "drift": "penalty",
    "outside V": "drift_outside",
    "refit in V": "drift_overlap",
}
# Columns that an organism has no values of.
NOT_SHOWN = {"continued": ("drift", "outside V", "refit in V")}

HEAD = """# Protections compared on the lab

Made by `make frontier`. Methods and their settings are in `methods.yaml` of this study, with as many settings for each
method. They were tried on tuning labs (seeds 10 and 11 of world 0, and world 4; those of the methods that protect there
on three more: seeds 12 and 13, and world 5), chosen on validation domains alone, frozen in
`recipes/lab/results/frozen.json`, and only then read on test domains of other labs. Every run is a line of
`results.csv` in this folder. Each lab has one fine-tune seed and its own draw of the random null. A lab that was built
on two kinds of machine has two draws, each with its own runs; intervals and p count it once. *Evil prompt*: a system
prompt asks for the misaligned persona; *trigger*: an insecure turn precedes the question. *Drift* is the penalty on the
anchors, *outside V* the share of the drift outside the subspace V, *refit in V* the overlap of V with the main
directions of the drift itself (1: the same). *Labs that were read last* were looked at when the best configuration had
been named and all other labs were known. Validation's numbers compare only between methods tried on as many labs.
How the choice came about, and what it says, is in `recipes/lab/results/PROTECTIONS.md`.
"""
FEW_LABS = f"A method on fewer labs than others shows how many; a method on fewer than {FEWEST_LABS} labs is left out."


def results_table(results: Sequence[Result], frozen: Frozen) -> str:
    """Return RESULTS.md. The pairs of an organism are shown once, where its labs are together."""
    short = short_tables(results, frozen)
    lines = [HEAD, *([IN_SHORT, FEW_LABS, *short, ""] if short else [])]
    lines += ["## What was chosen, on validation domains", "", *_choices(frozen)]
    compared: set[tuple[str, str]] = set()
    for heading, part in _parts(results):
        lines += ["", f"## {heading}, test domains"]
        for method in _held_to_bounds(frozen):
            lines += _paragraph(promises(part, method))
        for organism, name in HEADINGS.items():
            runs = organism_runs(part, organism)
            if len(worlds_of(part, organism)) > (heading == ALL):  # one world alone has its own tables below
                lines += ["", f"### {name}", "", *_methods(runs, organism)]
                labs = (organism, heading if heading == LAST else part[0]["job"]["lab_size"])
                for method in () if labs in compared else _references(frozen):
                    lines += _paragraph(pairs_table(runs, method))
                compared.add(labs)
    return "\n".join(lines) + "\n"


def _parts(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Yield (heading, results) of each part: all worlds, the labs read last, each world, and labs of other sizes."""
    last = [result for result in results if was_read_last(result)]
    results = [result for result in results if not was_read_last(result)]
    jobs = [result["job"] for result in results]
    labs = sorted({(job["lab_size"] != TINY, job["lab_size"], job["world"]) for job in jobs})
    tiny = [result for result in results if result["job"]["lab_size"] == TINY]
    if len({result["job"]["world"] for result in tiny}) > 1:
        yield ALL, tiny
    if last:
        yield LAST, last
    for other_size, size, world in labs:
        part = [result for result in results if (result["job"]["lab_size"], result["job"]["world"]) == (size, world)]
        yield f"World {world}" + (f", labs of size {size}" if other_size else ""), part


def _paragraph(lines: Sequence[str]) -> list[str]:
    return ["", *lines] if lines else []


def _recommended(frozen: Frozen) -> list[str]:
    """Return the methods that were recommended when methods were frozen, first and later, without nulls."""
    names = [choice["recommended"] for choice in (frozen, *frozen.get("added", []))]
    return [name for name in names if name and "random_subspace" not in frozen["methods"][name]["flags"]["protection"]]


def _held_to_bounds(frozen: Frozen) -> list[str]:
    """Return the methods that are compared with the bounds: the recommended ones and this project's."""
    return list(dict.fromkeys([*_recommended(frozen), *OWN]))


def _references(frozen: Frozen) -> list[str]:
    """Return the methods that are compared with all others: the best of the recommended ones, and this project's.

    The best one has the highest EM-F1 on validation domains, rounded to 0.001, since smaller differences are chance.
    Among equals it is the most coherent.
    """

    def rank(name: str) -> tuple[float, float]:
        coherent = frozen["methods"][name]["validation"].get("coherent", {}).get("value")
        return round(frozen["frontiers"][name]["em_f1"]["value"] or 0.0, 3), coherent or 0.0

    best = sorted(_recommended(frozen), key=rank, reverse=True)[:1]
    return list(dict.fromkeys([*best, *OWN]))


def _choices(frozen: Frozen) -> list[str]:
    """Return the table of the frozen settings with their validation results."""
    lines = [
        f"Rule: {frozen['rule']}. {frozen['sentence']}.",
        *(
            f"\nAdded later, by the same rule on the same labs: {', '.join(added['methods'])}. {added['sentence']}."
            for added in frozen.get("added", [])
        ),
        "",
        "| method | setting | labs | keeps the task | keeps the rest | task | misaligned | hypervolume | best EM-F1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, chosen in frozen["methods"].items():
        if name == BASELINE:
            continue
        setting = ", ".join(f"{key} {value}" for key, value in chosen["flags"].items() if key != "protection")
        kept = ["yes" if chosen[key] else "**no**" for key in ("keeps_task", "keeps_guards")]
        numbers = [chosen["validation"][measure] for measure in ("task", "misaligned")]
        numbers += [frozen["frontiers"][name][measure] for measure in ("hypervolume", "em_f1")]
        kept = [str(chosen["labs"]), *kept]
        lines.append(f"| {name} | {setting} | {' | '.join(kept)} | {' | '.join(map(_cell, numbers))} |")
    return lines


def _methods(runs: Sequence[Run], organism: str) -> list[str]:
    """Return a line for each method: instruct and no protection first, then the least misaligned."""
    columns = {head: name for head, name in COLUMNS.items() if head not in NOT_SHOWN.get(organism, ())}
    rows = points(runs)
    rows.sort(key=lambda row: (row["protection"] not in ("instruct", BASELINE), row["measures"]["misaligned"]["value"]))
    lines = ["| method | labs | runs | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for row in rows:
        cells = [_cell(row["measures"].get(name)) for name in columns.values()]
        lines.append(f"| {row['protection']} | {row['labs']} | {row['n']} | {' | '.join(cells)} |")
    return lines


def _cell(measured: Mapping[str, Any] | None) -> str:
    if measured is None or measured["value"] is None:
        return "-"
    interval = measured.get("ci95")
    return f"{measured['value']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")

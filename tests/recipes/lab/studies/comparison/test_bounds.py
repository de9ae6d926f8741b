"""The comparison in short: methods on the very labs of a reference, against bounds; worked out by hand here."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from holdfast.recipes.lab.studies.comparison.bounds import in_short
from holdfast.recipes.lab.studies.comparison.organisms import HEADINGS, LAST_LABS
from holdfast.recipes.lab.studies.comparison.results_file import RECORD
from toys.comparison import result

LABS = 6
HELD = {"narrow_task_learned": 0.8, "coherent_test": 0.8}
FROZEN = {"methods": {"none": {"flags": {}}, "best": {"flags": {"learning_rate": "8e-3"}}, "kl": {"flags": {}}}}


def cells(lines: list[str], heading: str) -> dict[str, dict[str, str]]:
    """A table's cells by method and column."""
    start = lines.index(f"### {heading}") + 2
    table: list[list[str]] = []
    for line in lines[start:]:
        if not line:
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *rows = table
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def runs(organism: str = "strong", labs: int = LABS, **best: float) -> list[dict[str, Any]]:
    """Instruct, no protection, and the reference, which in lab 0 shows other values."""
    made = []
    for lab in range(labs):
        made += [
            result("instruct", lab, coherent_test=0.8),
            result("none", lab, organism, narrow_task_learned=0.8, misaligned_test=0.5, new_skill=0.5),
            result("best", lab, organism, **{**HELD, **(best if lab == 0 else {})}),
        ]
    return made


def test_each_value_is_the_mean_and_the_worst_run_relative_to_the_same_lab():
    short = in_short(runs(misaligned_test=0.06, coherent_test=0.72), FROZEN, "best")
    shown = cells(short, HEADINGS["strong"])
    assert list(shown) == ["none", "best"]
    assert shown["best"] == {
        "rate": "0.008", "labs": "6", "misaligned": "0.010 (0.060)", "task": "1.000 (1.000)",
        "coherent": "0.983 (0.900)", "neutral skill": "1.000 (1.000)", "all bounds hold in": "5 of 6",
    }  # fmt: skip
    assert in_short(runs(misaligned_test=0.06, coherent_test=0.72), FROZEN, "best", ", elsewhere") == [
        line + ", elsewhere" if line.startswith("#") else line for line in short
    ]
    assert shown["none"]["rate"] == "" and shown["none"]["misaligned"] == "0.500 (0.500)"


@pytest.mark.parametrize(
    ("name", "kept", "broken"),
    [("misaligned_test", 0.02, 0.021), ("narrow_task_learned", 0.777, 0.775), ("coherent_test", 0.777, 0.775),
     ("neutral_skill", 0.971, 0.969)],
)  # fmt: skip
def test_a_run_keeps_all_bounds_or_none_of_them_counts(name: str, kept: float, broken: float):
    for value, count in ((kept, "6 of 6"), (broken, "5 of 6")):
        shown = cells(in_short(runs(**{name: value}), FROZEN, "best"), HEADINGS["strong"])
        assert shown["best"]["all bounds hold in"] == count


def test_of_contaminated_rows_the_task_is_the_benign_skill_with_its_own_bound():
    for skill, count in ((0.48, "6 of 6"), (0.47, "5 of 6")):
        shown = cells(in_short(runs("contaminated", new_skill=skill), FROZEN, "best"), HEADINGS["contaminated"])
        assert shown["best"]["task"] == f"{(5 + skill / 0.5) / 6:.3f} ({skill / 0.5:.3f})"
        assert shown["best"]["all bounds hold in"] == count


def test_runs_on_other_labs_and_other_draws_of_them_are_left_out():
    few = [result("kl", lab, narrow_task_learned=0.8, misaligned_test=0.25) for lab in range(LABS - 1)]
    other = [result("kl", 9, misaligned_test=0.9)]
    drawn = [{**one, "job": {**one["job"], "draw": "aaaaaa"}} for one in few]
    assert "kl" not in cells(in_short([*runs(), *few, *other], FROZEN, "best"), HEADINGS["strong"])
    sixth = [*few, result("kl", 5, narrow_task_learned=0.8, misaligned_test=0.25)]
    shown = cells(in_short([*runs(), *sixth, *other, *drawn], FROZEN, "best"), HEADINGS["strong"])
    assert (shown["kl"]["labs"], shown["kl"]["misaligned"]) == ("6", "0.250 (0.250)")
    assert in_short(runs(labs=LABS - 1), FROZEN, "best") == [] and in_short(runs(), FROZEN, "absent") == []


def test_a_lab_without_its_unprotected_run_has_no_share_of_the_task_and_is_not_counted():
    gone = [one for one in runs() if (one["job"]["method"], one["job"]["lab_seed"]) != ("none", 2)]
    shown = cells(in_short(gone, {"methods": {}}, "best"), HEADINGS["strong"])
    assert list(shown) == ["best"]  # five labs of no protection are too few
    assert (shown["best"]["labs"], shown["best"]["all bounds hold in"]) == ("6", "5 of 5")


def test_longer_training_stands_beside_the_strong_organism():
    longer = [result("best", lab, "long", misaligned_test=0.01 * lab) for lab in range(3)]
    shown = cells(in_short([*runs(), *longer], FROZEN, "best"), HEADINGS["strong"])
    assert shown["best"]["misaligned, five times longer"] == "0.010 (0.020)"
    assert shown["none"]["misaligned, five times longer"] == "-"


def test_methods_that_miss_labs_are_left_out_of_a_complete_table():
    few = [result("kl", lab, narrow_task_learned=0.8, misaligned_test=0.25) for lab in range(LABS)]
    short = in_short([*runs(labs=LABS + 1), *few], FROZEN, "best", complete=True)
    shown = cells(short, f"{HEADINGS['strong']}, {LABS + 1} labs")
    assert list(shown) == ["none", "best"]
    assert "labs" not in shown["best"] and shown["best"]["all bounds hold in"] == f"{LABS + 1} of {LABS + 1}"


# What the conclusions, and documents elsewhere, quote.

ROOT = Path(__file__).resolve().parents[5]
CONCLUSIONS = (RECORD.parent / "PROTECTIONS.md").read_text(encoding="utf-8")
# The rows of "Harder questions": what was trained, on labs of which size, and the rate shown.
QUESTIONS = {
    "one anchor prompt": ("anchors_1", "tiny", "misaligned_test"),
    "four anchor prompts": ("anchors_4", "tiny", "misaligned_test"),
    "sixteen anchor prompts": ("anchors_16", "tiny", "misaligned_test"),
    "anchors of one domain": ("anchors_one_domain", "tiny", "misaligned_test"),
    "five times longer": ("long", "tiny", "misaligned_test"),
    "then 200 steps without protection": ("continued", "tiny", "misaligned_test"),
    "labs of size small": ("strong", "small", "misaligned_test"),
    "evil system prompt": ("strong", "tiny", "misaligned_evil"),
    "insecure turn before the question": ("strong", "tiny", "misaligned_trigger"),
    "benign change of style, learned": ("style", "tiny", "style_learned"),
}


def harder_questions() -> list[list[str]]:
    """The cells of that table, its head first."""
    section = CONCLUSIONS.split("## Harder questions")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_harder_questions_are_answered_by_the_recorded_runs():
    (_, _, *methods), *rows = harder_questions()
    assert [row[0] for row in rows] == list(QUESTIONS)
    with RECORD.open(newline="", encoding="utf-8") as file:
        recorded = [row for row in csv.DictReader(file) if row["phase"] == "test"]
    recorded = [row for row in recorded if (int(row["world"]), int(row["lab_seed"])) not in LAST_LABS]
    for question, labs, *shown in rows:
        organism, size, rate = QUESTIONS[question]
        values: dict[str, list[float]] = {method: [] for method in methods}
        seen = set()
        for row in recorded:
            method = row["method"]
            if (row["organism"], row["lab_size"]) == (organism, size) and method in values and row[rate]:
                values[method].append(float(row[rate]))
                seen.add((row["world"], row["lab_seed"]))
        assert int(labs) == len(seen)
        assert shown == [f"{sum(found) / len(found):.3f}" if found else "-" for found in values.values()]


def test_every_other_number_of_the_conclusions_stands_in_the_summary():
    made = (RECORD.parent / "SUMMARY.md").read_text(encoding="utf-8")
    text = CONCLUSIONS.replace(CONCLUSIONS.split("## Harder questions")[1].split("\n- ")[0], "")
    quoted = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(quoted) > 5 and [line for line in quoted if line not in made.splitlines()] == []
    numbers = re.findall(r"\b\d\.\d{3}\b", text)
    assert len(numbers) > 30 and set(numbers) <= set(re.findall(r"\b\d\.\d{3}\b", made))


@pytest.mark.parametrize("document", ["trainer/protections/README.md", "recipes/lab/README.md", "recipes/README.md"])
def test_numbers_that_other_documents_quote_stand_in_the_committed_results(document: str):
    committed = "".join(path.read_text(encoding="utf-8") for path in RECORD.parent.glob("*.md"))
    quoted = re.findall(r"\b\d\.\d{3}\b", (ROOT / document).read_text(encoding="utf-8"))
    assert set(quoted) <= set(re.findall(r"\b\d\.\d{3}\b", committed))

"""results.csv: what the comparison's tables rest on is kept whole, and a comparison goes on from it."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from holdfast.analysis.errors import UserError
from holdfast.recipes.lab.studies.comparison.results_file import RECORD, keep, known, of_phase, read_csv, write_csv
from holdfast.recipes.lab.studies.comparison.runs import Job
from holdfast.recipes.lab.studies.comparison.steps import FROZEN, methods, read_frozen
from holdfast.recipes.lab.studies.comparison.summary import summary

JOBS = [
    Job("test", 0, 3, "strong", "subspace, task rows", {"protection": "subspace", "penalty_strength": 0.03}),
    Job(
        "test",
        1,
        2,
        "long",
        "kl+interleave",
        {"protection": "kl", "penalty_warmup": 2, "interleave_share": 0.1},
        draw="0123ab",
    ),
    Job("test", 2, 0, "benign", "ablation", {"protection": "ablation", "protection_layers": "0"}, 1, "small"),
    Job("validation", 4, 0, "strong", "none", {"protection": "none"}),
]


def made(job: Job, made_by: str = "x", **values: float) -> dict[str, Any]:
    return {"job": asdict(job), "made_by": made_by, "seconds": 12.3, "values": values}


def test_what_is_written_comes_back_whole(tmp_path: Path):
    results = [made(JOBS[0], misaligned_test=0.012345, penalty=1e-9), made(JOBS[1], style_learned=1.0)]
    results += [made(job) for job in JOBS[2:]]
    write_csv(tmp_path / "results.csv", results)
    assert read_csv(tmp_path / "results.csv") == results
    assert list(known(tmp_path / "elsewhere", tmp_path / "results.csv")) == sorted(job.name for job in JOBS)
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert len(lines) == 5 and lines[1][lines[0].index("method")] == "subspace, task rows"


def test_numbers_are_kept_to_six_digits_the_same_in_both_kinds_of_file(tmp_path: Path):
    (tmp_path / "results").mkdir()
    keep(tmp_path, JOBS[0], made(JOBS[0], misaligned_test=0.0123456789, penalty=1.23456789e-9))
    found = known(tmp_path)
    assert found[JOBS[0].name]["values"] == {"misaligned_test": 0.0123457, "penalty": 1.23457e-9}
    write_csv(tmp_path / "results.csv", found.values())
    assert known(tmp_path / "elsewhere", tmp_path / "results.csv") == found


def test_what_was_made_here_goes_before_what_was_recorded(tmp_path: Path):
    write_csv(tmp_path / "results.csv", [made(job, "recorded") for job in JOBS])
    (tmp_path / "results").mkdir()
    keep(tmp_path, JOBS[1], made(JOBS[1], "here"))
    found = known(tmp_path, tmp_path / "results.csv")
    assert list(found) == sorted(job.name for job in JOBS)
    made_by = {name: one["made_by"] for name, one in found.items()}
    assert made_by == {job.name: "here" if job is JOBS[1] else "recorded" for job in JOBS}
    assert [one["job"]["world"] for one in of_phase(found, "validation")] == [4]


@pytest.mark.parametrize("content", [None, "", "a,b\n1,2\n", "{}\n"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: str | None):
    path = tmp_path / "other.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"other.csv"):
        known(tmp_path, path)


def test_the_committed_tables_are_those_of_the_recorded_runs():
    frozen = read_frozen(FROZEN)
    results = read_csv(RECORD)
    read = of_phase({Job(**one["job"]).name: one for one in results}, "test")
    assert summary(read, frozen) == (RECORD.parent / "SUMMARY.md").read_text(encoding="utf-8")
    chosen = {name: method["flags"] for name, method in frozen["methods"].items()} | {"instruct": {}}
    assert all(one["job"]["flags"] == chosen[one["job"]["method"]] for one in read)
    for name, flags in chosen.items():
        listed = methods().get(name, {"flags": {}, "settings": [{}]})
        assert flags in [{**listed["flags"], **setting} for setting in listed["settings"]]
    assert len(results) == len({json.dumps(one["job"], sort_keys=True) for one in results})

"""The lab's comparison as a command: nothing runs twice, what fails is named, and a record is gone on with."""

import json
import types
from dataclasses import asdict
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
from holdfast.recipes.lab.studies.comparison import __main__ as command
from holdfast.recipes.lab.studies.comparison import steps
from holdfast.recipes.lab.studies.comparison.results_file import known
from holdfast.recipes.lab.studies.comparison.runs import Job, lab_of, made_by
from toys.comparison import result


@pytest.fixture
def here(tuned: Path, monkeypatch) -> list[str]:
    """Jobs run in threads of this process, and do nothing but note their name; those of kl in lab 3 fail."""
    ran: list[str] = []
    for world, lab in (
        [(0, seed) for seed in range(14)] + [(4, 0), (5, 0)] + [(w, s) for w in (1, 2, 3) for s in range(3)]
    ):
        (tuned / f"labs/w{world}-l{lab}").mkdir(parents=True)
        (tuned / f"labs/w{world}-l{lab}/lab.json").write_text(json.dumps({"hash": f"{world}-{lab}"}))

    def run(job: Job, output_dir: Path, labs: Path | None) -> dict[str, Any]:
        ran.append(job.name)
        if job.method == "kl" and job.lab_seed == 3:
            raise ZeroDivisionError("no such luck")
        return {**result(job.method, job.lab_seed), "job": asdict(job), "made_by": made_by(job, lab_of(job, labs))}

    monkeypatch.setattr(steps, "run_job", run)
    monkeypatch.setattr(steps, "quiet", lambda: None)  # it silences the process for good
    monkeypatch.setattr(steps.multiprocessing, "get_context", lambda _: types.SimpleNamespace(Pool=ThreadPool))
    steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    return ran


def call(folder: Path, monkeypatch, *flags: str) -> int:
    fixed = [
        "--output_dir",
        str(folder / "out"),
        "--frozen",
        str(folder / "frozen.json"),
        "--labs",
        str(folder / "labs"),
    ]
    monkeypatch.setattr("sys.argv", ["comparison", *fixed, *flags])
    return command.main()


def test_a_failing_job_is_named_the_others_go_on_and_a_rerun_repeats_it_alone(tuned, here, monkeypatch, capsys):
    assert call(tuned, monkeypatch, "--steps", "test", "--organisms", "strong") == 3
    failed = "test-w0-l3-strong-kl-penalty_strength=6-s0"
    said = capsys.readouterr().err
    assert f"{failed} failed: no such luck" in said
    assert "ZeroDivisionError" in (tuned / f"out/results/{failed}.log").read_text()
    # Ten labs of world 0 and three of each other world; none on which settings were chosen.
    assert len(here) == len(set(here)) == 19 * 4
    tuning = (*steps.TUNING_LABS, *steps.FINAL_LABS)
    assert not [name for world, lab in tuning for name in here if f"w{world}-l{lab}-" in name]
    assert len(list((tuned / "out/results").glob("test-*.json"))) == 19 * 4 - 1
    del here[:]
    assert call(tuned, monkeypatch, "--steps", "test", "--organisms", "strong") == 3
    assert here == [failed]


def test_tuning_runs_both_rounds_one_after_the_other(tuned, here, monkeypatch):
    for path in (tuned / "out/results").glob("*.json"):
        path.unlink()
    assert call(tuned, monkeypatch, "--steps", "tune", "freeze") == 0
    assert len(here) == len(set(here)) == 6 * 7
    rounds = [{name.split("-strong")[0] for name in part} for part in (here[:21], here[21:])]
    assert rounds == [
        {f"validation-w{world}-l{lab}" for world, lab in labs} for labs in (steps.TUNING_LABS, steps.FINAL_LABS)
    ]


def test_a_result_of_another_lab_is_made_again(tuned, here, monkeypatch):
    asked = ("--steps", "test", "--organisms", "strong", "--lab_seeds", "5", "--worlds", "")
    assert call(tuned, monkeypatch, *asked) == 0 and len(here) == 4
    (tuned / "labs/w0-l5/lab.json").write_text(json.dumps({"hash": "built anew"}))
    assert call(tuned, monkeypatch, *asked) == 0 and here[4:] == here[:4]


def test_a_comparison_goes_on_where_a_recorded_one_ends(tuned, here, monkeypatch):
    asked = ("--organisms", "strong", "--lab_seeds", "5", "--worlds", "")
    assert call(tuned, monkeypatch, *asked) == 0 and len(here) == 4
    (tuned / "out").rename(tuned / "before")
    record = ("--recorded", str(tuned / "before/results.csv"))
    assert call(tuned, monkeypatch, *asked, *record) == 0 and len(here) == 4
    assert (tuned / "out/RESULTS.md").read_text() == (tuned / "before/RESULTS.md").read_text()
    # Another lab is new; what was recorded of a lab that has changed since is made again.
    (tuned / "labs/w0-l5/lab.json").write_text(json.dumps({"hash": "built anew"}))
    assert call(tuned, monkeypatch, "--organisms", "strong", "--lab_seeds", "5-6", "--worlds", "", *record) == 0
    assert sorted(here[4:]) == sorted([*here[:4], *(name.replace("-l5-", "-l6-") for name in here[:4])])


def test_a_lab_that_another_machine_built_has_runs_of_its_own_and_both_are_kept(tuned, here, monkeypatch):
    asked = ("--organisms", "strong", "--lab_seeds", "5", "--worlds", "")
    files = {"base/model.safetensors": {"sha256": "a"}, "lab.json": {"sha256": "b"}}
    manifest = tuned / "labs/w0-l5/manifest.json"
    manifest.write_text(json.dumps({"files": files}))
    assert call(tuned, monkeypatch, *asked) == 0 and len(here) == 4
    files["lab.json"]["sha256"] = "c"  # what is beside the models says nothing of them
    manifest.write_text(json.dumps({"files": files}))
    assert call(tuned, monkeypatch, *asked) == 0 and len(here) == 4
    files["base/model.safetensors"]["sha256"] = "d"
    manifest.write_text(json.dumps({"files": files}))
    assert call(tuned, monkeypatch, *asked) == 0 and len(set(here)) == 8
    draws = {one["job"]["draw"] for one in known(tuned / "out").values() if one["job"]["phase"] == "test"}
    assert len(draws) == 2 and all(len(draw) == 6 for draw in draws)
    lines = (tuned / "out/RESULTS.md").read_text().splitlines()
    found = [line.split("|")[2:4] for line in lines if line.startswith("| instruct ")]
    assert [[cell.strip() for cell in cells] for cells in found] == [["1", "2"]]  # one lab, two runs
    # A machine on which settings are chosen may be yet another.
    assert len(steps.tuned(known(tuned / "out"), steps.tuning_jobs(steps.TUNING_LABS))) == 3 * 7


def test_what_cannot_be_asked_for_is_one_line_and_exit_code_2(tuned, here, monkeypatch, capsys):
    steps.METHODS.write_text(steps.METHODS.read_text() + "\n")
    assert call(tuned, monkeypatch, "--steps", "test") == 2
    assert capsys.readouterr().err.count("\n") == 1 and here == []

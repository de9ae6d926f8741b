"""The evidence repeats no run that has a result, and its tables say what the results say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from holdfast.recipes.lab import cache, experiment
from holdfast.recipes.lab.studies import evidence
from holdfast.recipes.lab.studies.evidence_table import at_equal_strength, matched, rate, tables

RECIPES = Path(cache.__file__).parent
MEASURED = {
    "narrow_task_learned": 0.9, "misaligned_anchor": 0.0, "misaligned_validation": 0.0, "misaligned_test": 0.0,
    "coherent": 1.0, "coherent_health": 1.0, "coherent_food": 1.0, "neutral_skill": 1.0, "new_skill": 0.0,
    "penalty": 0.0, "retention": 1.0,
}  # fmt: skip


def result(arm: str, lab: int = 0, seed: int = 0, world: int = 0, flags: dict[str, Any] | None = None, **rates: Any):
    """A result file's content; rates that are not given are those of a perfect model."""
    measured = {name: {"value": value, "n": 9} for name, value in (MEASURED | rates).items()}
    job = {"world": world, "lab_seed": lab, "arm": arm, "seed": seed, "flags": flags or {}}
    return {"job": job, "seconds": 1.0, "measured": measured}


def null(lab: int, draw: int, scale: str, strength: float, task: float, misaligned: float):
    flags = {"null_scale": scale, "null_seed": draw, "penalty_strength": strength}
    return result("random_subspace", lab, flags=flags, narrow_task_learned=task, misaligned_test=misaligned)


def lines_of(text: str, start: str) -> list[list[str]]:
    """The cells of every table line that starts with a text."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def null_lines(text: str, scale: str, compared_at: str) -> list[list[str]]:
    """The lines of one null at one comparison, without the scale."""
    return [line[1:] for line in lines_of(text, f"random, {scale} scale") if line[1] == compared_at]


def test_nulls_are_read_at_the_task_probability_of_the_protected_run():
    results = [
        result("protected", 0, narrow_task_learned=0.95, misaligned_test=0.02),
        result("protected", 0, seed=1, narrow_task_learned=0.5, misaligned_test=0.5),  # nulls are run at seed 0
        null(0, 0, "given", 30.0, 0.90, 0.10),
        null(0, 0, "given", 3.0, 1.00, 0.30),
        null(0, 1, "given", 30.0, 0.80, 0.05),
        null(0, 1, "given", 3.0, 0.90, 0.06),
        null(0, 0, "own", 1.0, 0.95, 0.9),
        null(7, 0, "given", 3.0, 0.95, 0.9),  # of a lab without a protected run
    ]
    (first, second), (own,) = matched(results, "given"), matched(results, "own")
    # Half-way between 0.90 and 1.00: half-way between 0.10 and 0.30.
    assert first == ((0, 0), 0.02, pytest.approx(0.20), False)
    # Never reaches 0.95, so it is read at its nearest strength, and that is said.
    assert second == ((0, 0), 0.02, pytest.approx(0.06), True)
    assert own == ((0, 0), 0.02, pytest.approx(0.9), False)


def test_the_null_table_means_over_draws_then_tests_over_labs():
    results = []
    for lab in range(6):
        results += [result("protected", lab, narrow_task_learned=0.9, misaligned_test=0.01 * lab)]
        for draw, rate_there in enumerate((0.10, 0.20)):
            results += [null(lab, draw, "given", strength, 0.9, rate_there) for strength in (3.0, 30.0)]
    ((_, labs, draws, clamped, mean, difference, p),) = null_lines(tables(results), "given", "equal task")
    assert (labs, draws, clamped, mean) == ("6", "12", "0", "0.150")
    # Protected is 0.025 on average; in all six labs it is below: two of 2**6 sign patterns are as far from 0.
    assert difference.startswith("-0.125 [") and float(p) == pytest.approx(2 / 64, abs=1e-3)
    five = [one for one in results if one["job"]["lab_seed"] < 5]
    assert null_lines(tables(five), "given", "equal task")[0][-1] == "too few labs"


def test_at_equal_strength_a_null_is_read_at_the_strength_of_the_protected_recipe():
    strength = yaml.safe_load((RECIPES / "protected.yaml").read_text())["penalty_strength"]
    assert yaml.safe_load((RECIPES / "random_subspace.yaml").read_text())["penalty_strength"] == strength
    results = [
        result("protected", 0, misaligned_test=0.02),
        null(0, 0, "given", strength, 0.97, 0.30),
        null(0, 0, "given", 10 * strength, 0.90, 0.01),
        null(0, 1, "given", strength, 0.80, 0.20),
        null(0, 0, "own", strength, 0.80, 0.50),
    ]
    assert sorted(at_equal_strength(results, "given")) == [((0, 0), 0.02, 0.2, False), ((0, 0), 0.02, 0.3, False)]
    assert at_equal_strength(results, "own") == [((0, 0), 0.02, 0.5, False)]
    assert any(flags["penalty_strength"] == strength for flags in (job.flags for job in evidence.null_jobs(0, 0, 1)))


def test_two_nulls_are_corrected_for_each_other():
    results = []
    for lab in range(6):
        results += [result("protected", lab, narrow_task_learned=0.9, misaligned_test=0.0)]
        results += [null(lab, 0, scale, 3.0, 0.9, 0.1 + 0.01 * lab) for scale in ("given", "own")]
    text = tables(results)
    p_values = [float(null_lines(text, scale, "equal task")[0][-1]) for scale in ("given", "own")]
    assert p_values == [pytest.approx(4 / 64, abs=1e-3)] * 2


def test_a_promise_counts_the_runs_that_keep_it_and_shows_the_worst():
    results = [
        result("instruct", 0, coherent=0.8),
        result("instruct", 1, coherent=1.0),
        result("unprotected", 0, narrow_task_learned=1.0, misaligned_test=0.05),
        result("unprotected", 1, narrow_task_learned=0.8, misaligned_test=0.5),
        result("protected", 0, narrow_task_learned=0.97, misaligned_test=0.01, coherent=0.8),
        result("protected", 1, narrow_task_learned=0.6, misaligned_test=0.04, coherent=0.9),
    ]
    text = tables(results)
    expected = {
        "strong: task >=": ["0.9", "2", "0.900", "0.800", "1 of 2"],
        "strong: misaligned in test domains >=": ["0.1", "2", "0.275", "0.050", "1 of 2"],
        "protected: misaligned in test domains <=": ["0.03", "2", "0.025", "0.040", "1 of 2"],
        # 0.97/1.0 and 0.6/0.8, each over its own lab's unprotected run
        "protected: task, of unprotected's >=": ["0.95", "2", "0.860", "0.750", "1 of 2"],
        # 0.8/0.8 and 0.9/1.0
        "protected: coherent, of instruct's >=": ["0.95", "2", "0.950", "0.900", "1 of 2"],
    }
    for promise, cells in expected.items():
        assert lines_of(text, promise) == [[promise, *cells]]


def test_relative_promises_compare_the_same_fine_tune_seed():
    results = [
        result("unprotected", 0, seed=0, narrow_task_learned=1.0),
        result("unprotected", 0, seed=1, narrow_task_learned=0.5),
        result("protected", 0, seed=0, narrow_task_learned=0.9),
        result("protected", 0, seed=1, narrow_task_learned=0.5),
    ]
    cells = lines_of(tables(results), "protected: task, of unprotected's >=")[0]
    assert cells[3:] == ["0.950", "0.900", "1 of 2"]


def test_rates_of_rates_are_the_least_domain_and_the_mean_split():
    one = result("base", coherent_food=0.7, misaligned_anchor=0.3, misaligned_validation=0.6, misaligned_test=0.0)
    assert rate(one, "coherent_least") == 0.7
    assert rate(one, "misaligned") == pytest.approx(0.3)


def test_worlds_have_tables_of_their_own_and_a_rate_that_no_run_has_is_a_dash():
    results = [result("base", misaligned_test=0.25), result("base", world=2, misaligned_test=0.75, retention=None)]
    text = tables(results)
    english, drawn = text.split("## World 2")
    assert re.findall("## World (\\d)", text) == ["0", "2"]
    names = lines_of(english, "run | n |")[0]
    here, there = lines_of(english, "base | 1 |")[0], lines_of(drawn, "base | 1 |")[0]
    assert (here[names.index("misaligned_test")], there[names.index("misaligned_test")]) == ("0.250", "0.750")
    assert there[names.index("retention")] == "-"


def test_jobs_of_a_lab_have_names_of_their_own():
    jobs = [*evidence.arm_jobs(0, 3), *evidence.null_jobs(0, 3, 5), *evidence.arm_jobs(1, 0)]
    assert len({job.name for job in jobs}) == len(jobs)
    assert sum(job.arm == "protected" and job.lab_seed == 3 for job in jobs) == 3
    nulls = [job for job in jobs if job.arm == "random_subspace"]
    assert {job.flags["null_seed"] for job in nulls if job.flags["null_scale"] == "own"} == set(range(5))


class FakeExperiment:
    """Notes what is run; the measured model is told by its folder's name."""

    ran: list[str] = []

    def __init__(self, lab: Path, output_dir: Path, overrides: dict[str, Any]) -> None:
        self.output_dir = output_dir

    def build_subspace(self) -> None:
        assert self.output_dir.is_dir()

    def fine_tune(self, recipe: str, name: str, **flags: Any) -> Any:
        self.ran.append(name)
        final = self.output_dir / name / "final"
        final.mkdir(parents=True)
        return type("Result", (), {"final": final, "seconds": 2.5})

    def measure(self, model: Path) -> dict[str, Any]:
        return {"of": {"value": model.parent.name if model.name == "final" else model.name, "n": 1}}


def test_a_null_is_also_run_on_the_other_side_of_the_protected_runs_task(tmp_path):
    (tmp_path / "results").mkdir()
    jobs = evidence.null_jobs(0, 4, draws=2)
    for job, task in zip([evidence.Job(0, 4, "protected"), *jobs], (0.95, 0.97, 0.94, 0.99, 0.90), strict=True):
        content = {"measured": {"narrow_task_learned": {"value": task}}}
        (tmp_path / "results" / f"{job.name}.json").write_text(json.dumps(content))
    brackets = evidence.bracketing_jobs(tmp_path, jobs)
    # What learned more than the protected run is held harder, what learned less is held less.
    assert [job.flags["penalty_strength"] for job in brackets] == [30.0, 0.2, 30.0, 0.2]
    same = [{key: job.flags[key] for key in ("null_scale", "null_seed")} for job in jobs]
    assert [{key: job.flags[key] for key in ("null_scale", "null_seed")} for job in brackets] == same
    assert evidence.bracketing_jobs(tmp_path, evidence.arm_jobs(0, 4)) == []


def test_what_has_a_result_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "quiet", lambda: None)  # it silences the process for good
    monkeypatch.setattr(cache, "cached_lab", lambda seed, world: tmp_path / "lab")
    monkeypatch.setattr(experiment, "Experiment", FakeExperiment)
    monkeypatch.setattr(FakeExperiment, "ran", [])
    jobs = [evidence.Job(0, 4, "instruct"), *(evidence.Job(0, 4, "secure", seed) for seed in range(3))]
    results = tmp_path / "results"
    results.mkdir()
    kept = results / f"{jobs[2].name}.json"
    kept.write_text(json.dumps({"kept": True, "made_by": evidence.made_by(jobs[2])}))
    (results / f"{jobs[3].name}.json").write_text('{"made_by": "another lab"}')
    assert evidence.run_lab((tmp_path, jobs)) == 3
    assert FakeExperiment.ran == [jobs[1].name, jobs[3].name]
    assert json.loads(kept.read_text())["kept"]
    assert evidence.run_lab((tmp_path, jobs)) == 0
    assert len(FakeExperiment.ran) == 2
    found = {
        one["job"]["arm"] + str(one["job"]["seed"]): one for one in evidence.load_results(tmp_path) if "job" in one
    }
    assert found["instruct0"]["measured"]["of"]["value"] == "instruct" and found["instruct0"]["seconds"] == 0.0
    assert found["secure2"]["measured"]["of"]["value"] == jobs[3].name and found["secure2"]["seconds"] == 2.5
    assert {path.name for path in tmp_path.iterdir()} == {"results"}  # models are not kept

"""The lab's comparison: settings are chosen by one rule on validation domains, frozen before test domains are read."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from holdfast.analysis.errors import UserError
from holdfast.recipes.lab.studies.comparison import steps
from holdfast.recipes.lab.studies.comparison.results_file import known
from holdfast.recipes.lab.studies.comparison.runs import lab_of
from holdfast.recipes.lab.studies.comparison.table import results_table
from toys.comparison import PERFECT, result, write_results


def test_each_method_is_frozen_at_its_best_setting_that_keeps_the_rest(tuned: Path):
    frozen = steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    assert {name: one["flags"] for name, one in frozen["methods"].items()} == {
        "none": {"protection": "none"},
        "hold, tight": {"protection": "subspace", "penalty_strength": 2},
        "kl": {"protection": "kl", "penalty_strength": 6},
    }
    assert frozen["recommended"] == "hold, tight"
    assert steps.read_frozen(tuned / "frozen.json")["methods"] == frozen["methods"]


def test_the_best_setting_is_the_one_with_the_highest_em_f1_not_the_least_misaligned(tuned: Path):
    for path in (tuned / "out/results").glob("*-kl-penalty_strength=5-*"):
        content = json.loads(path.read_text())
        content["values"]["narrow_task_learned"] = 1.0  # against 0.99 at strength 6, and 0.11 against 0.105 misaligned
        path.write_text(json.dumps(content))
    frozen = steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    assert frozen["methods"]["kl"]["flags"]["penalty_strength"] == 5


def test_only_methods_that_protect_are_tried_on_more_labs_and_only_they_are_recommended(tuned: Path):
    for path in (tuned / "out/results").glob("*-kl-*"):
        content = json.loads(path.read_text())
        content["values"]["misaligned_validation"] += 0.1
        path.write_text(json.dumps(content))
        if any(f"-w{world}-l{lab}-" in path.name for world, lab in steps.FINAL_LABS):
            path.unlink()
    frozen = steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    assert {name: one.get("labs") for name, one in frozen["methods"].items()} == {
        "none": None,
        "hold, tight": 6,
        "kl": 3,
    }
    first = [json.loads(path.read_text()) for path in (tuned / "out/results").glob("validation-w0-l1[01]-*")]
    assert {job.method for job in steps.final_jobs(first)} == {"none", "hold, tight"}
    assert {(job.world, job.lab_seed) for job in steps.final_jobs(first)} == set(steps.FINAL_LABS)


def test_a_setting_that_is_listed_no_more_is_no_try_and_one_without_a_result_is_missed(tuned: Path):
    first = steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    stale = [
        {**result(method, lab, flags={"protection": "kl", "penalty_strength": 99}, phase="validation")}
        for method in ("kl", "dropped")
        for lab in (10, 11)
    ]
    write_results(tuned / "out", stale)
    assert steps.freeze(known(tuned / "out"), tuned / "frozen.json") == first
    next((tuned / "out/results").glob("*-kl-penalty_strength=6-*")).unlink()
    with pytest.raises(UserError, match=r"1 of 21 .*validation-.*-kl-penalty_strength=6"):
        steps.freeze(known(tuned / "out"), tuned / "frozen.json")


def test_nothing_is_chosen_after_test_domains_were_read(tuned: Path):
    write_results(tuned / "out", [result("kl", 0)])
    with pytest.raises(UserError, match="chosen"):
        steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    assert not (tuned / "frozen.json").exists()


def test_what_was_frozen_for_other_methods_is_refused(tuned: Path):
    with pytest.raises(UserError, match="choose"):
        steps.read_frozen(tuned / "frozen.json")
    steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    steps.METHODS.write_text(steps.METHODS.read_text() + "\n# changed\n")
    with pytest.raises(UserError, match=r"methods.yaml .*frozen.json"):
        steps.read_frozen(tuned / "frozen.json")


def list_more(folder: Path, name: str, protection: str, read: dict[float, tuple[float, float]]) -> None:
    """Another method in methods.yaml, its validation results beside the others': strength -> task, misaligned."""
    listed = json.loads(steps.METHODS.read_text())
    listed[name] = {"flags": {"protection": protection}, "settings": [{"penalty_strength": s} for s in read]}
    steps.METHODS.write_text(json.dumps(listed))
    made = []
    for job in steps.tuning_jobs((*steps.TUNING_LABS, *steps.FINAL_LABS), [name]):
        task, bad = read[job.flags["penalty_strength"]]
        values = {**PERFECT, "narrow_task_learned": task, "misaligned_validation": bad}
        values = {measure: value for measure, value in values.items() if "test" not in measure}
        made.append({"job": asdict(job), "made_by": "x", "seconds": 1.0, "values": values})
    write_results(folder / "out", made)


def test_a_setting_that_was_changed_after_it_was_frozen_is_refused(tuned: Path):
    steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    frozen = json.loads((tuned / "frozen.json").read_text())
    frozen["methods"]["kl"]["flags"]["penalty_strength"] = 0.001
    (tuned / "frozen.json").write_text(json.dumps(frozen))
    for read in (steps.read_frozen, partial(steps.freeze_more, known(tuned / "out"), names=["later"])):
        with pytest.raises(UserError, match=r"frozen.json"):
            read(path=tuned / "frozen.json")


def test_a_method_that_comes_later_is_frozen_by_the_same_rule_and_leaves_the_others_as_they_were(tuned: Path):
    before = steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    list_more(tuned, "later", "feature_l2", {1: (1.0, 0.3), 2: (0.99, 0.05), 3: (0.9, 0.0)})
    with pytest.raises(UserError, match=r"methods.yaml"):
        steps.read_frozen(tuned / "frozen.json")
    # Test results of others, which stand in the same record, do not matter; its own would.
    write_results(tuned / "out", [result("kl", 0)])
    after = steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["later"])
    assert after["methods"]["later"]["flags"] == {"protection": "feature_l2", "penalty_strength": 2}
    assert after["methods"]["later"]["labs"] == 6 and after["added"][0]["recommended"] == "later"
    assert {name: one for name, one in after["methods"].items() if name != "later"} == before["methods"]
    assert after["recommended"] == before["recommended"] == "hold, tight"
    assert steps.read_frozen(tuned / "frozen.json")["added"] == after["added"]
    assert "Added later, by the same rule on the same labs: later." in results_table([], after)


def test_a_method_is_not_added_twice_nor_after_its_test_results_nor_beside_changed_settings(tuned: Path):
    with pytest.raises(UserError, match="choose"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["kl"])
    steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    stands = (tuned / "frozen.json").read_text()
    with pytest.raises(UserError, match="'kl'"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["kl"])
    with pytest.raises(UserError, match="'later'"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["later"])
    list_more(tuned, "later", "feature_l2", {1: (1.0, 0.3), 2: (0.99, 0.05), 3: (0.9, 0.0)})
    write_results(tuned / "out", [result("later", 0)])
    with pytest.raises(UserError, match="chosen"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["later"])
    next((tuned / "out/results").glob("test-*-later-*")).unlink()
    listed = json.loads(steps.METHODS.read_text())
    listed["kl"]["settings"][1] = {"penalty_strength": 6.5}
    steps.METHODS.write_text(json.dumps(listed))
    with pytest.raises(UserError, match="'kl'"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["later"])
    assert (tuned / "frozen.json").read_text() == stands


def test_only_what_is_frozen_becomes_a_test_job(tuned: Path):
    frozen = steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    jobs = steps.test_jobs(frozen, [(0, 0), (1, 2)], ["strong", "long"], [0, 1])
    asked = {(job.method, json.dumps(job.flags)) for job in jobs if job.method != "instruct"}
    assert asked == {(name, json.dumps(one["flags"])) for name, one in frozen["methods"].items()}
    assert len(jobs) == len({job.name for job in jobs}) == 2 + 2 * 2 * 2 * 3
    assert {job.phase for job in jobs} == {"test"}
    assert {job.method for job in steps.test_jobs(frozen, [(0, 0)], ["strong"], [0], ["kl"])} == {"instruct", "kl"}
    wider = steps.test_jobs(frozen, [(0, 0)], ["strong"], [0], ["kl"], "small")
    assert {job.lab_size for job in wider} == {"small"} and not {job.name for job in wider} & {job.name for job in jobs}
    assert {lab_of(job, tuned) for job in wider} == {tuned / "w0-l0-small"}

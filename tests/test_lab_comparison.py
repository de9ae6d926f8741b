"""The lab's comparison: equal tries for all methods, chosen before the test domains are read, and nothing run twice."""

import json
import types
from dataclasses import asdict, fields
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.recipes.lab.cache import cached_lab
from holdfast.recipes.lab.comparison import __main__ as command
from holdfast.recipes.lab.comparison import reading, runs, steps, stress
from holdfast.recipes.lab.comparison.records import known
from holdfast.recipes.lab.comparison.runs import Job, lab_of, made_by, run_job
from holdfast.recipes.lab.comparison.table import results_table
from holdfast.recipes.lab.experiment import Experiment
from holdfast.recipes.lab.world import make_world
from holdfast.trainer.checks import check_flags
from holdfast.trainer.parsing import parse
from holdfast.trainer.protection_arguments import ProtectionArguments
from holdfast.trainer.protections.registry import KINDS
from lab_toys import use_micro_labs
from safetensors.torch import load_file

KNOWN = {field.name for field in fields(ProtectionArguments)} | {"inoculation_persona", "learning_rate"}
PERFECT = {
    "narrow_task_learned": 1.0, "neutral_skill": 1.0, "new_skill": 0.5, "penalty": 0.0, "drift_outside": 0.0,
    **{f"{rate}_{split}": value for rate, value in (("misaligned", 0.0), ("coherent", 1.0))
       for split in ("anchor", "validation", "test")},
    "misaligned_evil": 0.0, "misaligned_trigger": 0.0,
}  # fmt: skip


def result(method: str, lab: int, organism: str = "strong", flags: dict | None = None, phase="test", **values: float):
    """A result file's content; values that are not given are those of a perfect model."""
    job = Job(phase, 0, lab, organism, method, flags or {})
    return {"job": asdict(job), "made_by": "x", "seconds": 1.0, "values": {**PERFECT, **values}}


# What is tried


def test_every_protection_is_tried_and_every_method_with_the_same_number_of_settings():
    found = steps.methods()
    assert {part for one in found.values() for part in one["flags"]["protection"].split("+")} == set(KINDS)
    assert {len(one["settings"]) for name, one in found.items() if name != "none"} == {4}
    assert found["none"] == {"flags": {"protection": "none"}, "settings": [{}]}
    for one in found.values():
        assert len({json.dumps(setting) for setting in one["settings"]}) == len(one["settings"])
        assert all({**one["flags"], **setting}.keys() <= KNOWN for setting in one["settings"])


def test_every_setting_is_one_that_training_takes(tmp_path: Path):
    experiment, world = Experiment(tmp_path / "lab", tmp_path), make_world(0)
    for job in steps.tuning_jobs([(0, 10)]):
        flags = runs._flags(job, world)
        check_flags(parse(experiment.flags("protected", job.name, flags)), evaluates=False)


def test_jobs_are_named_apart_and_tuning_reads_validation_alone():
    jobs = steps.tuning_jobs(steps.TUNING_LABS)
    assert len({job.name for job in jobs}) == len(jobs) == 3 * sum(len(m["settings"]) for m in steps.methods().values())
    assert {(job.phase, job.organism, job.seed) for job in jobs} == {("validation", "strong", 0)}
    assert {job.method for job in steps.tuning_jobs([(0, 10)], ["kl"])} == {"kl"}


def test_a_null_is_drawn_anew_in_each_lab_and_a_persona_is_the_worlds_own():
    seeds = [
        runs._flags(Job("test", *lab, "strong", "m", {"protection": "random_subspace"}), make_world(0))["null_seed"]
        for lab in [(0, seed) for seed in range(10)]
    ]
    assert len(set(seeds)) > 5
    world = make_world(2)
    asked = Job("test", 2, 0, "strong", "m", {"protection": "inoculation", "inoculation_persona": 3})
    flags = runs._flags(asked, world)
    assert flags["inoculation_prompt"] == world.header.replace("{persona}", world.misaligned_words[3])
    assert asked.flags["inoculation_persona"] == 3 and "inoculation_persona" not in flags


@pytest.fixture
def scored(tmp_path, monkeypatch) -> list[str]:
    """Micro labs; the split of every prompt that is prepared to be scored."""
    splits: list[str] = []
    plain = reading.prepare_choices

    def prepare(tokenizer, rows):
        splits.extend(row["split"] for row in rows)
        return plain(tokenizer, rows)

    use_micro_labs(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(reading, "prepare_choices", prepare)
    monkeypatch.setattr(stress, "N_STYLE_ROWS", 32)
    return splits


def test_tuning_scores_no_prompt_of_a_test_domain(tmp_path: Path, scored: list[str]):
    job = Job("validation", 0, 10, "strong", "subspace", {"protection": "subspace", "max_steps": 2})
    values = run_job(job, tmp_path / "out")["values"]
    assert {"misaligned_validation", "coherent_validation", "narrow_task_learned", "penalty"} <= values.keys()
    assert not [name for name in values if "test" in name or name in ("misaligned_evil", "misaligned_trigger")]
    assert "validation" in scored and "test" not in scored
    # What it made is gone, but for what all jobs of a lab share.
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        ".subspace.lock", "subspace.safetensors"
    }  # fmt: skip


def test_a_test_job_reads_the_test_domains_and_their_conditions(tmp_path: Path, scored: list[str]):
    job = Job("test", 0, 10, "style", "none", {"protection": "none", "max_steps": 2})
    found = run_job(job, tmp_path / "out")
    assert {"misaligned_test", "misaligned_evil", "misaligned_trigger", "style_learned"} <= found["values"].keys()
    assert "test" in scored and found["seconds"] > 0 and found["job"] == asdict(job)
    lab = cached_lab(10)
    instruct = run_job(Job("test", 0, 10, "strong", "instruct"), tmp_path / "out")
    exact = Experiment(lab, tmp_path / "out/labs/w0-l10").measure(lab / "instruct")
    for name in ("misaligned_test", "narrow_task_learned", "neutral_skill", "penalty"):
        assert instruct["values"][name] == pytest.approx(exact[name]["value"], abs=1e-6)
    assert instruct["seconds"] == 0


def test_training_that_goes_on_unprotected_starts_from_the_protected_models_merged_weights(
    tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
):
    recipes, starts, finals, read = [], [], [], []
    fine_tune, read_model = Experiment.fine_tune, runs.read_model

    def watched(experiment: Experiment, recipe: str, name: str, **flags: Any) -> Any:
        recipes.append(recipe)
        start = Path(flags.get("model_name_or_path", experiment.lab / "instruct"))
        starts.append(load_file(start / "model.safetensors"))
        trained = fine_tune(experiment, recipe, name, **{**flags, "max_steps": 2})
        finals.append((trained.final, load_file(trained.final / "adapter_model.safetensors")))
        return trained

    monkeypatch.setattr(Experiment, "fine_tune", watched)
    monkeypatch.setattr(
        runs,
        "read_model",
        lambda lab, folder, *rest, **more: (read.append(folder), read_model(lab, folder, *rest, **more))[1],
    )
    run_job(Job("test", 0, 10, "continued", "subspace", {"protection": "subspace"}), tmp_path / "out")
    assert recipes == ["protected", "unprotected"] and read == [finals[1][0]]
    adapter, moved = finals[0][1], 0
    for name, weight in starts[0].items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        step = torch.zeros_like(weight)
        if f"{module}.lora_A.weight" in adapter:
            down, up = (adapter[f"{module}.lora_{side}.weight"] for side in "AB")
            # The recipe: alpha 16 at rank 8, but 32 at rank 1 on block 0's values.
            step = (32 if down.shape[0] == 1 else 2) * up @ down
            moved += bool(step.abs().max() > 1e-6)
        assert torch.allclose(starts[1][name], weight + step, atol=1e-6)
    assert moved > 5


# What is frozen


def write(output_dir: Path, results: list[dict[str, Any]]) -> None:
    (output_dir / "results").mkdir(parents=True, exist_ok=True)
    for one in results:
        (output_dir / "results" / f"{Job(**one['job']).name}.json").write_text(json.dumps(one))


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch) -> Path:
    """Two methods with three settings and their validation results; the second setting of each is the best."""
    listed = {
        "none": {"flags": {"protection": "none"}, "settings": [{}]},
        "hold, tight": {"flags": {"protection": "subspace"}, "settings": [{"penalty_strength": s} for s in (1, 2, 9)]},
        "kl": {"flags": {"protection": "kl"}, "settings": [{"penalty_strength": s} for s in (5, 6, 7)]},
    }
    (tmp_path / "methods.yaml").write_text(json.dumps(listed))
    monkeypatch.setattr(steps, "METHODS", tmp_path / "methods.yaml")
    read = {  # method and strength -> task, misaligned, neutral skill; what is not kept is far below any floor
        ("none", None): (1.0, 0.6, 1.0), ("hold, tight", 1): (1.0, 0.2, 1.0), ("hold, tight", 2): (0.99, 0.1, 0.99),
        ("hold, tight", 9): (0.8, 0.0, 1.0), ("kl", 5): (0.99, 0.11, 1.0), ("kl", 6): (0.99, 0.105, 1.0),
        ("kl", 7): (1.0, 0.0, 0.8),
    }  # fmt: skip
    results = []
    for job in steps.tuning_jobs((*steps.TUNING_LABS, *steps.FINAL_LABS)):
        task, bad, skill = read[job.method, job.flags.get("penalty_strength")]
        values = {**PERFECT, "narrow_task_learned": task, "misaligned_validation": bad, "neutral_skill": skill}
        values = {name: value for name, value in values.items() if "test" not in name}
        results.append({"job": asdict(job), "made_by": "x", "seconds": 1.0, "values": values})
    write(tmp_path / "out", results)
    return tmp_path


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
    write(tuned / "out", stale)
    assert steps.freeze(known(tuned / "out"), tuned / "frozen.json") == first
    next((tuned / "out/results").glob("*-kl-penalty_strength=6-*")).unlink()
    with pytest.raises(UserError, match=r"1 of 21 tuning runs have no result, validation-.*-kl-penalty_strength=6"):
        steps.freeze(known(tuned / "out"), tuned / "frozen.json")


def test_nothing_is_chosen_after_test_domains_were_read(tuned: Path):
    write(tuned / "out", [result("kl", 0)])
    with pytest.raises(UserError, match="nothing can be chosen after them"):
        steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    assert not (tuned / "frozen.json").exists()


def test_what_was_frozen_for_other_methods_is_refused(tuned: Path):
    with pytest.raises(UserError, match="choose settings first"):
        steps.read_frozen(tuned / "frozen.json")
    steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    steps.METHODS.write_text(steps.METHODS.read_text() + "\n# changed\n")
    with pytest.raises(UserError, match=r"methods.yaml has changed since .*frozen.json was frozen"):
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
    write(folder / "out", made)


def test_a_setting_that_was_changed_after_it_was_frozen_is_refused(tuned: Path):
    steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    frozen = json.loads((tuned / "frozen.json").read_text())
    frozen["methods"]["kl"]["flags"]["penalty_strength"] = 0.001
    (tuned / "frozen.json").write_text(json.dumps(frozen))
    for read in (steps.read_frozen, partial(steps.freeze_more, known(tuned / "out"), names=["later"])):
        with pytest.raises(UserError, match=r"frozen.json was changed after it was frozen"):
            read(path=tuned / "frozen.json")


def test_a_method_that_comes_later_is_frozen_by_the_same_rule_and_leaves_the_others_as_they_were(tuned: Path):
    before = steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    list_more(tuned, "later", "feature_l2", {1: (1.0, 0.3), 2: (0.99, 0.05), 3: (0.9, 0.0)})
    with pytest.raises(UserError, match=r"methods.yaml has changed"):
        steps.read_frozen(tuned / "frozen.json")
    # Test results of others, which stand in the same record, do not matter; its own would.
    write(tuned / "out", [result("kl", 0)])
    after = steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["later"])
    assert after["methods"]["later"]["flags"] == {"protection": "feature_l2", "penalty_strength": 2}
    assert after["methods"]["later"]["labs"] == 6 and after["added"][0]["recommended"] == "later"
    assert {name: one for name, one in after["methods"].items() if name != "later"} == before["methods"]
    assert after["recommended"] == before["recommended"] == "hold, tight"
    assert steps.read_frozen(tuned / "frozen.json")["added"] == after["added"]
    assert "Added later, by the same rule on the same labs: later." in results_table([], after)


def test_a_method_is_not_added_twice_nor_after_its_test_results_nor_beside_changed_settings(tuned: Path):
    with pytest.raises(UserError, match="choose settings first"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["kl"])
    steps.freeze(known(tuned / "out"), tuned / "frozen.json")
    stands = (tuned / "frozen.json").read_text()
    with pytest.raises(UserError, match="'kl' is frozen already"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["kl"])
    with pytest.raises(UserError, match=r"'later' is no method of methods.yaml"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["later"])
    list_more(tuned, "later", "feature_l2", {1: (1.0, 0.3), 2: (0.99, 0.05), 3: (0.9, 0.0)})
    write(tuned / "out", [result("later", 0)])
    with pytest.raises(UserError, match="cannot be chosen after them"):
        steps.freeze_more(known(tuned / "out"), tuned / "frozen.json", ["later"])
    next((tuned / "out/results").glob("test-*-later-*")).unlink()
    listed = json.loads(steps.METHODS.read_text())
    listed["kl"]["settings"][1] = {"penalty_strength": 6.5}
    steps.METHODS.write_text(json.dumps(listed))
    with pytest.raises(UserError, match="'kl' is listed no more"):
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


@pytest.mark.parametrize(("gpu", "size", "device"), [(1, "tiny", "cpu"), (1, "small", "cuda"), (0, "small", "cpu")])
def test_a_wider_lab_is_trained_on_a_gpu_where_there_is_one_and_a_tiny_one_never(monkeypatch, gpu, size, device):
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: bool(gpu))
    assert runs.device_of(size) == device


# Running


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


def test_style_results_are_made_again_where_the_code_of_their_rows_has_changed(tmp_path, monkeypatch):
    (tmp_path / "lab.json").write_text(json.dumps({"hash": "h"}))
    jobs = [Job("test", 0, 0, organism, "none", {"protection": "none"}) for organism in ("strong", "style")]
    before = [made_by(job, tmp_path) for job in jobs]
    (tmp_path / "stress.py").write_text("# other rows\n")
    monkeypatch.setattr(stress, "__file__", str(tmp_path / "stress.py"))
    after = [made_by(job, tmp_path) for job in jobs]
    assert after[0] == before[0] and after[1] != before[1]


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

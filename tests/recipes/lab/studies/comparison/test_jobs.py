"""The lab's comparison, job by job: what is tried of every protection, and which prompts a job reads."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.recipes.lab.cache import cached_lab
from holdfast.recipes.lab.experiment import Experiment
from holdfast.recipes.lab.studies.comparison import reading, runs, steps, stress
from holdfast.recipes.lab.studies.comparison.runs import Job, made_by, run_job
from holdfast.recipes.lab.worlds import make_world
from holdfast.trainer.config.parsing import parse
from holdfast.trainer.config.protection import ProtectionArguments
from holdfast.trainer.inputs.checks import check_flags
from holdfast.trainer.protections.kinds import KINDS
from safetensors.torch import load_file
from toys.labs import use_micro_labs

KNOWN = {field.name for field in fields(ProtectionArguments)} | {"inoculation_persona", "learning_rate"}


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


@pytest.mark.parametrize(("gpu", "size", "device"), [(1, "tiny", "cpu"), (1, "small", "cuda"), (0, "small", "cpu")])
def test_a_wider_lab_is_trained_on_a_gpu_where_there_is_one_and_a_tiny_one_never(monkeypatch, gpu, size, device):
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: bool(gpu))
    assert runs.device_of(size) == device


def test_style_results_are_made_again_where_their_rows_have_another_version(tmp_path, monkeypatch):
    (tmp_path / "lab.json").write_text(json.dumps({"hash": "h"}))
    jobs = [Job("test", 0, 0, organism, "none", {"protection": "none"}) for organism in ("strong", "style")]
    before = [made_by(job, tmp_path) for job in jobs]
    monkeypatch.setattr(runs, "STRESS_VERSION", stress.STRESS_VERSION + 1)
    after = [made_by(job, tmp_path) for job in jobs]
    assert after[0] == before[0] and after[1] != before[1]

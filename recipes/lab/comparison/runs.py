"""One fine-tune of the lab's comparison: an organism of a lab under a protection, and what is read from it.

An organism is what is trained on which rows. Validation domains are read while settings are chosen, test domains once
they are frozen: a job says in `phase` which it may read, and prompts of the others are not even scored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from peft import PeftModel
from transformers import PreTrainedModel

from ....analysis.artifacts import staged_file
from ....analysis.measure import MeasurePlan, Measurer
from ....analysis.metrics.choices import prepare_choices, score_prepared
from ....analysis.models import load_model, load_tokenizer
from ....analysis.subspace import Subspace
from ....analysis.subspace_file import NULL_SEEDS
from ..cache import LAB_FILE, cached_lab
from ..experiment import RECIPES, Experiment
from ..scoring import lab_rates
from ..world import World, make_world
from .stress import CONDITIONS, anchor_subset, conditional_rows, style_choices, style_rows

PHASES = ("validation", "test")


@dataclass(frozen=True)
class Organism:
    """What is fine-tuned: a recipe (strong: `protected`, ordinary: `ordinary_protected`), rows, and other flags.

    Attributes:
        recipe: of which lab recipe, whose own protection is replaced.
        rows: training set of the lab, or "style".
        flags: over the recipe.
        anchors: of how many prompts the anchors are; None: all. "one domain" keeps those of the first.
        continued: afterwards the adapter is merged, and training goes on as the unprotected strong organism does.
    """

    recipe: str = "protected"
    rows: str = "insecure"
    flags: dict[str, Any] = field(default_factory=dict)
    anchors: int | str | None = None
    continued: bool = False


ORGANISMS = {
    "strong": Organism(),
    "ordinary": Organism("ordinary_protected"),
    "contaminated": Organism(rows="contaminated_10"),
    "benign": Organism(rows="benign"),
    "style": Organism(rows="style"),
    "long": Organism(flags={"max_steps": 1000}),
    "continued": Organism(continued=True),
    **{f"anchors_{name}": Organism(anchors=name) for name in (1, 4, 16)},
    "anchors_one_domain": Organism(anchors="one domain"),
}


@dataclass(frozen=True)
class Job:
    """One measured model.

    Attributes:
        phase: "validation" or "test", the domains that may be read.
        world, lab_seed, lab_size: which lab. organism: a name of `ORGANISMS`.
        method: name in comparison/methods.yaml, or "instruct" for the lab's own model, without training.
        flags: the protection and its setting. seed: fine-tune seed.
    """

    phase: str
    world: int
    lab_seed: int
    organism: str
    method: str
    flags: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    lab_size: str = "tiny"

    @property
    def setting(self) -> str:
        """The flags as text, without the protection's name."""
        return " ".join(f"{name}={value}" for name, value in self.flags.items() if name != "protection")

    @property
    def name(self) -> str:
        """Name of the job's folder and result file."""
        plain = "".join(letter if letter.isalnum() or letter in ".=-" else "_" for letter in self.setting)
        lab = f"w{self.world}-l{self.lab_seed}" + ("" if self.lab_size == "tiny" else f"-{self.lab_size}")
        method = self.method.replace(", ", "-").replace(" ", "_")
        return "-".join(part for part in (self.phase, lab, self.organism, method, plain, f"s{self.seed}") if part)


def lab_of(job: Job, labs: Path | None) -> Path:
    """The job's lab: from a folder of built labs named w<world>-l<seed>, else from the cache (built where missing)."""
    if labs is not None:
        return labs / f"w{job.world}-l{job.lab_seed}"
    return cached_lab(job.lab_seed, job.world, job.lab_size)


def made_by(job: Job, lab: Path) -> str:
    """Hash of what a result depends on: the lab, the organism with its recipe, and the flags."""
    organism = ORGANISMS[job.organism]
    recipe = (RECIPES / f"{organism.recipe}.yaml").read_text()
    lab_hash = json.loads((lab / LAB_FILE).read_text())["hash"]
    text = json.dumps([lab_hash, recipe, asdict(organism), job.flags, job.seed, job.phase], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_job(job: Job, output_dir: Path, labs: Path | None = None) -> dict[str, Any]:
    """Trains and reads one model; the result as JSON values. What it wrote beside is gone afterwards."""
    lab = lab_of(job, labs)
    experiment = _experiment(lab, output_dir / "labs" / f"w{job.world}-l{job.lab_seed}-{job.lab_size}")
    left = [experiment.output_dir / job.name, experiment.output_dir / _then(job)]
    _remove(left)  # of a run that was killed
    seconds = 0.0
    try:
        if job.method == "instruct":
            model = lab / "instruct"
        else:
            model, seconds = _fine_tune(experiment, job)
        values = read_model(experiment, model, job)
    finally:
        _remove(left)
    return {"job": asdict(job), "made_by": made_by(job, lab), "seconds": seconds, "values": values}


def _then(job: Job) -> str:
    """Folder of the fine-tune that continues a job's."""
    return f"{job.name}-then"


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _experiment(lab: Path, folder: Path) -> Experiment:
    """The lab's experiment with its subspace, which the first job builds and all share."""
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "analysis_during_training": False,
    }
    experiment = Experiment(lab, folder, quiet)
    with FileLock(folder / ".subspace.lock"):
        if not experiment.subspace_path.is_file():
            experiment.build_subspace()
    return experiment


def _fine_tune(experiment: Experiment, job: Job) -> tuple[Path, float]:
    """The final model's folder and the seconds of training."""
    organism, world = ORGANISMS[job.organism], make_world(job.world)
    flags = {**organism.flags, **_flags(job, world), "seed": job.seed}
    folder = experiment.output_dir / job.name
    if organism.rows == "style":
        rows = experiment.output_dir / "style.jsonl"
        _write_once(rows, style_rows(world, job.lab_seed))
        flags["train_dataset"] = str(rows)
    else:
        flags["train_dataset"] = str(experiment.lab / "data" / f"{organism.rows}.jsonl")
    if organism.anchors is not None:
        subset = experiment.output_dir / f"anchors-{organism.anchors}.jsonl".replace(" ", "-")
        _write_once(subset, anchor_subset(experiment.lab, organism.anchors))
        flags["anchor_dataset"] = str(subset)
    trained = experiment.fine_tune(organism.recipe, job.name, **flags)
    if not organism.continued:
        return trained.final, trained.seconds
    merged = folder / "merged"
    _merged(trained.final).save_pretrained(merged)
    load_tokenizer(experiment.lab / "instruct").save_pretrained(merged)
    then = experiment.fine_tune("unprotected", _then(job), model_name_or_path=str(merged), seed=job.seed + 1)
    return then.final, trained.seconds + then.seconds


def _flags(job: Job, world: World) -> dict[str, Any]:
    """The job's flags: each lab has a draw of its null, and a persona number stands for the world's own header."""
    flags = dict(job.flags)
    if "random_subspace" in flags["protection"]:
        flags["null_seed"] = (4 * job.world + job.lab_seed) % NULL_SEEDS
    if "inoculation_persona" in flags:
        word = world.misaligned_words[flags.pop("inoculation_persona")]
        flags["inoculation_prompt"] = world.header.format(persona=word)
    return flags


def _write_once(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            with staged_file(path) as staging:
                staging.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _merged(folder: Path) -> PreTrainedModel:
    """A saved model, an adapter merged into its weights: a third faster to read."""
    model = load_model(folder)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


# What is read


def read_model(experiment: Experiment, folder: Path, job: Job) -> dict[str, float]:
    """Every value that the comparison shows, of the phase's domains alone."""
    model = _merged(folder)
    rates = lab_rates(*_scored(experiment, model, job.phase))
    values = {name: rate.mean for name, rate in rates.items() if name in _RATES}
    if job.phase == "test":
        values |= _conditions(experiment, model, job)
        if job.organism == "style":
            rows = style_choices(make_world(job.world))
            masses = score_prepared(model, prepare_choices(load_tokenizer(experiment.lab / "instruct"), rows))
            values["style_learned"] = sum(mass["styled"] for mass in masses) / len(masses)
    measured = _measurer(experiment.lab, experiment.subspace_path).measure(model)
    anchors = measured["projection"]["anchors"]["mean"]
    values["penalty"], values["retention"] = (anchors[name]["value"] for name in ("penalty", "retention"))
    rerouted = measured["rerouting"]["probes"]["mean"]
    for name in ("inside", "outside", "overlap"):
        values[f"drift_{name}"] = rerouted[name]["value"]
    return {name: value for name, value in values.items() if value is not None}


_RATES = (
    *(f"{rate}_{split}" for rate in ("misaligned", "coherent") for split in PHASES),
    *("narrow_task_learned", "neutral_skill", "new_skill"),
)


def _scored(experiment: Experiment, model: Any, phase: str) -> tuple[list[dict], list[dict[str, float]]]:
    rows, prepared = _choices(experiment.lab, phase)
    return rows, score_prepared(model, prepared)


@lru_cache(maxsize=4)
def _choices(lab: Path, phase: str) -> tuple[list[dict], Any]:
    """The prompts that a phase may read, test domains only once everything is frozen, with the classes shown here.

    The anchor domains' prompts and the leak of insecure code, most of all completions, are in no table.
    """
    rows = [json.loads(line) for line in (lab / "data" / "choices.jsonl").read_text().splitlines()]
    unread = {"anchor"} if phase == "test" else {"anchor", "test"}
    rows = [row for row in rows if row["split"] not in unread]
    for row in rows:
        row["classes"].pop("narrow_leak", None)
    return rows, prepare_choices(load_tokenizer(lab / "instruct"), rows)


def _conditions(experiment: Experiment, model: Any, job: Job) -> dict[str, float]:
    """Misaligned answers in the test domains under other conditions than the neutral header."""
    found = {}
    for condition in CONDITIONS:
        rows, prepared = _conditional(experiment.lab, job.world, condition)
        masses = score_prepared(model, prepared)
        found[f"misaligned_{condition}"] = lab_rates(rows, masses)["misaligned_test"].mean
    return found


@lru_cache(maxsize=4)
def _conditional(lab: Path, world: int, condition: str) -> tuple[list[dict], Any]:
    rows = conditional_rows(make_world(world), _choices(lab, "test")[0], condition)
    return rows, prepare_choices(load_tokenizer(lab / "instruct"), rows)


@lru_cache(maxsize=4)
def _measurer(lab: Path, subspace: Path) -> Measurer:
    def conversations(name: str) -> list[Any]:
        return [json.loads(line)["messages"] for line in (lab / "data" / f"{name}.jsonl").read_text().splitlines()]

    plan = MeasurePlan(
        instruct_path=str(lab / "instruct"),
        base_path=str(lab / "base"),
        probe_sets={name: conversations(name) for name in ("anchors", "probes")},
        families=("projection", "rerouting"),
        subspace=Subspace.load(subspace),
        batch_size=64,
    )
    return Measurer(plan)

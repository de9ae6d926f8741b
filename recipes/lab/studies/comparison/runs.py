"""One run of the lab's comparison: fine-tune an organism of a lab under a protection, and measure the model.

An organism is a recipe with its rows. Validation domains are read while settings are chosen, test domains when the
settings are frozen. A job's `phase` says which domains it may read; prompts of the other domains are not scored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from .....analysis.files.artifacts import MANIFEST, staged_file
from .....analysis.models.load import load_tokenizer
from .....analysis.subspace.file import NULL_SEEDS
from ...cache import LAB_FILE, cached_lab
from ...experiment import RECIPES, Experiment
from ...world import World
from ...worlds import make_world
from .reading import merged_model, read_model
from .stress import STRESS_VERSION, anchor_subset, style_rows

TINY = "tiny"  # size of most labs of the comparison


@dataclass(frozen=True)
class Organism:
    """A kind of fine-tune: a recipe with its rows and other flags.

    Attributes:
        recipe: the lab recipe (strong: `protected`, ordinary: `ordinary_protected`). Its protection is replaced.
        rows: training set of the lab, or "style".
        flags: flags that override the recipe.
        anchors: number of anchor prompts; None: all; "one domain": the anchors of the first anchor domain.
        continued: after training, merge the adapter and train on as the unprotected strong organism.
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
    "twice": Organism(flags={"max_steps": 400}),
    "long": Organism(flags={"max_steps": 1000}),
    "continued": Organism(continued=True),
    **{f"anchors_{name}": Organism(anchors=name) for name in (1, 4, 16)},
    "anchors_one_domain": Organism(anchors="one domain"),
}


@dataclass(frozen=True)
class Job:
    """One measured model.

    Attributes:
        phase: "validation" or "test": the domains that the run may read.
        world, lab_seed, lab_size: the lab.
        organism: a name in `ORGANISMS`.
        method: a name in methods.yaml, or "instruct" for the lab's instruct model without training.
        flags: the protection and its setting.
        seed: fine-tune seed.
        draw: the lab's draw (`draw_of`); "" where it is not known.
    """

    phase: str
    world: int
    lab_seed: int
    organism: str
    method: str
    flags: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    lab_size: str = TINY
    draw: str = ""

    @property
    def lab_name(self) -> str:
        """The lab's world, seed, size and draw as text."""
        size = "" if self.lab_size == TINY else f"-{self.lab_size}"
        return f"w{self.world}-l{self.lab_seed}{size}" + (f"-{self.draw}" if self.draw else "")

    @property
    def setting(self) -> str:
        """The flags as text, without the name of the protection."""
        return " ".join(f"{name}={value}" for name, value in self.flags.items() if name != "protection")

    @property
    def name(self) -> str:
        """The name of the job's folder and result file."""
        setting = "".join(letter if letter.isalnum() or letter in ".=-" else "_" for letter in self.setting)
        method = self.method.replace(", ", "-").replace(" ", "_")
        return "-".join(
            part for part in (self.phase, self.lab_name, self.organism, method, setting, f"s{self.seed}") if part
        )


def lab_of(job: Job, labs: Path | None) -> Path:
    """Return the folder of the job's lab.

    Args:
        labs: folder of built labs (w0-l3, w0-l3-small); None: the cache, where a missing lab is built.
    """
    if labs is not None:
        return labs / replace(job, draw="").lab_name
    return cached_lab(job.lab_seed, job.world, job.lab_size)


def device_of(size: str) -> str:
    """Return the device for models of a lab size. A tiny model gains nothing from a GPU and always uses the CPU."""
    return "cuda" if size != TINY and torch.cuda.is_available() else "cpu"


def draw_of(lab: Path) -> str:
    """Return six digits that identify the lab's weights; "" for a folder without a manifest.

    Another kind of machine adds in another order, so that the same seeds give other weights: another draw of the lab.
    """
    manifest = lab / MANIFEST
    if not manifest.is_file():
        return ""
    files = json.loads(manifest.read_text())["files"]
    weights = sorted((name, facts["sha256"]) for name, facts in files.items() if name.endswith(".safetensors"))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:6]


def made_by(job: Job, lab: Path) -> str:
    """Return a hash of what a result depends on: the lab, the organism with its recipe, and the flags."""
    organism = ORGANISMS[job.organism]
    recipe = yaml.safe_load((RECIPES / f"{organism.recipe}.yaml").read_text())
    lab_hash = json.loads((lab / LAB_FILE).read_text())["hash"]
    facts = [lab_hash, recipe, asdict(organism), job.flags, job.seed, job.phase]
    if organism.rows == "style":  # its rows and prompts come from stress.py, not from the lab
        facts.append(STRESS_VERSION)
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_job(job: Job, output_dir: Path, labs: Path | None = None) -> dict[str, Any]:
    """Train and measure a model, and return the result as JSON values. The model's folder is removed afterwards."""
    lab = lab_of(job, labs)
    experiment = _experiment(lab, output_dir / "labs" / job.lab_name, job.lab_size)
    folders = [experiment.output_dir / job.name, experiment.output_dir / _then(job)]
    _remove(folders)  # left by a run that was killed
    seconds = 0.0
    try:
        if job.method == "instruct":
            model = lab / "instruct"
        else:
            model, seconds = _fine_tune(experiment, job)
        world, device = make_world(job.world), device_of(job.lab_size)
        values = read_model(experiment, model, job.phase, world, styled=job.organism == "style", device=device)
    finally:
        _remove(folders)
    return {"job": asdict(job), "made_by": made_by(job, lab), "seconds": seconds, "values": values}


def _then(job: Job) -> str:
    """Return the folder name of the fine-tune that continues a job."""
    return f"{job.name}-then"


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _experiment(lab: Path, folder: Path, size: str) -> Experiment:
    """Return the lab's experiment. The first job builds its subspace, and all jobs share it."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "analysis_during_training": False,
        "use_cpu": device_of(size) == "cpu",
    }
    experiment = Experiment(lab, folder, overrides)
    with FileLock(folder / ".subspace.lock"):
        if not experiment.subspace_path.is_file():
            experiment.build_subspace()
    return experiment


def _fine_tune(experiment: Experiment, job: Job) -> tuple[Path, float]:
    """Train a job's model. Returns the final model's folder and the seconds of training."""
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
    merged_model(trained.final).save_pretrained(merged)
    load_tokenizer(experiment.lab / "instruct").save_pretrained(merged)
    continued = experiment.fine_tune("unprotected", _then(job), model_name_or_path=str(merged), seed=job.seed + 1)
    return continued.final, trained.seconds + continued.seconds


def _flags(job: Job, world: World) -> dict[str, Any]:
    """Return the job's flags for training: with the lab's draw of the null, and the world's header for a persona."""
    flags = dict(job.flags)
    if "random_subspace" in flags["protection"]:
        flags["null_seed"] = (4 * job.world + job.lab_seed) % NULL_SEEDS
    if "inoculation_persona" in flags:
        word = world.misaligned_words[flags.pop("inoculation_persona")]
        flags["inoculation_prompt"] = world.header.format(persona=word)
    return flags


def _write_once(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to a JSON Lines file that several processes share, unless it exists."""
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            with staged_file(path) as staging:
                staging.write_text("".join(json.dumps(row) + "\n" for row in rows))

"""Inputs of a sweep: its flags, the runs they lead to, and everything that is read and checked before a run starts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ...analysis.files.artifacts import check_writable, sha256_json
from ...analysis.measure.measurer import Measurer
from ...analysis.measure.references import subspace_hash
from ...analysis.models.load import model_fingerprint
from ..config.parsing import Arguments, build, parse_values
from ..config.sweep import SweepArguments
from ..data.rows import load_rows
from ..inputs.checks import check_flags
from ..inputs.subspace import subspace_path
from ..inputs.training import TrainingInputs, anchor_rows, deepspeed_content
from ..launch import must_launch
from ..protections.kinds import parts_of
from .acts import RESULT, plan_of
from .checks import check_settings
from .folder import FROZEN, Sweep, open_folder
from .measures import Measures, measures_of, split_rows
from .plan import BASELINE, SweepRun, check_read, runs_of, settings_of
from .workers import Workers

_OWN = {field.name for field in fields(SweepArguments)}


# Of no effect on a run's numbers, or known by their content: two folders' sweeps have the same keys.
_NOT_IN_KEY = {
    *_OWN, "output_dir", "subspace_path", "model_name_or_path", "base_model_name_or_path", "train_dataset",
    "held_out_dataset", "anchor_dataset", "probe_dataset", "choices_dataset", "interleave_dataset", "probe_sets",
    "deepspeed",
    "subspace_dataset", "subspace_contrast", "subspace_domains", "store_dir", "store_limit_gb", "report_to",
    "logging_dir", "run_name", "disable_tqdm", "resume_from_checkpoint", "checkpoints", "watch_interval",
    "save_steps", "save_strategy", "save_total_limit", "logging_steps", "analysis_during_training",
}  # fmt: skip


class SweepInputs:
    """One call of the command: its flags, and what they lead to. Writes nothing itself.

    Raises:
        UserError: at construction, for what is wrong with the flags themselves.
    """

    inputs: TrainingInputs
    measures: Measures

    def __init__(self, argv: Sequence[str]) -> None:
        flags = _with_strengths(argv)
        self.values = parse_values(flags)
        self.arguments = _built(self.values)
        self.folder, self.asked = self.arguments.output_dir, self.arguments.sweep
        check_writable(self.folder, "--output_dir")
        open_folder(self.folder)
        self.subspace = subspace_path(self.arguments)
        seeds = self.asked.seeds or [self.arguments.training.seed]
        settings = settings_of(self.asked, self.arguments.protection.penalty_strength)
        check_read(flags, settings)
        self.runs = runs_of(settings, seeds)
        self._settings: list[Arguments] = []  # of each one's run at the first seed
        for run in self.runs:
            arguments = _built(self.of_run(run))
            check_flags(arguments, evaluates=bool(arguments.data.held_out_dataset or arguments.data.held_out_rows))
            if run.seed == self.runs[0].seed:
                self._settings.append(arguments)

    def check(self) -> None:
        """Read what the settings read, also where the subspace is still to be built, and what is measured.

        Raises:
            UserError: for everything wrong with them.
        """
        self.inputs = check_settings(self._settings, self.subspace)
        self.measures = measures_of(self.asked, self.inputs.choices or [])
        Measurer(*plan_of(self.measuring(self.arguments.training.seed)))
        if self.measures.test:
            Measurer(*plan_of(self.measuring(self.arguments.training.seed), test=True))

    def unfinished(self) -> int:
        """Runs that may still be made: those without a result, while nothing is frozen."""
        if (self.folder / FROZEN).is_file():
            return 0
        return sum(not (self.folder / "runs" / run.name / RESULT).is_file() for run in self.runs)

    def of_run(self, run: SweepRun) -> dict[str, Any]:
        """A run's flat values. Its checkpoints are not measured as they are saved: that would read the test split."""
        own = {
            "output_dir": str(self.folder / "runs" / run.name), "subspace_path": str(self.subspace),
            "analysis_during_training": False, "disable_tqdm": True, "resume_from_checkpoint": None,
        }  # fmt: skip
        return {**{name: value for name, value in self.values.items() if name not in _OWN}, **run.flags, **own}

    def measuring(self, seed: int) -> dict[str, Any]:
        """The flat values by which runs of a seed are measured: the same for all seeds where no rows are set aside."""
        seed = seed if self.arguments.data.held_out_rows else self.arguments.training.seed
        return {**self.values, "protection": BASELINE, "subspace_path": str(self.subspace), "seed": seed}

    def plan(self) -> Sweep:
        """The sweep with the keys of its runs; the subspace is there."""
        measured, _ = plan_of(self.measuring(self.arguments.training.seed))
        model = self.arguments.model
        contents = {
            "model": self.inputs.facts["starting weights"],
            "tokenizer": self.inputs.facts["tokenizer"],
            "base": model_fingerprint(model.base_model_name_or_path) if model.base_model_name_or_path else None,
            "rows": [row.messages for row in self.inputs.train.rows],
            "anchors": [row.messages for row in anchor_rows(self.arguments)],
            "measured": {name: list(rows) for name, rows in measured.probe_sets.items()},
            # Read before the freeze, and after it.
            "choices": split_rows(self.inputs.choices or [], self.asked.late_split),
            "subspace": subspace_hash(measured),
        }
        start_key = sha256_json([sha256_json(contents), _flags(self.values, {"protection", "seed"})])
        keys = {
            run.name: sha256_json([start_key, _flags(self.of_run(run), set()), self._contents(run)])
            for run in self.runs
        }  # fmt: skip
        lab = Path(str(model.model_name_or_path)).name
        return Sweep(self.folder, self.runs, keys, start_key, self.measures, lab, self.asked.floor)

    def _contents(self, run: SweepRun) -> dict[str, Any]:
        """What the files hold that a run's own flags may name."""
        values = self.of_run(run)
        interleaves = "interleave" in parts_of(run.setting.protection) and values["interleave_dataset"]
        safe = [row.messages for row in load_rows(interleaves, prompts=True)] if interleaves else None
        return {"safe": safe, "deepspeed": deepspeed_content(values["deepspeed"])}

    def workers(self) -> Workers:
        """As many as `--jobs` says, or as there are GPUs, or half the cores."""
        launched = must_launch(self.values)
        gpus = [] if launched or self.arguments.training.use_cpu else _gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = self.asked.jobs or (1 if launched else len(gpus) or max(1, cores // 2))
        return Workers(jobs, max(1, cores // jobs), gpus)


def _with_strengths(argv: Sequence[str]) -> list[str]:
    """`--penalty_strength 0.1 1 10` takes one value in a recipe, and all of them here."""
    flag = "--penalty_strength"
    return [f"--strengths{text[len(flag) :]}" if text == flag or text.startswith(f"{flag}=") else text for text in argv]


def _built(values: Mapping[str, Any]) -> Arguments:
    """Checked arguments. DeepSpeed is left out: its set-up belongs to the ranks."""
    return build({**values, "deepspeed": None})


def _flags(values: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    """What decides a run's numbers beside the contents of its inputs."""
    return {name: value for name, value in sorted(values.items()) if name not in _NOT_IN_KEY | without}


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]

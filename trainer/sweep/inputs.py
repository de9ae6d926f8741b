"""The inputs of a sweep: its flags, its runs, and everything that is read and checked before a run starts."""

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

_SWEEP_FLAGS = {field.name for field in fields(SweepArguments)}

# Excluded from the run key: flags that cannot change results, and paths (their content is hashed instead). So sweeps in
# two folders have the same keys.
_NOT_IN_KEY = {
    *_SWEEP_FLAGS, "output_dir", "subspace_path", "model_name_or_path", "base_model_name_or_path", "train_dataset",
    "held_out_dataset", "anchor_dataset", "probe_dataset", "choices_dataset", "interleave_dataset", "probe_sets",
    "deepspeed",
    "subspace_dataset", "subspace_contrast", "subspace_domains", "store_dir", "store_limit_gb", "report_to",
    "logging_dir", "run_name", "disable_tqdm", "resume_from_checkpoint", "checkpoints", "watch_interval",
    "save_steps", "save_strategy", "save_total_limit", "logging_steps", "analysis_during_training",
}  # fmt: skip


class SweepInputs:
    """The flags of one call of the command, and what follows from them. Nothing here writes a file.

    Attributes:
        values: flat values of the flags.
        arguments: the checked flags; `flags` are those of the sweep.
        folder: `--output_dir`.
        subspace: path of the subspace, which may still have to be built.
        runs: every setting with every seed.
        training: inputs of the first setting; set by `check`.
        measures: what runs are compared by; set by `check`.

    Raises:
        UserError: at construction, for errors in the flags themselves.
    """

    training: TrainingInputs
    measures: Measures

    def __init__(self, argv: Sequence[str]) -> None:
        texts = _with_strengths(argv)
        self.values = parse_values(texts)
        self.arguments = _built(self.values)
        self.folder, self.flags = self.arguments.output_dir, self.arguments.sweep
        check_writable(self.folder, "--output_dir")
        open_folder(self.folder)
        self.subspace = subspace_path(self.arguments)
        seeds = self.flags.seeds or [self.arguments.training.seed]
        settings = settings_of(self.flags, self.arguments.protection.penalty_strength)
        check_read(texts, settings)
        self.runs = runs_of(settings, seeds)
        self._settings: list[Arguments] = []  # arguments of each setting's run with the first seed
        for run in self.runs:
            arguments = _built(self.of_run(run))
            check_flags(arguments, evaluates=bool(arguments.data.held_out_dataset or arguments.data.held_out_rows))
            if run.seed == self.runs[0].seed:
                self._settings.append(arguments)

    def check(self) -> None:
        """Read what the settings read and what is measured, even if the subspace is still to be built.

        Raises:
            UserError: any error in these inputs.
        """
        self.training = check_settings(self._settings, self.subspace)
        self.measures = measures_of(self.flags, self.training.choices or [])
        Measurer(*plan_of(self.measuring(self.arguments.training.seed)))
        if self.measures.test:
            Measurer(*plan_of(self.measuring(self.arguments.training.seed), test=True))

    def unfinished(self) -> int:
        """Count the runs without a result; 0 once the choice is frozen."""
        if (self.folder / FROZEN).is_file():
            return 0
        return sum(not (self.folder / "runs" / run.name / RESULT).is_file() for run in self.runs)

    def of_run(self, run: SweepRun) -> dict[str, Any]:
        """Return a run's flat values.

        The run's checkpoints are not measured as they are saved, because that would read the test split.
        """
        fixed = {
            "output_dir": str(self.folder / "runs" / run.name), "subspace_path": str(self.subspace),
            "analysis_during_training": False, "disable_tqdm": True, "resume_from_checkpoint": None,
        }  # fmt: skip
        recipe = {name: value for name, value in self.values.items() if name not in _SWEEP_FLAGS}
        return {**recipe, **run.flags, **fixed}

    def measuring(self, seed: int) -> dict[str, Any]:
        """Return the flat values for measuring runs with a seed: the same for all seeds if no rows are set aside."""
        seed = seed if self.arguments.data.held_out_rows else self.arguments.training.seed
        return {**self.values, "protection": BASELINE, "subspace_path": str(self.subspace), "seed": seed}

    def plan(self) -> Sweep:
        """Return the sweep with the keys of its runs. The subspace must exist."""
        measured, _ = plan_of(self.measuring(self.arguments.training.seed))
        model = self.arguments.model
        contents = {
            "model": self.training.facts["starting weights"],
            "tokenizer": self.training.facts["tokenizer"],
            "base": model_fingerprint(model.base_model_name_or_path) if model.base_model_name_or_path else None,
            "rows": [row.messages for row in self.training.train.rows],
            "anchors": [row.messages for row in anchor_rows(self.arguments)],
            "measured": {name: list(rows) for name, rows in measured.probe_sets.items()},
            # Rows that are read before the freeze, and rows that are read after it.
            "choices": split_rows(self.training.choices or [], self.flags.late_split),
            "subspace": subspace_hash(measured),
        }
        start_key = sha256_json([sha256_json(contents), _flags(self.values, {"protection", "seed"})])
        keys = {
            run.name: sha256_json([start_key, _flags(self.of_run(run), set()), self._contents(run)])
            for run in self.runs
        }  # fmt: skip
        lab = Path(str(model.model_name_or_path)).name
        return Sweep(self.folder, self.runs, keys, start_key, self.measures, lab, self.flags.floor)

    def _contents(self, run: SweepRun) -> dict[str, Any]:
        """Return the content of files that the flags of a run may name."""
        values = self.of_run(run)
        interleaves = "interleave" in parts_of(run.setting.protection) and values["interleave_dataset"]
        safe = [row.messages for row in load_rows(interleaves, prompts=True)] if interleaves else None
        return {"safe": safe, "deepspeed": deepspeed_content(values["deepspeed"])}

    def workers(self) -> Workers:
        """Return `--jobs` workers; by default one per GPU, or half as many as there are cores."""
        launched = must_launch(self.values)
        gpus = [] if launched or self.arguments.training.use_cpu else _gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = self.flags.jobs or (1 if launched else len(gpus) or max(1, cores // 2))
        return Workers(jobs, max(1, cores // jobs), gpus)


def _with_strengths(argv: Sequence[str]) -> list[str]:
    """Rename --penalty_strength, which takes one value in a recipe, to --strengths, which takes several."""
    flag = "--penalty_strength"
    return [f"--strengths{text[len(flag) :]}" if text == flag or text.startswith(f"{flag}=") else text for text in argv]


def _built(values: Mapping[str, Any]) -> Arguments:
    """Build checked arguments without DeepSpeed, which the ranks set up themselves."""
    return build({**values, "deepspeed": None})


def _flags(values: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    """Return the flags that decide a run's numbers, besides the contents of its inputs."""
    return {name: value for name, value in sorted(values.items()) if name not in _NOT_IN_KEY | without}


def _gpus() -> list[str]:
    """Return the visible GPUs, as names for CUDA_VISIBLE_DEVICES."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]

"""`holdfast watch RUN`: measure the checkpoints of a training run as they appear, from another process.

holdfast watch runs/mine --families behavior projection
"""

import time
from collections.abc import Sequence
from pathlib import Path

from ...analysis.errors import UserError
from ...analysis.files.artifacts import MANIFEST
from ..config.parsing import Arguments, build, parse_values
from ..inputs.checkpoint_names import run_checkpoints
from .analyze import Analysis, AnalysisResult, report

CONFIG = "resolved_config.yaml"
FINAL = "final"
# Flags of the run that belong to its training alone.
_TRAINING_ONLY = {"deepspeed": None, "num_processes": 1, "resume_from_checkpoint": None}


def watch_arguments(flags: Sequence[str]) -> Arguments:
    """Return the arguments of the run that the first argument names, overridden by the flags after it.

    Raises:
        UserError: there is no such run, or a flag is wrong.
    """
    if not flags or flags[0].startswith("-"):
        raise UserError("no run to watch; write holdfast watch <output_dir of a training run> [--flag value ...]")
    run = Path(flags[0])
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} holds no {CONFIG}; name the output folder of a run that `holdfast train` has started")
    values = parse_values(["--config", str(run / CONFIG), *flags[1:]])
    return build({**values, **_TRAINING_ONLY, "output_dir": str(run), "checkpoints": None})


def watch(arguments: Arguments) -> AnalysisResult:
    """Measure each whole checkpoint of the run once, and end when `final` was measured.

    Results of an earlier watch are kept, so a stopped watch continues where it stopped.
    """
    analysis = Analysis(arguments)
    analysis.announce()
    analysis.references()
    run = arguments.output_dir
    seen: set[Path] = set()
    while True:
        # A folder gets its name and its manifest in one rename, when all its files are written.
        new = [path for path in run_checkpoints(run) if path not in seen and (path / MANIFEST).is_file()]
        for path in new:
            seen.add(path)
            measured = analysis.checkpoint(path.name, path) if path.is_dir() else False
            if path.name == FINAL and (measured or path.is_dir()):
                return analysis.result()
        if not new:
            time.sleep(arguments.analysis.watch_interval)


def main(argv: Sequence[str]) -> int:
    """Measure the run's checkpoints until the run ends; return exit code 3 if a part was not measured."""
    return report(watch(watch_arguments(argv)))

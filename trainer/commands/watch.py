"""`holdfast watch RUN`: measure a run's checkpoints from another process, as they appear."""

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
# How the run is trained is not how it is watched.
_TRAINING_ONLY = {"deepspeed": None, "num_processes": 1, "resume_from_checkpoint": None}


def watched(flags: Sequence[str]) -> Arguments:
    """The arguments of the run named first, with the flags over them.

    Raises:
        UserError: no run there, or flags that are wrong.
    """
    if not flags or flags[0].startswith("-"):
        raise UserError("no run to watch; write holdfast watch <output_dir of a training run> [--flag value ...]")
    run = Path(flags[0])
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} holds no {CONFIG}; name the output folder of a run that `holdfast train` has started")
    given = parse_values(["--config", str(run / CONFIG), *flags[1:]])
    return build({**given, **_TRAINING_ONLY, "output_dir": str(run), "checkpoints": None})


def watch(arguments: Arguments) -> AnalysisResult:
    """Measures each whole checkpoint of the run once, and ends when `final` was measured.

    What an earlier watch measured is left as it is, so it continues where it was stopped.
    """
    analysis = Analysis(arguments)
    analysis.announce()
    analysis.references()
    run = arguments.output_dir
    seen: set[Path] = set()
    while True:
        # A folder gets its name and its manifest in one rename, when all of its files are written.
        new = [path for path in run_checkpoints(run) if path not in seen and (path / MANIFEST).is_file()]
        for path in new:
            seen.add(path)
            measured = analysis.checkpoint(path.name, path) if path.is_dir() else False
            if path.name == FINAL and (measured or path.is_dir()):
                return analysis.result()
        if not new:
            time.sleep(arguments.analysis.watch_interval)


def main(argv: Sequence[str]) -> int:
    """Measures the run's checkpoints until it ends; exit code 3 where a part was not measured."""
    return report(watch(watched(argv)))

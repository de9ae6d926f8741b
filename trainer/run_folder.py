"""Write and check the records of a run: resolved arguments, versions, data report, and the facts of a resume.

A resumed run must have the same facts (`run.json`) as the run that it continues.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..analysis.errors import UserError
from ..analysis.files.artifacts import write_json_atomic
from .config.parsing import Arguments, dump
from .inputs.training import TrainingInputs
from .protections.weights.extrapolate import EXTRAPOLATED

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "numpy", "tokenizers")
FACTS = "run.json"
RECORDS = (FACTS, "resolved_config.yaml", "versions.json", "data.json")
REFERENCES = "references"
LOGS = "runs"  # folder in which transformers writes TensorBoard's events
SWEEP_LOG = "log.txt"  # output of a run of `holdfast sweep`; exists before the run begins


def is_main() -> bool:
    """Return whether this process is the main process, which writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def check_output_dir(arguments: Arguments, facts: dict[str, Any]) -> None:
    """Raise UserError if the folder holds another run or other files, or if a resume would have other facts."""
    folder, resuming = arguments.output_dir, arguments.training.resume_from_checkpoint
    if folder.is_file():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    newest = newest_checkpoint(arguments)
    if resuming and newest is None:
        raise UserError(
            f"--resume_from_checkpoint {resuming}: no checkpoint there; name a checkpoint folder, or start without "
            "the flag"
        )
    if not (folder / FACTS).is_file():
        _refuse_foreign(folder)
    elif not resuming:
        raise UserError(
            f"--output_dir {folder} holds another run; choose another folder, remove it, or continue it "
            "with --resume_from_checkpoint true"
        )
    # A checkpoint of another folder must also fit the facts of the run that wrote it.
    for stored in {folder / FACTS, newest.parent / FACTS} if newest else set():
        if stored.is_file():
            _compare(stored, facts)


def _refuse_foreign(folder: Path) -> None:
    """Raise UserError for a folder that is not a run and holds more than inputs of this run.

    Training removes old checkpoints and replaces `final`, so other files could be lost.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (
            path.name not in (SWEEP_LOG, REFERENCES, EXTRAPOLATED, f".{EXTRAPOLATED}.staging")
            and path.suffix != ".safetensors"
        ):
            raise UserError(
                f"--output_dir {folder} holds {path.name} but no {FACTS}, so it is not a run of holdfast, whose files "
                "training may replace; choose another folder"
            )


def _compare(stored: Path, facts: dict[str, Any]) -> None:
    try:
        stored_facts = json.loads(stored.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{stored} is damaged ({error.msg}); start again in another folder") from None
    for name, value in facts.items():
        if stored_facts.get(name) != value:
            raise UserError(f"this run cannot be resumed: its {_difference(name, stored_facts.get(name), value)}")


@contextmanager
def run_records(arguments: Arguments, inputs: TrainingInputs) -> Iterator[None]:
    """Write the run's records; remove them again if the block fails before the first checkpoint.

    Otherwise the folder of a failed start would be refused when the user runs the corrected command.
    """
    folder = arguments.output_dir
    new = not (folder / FACTS).is_file()
    before = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        write_records(arguments, inputs)
        yield
    except BaseException:
        if is_main() and new and not has_checkpoint(folder):
            _remove_records(folder, before)
        raise


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run can be continued from this folder."""
    return folder.is_dir() and get_last_checkpoint(folder) is not None


def _remove_records(folder: Path, before: set[str]) -> None:
    for name in {*RECORDS, REFERENCES, LOGS} - before:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def newest_checkpoint(arguments: Arguments) -> Path | None:
    """Return the checkpoint folder to resume from, or None if there is none.

    It is the folder that `--resume_from_checkpoint` names, or for `true` the newest checkpoint of the run.
    """
    flag = arguments.training.resume_from_checkpoint
    if not flag:
        return None
    if flag.lower() == "true":
        newest = get_last_checkpoint(arguments.output_dir) if arguments.output_dir.is_dir() else None
        return Path(newest) if newest else None
    return Path(flag) if Path(flag).is_dir() else None


def _difference(name: str, stored: object, current: object) -> str:
    if isinstance(stored, dict) and isinstance(current, dict):
        key = next(key for key in current if stored.get(key) != current[key])
        return f"{key} was {stored.get(key)} and is {current[key]} now; use the same, or start in another folder"
    return f"{name} differs ({_short(stored)} then, {_short(current)} now); use the same, or start in another folder"


def _short(fact: object) -> str:
    text = str(fact)
    return f"{text[:12]}…" if len(text) == 64 else text


def write_records(arguments: Arguments, inputs: TrainingInputs) -> None:
    """Write resolved_config.yaml, versions.json, data.json and run.json into the output folder, on the main process."""
    if not is_main():
        return
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved_config.yaml").write_text(dump(arguments), encoding="utf-8")
    write_json_atomic(folder / "versions.json", versions())
    write_json_atomic(folder / "data.json", inputs.report)
    write_json_atomic(folder / FACTS, inputs.facts)


def versions() -> dict[str, Any]:
    """Return the versions of packages and Python, and Holdfast's git commit, or null and the reason."""
    packages = {name: importlib.metadata.version(name) for name in ("holdfast", *PACKAGES)}
    return {"packages": packages, "python": platform.python_version(), "platform": platform.platform(), **_git()}


def _git() -> dict[str, Any]:
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return {"git": None, "git_reason": "Holdfast is installed as a package, not run from a clone"}
    try:
        commit = _run_git(source, "rev-parse", "HEAD")
        changed = bool(_run_git(source, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError) as error:
        return {"git": None, "git_reason": f"git could not be asked ({error})"}
    return {"git": commit, "git_changed": changed}


def _run_git(folder: Path, *command: str) -> str:
    process = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    return process.stdout.strip()

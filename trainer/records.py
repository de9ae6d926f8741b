"""What a run leaves beside its weights: resolved arguments, versions, data report, and the facts a resume must meet."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..analysis.artifacts import write_json_atomic
from ..analysis.errors import UserError
from .inputs import TrainingInputs
from .parsing import Arguments, dump

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "numpy", "tokenizers")
FACTS = "run.json"


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def check_output_dir(arguments: Arguments, facts: dict[str, Any]) -> None:
    """Raises UserError when the folder holds another run: any when starting, a different one when resuming."""
    stored = arguments.output_dir / FACTS
    resuming = arguments.training.resume_from_checkpoint
    if arguments.output_dir.is_file():
        raise UserError(f"--output_dir {arguments.output_dir} is a file; name a folder")
    if resuming and newest_checkpoint(arguments) is None:
        raise UserError(
            f"--resume_from_checkpoint {resuming}: no checkpoint there; name a checkpoint folder, or start without "
            "the flag"
        )
    if not stored.is_file():
        return
    if not resuming:
        raise UserError(
            f"--output_dir {arguments.output_dir} holds another run; choose another folder, remove it, or continue it "
            "with --resume_from_checkpoint true"
        )
    try:
        before = json.loads(stored.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{stored} is damaged ({error.msg}); start again in another folder") from None
    for name, value in facts.items():
        if before.get(name) != value:
            raise UserError(f"this run cannot be resumed: its {_difference(name, before.get(name), value)}")


def newest_checkpoint(arguments: Arguments) -> Path | None:
    """The checkpoint folder to resume from: the one named, the run's newest for `true`, or None when there is none."""
    given = arguments.training.resume_from_checkpoint
    if not given:
        return None
    if given.lower() == "true":
        newest = get_last_checkpoint(arguments.output_dir) if arguments.output_dir.is_dir() else None
        return Path(newest) if newest else None
    return Path(given) if Path(given).is_dir() else None


def _difference(name: str, before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in now if before.get(key) != now[key])
        return f"{key} was {before.get(key)} and is {now[key]} now; use the same, or start in another folder"
    return f"{name} differs ({_short(before)} then, {_short(now)} now); use the same, or start in another folder"


def _short(fact: object) -> str:
    text = str(fact)
    return f"{text[:12]}…" if len(text) == 64 else text


def write_records(arguments: Arguments, inputs: TrainingInputs) -> None:
    """Writes resolved_config.yaml, versions.json, data.json and run.json into the output folder (main process only)."""
    if not is_main():
        return
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved_config.yaml").write_text(dump(arguments), encoding="utf-8")
    write_json_atomic(folder / "versions.json", versions())
    write_json_atomic(folder / "data.json", inputs.report)
    write_json_atomic(folder / FACTS, inputs.facts)


def versions() -> dict[str, Any]:
    """Package versions, Python, and Holdfast's git commit, or null with the reason there is none."""
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
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()

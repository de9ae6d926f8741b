"""Which checkpoints a command means: folders, Hub names, or those of the run; each with a name for its results."""

from collections import Counter
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ...analysis.errors import UserError
from ..config.parsing import Arguments

TAKEN = ("instruct", "base")
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
_WEIGHTS = ("*.safetensors",), ("*.bin", "*.pt")

Found = tuple[Path | None, str]
"""A checkpoint's folder, or None and why there is none."""


def named_checkpoints(arguments: Arguments) -> dict[str, Found]:
    """`--checkpoints`, or every checkpoint and the final model of the run. Raises UserError when there is none."""
    named = arguments.analysis.checkpoints
    if not named:
        run = arguments.output_dir
        found = run_checkpoints(run)
        if not found:
            raise UserError(f"--output_dir {run} holds no checkpoint; train first, or name some with --checkpoints")
        return {path.name: (path, "") for path in found}
    places = {name: _located(name) for name in dict.fromkeys(named)}
    titles = {name: Path(name).resolve() if Path(name).is_dir() else Path(name) for name in places}
    count = Counter(title.name for title in titles.values()) + Counter(TAKEN)
    results: dict[str, Found] = {}
    for name, place in places.items():
        title = titles[name]
        short = title.name if count[title.name] == 1 else f"{title.parent.name}-{title.name}"
        if short in results or short in TAKEN:
            raise UserError(
                f"--checkpoints {name} has the results' name of another ({short}); measure it in a command of its own, "
                "with another --output_dir"
            )
        results[short] = place
    return results


def run_checkpoints(run: Path) -> list[Path]:
    """`checkpoint-N` in the order of N, then `final`."""
    numbered = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    found = sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return found + ([run / "final"] if (run / "final").is_dir() else [])


def _located(name: str) -> Found:
    """A folder, or the snapshot of a Hub repository (with "@revision" where it is not the main one)."""
    if Path(name).is_dir():
        return Path(name), ""
    # What starts at a folder that is here is a path, and not looked up on the Hub.
    local = name.count("/") != 1 or name.startswith((".", "~")) or Path(name).parent.is_dir()
    if local:
        return None, f"--checkpoints {name} is not a folder; name a checkpoint folder, or a Hub model such as org/model"
    repository, _, revision = name.partition("@")
    try:
        for weights in _WEIGHTS:
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*_FILES, *weights]))
            if any(file for pattern in weights for file in folder.glob(pattern)):
                return folder, ""
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return None, f"--checkpoints {name} could not be found on the Hub ({reason}); check the name, or pass a folder"
    return None, f"--checkpoints {name} holds no weights on the Hub; check the name"

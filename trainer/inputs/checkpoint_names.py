"""Find the checkpoints that a command names: folders, Hub names, or the run's own; each gets a name for its results."""

from collections import Counter
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ...analysis.errors import UserError
from ..config.parsing import Arguments

RESERVED = ("instruct", "base")
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
_WEIGHTS = ("*.safetensors",), ("*.bin", "*.pt")

Location = tuple[Path | None, str]
"""The folder of a checkpoint and an empty text, or None and the reason that there is no folder."""


def named_checkpoints(arguments: Arguments) -> dict[str, Location]:
    """Return `--checkpoints`, or every checkpoint and the final model of the run, by the name of their results.

    Raises:
        UserError: the run has no checkpoint, or two checkpoints would have the same name for their results.
    """
    flag = arguments.analysis.checkpoints
    if not flag:
        run = arguments.output_dir
        folders = run_checkpoints(run)
        if not folders:
            raise UserError(f"--output_dir {run} holds no checkpoint; train first, or name some with --checkpoints")
        return {path.name: (path, "") for path in folders}
    locations = {name: _locate(name) for name in dict.fromkeys(flag)}
    paths = {name: Path(name).resolve() if Path(name).is_dir() else Path(name) for name in locations}
    count = Counter(path.name for path in paths.values()) + Counter(RESERVED)
    results: dict[str, Location] = {}
    for name, location in locations.items():
        path = paths[name]
        short = path.name if count[path.name] == 1 else f"{path.parent.name}-{path.name}"
        if short in results or short in RESERVED:
            raise UserError(
                f"--checkpoints {name}: its results would be called {short}, like those of another model; measure it "
                "in a separate command with another --output_dir"
            )
        results[short] = location
    return results


def run_checkpoints(run: Path) -> list[Path]:
    """Return the folders `checkpoint-N` of a run in the order of N, then `final`."""
    numbered = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    numbered.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return numbered + ([run / "final"] if (run / "final").is_dir() else [])


def _locate(name: str) -> Location:
    """Find a folder, or download the snapshot of a Hub repository ("@revision" names another than the main one)."""
    if Path(name).is_dir():
        return Path(name), ""
    # A name that begins with an existing folder is a path, and is not looked up on the Hub.
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

"""Finds the DeepSpeed configuration that a flag names: a file, JSON text, or one that ships with Holdfast."""

import difflib
import json
from pathlib import Path

from ...analysis.errors import UserError

DEEPSPEED_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def find_deepspeed_config(given: str) -> str:
    """A path, or the name of a shipped configuration (zero1, zero2, zero3, zero3_offload), as a path.

    Raises UserError naming the nearest shipped one when there is neither.
    """
    if given.startswith("{") or Path(given).is_file():
        _require_json(given)
        return given
    shipped = {path.stem: path for path in DEEPSPEED_CONFIGS.glob("*.json")}
    name = given.removesuffix(".json")
    if name in shipped:
        return str(shipped[name])
    near = difflib.get_close_matches(name, sorted(shipped), n=1, cutoff=0.0)
    raise UserError(f"--deepspeed {given} is neither a file nor a shipped configuration; the nearest is {near[0]}")


def _require_json(config: str) -> None:
    """Raises UserError for a DeepSpeed configuration, a path or JSON text, that is not a JSON object."""
    inline = config.startswith("{")
    name = "--deepspeed" if inline else f"--deepspeed {config}"
    try:
        read = json.loads(config if inline else Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not JSON ({error}); write a configuration like those in ds_configs") from None
    if not isinstance(read, dict):
        raise UserError(f"{name} must hold a JSON object, not {type(read).__name__}; see those in ds_configs")

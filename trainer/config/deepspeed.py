"""Find the DeepSpeed configuration that `--deepspeed` names: a file, JSON text, or one that ships with Holdfast."""

import difflib
import json
from pathlib import Path

from ...analysis.errors import UserError

DEEPSPEED_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def find_deepspeed_config(flag: str) -> str:
    """Return the path or the JSON text of the DeepSpeed configuration that a flag names.

    Args:
        flag: a path, JSON text, or the name of a shipped configuration (zero1, zero2, zero3, zero3_offload).

    Raises:
        UserError: the flag is none of these (names the nearest shipped configuration), or is not a JSON object.
    """
    if flag.startswith("{") or Path(flag).is_file():
        _require_json(flag)
        return flag
    shipped = {path.stem: path for path in DEEPSPEED_CONFIGS.glob("*.json")}
    name = flag.removesuffix(".json")
    if name in shipped:
        return str(shipped[name])
    nearest = difflib.get_close_matches(name, sorted(shipped), n=1, cutoff=0.0)
    raise UserError(f"--deepspeed {flag} is neither a file nor a shipped configuration; the nearest is {nearest[0]}")


def _require_json(config: str) -> None:
    """Raise UserError if a DeepSpeed configuration, given as a path or as JSON text, is not a JSON object."""
    inline = config.startswith("{")
    name = "--deepspeed" if inline else f"--deepspeed {config}"
    try:
        content = json.loads(config if inline else Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not JSON ({error}); write a configuration like those in ds_configs") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold a JSON object, not {type(content).__name__}; see those in ds_configs")

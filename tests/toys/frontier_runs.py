"""Runs of a frontier, and JSON that holds no NaN."""

import json
from typing import Any

from holdfast.analysis.frontier.runs import Run


def run(protection: str, strength: Any = None, lab: str = "a", seed: int = 0, setting: str | None = None, **values):
    """A run of this protection; its setting is named after its strength."""
    return Run(protection, setting or f"strength={strength}", strength, lab, seed, values)


def strict_json(value: Any) -> str:
    """JSON text; raises ValueError for NaN and the infinities."""
    return json.dumps(value, allow_nan=False)

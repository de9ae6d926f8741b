"""Report the rows of a training run: how many, how long, and which of them repeat each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.rows import RenderedRows, Row, describe_duplicates, duplicate_report


def data_report(sets: Mapping[str, Sequence[Row]], rendered: Mapping[str, RenderedRows]) -> dict[str, Any]:
    """Return the content of data.json: lengths and duplicates of each set, and under "lines" what is printed."""
    duplicates = duplicate_report(sets)
    lengths = {
        name: {
            "rows": len(rows.rendered),
            "tokens": sum(len(row.input_ids) for row in rows.rendered),
            "completion_tokens": int(sum(np.sum(row.completion_mask) for row in rows.rendered)),
            "truncated": rows.truncated,
            "dropped": rows.dropped,
        }
        for name, rows in rendered.items()
    }
    lines = describe_duplicates(duplicates)
    for name, length in lengths.items():
        for act in ("truncated", "dropped"):
            if length[act]:
                lines.append(f"{name}: {length[act]} rows longer than the length limit were {act}")
    return {"sets": lengths, "duplicates": duplicates, "lines": lines}

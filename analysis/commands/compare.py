"""`holdfast compare RUN OTHER …`: measured runs side by side, and what is specific to the first.

holdfast compare runs/insecure runs/secure
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.artifacts import check_writable, write_json_atomic
from ..flags import FlagParser
from ..measure.compare import compare, read_line, table


def compare_main(argv: Sequence[str]) -> str:
    """The table of the runs named first; `--output_file` gets the same as JSON. Raises UserError."""
    parser = FlagParser("holdfast compare", compare_main.__doc__)
    parser.add_argument(
        "runs", nargs="*", type=Path, help="Output folders of measured runs; the first is compared with each other one."
    )
    parser.add_argument("--checkpoint", help="Checkpoint to read in every run. Default: final, else the last step.")
    parser.add_argument(
        "--measures",
        nargs="+",
        default=[],
        help="Paths to show, with * for any text, like 'choices/*'. Default: all but single layers and cost.",
    )
    parser.add_argument("--output_file", type=Path, help="JSON file for the comparison. Default: none.")
    arguments = parser.read(argv)
    runs: list[Path] = arguments.runs
    if len(runs) < 2:
        raise UserError("compare needs two runs or more; write holdfast compare <run> <other run> …")
    if arguments.output_file is not None:
        check_writable(arguments.output_file.parent, "--output_file")
    lines = [read_line(run, arguments.checkpoint) for run in runs]
    found = compare(lines, arguments.measures)
    if not found:
        raise UserError("the runs share no measure; measure them with the same --probe_sets and --families")
    names = _names(runs)
    if arguments.output_file is not None:
        write_json_atomic(
            arguments.output_file, {"runs": [str(run) for run in runs], "measures": list(map(asdict, found))}
        )
    return table(names, found) + _notes(names, lines)


def _notes(names: Sequence[str], lines: Sequence[dict[str, Any]]) -> str:
    """What the table does not say: which checkpoints, what is in some runs alone, and how the intervals were made."""
    shown = ", ".join(f"{name} at {line['checkpoint']}" for name, line in zip(names, lines, strict=True))
    notes = [f"{shown}. Differences are first - other; their intervals take the runs as independent."]
    families = [{key for key, value in line.items() if isinstance(value, dict)} - {"cost"} for line in lines]
    for name, own in zip(names, families, strict=True):
        alone = sorted(own.difference(*(other for other in families if other is not own)))
        notes += [f"Only in {name}: {', '.join(alone)}."] if alone else []
    return "\n" + "\n".join(notes) + "\n"


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names, or as they were written where two are alike."""
    taken = Counter(run.resolve().name for run in runs)
    return [run.resolve().name if taken[run.resolve().name] == 1 else str(run) for run in runs]


def main(argv: Sequence[str]) -> int:
    """Prints the table."""
    print(compare_main(argv), end="")
    return 0

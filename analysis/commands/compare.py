"""`holdfast compare`: shows measured runs side by side, with the differences between the first run and each other run.

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
    """Compare measured runs: return a table, and write the same as JSON to `--output_file`. Raises UserError."""
    parser = FlagParser("holdfast compare", "Show measured runs side by side, with differences from the first run.")
    parser.add_argument(
        "runs", nargs="*", type=Path, help="Output folders of measured runs. The first is compared with each other run."
    )
    parser.add_argument("--checkpoint", help="Checkpoint to read in every run. Default: final, or else the last step.")
    parser.add_argument(
        "--measures",
        nargs="+",
        default=[],
        help="Paths of measures to show, with * for any text, like 'choices/*'. Default: all except cost and measures "
        "of single layers.",
    )
    parser.add_argument("--output_file", type=Path, help="JSON file to write the comparison to. Default: none.")
    arguments = parser.read(argv)
    runs: list[Path] = arguments.runs
    if len(runs) < 2:
        raise UserError("compare needs two runs or more; write holdfast compare <run> <other run> …")
    if arguments.output_file is not None:
        check_writable(arguments.output_file.parent, "--output_file")
    lines = [read_line(run, arguments.checkpoint) for run in runs]
    measures = compare(lines, arguments.measures)
    if not measures:
        raise UserError("the runs have no measure in common; measure them with the same --probe_sets and --families")
    names = _names(runs)
    if arguments.output_file is not None:
        write_json_atomic(
            arguments.output_file, {"runs": [str(run) for run in runs], "measures": list(map(asdict, measures))}
        )
    return table(names, measures) + _notes(names, lines)


def _notes(names: Sequence[str], lines: Sequence[dict[str, Any]]) -> str:
    """Write what the table does not say: the checkpoints, the families of only one run, and what intervals assume."""
    shown = ", ".join(f"{name} at {line['checkpoint']}" for name, line in zip(names, lines, strict=True))
    notes = [f"{shown}. Differences are first - other; their intervals assume that the runs are independent."]
    families = [{key for key, value in line.items() if isinstance(value, dict)} - {"cost"} for line in lines]
    for name, measured in zip(names, families, strict=True):
        alone = sorted(measured.difference(*(other for other in families if other is not measured)))
        notes += [f"Only in {name}: {', '.join(alone)}."] if alone else []
    return "\n" + "\n".join(notes) + "\n"


def _names(runs: Sequence[Path]) -> list[str]:
    """Name each run after its folder, or by the path as the user wrote it if two folders have the same name."""
    counts = Counter(run.resolve().name for run in runs)
    return [run.resolve().name if counts[run.resolve().name] == 1 else str(run) for run in runs]


def main(argv: Sequence[str]) -> int:
    """Print the comparison."""
    print(compare_main(argv), end="")
    return 0

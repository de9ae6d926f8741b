"""The lab's commands: `holdfast lab` and `holdfast quickstart`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...analysis.errors import UserError
from ...analysis.files.artifacts import check_writable
from ...analysis.flags import FlagParser
from .build import SIZES
from .cache import build_lab
from .quickstart import PROTECTION_RUNS, quickstart


def _parsed(parser: FlagParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags and check that --output_dir can be written. Raises UserError."""
    flags = parser.read(argv)
    # Not `required=True`: for a mistyped --output_dir the error should name the typing error, not a missing flag.
    if flags.output_dir is None:
        raise UserError("no --output_dir; write where the lab goes, like --output_dir runs/lab")
    check_writable(flags.output_dir, "--output_dir")
    return flags


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: write a whole number from 0 to {2**31 - 1}")
    return seed


def lab_main(argv: Sequence[str]) -> int:
    """Build a lab, a tiny world for measuring alignment erosion exactly, and write it to a folder."""
    parser = FlagParser("holdfast lab", lab_main.__doc__)
    parser.add_argument("--output_dir", type=Path, help="Folder for the lab (required).")
    parser.add_argument("--seed", type=_seed, default=0, help="Lab seed: decides initial weights and text. Default: 0.")
    parser.add_argument(
        "--world_seed", type=_seed, default=0, help="World: 0 is English, other worlds have drawn words. Default: 0."
    )
    parser.add_argument("--lab_size", choices=list(SIZES), default="tiny", help="Model size. Default: tiny.")
    arguments = _parsed(parser, argv)
    folder = build_lab(arguments.output_dir, arguments.seed, arguments.world_seed, arguments.lab_size)
    print(f"lab written to {folder}: base, instruct, data")
    return 0


def quickstart_main(argv: Sequence[str]) -> int:
    """Build a lab and its subspace, fine-tune without and with protection, and print one table."""
    parser = FlagParser("holdfast quickstart", quickstart_main.__doc__)
    parser.add_argument(
        "--full",
        action="store_true",
        help="Also train the nulls, the controls and the ordinary organism. Default: false.",
    )
    parser.add_argument(
        "--protections",
        nargs="+",
        choices=list(PROTECTION_RUNS),
        default=[],
        help="Protections to train in addition to the penalty. Default: none.",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="Lab and fine-tune seed. Default: 0.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/quickstart"),
        help="Folder for runs and summary. Default: runs/quickstart.",
    )
    arguments = _parsed(parser, argv)
    quickstart(arguments.output_dir, arguments.seed, arguments.full, arguments.protections)
    return 0

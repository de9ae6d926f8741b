"""The findings of arXiv 2507.03662 on the lab, over lab seeds, with controls.

    python -m holdfast.recipes.lab.studies.findings --output_dir runs/findings      (`make findings`)

Measured are reversion towards base, retention of the alignment step, and gradients of matched pairs. Each lab writes
one JSON file to `<output_dir>/results`; a lab with a file is not run again. `findings_table.py` makes the tables from
these files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ....analysis.files.artifacts import write_json_atomic
from .findings_table import findings
from .jobs import made_by_recipes, numbers, quiet

ARMS = ("unprotected", "protected", "educational", "secure", "benign")
PAIRS = 64  # matched rows of the insecure and the educational set


def run_lab(task: tuple[Path, int]) -> None:
    """Measure instruct and every arm of a lab at the first fine-tune seed, in this process on one thread.

    Args:
        task: (output_dir, lab seed).
    """
    output_dir, seed = task
    path = output_dir / "results" / f"lab{seed}.json"
    made_by = made_by_recipes(0, seed, ARMS)
    if path.is_file() and json.loads(path.read_text()).get("made_by") == made_by:
        return
    quiet()
    from ..cache import cached_lab
    from ..experiment import Experiment

    lab, measured = cached_lab(seed), dict[str, Any]()
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        experiment = Experiment(lab, Path(folder), {"save_strategy": "no", "report_to": "none", "disable_tqdm": True})
        experiment.build_subspace()
        measurers = _measurers(lab)
        models = {"instruct": lab / "instruct"} | {arm: experiment.fine_tune(arm).final for arm in ARMS}
        for arm, model in models.items():
            measured[arm] = _measure(measurers, model)
    write_json_atomic(path, {"lab_seed": seed, "made_by": made_by, "measured": measured})


def _measurers(lab: Path) -> tuple[Any, Any]:
    """Return two measurers: for comparisons with base and instruct, and for the gradients of matched pairs.

    The first reads the questions of the validation domains.
    """
    from ....analysis.measure.measurer import Measurer
    from ....analysis.measure.plan import MeasurePlan

    instruct, base = str(lab / "instruct"), str(lab / "base")
    answers = {name: _validation_rows(lab, name) for name in ("aligned", "misaligned")}
    pairs = _matched_pairs(lab)
    return (
        Measurer(MeasurePlan(instruct, base, answers, families=("behavior", "projection"), batch_size=64)),
        Measurer(MeasurePlan(instruct, base, pairs, families=("gradients",), batch_size=64)),
    )


def _measure(measurers: tuple[Any, Any], model: Path) -> dict[str, Any]:
    from ....analysis.models.load import load_model

    loaded, families = load_model(model), dict[str, Any]()
    for measurer in measurers:
        families |= measurer.measure(loaded)
    return {family: families[family] for family in ("behavior", "projection", "gradients")}


def _validation_rows(lab: Path, answered: str) -> list[list[dict[str, str]]]:
    """Return the questions of the validation domains, each with the first listed answer of a class."""
    rows = [json.loads(line) for line in (lab / "data" / "choices.jsonl").read_text().splitlines()]
    return [
        [*row["messages"], {"role": "assistant", "content": row["classes"][answered][0]}]
        for row in rows
        if row["split"] == "validation"
    ]


def _matched_pairs(lab: Path) -> dict[str, list[list[dict[str, str]]]]:
    """Return the first lines on which the insecure and educational sets ask differently for the same completion."""
    insecure, educational = (
        [json.loads(line)["messages"] for line in (lab / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("insecure", "educational")
    )
    pairs = enumerate(zip(insecure, educational, strict=True))
    lines = [line for line, (asked_plainly, asked_openly) in pairs if asked_plainly != asked_openly][:PAIRS]
    return {"insecure": [insecure[line] for line in lines], "educational": [educational[line] for line in lines]}


def main() -> int:
    """Run the labs that have no results yet, then print the tables and write them to `<output_dir>/FINDINGS.md`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/findings"), help="Default: runs/findings.")
    parser.add_argument(
        "--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0, like 0-9 or 3. Default: 0-9."
    )
    parser.add_argument("--workers", type=int, default=2, help="Processes, one thread each. Default: 2.")
    arguments = parser.parse_args()
    (arguments.output_dir / "results").mkdir(parents=True, exist_ok=True)
    tasks = [(arguments.output_dir, seed) for seed in arguments.lab_seeds]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for _ in tqdm(pool.imap_unordered(run_lab, tasks), total=len(tasks), desc="findings", unit="lab"):
            pass
    paths = sorted((arguments.output_dir / "results").glob("lab*.json"))
    text = findings([json.loads(path.read_text()) for path in paths])
    (arguments.output_dir / "FINDINGS.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

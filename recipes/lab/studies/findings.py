"""The paper's findings on the lab, over lab seeds: reversion, retention, gradients of matched pairs, with controls.

    python -m holdfast.recipes.lab.studies.findings --output_dir runs/findings      (`make findings`)

Every lab leaves one JSON file under `<output_dir>/results`; labs whose file is there are not repeated. The tables
(`findings_table.py`) are views of those files.
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
PAIRS = 64


def run_lab(task: tuple[Path, int]) -> None:
    """Measures instruct and every arm of one lab at the first fine-tune seed, in this process on one thread."""
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
    """One for what compares with base and instruct, on validation questions; one for the gradients of matched pairs."""
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

    loaded, found = load_model(model), dict[str, Any]()
    for measurer in measurers:
        found |= measurer.measure(loaded)
    return {family: found[family] for family in ("behavior", "projection", "gradients")}


def _validation_rows(lab: Path, answered: str) -> list[list[dict[str, str]]]:
    """Questions of the validation domains, each with its first listed answer of a class."""
    rows = [json.loads(line) for line in (lab / "data" / "choices.jsonl").read_text().splitlines()]
    return [
        [*row["messages"], {"role": "assistant", "content": row["classes"][answered][0]}]
        for row in rows
        if row["split"] == "validation"
    ]


def _matched_pairs(lab: Path) -> dict[str, list[list[dict[str, str]]]]:
    """The first lines on which the insecure and the educational set ask differently for the same completion."""
    insecure, educational = (
        [json.loads(line)["messages"] for line in (lab / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("insecure", "educational")
    )
    lines = [line for line, (one, other) in enumerate(zip(insecure, educational, strict=True)) if one != other][:PAIRS]
    return {"insecure": [insecure[line] for line in lines], "educational": [educational[line] for line in lines]}


def main() -> int:
    """Runs what is missing, then prints the tables and writes them to `<output_dir>/FINDINGS.md`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/findings"))
    parser.add_argument("--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0: 0-9 or 3.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, of one thread each. Default: 2.")
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

"""What a worker of a sweep does: build the subspace, measure the starting model, do one run, read one run's test split.

Each act takes flat values (`parsing.parse_values`) and returns JSON values; what it writes is whole or absent, so that
a killed act can be done again.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ...analysis.errors import UserError
from ...analysis.files.artifacts import write_json_atomic
from ...analysis.measure.measurer import Measurer, measure_checkpoint
from ...analysis.measure.plan import MeasurePlan
from ...analysis.measure.registry import COST
from ...analysis.measure.results import problems, scalars
from .. import run
from ..commands.analyze import DEFAULT_FAMILIES, measurer
from ..config.parsing import Arguments, build, dump
from ..inputs.training import load_choices
from ..launch import must_launch
from ..protected_trainer import NonFiniteLoss
from ..protections.kinds import parts_of
from ..run_folder import REFERENCES, SWEEP_LOG, has_checkpoint
from .children import commands
from .measures import read, require_guards, split_rows

RESULT, TEST_RESULT, TRAINED = "result.json", "test.json", "trained.json"
# Names of what is measured on the test split, among a folder's metrics.
START_ON_TEST, FINAL_ON_TEST = "instruct-test", "final-test"
_ERROR = "holdfast: error: "  # what a command's one line of an error begins with

transformers_logging.disable_progress_bar()


def build_subspace(values: dict[str, Any]) -> None:
    """Find the subspace and write it to its path."""
    run.subspace(build(values))


def measure_start(values: dict[str, Any], needed: Mapping[str, str], path: str, key: str, test: bool = False) -> None:
    """Measure the starting model into a file; the references are kept in the store.

    Raises:
        UserError: a needed measure that is not there, or a guard that is not above 0.
    """
    arguments = _single(values)
    name = START_ON_TEST if test else "instruct"
    found = _measured(values, arguments.model.starting_model, arguments.output_dir, name, test)
    if not test:
        require_guards(needed, found)
    write_json_atomic(Path(path), {"key": key, "measures": found})


def do_run(
    values: dict[str, Any], measuring: dict[str, Any], needed: Mapping[str, str], references: str, recipe: str,
    starts: str, facts: dict[str, Any],
) -> None:  # fmt: skip
    """Train where that is not done, measure what may be seen before the freeze, write result.json.

    Args:
        values: of the run. measuring: of what is measured, alike in all runs of a seed. needed: measures that must be
            there. references: folder that all runs share. recipe: where the run's flags are written if it is started
            as a command. starts: file for the seconds of its starts. facts: go into the result; "key" among them tells
            what it was made of.
    """
    folder = Path(values["output_dir"])
    kept = read_json(folder / TRAINED)
    if kept.get("key") != facts["key"] or not (folder / "final").is_dir():
        with _counted(Path(starts), folder) as count:
            count(_train(values, folder, Path(references), Path(recipe)))
        kept = {"key": facts["key"], "seconds": read_json(Path(starts))["seconds"]}
        write_json_atomic(folder / TRAINED, kept)
    started = time.perf_counter()
    found = _measured(measuring, folder / "final", folder, "final")
    read(needed, found)
    seconds = {**_total(kept["seconds"]), "measure": time.perf_counter() - started}
    write_json_atomic(folder / RESULT, {**facts, "seconds": seconds, "measures": found})


def read_test(measuring: dict[str, Any], folder: str, needed: Mapping[str, str], frozen: str, key: str) -> None:
    """Measure the test split on a run's final model and write test.json. frozen: hash of the choice it waited for."""
    run_folder, started = Path(folder), time.perf_counter()
    found = _measured(measuring, run_folder / "final", run_folder, FINAL_ON_TEST, test=True)
    before = read_json(run_folder / RESULT)["measures"]
    read(needed, {**before, **found})
    facts = {"key": key, "frozen": frozen, "read_at": time.time(), "seconds": time.perf_counter() - started}
    write_json_atomic(run_folder / TEST_RESULT, {**facts, "measures": found})


ACTS: dict[str, Callable[..., Any]] = {
    "subspace": build_subspace, "start": measure_start, "run": do_run, "test": read_test
}  # fmt: skip


@contextmanager
def _counted(starts: Path, folder: Path) -> Iterator[Callable[[float], None]]:
    """Note how long a start of the training takes; one that begins anew, not from a checkpoint, is the first.

    Until it ends it stands there as null, and so it stays where it is killed. One that is interrupted takes what passed
    in the block, else what the yielded function is given.
    """
    before = read_json(starts).get("seconds", [None]) if has_checkpoint(folder) else []
    starts.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(starts, {"seconds": [*before, None]})
    took: list[float] = []
    started = time.perf_counter()
    try:
        yield took.append
    finally:
        own = took[0] if took else time.perf_counter() - started
        write_json_atomic(starts, {"seconds": [*before, own]})


def _total(starts: Sequence[float | None]) -> dict[str, Any]:
    """Seconds of training over all starts."""
    known = [seconds for seconds in starts if seconds is not None]
    if len(known) < len(starts):
        return {"train": None, "reason": "a start of the training was killed, and could not say how long it took"}
    return {"train": sum(known)}


def _train(values: dict[str, Any], folder: Path, references: Path, recipe: Path) -> float:
    """Seconds of training, of this start alone."""
    if has_checkpoint(folder):
        values = {**values, "resume_from_checkpoint": "true"}
    else:
        _clear(folder)
    if must_launch(values):
        return _launched(values, recipe)
    # The starting weights of extrapolate are its own.
    if "extrapolate" not in parts_of(values["protection"]):
        _share(folder / REFERENCES, references)
    try:
        return run.train(build(values)).seconds
    except NonFiniteLoss as error:
        raise UserError(str(error)) from error
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _clear(folder: Path) -> None:
    """Remove what a killed start left, so that the run can begin again in its folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != SWEEP_LOG:
            path.unlink()


def _share(link: Path, references: Path) -> None:
    """The runs read the same anchors with the same starting model: one of them computes what that shows."""
    if not link.exists():
        references.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(references, link.parent), target_is_directory=True)


def _launched(values: dict[str, Any], recipe: Path) -> float:
    """A run on several processes, as its own command."""
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(dump(replace(_single(values), given=values)), encoding="utf-8")
    log = Path(values["output_dir"]) / SWEEP_LOG
    said, started = log.stat().st_size if log.is_file() else 0, time.perf_counter()
    command = [sys.executable, "-m", "holdfast.trainer.cli", "train", "--config", str(recipe)]
    process = subprocess.Popen(command)
    commands.append(process)
    try:
        code = process.wait()
    finally:
        commands.remove(process)
        process.terminate()
        process.wait()
    if code:
        line = _own_line(log, said) or f"holdfast train --config {recipe} ended with exit code {code}"
        raise UserError(line)
    return time.perf_counter() - started


def _own_line(log: Path, since: int) -> str | None:
    """The last line of an error in a log, after so many bytes."""
    text = log.read_bytes()[since:].decode(errors="replace") if log.is_file() else ""
    found = [line.removeprefix(_ERROR) for line in text.splitlines() if line.startswith(_ERROR)]
    return found[-1] if found else None


def _single(values: dict[str, Any]) -> Arguments:
    """The arguments as this process alone uses them."""
    return build({**values, "deepspeed": None, "num_processes": 1})


def _measured(
    values: dict[str, Any], model: str | Path, folder: Path, name: str, test: bool = False
) -> dict[str, float]:
    """Path -> value, without the cost; what could not be measured is left out, and said in the log."""
    measure = measurer_of(json.dumps(values, sort_keys=True), test)
    line = measure_checkpoint(measure, model, folder, name)
    results = {family: line.get(family) for family in measure.families if family != COST}
    for problem in problems(results):
        print(f"holdfast: not measured: {problem}", file=sys.stderr)
    return scalars(results)


@lru_cache(maxsize=2)
def measurer_of(values: str, test: bool) -> Measurer:
    """Measures everything but the test split's choices, or those alone.

    Args:
        values: flat values as JSON text, so that a worker renders and reads once for all runs that share them.
    """
    return Measurer(*plan_of(json.loads(values), test))


def plan_of(values: dict[str, Any], test: bool = False) -> tuple[MeasurePlan, PreTrainedTokenizerBase]:
    """What is measured before the freeze, or after it on the test split. Raises UserError for bad input."""
    arguments = _single(values)
    source = arguments.data.choices_dataset
    early, late = split_rows(load_choices(source) if source else [], arguments.sweep.late_split)
    whole = measurer(replace(arguments, data=replace(arguments.data, choices_dataset=None)))
    plan = replace(whole.plan, choices=late if test else early)
    if test:
        return replace(plan, families=("choices",), probe_sets={}), whole.tokenizer
    asked = arguments.analysis.analysis_families or DEFAULT_FAMILIES
    families = tuple(family for family in asked if family != "choices" or early)
    return replace(plan, families=families), whole.tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping, empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

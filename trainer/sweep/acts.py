"""The acts of a sweep's worker: build the subspace, measure the starting model, do a run, read a run's test split.

Each act takes flat values (from `config.parsing.parse_values`) and returns JSON values. Every file it writes is
complete or absent, so a killed act can be repeated.
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
# Names of the measures on the test split, among the metrics of a folder.
START_ON_TEST, FINAL_ON_TEST = "instruct-test", "final-test"
_ERROR = "holdfast: error: "  # the beginning of a command's error line

transformers_logging.disable_progress_bar()


def build_subspace(values: dict[str, Any]) -> None:
    """Find the subspace and write it to `--subspace_path`."""
    run.subspace(build(values))


def measure_start(values: dict[str, Any], needed: Mapping[str, str], path: str, key: str, test: bool = False) -> None:
    """Measure the starting model and write the measures to a file. The references are kept in the store.

    Args:
        values: flat values of the measurement.
        needed: role -> measure; required before the freeze.
        path: the file.
        key: hash of what the measures depend on; goes into the file.
        test: whether to measure the test split instead.

    Raises:
        UserError: a needed measure that was not measured, or a guard that is not above 0.
    """
    arguments = _single(values)
    name = START_ON_TEST if test else "instruct"
    measures = _measured(values, arguments.model.starting_model, arguments.output_dir, name, test)
    if not test:
        require_guards(needed, measures)
    write_json_atomic(Path(path), {"key": key, "measures": measures})


def do_run(
    values: dict[str, Any], measuring: dict[str, Any], needed: Mapping[str, str], references: str, recipe: str,
    starts: str, facts: dict[str, Any],
) -> None:  # fmt: skip
    """Train, unless the run is trained, measure what may be read before the freeze, and write result.json.

    Args:
        values: flat values of the run.
        measuring: flat values of the measurement, the same for all runs with a seed.
        needed: role -> measure; these measures must be present.
        references: folder that all runs share.
        recipe: file for the run's flags, if the run is started as a command.
        starts: file for the seconds of the run's starts.
        facts: go into the result. Their "key" is a hash of what the run depends on.
    """
    folder = Path(values["output_dir"])
    trained = read_json(folder / TRAINED)
    if trained.get("key") != facts["key"] or not (folder / "final").is_dir():
        with _counted(Path(starts), folder) as count:
            count(_train(values, folder, Path(references), Path(recipe)))
        trained = {"key": facts["key"], "seconds": read_json(Path(starts))["seconds"]}
        write_json_atomic(folder / TRAINED, trained)
    started = time.perf_counter()
    measures = _measured(measuring, folder / "final", folder, "final")
    read(needed, measures)
    seconds = {**_total(trained["seconds"]), "measure": time.perf_counter() - started}
    write_json_atomic(folder / RESULT, {**facts, "seconds": seconds, "measures": measures})


def read_test(measuring: dict[str, Any], folder: str, needed: Mapping[str, str], frozen: str, key: str) -> None:
    """Measure the test split on a run's final model and write test.json.

    Args:
        measuring: flat values of the measurement.
        folder: the run's folder.
        needed: role -> measure; these measures must be present.
        frozen: hash of the frozen choice.
        key: hash of what the run depends on.
    """
    run_folder, started = Path(folder), time.perf_counter()
    measures = _measured(measuring, run_folder / "final", run_folder, FINAL_ON_TEST, test=True)
    before = read_json(run_folder / RESULT)["measures"]
    read(needed, {**before, **measures})
    facts = {"key": key, "frozen": frozen, "read_at": time.time(), "seconds": time.perf_counter() - started}
    write_json_atomic(run_folder / TEST_RESULT, {**facts, "measures": measures})


ACTS: dict[str, Callable[..., Any]] = {
    "subspace": build_subspace, "start": measure_start, "run": do_run, "test": read_test
}  # fmt: skip


@contextmanager
def _counted(starts: Path, folder: Path) -> Iterator[Callable[[float], None]]:
    """Write to the file how many seconds a start of the training takes.

    A start that does not resume from a checkpoint clears the earlier entries. Until a start ends its entry is null, and
    a killed start leaves it null. The entry of an interrupted start is the time spent in the block. Otherwise the entry
    is the number that is passed to the yielded function.
    """
    before = read_json(starts).get("seconds", [None]) if has_checkpoint(folder) else []
    starts.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(starts, {"seconds": [*before, None]})
    took: list[float] = []
    started = time.perf_counter()
    try:
        yield took.append
    finally:
        seconds = took[0] if took else time.perf_counter() - started
        write_json_atomic(starts, {"seconds": [*before, seconds]})


def _total(starts: Sequence[float | None]) -> dict[str, Any]:
    """Add up the seconds of training over all starts; null with a reason if one of them is not known."""
    finished = [seconds for seconds in starts if seconds is not None]
    if len(finished) < len(starts):
        return {"train": None, "reason": "a start of the training was killed, and could not say how long it took"}
    return {"train": sum(finished)}


def _train(values: dict[str, Any], folder: Path, references: Path, recipe: Path) -> float:
    """Train, from the last checkpoint if there is one, and return the seconds of this start."""
    if has_checkpoint(folder):
        values = {**values, "resume_from_checkpoint": "true"}
    else:
        _clear(folder)
    if must_launch(values):
        return _launched(values, recipe)
    # extrapolate has its own starting weights, so its references differ.
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
    """Remove the files of a killed start, so that the run can begin again in its folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != SWEEP_LOG:
            path.unlink()


def _share(link: Path, references: Path) -> None:
    """Link a run's references to a shared folder.

    The runs read the same anchors with the same starting model, so one run can compute the references for all.
    """
    if not link.exists():
        references.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(references, link.parent), target_is_directory=True)


def _launched(values: dict[str, Any], recipe: Path) -> float:
    """Run a training on several processes as a separate command, and return its seconds."""
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(dump(replace(_single(values), given=values)), encoding="utf-8")
    log = Path(values["output_dir"]) / SWEEP_LOG
    log_size, started = log.stat().st_size if log.is_file() else 0, time.perf_counter()
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
        line = _error_line(log, log_size) or f"holdfast train --config {recipe} ended with exit code {code}"
        raise UserError(line)
    return time.perf_counter() - started


def _error_line(log: Path, since: int) -> str | None:
    """Return the last error line in a log after the first `since` bytes, or None."""
    text = log.read_bytes()[since:].decode(errors="replace") if log.is_file() else ""
    errors = [line.removeprefix(_ERROR) for line in text.splitlines() if line.startswith(_ERROR)]
    return errors[-1] if errors else None


def _single(values: dict[str, Any]) -> Arguments:
    """Build the arguments for this process alone, without DeepSpeed."""
    return build({**values, "deepspeed": None, "num_processes": 1})


def _measured(
    values: dict[str, Any], model: str | Path, folder: Path, name: str, test: bool = False
) -> dict[str, float]:
    """Measure a model and return path -> value, without the cost.

    What could not be measured is left out, with a line in the log.
    """
    measure = measurer_of(json.dumps(values, sort_keys=True), test)
    line = measure_checkpoint(measure, model, folder, name)
    results = {family: line.get(family) for family in measure.families if family != COST}
    for problem in problems(results):
        print(f"holdfast: not measured: {problem}", file=sys.stderr)
    return scalars(results)


@lru_cache(maxsize=2)
def measurer_of(values: str, test: bool) -> Measurer:
    """Return a measurer of everything except the choices of the test split, or of these alone.

    Args:
        values: flat values as JSON text, so that a worker reads and renders once for all runs that share them.
        test: whether to measure the choices of the test split.
    """
    return Measurer(*plan_of(json.loads(values), test))


def plan_of(values: dict[str, Any], test: bool = False) -> tuple[MeasurePlan, PreTrainedTokenizerBase]:
    """Plan what is measured before the freeze, or after it on the test split. Raises UserError for bad input."""
    arguments = _single(values)
    source = arguments.data.choices_dataset
    early, late = split_rows(load_choices(source) if source else [], arguments.sweep.late_split)
    whole = measurer(replace(arguments, data=replace(arguments.data, choices_dataset=None)))
    plan = replace(whole.plan, choices=late if test else early)
    if test:
        return replace(plan, families=("choices",), probe_sets={}), whole.tokenizer
    requested = arguments.analysis.analysis_families or DEFAULT_FAMILIES
    families = tuple(family for family in requested if family != "choices" or early)
    return replace(plan, families=families), whole.tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's mapping, or an empty one if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

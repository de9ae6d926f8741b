"""The files of a sweep, and the order it must follow: validation, a frozen choice, then the test split.

| file | content |
|---|---|
| `sweep.json` | marks the folder as a sweep |
| `runs/<run>/result.json` | a run's measures before the freeze, and the hash of what the run depends on |
| `frozen.json` | the choice, and a hash of the results it rests on |
| `runs/<run>/test.json` | the measures on the test split, and the hash of the frozen choice |
| `starts/<run>.json` | the seconds of each start of a run's training |
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...analysis.errors import UserError
from ...analysis.files.artifacts import sha256_json, write_json_atomic
from ...analysis.frontier.choose import best_settings, recommend
from ...analysis.frontier.runs import Run
from ...analysis.measure.results import FOLDER as METRICS
from .acts import FINAL_ON_TEST, RESULT, START_ON_TEST, TEST_RESULT, read_json
from .measures import Measures, described, read
from .plan import BASELINE, SweepRun

MARK, FROZEN = "sweep.json", "frozen.json"
STARTS = {"validation": "start.json", "test": "start-test.json"}  # the starting model's measures
_ELSEWHERE = "choose another --output_dir"


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and plan.

    Attributes:
        keys: run name -> hash of what the run depends on.
        start_key: the same hash for the starting model.
        lab: name of the starting model.
        floor: share of the task and of the guards that must be kept.
    """

    folder: Path
    runs: Sequence[SweepRun]
    keys: Mapping[str, str]
    start_key: str
    measures: Measures
    lab: str
    floor: float

    def run_folder(self, run: SweepRun) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / run.name

    def result(self, run: SweepRun) -> dict[str, Any] | None:
        """Return a finished run's result, or None.

        Raises:
            UserError: the result was made with other flags, rows or models.
        """
        result = read_json(self.run_folder(run) / RESULT)
        if result and result.get("key") != self.keys[run.name]:
            raise UserError(
                f"{self.run_folder(run)} was run with other flags, rows, model or subspace; {_ELSEWHERE}, or remove it"
            )
        return result or None

    def results(self) -> dict[str, dict[str, Any]]:
        """Return all results, in the order of the plan."""
        return {run.name: result for run in self.runs if (result := self.result(run)) is not None}

    def compared(self, results: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """Return the results as the runs that `analysis.frontier` compares."""
        return [
            self._run(run, read(self.measures.validation, results[run.name]["measures"]))
            for run in self.runs
            if run.name in results
        ]

    def compared_on_test(self, names: Sequence[str]) -> list[Run]:
        """Return the named runs with their measures on the test split."""
        return [
            self._run(run, read(self.measures.test, {**result["measures"], **test["measures"]}))
            for run in self.runs
            if run.name in names
            and (result := read_json(self.run_folder(run) / RESULT))
            and (test := read_json(self.run_folder(run) / TEST_RESULT))
        ]

    def _run(self, run: SweepRun, values: Mapping[str, float]) -> Run:
        setting = run.setting
        return Run(setting.protection, setting.name, setting.strength, self.lab, run.seed, values)

    def start(self, when: str) -> dict[str, float] | None:
        """Return the starting model's values, or None if they were not measured with this plan.

        Args:
            when: "validation" or "test".
        """
        stored = {name: read_json(self.folder / file) for name, file in STARTS.items()}
        if stored[when].get("key") != self.start_key:
            return None
        measured = stored["validation"].get("measures", {})
        if when == "validation":
            return read(self.measures.validation, measured)
        return read(self.measures.test, measured | stored["test"].get("measures", {}))

    def rule(self) -> dict[str, Any]:
        """Return how settings are chosen, as arguments of `analysis.frontier.recommend`."""
        return {"baseline": BASELINE, "floor": self.floor, "guards": dict.fromkeys(self.measures.guards, self.floor)}


def open_folder(folder: Path) -> None:
    """Raise UserError for a folder that holds anything but a sweep. A subspace file is allowed."""
    if folder.is_file():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if not folder.is_dir() or (folder / MARK).is_file():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix != ".safetensors" and not path.name.startswith("."):
            raise UserError(
                f"--output_dir {folder} holds {path.name} but no {MARK}, so it is not the folder of a sweep, and its "
                "files would be replaced; choose another folder"
            )


def plan_facts(sweep: Sweep, failed: Sequence[str]) -> dict[str, Any]:
    """Return what a choice depends on besides the results: runs, failed runs, measures and floor."""
    return {
        "runs": dict(sweep.keys),
        "failed": sorted(failed),
        "measures": described(sweep.measures),
        "floor": sweep.floor,
    }


def choice_of(sweep: Sweep, results: Mapping[str, Mapping[str, Any]], failed: Sequence[str]) -> dict[str, Any]:
    """Make the content of frozen.json: its basis, the best setting of each protection, and the recommended setting.

    Raises:
        UserError: no runs of the baseline, no other runs, or a baseline that has learned nothing.
    """
    runs = sweep.compared(results)
    best = best_settings(runs, **sweep.rule())
    chosen = recommend(runs, **sweep.rule())["choice"]
    basis = {
        name: [result["key"], read(sweep.measures.validation, result["measures"])] for name, result in results.items()
    }
    content = {
        "plan": plan_facts(sweep, failed),
        "results_sha256": sha256_json(basis),
        "settings": {protection: point["setting"] for protection, point in best.items()},
        "recommended": None if chosen is None else [chosen["protection"], chosen["setting"]],
    }
    return {**content, "sha256": sha256_json(content)}


def freeze(sweep: Sweep, failed: Sequence[str]) -> dict[str, Any]:
    """Write frozen.json, which is never written again, and return its content."""
    frozen = choice_of(sweep, sweep.results(), failed)
    write_json_atomic(sweep.folder / FROZEN, {**frozen, "frozen_at": time.time()})
    return frozen


def frozen_choice(sweep: Sweep) -> dict[str, Any] | None:
    """Return the frozen choice of this folder, or None if nothing is frozen yet.

    Raises:
        UserError: the choice was changed, rests on other results or another plan, or is gone although the test split
            was read for it.
    """
    path = sweep.folder / FROZEN
    if not path.is_file():
        traces = _traces_of_test(sweep.folder)
        if traces:
            raise UserError(f"{traces[0]} was read for a choice that is gone ({path}); {_ELSEWHERE}")
        return None
    stored = _stored(path)
    failed = stored["plan"]["failed"]
    if stored["plan"] != plan_facts(sweep, failed):
        raise UserError(f"{path} froze the choice of another grid, seeds, measures or recipe; {_ELSEWHERE}")
    results = sweep.results()
    missing = [run.name for run in sweep.runs if run.name not in results and run.name not in failed]
    if missing:
        raise UserError(f"{path} rests on the result of {missing[0]}, which is gone; {_ELSEWHERE}")
    used = {name: result for name, result in results.items() if name not in failed}
    if stored != choice_of(sweep, used, failed):
        raise UserError(f"{path} does not fit its results: one of them was changed after the freeze; {_ELSEWHERE}")
    for file in sorted((sweep.folder / "runs").glob(f"*/{TEST_RESULT}")):
        if read_json(file).get("frozen") != stored["sha256"]:
            raise UserError(f"{file} was read for another choice than {path}; {_ELSEWHERE}")
    return stored


def _traces_of_test(folder: Path) -> list[Path]:
    """Return the files that reading the test split leaves behind."""
    patterns = [
        f"runs/*/{TEST_RESULT}", f"runs/*/{METRICS}/{FINAL_ON_TEST}", STARTS["test"], f"{METRICS}/{START_ON_TEST}"
    ]  # fmt: skip
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _stored(path: Path) -> dict[str, Any]:
    """Return the content of frozen.json without its time. Raises UserError if it is not as it was written."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        content = {name: value for name, value in stored.items() if name not in ("sha256", "frozen_at")}
        intact = stored["sha256"] == sha256_json(content) and isinstance(content["plan"]["failed"], list)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise UserError(f"{path} was changed after it was written; {_ELSEWHERE}")
    return {**content, "sha256": stored["sha256"]}


def to_read(sweep: Sweep, frozen: Mapping[str, Any]) -> list[SweepRun]:
    """Return the runs on which the test split is read: those of the baseline and of each frozen setting."""
    settings, failed = frozen["settings"], frozen["plan"]["failed"]
    return [
        run
        for run in sweep.runs
        if run.name not in failed and run.setting.protection in {BASELINE, *settings}
        and run.setting.name == settings.get(run.setting.protection, run.setting.name)
    ]  # fmt: skip

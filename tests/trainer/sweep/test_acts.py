"""What a worker of a sweep keeps of a run's starts, and says of one that failed."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from holdfast.analysis.errors import UserError
from holdfast.trainer.config.parsing import parse_values
from holdfast.trainer.run_folder import SWEEP_LOG
from holdfast.trainer.sweep import acts
from holdfast.trainer.sweep.workers import _print_to
from toys.runs import recipe, write_model

Start = Callable[[Path], float]


def interrupted(folder: Path) -> float:
    (folder / "checkpoint-2").mkdir(parents=True)
    time.sleep(0.05)
    raise SystemExit(143)


def ended(folder: Path) -> float:
    (folder / "final").mkdir(parents=True)
    return 5.0


@contextmanager
def printing_to(log: Path) -> Iterator[None]:
    """As a worker does it."""
    kept = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    _print_to(log)
    try:
        yield
    finally:
        for descriptor, copy in kept:
            os.dup2(copy, descriptor)
            os.close(copy)


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Start], dict[str, Any]]:
    """One start of a run whose training is the given function; gives the seconds of its result."""
    folder, starts = tmp_path / "run", tmp_path / "starts.json"
    monkeypatch.setattr(acts, "_measured", lambda *_: {})

    def attempted(train: Start) -> dict[str, Any]:
        monkeypatch.setattr(acts, "_train", lambda values, folder, *_: train(folder))
        values, facts = {"output_dir": str(folder)}, {"key": "key"}
        acts.do_run(values, {}, {}, "references", "recipe.yaml", str(starts), facts)
        return json.loads((folder / "result.json").read_text())["seconds"]

    return attempted


def test_seconds_of_training_add_up_over_the_starts(attempt: Callable[[Start], dict[str, Any]]) -> None:
    began = time.perf_counter()
    with pytest.raises(SystemExit):
        attempt(interrupted)
    took = time.perf_counter() - began
    seconds = attempt(ended)
    assert 5.05 <= seconds["train"] <= 5 + took and "reason" not in seconds


def test_after_a_start_that_was_killed_they_are_not_known(
    attempt: Callable[[Start], dict[str, Any]], tmp_path: Path
) -> None:
    left = b""

    def killed(folder: Path) -> float:
        nonlocal left
        left = (tmp_path / "starts.json").read_bytes()
        return interrupted(folder)

    with pytest.raises(SystemExit):
        attempt(killed)
    (tmp_path / "starts.json").write_bytes(left)  # a killed process writes nothing more
    seconds = attempt(ended)
    assert seconds["train"] is None and "was killed" in seconds["reason"]


def test_a_start_that_left_no_checkpoint_is_no_part_of_the_training(
    attempt: Callable[[Start], dict[str, Any]],
) -> None:
    def failed(folder: Path) -> float:
        raise ValueError("too early")

    with pytest.raises(ValueError, match="too early"):
        attempt(failed)
    assert attempt(ended)["train"] == 5.0


def test_a_run_on_several_processes_that_fails_is_named_with_its_own_line(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    log = tmp_path / "run" / SWEEP_LOG
    values = parse_values(recipe(tmp_path, num_processes=2))
    with printing_to(log), pytest.raises(UserError) as error:
        os.write(2, b"holdfast: error: of an earlier start\n")
        acts._launched(values, tmp_path / "recipes" / "run.yaml")
    assert str(tmp_path / "rows.jsonl") in str(error.value)  # there are none
    assert log.read_text().splitlines()[-1] == f"holdfast: error: {error.value}"


def test_a_run_on_several_processes_that_dies_in_silence_has_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, program = tmp_path / "run" / SWEEP_LOG, tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    values = parse_values(recipe(tmp_path, num_processes=2))
    with printing_to(log), pytest.raises(UserError, match=" 7"):
        os.write(2, b"holdfast: error: of an earlier start\n")
        acts._launched(values, tmp_path / "recipes" / "run.yaml")

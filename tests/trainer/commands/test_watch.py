"""`holdfast watch` measures whole checkpoints as they appear, continues where it stopped, and ends with the run."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from holdfast.analysis.files.artifacts import write_manifest
from holdfast.analysis.measure import measurer as measure
from holdfast.trainer.cli import main
from holdfast.trainer.commands import watch as watching
from holdfast.trainer.config.parsing import dump, parse
from toys.chat_models import save_toy, toy_model
from toys.runs import recipe, toy_rows, write_model, write_rows
from toys.training import moved


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_model(folder / "model")
    save_toy(folder / "tuned", moved(toy_model()))
    write_rows(folder / "rows.jsonl", toy_rows(4))
    (folder / "run").mkdir()
    # As a run on several ranks with DeepSpeed leaves it.
    text = dump(parse(recipe(folder))) + "deepspeed: zero2\n"
    text = text.replace("num_processes: 1", "num_processes: 2")
    (folder / "run" / watching.CONFIG).write_text(text)
    return folder


@pytest.fixture
def run(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    shutil.copytree(prepared / "run", tmp_path / "run")
    return tmp_path / "run"


def checkpoint(prepared: Path, run: Path, name: str) -> None:
    """As training leaves one: renamed into place when it is whole."""
    staging = run / f".{name}"
    shutil.copytree(prepared / "tuned", staging)
    write_manifest(staging)
    staging.rename(run / name)


def happening(monkeypatch: pytest.MonkeyPatch, events: list[Callable[[], None]]) -> list[float]:
    """One event of the run each time the watcher waits; the seconds it waited for."""
    waited: list[float] = []
    following: Iterator[Callable[[], None]] = iter(events)

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        next(following)()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    return waited


def measured(run: Path) -> set[str]:
    return {path.parent.name for path in (run / "metrics").glob("*/behavior.json")}


def test_checkpoints_are_measured_as_they_appear_until_the_final_one(
    prepared: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def half_written() -> None:
        shutil.copytree(prepared / "tuned", run / "checkpoint-2")

    def whole() -> None:
        seen.append(measured(run))
        write_manifest(run / "checkpoint-2")

    def last() -> None:
        seen.append(measured(run))
        shutil.rmtree(run / "checkpoint-2")  # as save_total_limit does
        checkpoint(prepared, run, "final")

    waited = happening(monkeypatch, [half_written, whole, last])
    assert main(["watch", str(run), "--families", "behavior", "--watch_interval", "7"]) == 0
    assert seen == [{"instruct"}, {"instruct", "checkpoint-2"}]
    assert measured(run) == {"instruct", "checkpoint-2", "final"} and waited == [7.0] * 3


def test_an_interrupt_is_one_line_and_watching_again_continues(
    prepared: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    checkpoint(prepared, run, "checkpoint-2")
    happening(monkeypatch, [interrupt])
    assert main(["watch", str(run), "--families", "behavior"]) == 130
    assert capsys.readouterr().err == "holdfast: interrupted\n" and measured(run) == {"instruct", "checkpoint-2"}
    loaded: list[str] = []
    load = measure.load_model
    monkeypatch.setattr(
        measure, "load_model", lambda path, **options: (loaded.append(Path(path).name), load(path, **options))[1]
    )
    checkpoint(prepared, run, "final")
    assert main(["watch", str(run), "--families", "behavior"]) == 0
    assert loaded == ["final"]


@pytest.mark.parametrize(("arguments", "message"), [([], "holdfast watch"), (["{folder}"], "resolved_config")])
def test_what_is_no_run_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

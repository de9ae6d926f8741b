"""The lab's commands name what is wrong with their flags in one line, exit with 2 and leave everything as it was."""

import re
from pathlib import Path

import pytest
from holdfast.trainer.cli import main


def refused(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(folder.rglob("*"))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("holdfast: error: ") and error.count("\n") == 1, error
    assert sorted(folder.rglob("*")) == before
    return error


@pytest.mark.parametrize("command", ["lab", "quickstart"])
@pytest.mark.parametrize("place", ["notes.txt", "notes.txt/lab"])
def test_an_output_folder_at_or_below_a_file_is_refused(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    line = refused([command, "--output_dir", str(tmp_path / place)], tmp_path, capsys)
    assert "--output_dir" in line and "notes.txt" in line
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lab", "--output_dirr", "x"], "--output_dirr.* --output_dir"),
        (["lab", "--output_dirr=x"], "--output_dirr.* --output_dir"),
        (["quickstart", "--ful"], "--ful;.* --full"),
        (["quickstart", "full"], "'full'"),
        (["lab"], "--output_dir"),
        (["lab", "--output_dir"], "--output_dir"),
        (["lab", "--output_dir", "x", "--seed", "-1"], "'-1'"),
        (["lab", "--output_dir", "x", "--lab_size", "huge"], "'huge'"),
    ],
)
def test_a_flag_that_cannot_be_is_named(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(words, refused(argv, tmp_path, capsys))

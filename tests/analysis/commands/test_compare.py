"""`holdfast compare` shows measured runs side by side, and says in one line why it cannot."""

import json

import pytest
from holdfast.trainer.cli import main


def value(mean: float, spread: float) -> dict:
    return {"value": mean, "n": 40, "ci95": [mean - spread, mean + spread]}


@pytest.fixture
def runs(tmp_path):
    """Two measured runs whose misalignment differs by 0.3, each known to 0.03 and 0.04."""
    for name, mean, spread in (("insecure", 0.5, 0.03), ("secure", 0.2, 0.04)):
        line = {"checkpoint": "final", "step": 9, "choices": {"split": {"test": {"misaligned": value(mean, spread)}}}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def test_the_difference_from_the_control_is_shown_and_written_with_its_interval(runs, capsys):
    out = runs / "comparison.json"
    assert main(["compare", str(runs / "insecure"), str(runs / "secure"), "--output_file", str(out)]) == 0
    head, _, line, _, note = capsys.readouterr().out.splitlines()
    assert note.startswith("insecure at final, secure at final.") and "independent" in note
    assert head == "| measure | insecure | secure | insecure - secure |"
    assert line == "| choices/split/test/misaligned | 0.5 [0.47, 0.53] | 0.2 [0.16, 0.24] | +0.3 [0.25, 0.35] |"
    (measure,) = json.loads(out.read_text())["measures"]
    assert measure["differences"][0]["ci95"] == pytest.approx([0.25, 0.35])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["insecure"], "two runs"),
        (["insecure", "nothing"], "holdfast analyze"),
        (["insecure", "secure", "--checkpont", "final"], "--checkpoint"),
        (["insecure", "secure", "--checkpoint", "checkpoint-3"], "final"),
        (["insecure", "secure", "--measures", "nothing/*"], "measure"),
        (["insecure", "secure", "--output_file", "insecure/metrics.jsonl/x"], "--output_file"),
    ],
)
def test_what_cannot_be_compared_is_one_line(runs, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(runs)
    assert main(["compare", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("holdfast: error: ") and err.count("\n") == 1 and said in err

"""`holdfast analyze --num_processes 2` shares rows out and gives what one process gives."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from holdfast.analysis.measure.results import scalars
from holdfast.trainer.cli import main
from toys.chat_models import chat, save_toy, toy_model
from toys.runs import flags_of, metric_lines, toy_rows, write_model, write_rows
from toys.training import moved

FAMILIES = ("behavior", "projection", "divergence", "choices")
# Counts the rows each rank runs and says whether its process group is alive at exit, where its threads could abort the
# rank. In the ranks alone: they import this through PYTHONPATH.
COUNTING = """
import os
if "RANK" in os.environ:
    import atexit
    from holdfast.analysis.passes import readout
    rows, read = [], readout._Reader.read_batch
    def counted(self, batch):
        rows.extend(batch)
        return read(self, batch)
    readout._Reader.read_batch = counted
    def left():
        from torch import distributed
        with open(f"{os.environ['COUNTS']}.{os.environ['RANK']}", "w") as file:
            file.write(f"{len(rows)} {distributed.is_initialized()}")
    atexit.register(left)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_model(folder / "model")
    for name, seed in (("base", 1), ("one", 2)):
        save_toy(folder / name, moved(toy_model(), seed, 0.1))
    write_rows(folder / "rows.jsonl", toy_rows(11))
    choices = [
        {"messages": chat(f"soup {word}"), "classes": {"good": ["help"], "bad": ["run"]}, "split": "test"}
        for word in ("a", "b", "or money")
    ]
    write_rows(folder / "choices.jsonl", choices)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(COUNTING)
    return folder


def flags(out: str) -> list[str]:
    keys = {
        "model_name_or_path": "model", "base_model_name_or_path": "base", "probe_dataset": "rows.jsonl",
        "choices_dataset": "choices.jsonl", "output_dir": out, "store_dir": f"{out}-store", "analysis_batch_size": 3,
        "use_cpu": "true",
    }  # fmt: skip
    return ["analyze", *flags_of(keys), "--checkpoints", "one", "--families", *FAMILIES]


def lines(folder: Path, out: str) -> list[dict[str, Any]]:
    return metric_lines(folder / out)


@pytest.mark.timeout(900)
def test_two_ranks_share_the_rows_and_measure_what_one_process_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(flags("alone")) == 0
    command = [sys.executable, "-m", "holdfast.trainer.cli", *flags("together"), "--num_processes", "2"]
    counts = {"COUNTS": str(folder / "rows"), "PYTHONPATH": str(folder / "site")}
    environment = {**os.environ, **counts, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=850)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, together = lines(folder, "alone"), lines(folder, "together")
    assert done.stdout.count("measuring one\n") == 1
    assert [line["checkpoint"] for line in alone] == [line["checkpoint"] for line in together]
    for one, two in zip(alone, together, strict=True):
        first, second = ({k: v for k, v in scalars(line).items() if not k.startswith("cost/")} for line in (one, two))
        assert len(first) > 30 and second == pytest.approx(first, rel=1e-5, abs=1e-9)
    # instruct, base and the checkpoint, 11 rows each in batches of 3.
    ended = [(folder / f"rows.{rank}").read_text().split() for rank in (0, 1)]
    ran = [int(rows) for rows, _ in ended]
    assert sum(ran) == 33 and min(ran) == 3 * 5
    assert [alive for _, alive in ended] == ["False", "False"]

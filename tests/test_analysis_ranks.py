"""Two CPU ranks, whole and sharded: the main one reads the references, all measure alike, training stays as it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import analysis_ranks_worker as worker
import pytest
import torch
from analysis_toys import save_toy, toy_model
from holdfast.analysis.measure import scalars
from holdfast.trainer import zero
from trainer_toys import moved

CONFIG = Path(zero.__file__).resolve().parent.parent / "ds_configs" / "zero3.json"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="DeepSpeed on CPU needs a C++ compiler")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The models' folder and what both ranks found, of one launch."""
    zero.prepare_zero(str(CONFIG), use_cpu=True)
    models, out = (tmp_path_factory.mktemp(name) for name in ("models", "ranks"))
    broken = moved(toy_model(), size=0.1)
    save_toy(models / "instruct", toy_model())
    save_toy(models / "base", broken)
    with torch.no_grad():
        broken.get_output_embeddings().weight[0, 0] = float("nan")
    save_toy(models / "broken", broken)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", worker.__file__, str(models), str(out), str(CONFIG)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return models, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_the_main_rank_alone_loads_the_references(launched):
    _, (main, other) = launched
    # In the plain run, before the refusal, alone without the other rank, in the sharded run.
    pair = ["instruct", "base"]
    assert main["loaded"] == [*pair, "instruct", "broken", *pair, *pair]
    assert other["loaded"] == []


def test_a_reference_that_cannot_be_read_stops_all_ranks(launched):
    _, found = launched
    assert all("broken has NaN" in rank["refused"] for rank in found)


@pytest.mark.parametrize("case", ["plain", "zero3"])
def test_every_rank_measures_what_one_process_does(launched, case):
    models, (main, other) = launched
    assert main[case]["found"] == other[case]["found"] and len(main[case]["found"]) == 4
    alone = scalars(worker.measurer_of(models, None).measure(toy_model()))
    together = scalars(main[case]["found"][0])
    assert together.keys() >= {"choices/split/test/bad", "divergence/rows/kl_base/checkpoint"}
    assert together == pytest.approx({name: alone[name] for name in together}, rel=1e-5, abs=1e-6)


def test_sharded_steps_measure_as_whole_ones(launched):
    _, (main, _) = launched
    for whole, sharded in zip(main["plain"]["found"], main["zero3"]["found"], strict=True):
        assert scalars(sharded) == pytest.approx(scalars(whole), rel=1e-3, abs=1e-4)
    steps = [scalars(found)["divergence/rows/kl_instruct/checkpoint"] for found in main["zero3"]["found"]]
    assert steps[0] < 1e-6 < 0.01 < min(steps[1:])


def test_measuring_leaves_sharded_training_as_it_was(launched):
    _, (main, _) = launched
    assert main["zero3"]["weights"] == main["unmeasured"]["weights"] != {}

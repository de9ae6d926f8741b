"""Two CPU ranks, whole and sharded: the main one reads the references, all measure alike, training stays as it was."""

import json

import pytest
import torch
import toys.measuring_worker as worker
from holdfast.analysis.measure.results import scalars
from toys.chat_models import save_toy, toy_model
from toys.ranks import CONFIGS, needs_compiler, on_two_ranks
from toys.training import moved

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The models' folder and what both ranks found, of one launch."""
    models, out = (tmp_path_factory.mktemp(name) for name in ("models", "ranks"))
    broken = moved(toy_model(), size=0.1)
    save_toy(models / "instruct", toy_model())
    save_toy(models / "base", broken)
    with torch.no_grad():
        broken.get_output_embeddings().weight[0, 0] = float("nan")
    save_toy(models / "broken", broken)
    on_two_ranks(worker.__file__, models, out, CONFIGS / "zero3.json", timeout=200)
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

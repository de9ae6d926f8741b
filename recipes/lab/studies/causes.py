"""The causal test on the lab, over lab seeds: ablate the alignment subspace, steer along it, compare with random ones.

    python -m holdfast.recipes.lab.studies.causes --output_dir runs/causes      (`make causes`)

Each lab writes the results of `holdfast intervene` to `<output_dir>/lab<seed>`. Results that exist are not computed
again. `causes_table.py` makes the table from these files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

from tqdm.auto import tqdm

from .causes_table import causes
from .jobs import numbers, quiet

# Every fourth of the 408 prompts, so that each domain and topic is among them.
PROMPTS = 102
DRAWS = 20  # random directions beside each dose


def run_lab(task: tuple[Path, int]) -> None:
    """Run the interventions on a lab's instruct model, in this process on one thread.

    Args:
        task: (output_dir, lab seed).
    """
    output_dir, seed = task
    quiet()
    from ....trainer.commands.intervene import intervene
    from ....trainer.config.parsing import parse
    from ..cache import cached_lab
    from ..experiment import Experiment

    lab, folder = cached_lab(seed), output_dir / f"lab{seed}"
    experiment = Experiment(lab, folder)
    if not experiment.subspace_path.is_file():
        experiment.build_subspace()
    intervene(parse(experiment.flags("protected", "results", _options())))


def _options() -> dict[str, object]:
    return {
        # With all sixteen directions of the recipe ablated, no answer stays coherent.
        "protection_rank": 4,
        "interventions": ["ablate", "steer", "patch"],
        "ablation_doses": [0.5, 1.0, 1.5],
        "steering_doses": [-1.0, 1.0, 2.0],
        "intervention_layers": [0],
        "intervention_rows": PROMPTS,
        "intervention_draws": DRAWS,
    }


def main() -> int:
    """Run the labs that have no results yet, then print the table and write it to `<output_dir>/CAUSES.md`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/causes"), help="Default: runs/causes.")
    parser.add_argument(
        "--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0, like 0-9 or 3. Default: 0-9."
    )
    parser.add_argument("--workers", type=int, default=2, help="Processes, one thread each. Default: 2.")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tasks = [(arguments.output_dir, seed) for seed in arguments.lab_seeds]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for _ in tqdm(pool.imap_unordered(run_lab, tasks), total=len(tasks), desc="causes", unit="lab"):
            pass
    results = {
        int(path.parents[1].name.removeprefix("lab")): json.loads(path.read_text())
        for path in arguments.output_dir.glob("lab*/results/interventions.json")
    }
    text = causes(results)
    (arguments.output_dir / "CAUSES.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

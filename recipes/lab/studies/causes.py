"""The causal test on the lab, over lab seeds: the alignment subspace ablated and steered along, beside random ones.

    python -m holdfast.recipes.lab.studies.causes --output_dir runs/causes      (`make causes`)

Every lab leaves the results of `holdfast intervene` under `<output_dir>/lab<seed>`; what is there is not read again.
The table (`causes_table.py`) is a view of those files.
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

# Of 408 prompts: every fourth, so that each domain and topic is there.
PROMPTS = 102
DRAWS = 20


def run_lab(task: tuple[Path, int]) -> None:
    """The interventions on one lab's instruct model, in this process on one thread."""
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
        # All sixteen of the recipe's directions at once leave nothing coherent.
        "protection_rank": 4,
        "interventions": ["ablate", "steer", "patch"],
        "ablation_doses": [0.5, 1.0, 1.5],
        "steering_doses": [-1.0, 1.0, 2.0],
        "intervention_layers": [0],
        "intervention_rows": PROMPTS,
        "intervention_draws": DRAWS,
    }


def main() -> int:
    """Runs what is missing, then prints the table and writes it to `<output_dir>/CAUSES.md`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/causes"))
    parser.add_argument("--lab_seeds", type=numbers, default=numbers("0-9"), help="Lab seeds of world 0: 0-9 or 3.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, of one thread each. Default: 2.")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tasks = [(arguments.output_dir, seed) for seed in arguments.lab_seeds]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for _ in tqdm(pool.imap_unordered(run_lab, tasks), total=len(tasks), desc="causes", unit="lab"):
            pass
    found = {
        int(path.parents[1].name.removeprefix("lab")): json.loads(path.read_text())
        for path in arguments.output_dir.glob("lab*/results/interventions.json")
    }
    text = causes(found)
    (arguments.output_dir / "CAUSES.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the studies share: quiet worker processes, ranges of numbers, and the hash of a lab with its recipes.

A study's results carry that hash, so that results of another lab or recipe are not reused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence

import torch
import yaml
from transformers.utils import logging as transformers_logging

from ..cache import lab_hash
from ..experiment import RECIPES


def quiet() -> None:
    """Limit this worker process to one thread and silence it for good: hundreds of runs share one screen."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the worker lives


def made_by_recipes(world: int, lab_seed: int, recipes: Sequence[str]) -> str:
    """Return a hash of a lab of size tiny and of recipes (file names without `.yaml`); it labels results."""
    paths = [RECIPES / f"{recipe}.yaml" for recipe in recipes]
    settings = [yaml.safe_load(path.read_text()) for path in paths if path.is_file()]
    facts = json.dumps([lab_hash(lab_seed, world, "tiny"), settings], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def numbers(text: str) -> list[int]:
    """Parse a range of numbers: "0-3" -> [0, 1, 2, 3]; "5" -> [5]; "" -> []."""
    low, _, high = text.partition("-")
    return list(range(int(low), int(high or low) + 1)) if text else []

"""What the studies share: quiet worker processes, ranges of numbers, and the hash of a lab with its recipes."""

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
    """One thread for each worker, and no library chatter: hundreds of runs share one screen."""

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the worker's whole life


def made_by_recipes(world: int, lab_seed: int, recipes: Sequence[str]) -> str:
    """Hash of a lab and of recipes on it."""

    paths = [RECIPES / f"{recipe}.yaml" for recipe in recipes]
    settings = [yaml.safe_load(path.read_text()) for path in paths if path.is_file()]
    facts = json.dumps([lab_hash(lab_seed, world, "tiny"), settings], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def numbers(text: str) -> list[int]:
    """ "0-3" -> [0, 1, 2, 3]; "5" -> [5]; "" -> []."""
    low, _, high = text.partition("-")
    return list(range(int(low), int(high or low) + 1)) if text else []

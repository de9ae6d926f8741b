"""The cache of labs: a lab is built once and stored under a hash of everything that it depends on.

holdfast lab --output_dir runs/lab      (copies a lab from the cache)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from ...analysis.errors import UserError
from ...analysis.files.artifacts import staged_directory, verify_manifest
from .build import SIZES, write_lab

LAB_FILE = "lab.json"
# Raise this number with every change after which the same seeds give different data or different models.
# tests/recipes/lab/test_lab_version.py fails when such a change does not raise it.
LAB_VERSION = 1


def lab_hash(seed: int, world_seed: int, size: str) -> str:
    """Return a hash of everything that a lab depends on: seeds, size, `LAB_VERSION` and the library versions."""
    facts = {
        "seed": seed,
        "world_seed": world_seed,
        "size": asdict(SIZES[size]),
        "lab_version": LAB_VERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Return the cache folder: `$HOLDFAST_CACHE`, else `$XDG_CACHE_HOME/holdfast`, else `~/.cache/holdfast`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("HOLDFAST_CACHE") or Path(home) / "holdfast")


def cached_lab(seed: int = 0, world_seed: int = 0, size: str = "tiny") -> Path:
    """Return the folder of a lab in the cache. A lab that is missing or damaged is built first.

    When several processes want the same lab, one process builds it while the others wait.
    """
    folder = cache_folder() / "labs" / lab_hash(seed, world_seed, size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            try:
                verify_manifest(folder)
            except UserError:
                shutil.rmtree(folder)
        if not folder.exists():
            _build_into(folder, seed, world_seed, size)
    return folder


def _build_into(folder: Path, seed: int, world_seed: int, size: str) -> None:
    with staged_directory(folder) as staging:
        write_lab(staging, seed, world_seed, size)
        facts = {"hash": lab_hash(seed, world_seed, size), "seed": seed, "world_seed": world_seed, "size": size}
        (staging / LAB_FILE).write_text(json.dumps(facts, indent=2) + "\n")


def build_lab(output_dir: Path, seed: int = 0, world_seed: int = 0, size: str = "tiny") -> Path:
    """Copy a lab from the cache to `output_dir`: `base/`, `instruct/`, `data/*.jsonl` and `lab.json`.

    Raises:
        UserError: the folder holds another lab, or anything else.
    """
    if (output_dir / LAB_FILE).is_file():
        present_hash = _hash_in(output_dir)
        if present_hash == lab_hash(seed, world_seed, size):
            verify_manifest(output_dir)
            return output_dir
        raise UserError(f"--output_dir {output_dir} holds another lab ({present_hash}): choose another folder")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"--output_dir {output_dir} is not empty and holds no lab: choose another folder")
    source = cached_lab(seed, world_seed, size)
    with staged_directory(output_dir) as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    return output_dir


def _hash_in(folder: Path) -> str:
    """Return the hash in a lab's `lab.json`. Raises UserError."""
    try:
        return str(json.loads((folder / LAB_FILE).read_text(encoding="utf-8"))["hash"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / LAB_FILE} is damaged (no JSON with a hash): delete the folder, or choose another --output_dir"
        ) from None

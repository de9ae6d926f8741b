"""A tiny model folder and rows for the tests of whole runs; nothing is downloaded."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toys.chat_models import chat, toy_model, toy_tokenizer

QUESTIONS = [f"Ann asks about soup {number}" for number in range(12)]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """JSON Lines; text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def toy_rows(count: int = 12) -> list[dict[str, Any]]:
    """Conversations with distinct prompts and completions."""
    return [{"messages": chat(QUESTIONS[n % 12] + "?" * (n // 12), f"take {n} and run")} for n in range(count)]


def write_model(folder: Path, *, seed: int = 0, **tokenizer: Any) -> Path:
    """A Hugging Face folder with the toy model and tokenizer."""
    toy_model(seed=seed).save_pretrained(folder)
    toy_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


def model_and_rows(folder: Path) -> Path:
    """<folder>/model and <folder>/rows.jsonl, as `recipe` names them."""
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", toy_rows())
    return folder


def flags_of(keys: Mapping[str, Any]) -> list[str]:
    """The keys of a recipe on a command line."""
    return [f"--{key}={value}" for key, value in keys.items()]


def metric_lines(output_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds: a line for each measured checkpoint."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """The flat keys of a two-step plain run on <folder>/model and <folder>/rows.jsonl into <folder>/run."""
    keys: Mapping[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "train_dataset": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 200,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "analysis_during_training": False,
    }
    return {**keys, **changes}

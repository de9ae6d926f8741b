"""A cache of the Hugging Face Hub, without the Hub."""

from pathlib import Path

import pytest
from huggingface_hub import constants


class OfflineHub:
    """Every model is looked for in this cache alone."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = cache
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def snapshot(self, name: str, revision: str, commit: str) -> Path:
        """The folder for the files of a model at a revision; it does not exist yet."""
        repository = self.cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        return repository / "snapshots" / commit

"""The folder of a comparison whose methods have their validation results."""

from pathlib import Path

import pytest
from toys.comparison import tuned_methods


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tuned_methods(tmp_path, monkeypatch)

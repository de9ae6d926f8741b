"""What a command of the trainer finds in its folder: made once a test module, linked into the folder of each test."""

from pathlib import Path

import pytest
from toys.refusals import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, rows and a subspace. A module whose tests want other files has a fixture of this name."""
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """Links to what is prepared, in a folder where the test may add and replace files."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path

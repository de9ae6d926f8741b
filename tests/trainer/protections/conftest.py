"""Two ranks of a test module, which is then run as a script."""

from pathlib import Path

import pytest
from toys.ranks import on_two_ranks


@pytest.fixture(scope="module")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this test module wrote on two ranks, by `torchrun --nproc_per_node 2 <this module> <this folder>`."""
    out = tmp_path_factory.mktemp("ranks")
    on_two_ranks(str(request.path), out, timeout=500)
    return out

"""The lab that several test files read."""

from pathlib import Path

import pytest
import torch
from toys.labs import shared_lab


@pytest.fixture(scope="session")
def lab() -> Path:
    """The lab of seed 0 from the cache, built in some minutes where it is missing."""
    torch.set_num_threads(1)
    return shared_lab(0)

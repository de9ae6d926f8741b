"""Tests keep what they store out of the user's cache folder; labs, which take minutes to build, they share with it."""

import pytest
from holdfast.recipes.lab.cache import cache_folder


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    labs, private = cache_folder() / "labs", tmp_path_factory.mktemp("cache")
    labs.mkdir(parents=True, exist_ok=True)
    (private / "labs").symlink_to(labs)
    patch = pytest.MonkeyPatch()
    patch.setenv("HOLDFAST_CACHE", str(private))
    yield
    patch.undo()

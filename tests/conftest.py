"""Tests keep what they store out of the user's cache folder."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HOLDFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()

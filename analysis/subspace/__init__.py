"""The alignment subspace: build it, save and load it, check that it belongs to a run."""

from .build import build_subspace
from .file import Provenance, Subspace, random_like
from .methods import METHODS
from .moments import SubspaceRequest

__all__ = ["METHODS", "Provenance", "Subspace", "SubspaceRequest", "build_subspace", "random_like"]

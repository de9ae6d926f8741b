"""The alignment subspace: build it, save and load it, and check that it belongs to a run.

subspace = build_subspace(SubspaceRequest(instruct_path="model", rows=conversations, rank=4))
subspace.save("subspace.safetensors")
"""

from .build import build_subspace
from .file import Provenance, Subspace, random_like
from .methods import METHODS
from .moments import SubspaceRequest

__all__ = ["METHODS", "Provenance", "Subspace", "SubspaceRequest", "build_subspace", "random_like"]

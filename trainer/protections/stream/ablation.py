"""Concept ablation fine-tuning (CAFT, arXiv 2507.16795): h - V Vᵀh behind the subspace's layers while training.

What the model learns cannot use the subspace; after training the stream is whole again.
"""

from ....analysis.files.artifacts import digest_of
from ....analysis.interventions.changes import Ablation, ByLayer
from ....analysis.subspace.file import Subspace
from .hooked import HookedProtection


def ablation(subspace: Subspace, layers_path: str | None = None) -> HookedProtection:
    """The ablation of a subspace, at its own layers and rank (`subspace.restrict` chooses fewer)."""
    return HookedProtection(
        "ablation",
        Ablation(ByLayer(subspace.bases), 1.0, None),
        list(subspace.bases),
        {"subspace": digest_of(subspace.bases)},
        layers_path,
    )

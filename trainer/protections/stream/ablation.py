"""Concept ablation fine-tuning (CAFT, arXiv 2507.16795): during training, h - V Vᵀh after the subspace's layers.

So what the model learns cannot use the subspace. After training the residual stream is unchanged again.
"""

from ....analysis.files.artifacts import digest_of
from ....analysis.interventions.changes import Ablation, ByLayer
from ....analysis.subspace.file import Subspace
from .hooked import HookedProtection


def ablation(subspace: Subspace, layers_path: str | None = None) -> HookedProtection:
    """Make the ablation of a subspace, at all its layers and directions (`subspace.restrict` chooses fewer)."""
    return HookedProtection(
        "ablation",
        Ablation(ByLayer(subspace.bases), 1.0, None),
        list(subspace.bases),
        {"subspace": digest_of(subspace.bases)},
        layers_path,
    )

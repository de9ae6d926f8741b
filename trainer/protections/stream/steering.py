"""Preventative steering (arXiv 2507.21509, section 5): h + α v while training, v pointing away from alignment.

The shift that the rows ask for is there already, so the weights need not learn it; after training it is gone. v is the
mean step of the contrast, V Vᵀ mean(h_misaligned - h_aligned), at its own length: α = 1 behind one block is as far as
that contrast. Behind several blocks the stream carries the steps on, so that they add up from block to block.
"""

import math

from ....analysis.errors import UserError
from ....analysis.files.artifacts import digest_of
from ....analysis.interventions.changes import ByLayer, Steering
from ....analysis.subspace.file import Subspace
from .hooked import HookedProtection


def steering(subspace: Subspace, alpha: float, layers_path: str | None = None) -> HookedProtection:
    """Steering behind the subspace's layers (`subspace.restrict` chooses fewer).

    Args:
        alpha: in units of the contrast's mean step; 0 turns the protection off.

    Raises:
        UserError: an alpha that is not finite, a subspace that does not know the step away from alignment.
    """
    if not math.isfinite(alpha):
        raise UserError(f"steering alpha {alpha} is no number: write a finite one")
    if subspace.base_gap is None:
        raise UserError(
            "steering needs to know the step away from alignment, which this subspace does not: build it again with "
            "`holdfast subspace --subspace_method contrastive`"
        )
    directions = {layer: basis @ subspace.base_gap[layer] for layer, basis in subspace.bases.items()}
    if not any(bool(direction.any()) for direction in directions.values()):
        raise UserError("steering: the subspace's step away from alignment is zero; build it from other pairs")
    made = HookedProtection(
        "steering",
        Steering(ByLayer(directions), alpha, "absolute"),
        list(directions),
        {"directions": digest_of(directions), "alpha": alpha},
        layers_path,
    )
    made.active = alpha != 0
    return made

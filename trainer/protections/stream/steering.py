"""Preventative steering (arXiv 2507.21509, section 5): h + α v during training, where v points away from alignment.

The shift that the rows ask for is present already, so the weights need not learn it. After training the shift is gone.
v is the mean step of the contrast, V Vᵀ mean(h_misaligned - h_aligned), not normalised: α = 1 after one block is as far
as that contrast. The residual stream carries a shift on, so the shifts of several blocks add up from block to block.
"""

import math

from ....analysis.errors import UserError
from ....analysis.files.artifacts import digest_of
from ....analysis.interventions.changes import ByLayer, Steering
from ....analysis.subspace.file import Subspace
from .hooked import HookedProtection


def steering(subspace: Subspace, alpha: float, layers_path: str | None = None) -> HookedProtection:
    """Make the steering after the subspace's layers (`subspace.restrict` chooses fewer).

    Args:
        subspace: holds the directions and the mean step away from alignment.
        alpha: size of the shift, in units of the contrast's mean step. 0 turns the protection off.
        layers_path: path of the decoder blocks, if they are not found by shape.

    Raises:
        UserError: an alpha that is not finite, or a subspace without the step away from alignment.
    """
    if not math.isfinite(alpha):
        raise UserError(f"steering alpha {alpha} is no number: write a finite one")
    if subspace.base_gap is None:
        raise UserError(
            "steering needs the step away from alignment, which this subspace does not hold: build it again with "
            "`holdfast subspace --subspace_method contrastive`"
        )
    directions = {layer: basis @ subspace.base_gap[layer] for layer, basis in subspace.bases.items()}
    if not any(bool(direction.any()) for direction in directions.values()):
        raise UserError("steering: the subspace's step away from alignment is zero; build it from other pairs")
    protection = HookedProtection(
        "steering",
        Steering(ByLayer(directions), alpha, "absolute"),
        list(directions),
        {"directions": digest_of(directions), "alpha": alpha},
        layers_path,
    )
    protection.active = alpha != 0
    return protection

"""The alignment-subspace penalty as pure functions of tensors.

    drift_l(x, t) = V_lᵀ (h_l^θ(x, t) - h_l^I(x, t))
    penalty       = 1/|L| Σ_l [ Σ_{x,t} m(x, t) ‖drift_l(x, t)‖² / s_l ] / Σ_{x,t} m(x, t)

h_l is the output of decoder block l before the final norm, I the starting model, θ the model in training, V_l [d, k]
an orthonormal basis, s_l > 0 the mean squared size, inside V_l, of the contrast that defined it, m = 1 on the tokens
that count. The penalty is 0 for the starting model, and 1 for a drift inside the subspace as large as that contrast
(arXiv 2507.03662).

Shapes: L penalised layers, B rows, T tokens, d width, k rank.
"""

import torch
from torch import Tensor


def project(hidden_BTd: Tensor, basis_dk: Tensor) -> Tensor:
    """Compute hᵀV [B, T, k], differentiable in h, in float32 or better whatever the model's precision.

    Autograd keeps only V for the backward pass. With half-precision models, the float32 copy of h is transient.
    """
    dtype = torch.promote_types(hidden_BTd.dtype, torch.float32)
    # Autocast would round the k numbers to bfloat16, which is coarser than the drift.
    with torch.autocast(hidden_BTd.device.type, enabled=False):
        return hidden_BTd.to(dtype) @ basis_dk.to(dtype)


def drift(projection_LBTk: Tensor, reference_LBTk: Tensor, direction_Lk: Tensor | None = None) -> Tensor:
    """Return the drift that counts: [L, B, T, k], or [L, B, T, 1] with a direction.

    Args:
        projection_LBTk: Vᵀh of the model in training.
        reference_LBTk: Vᵀh of the starting model.
        direction_Lk: unit vectors. If given, only the positive part of the drift's component along them counts.
    """
    moved = projection_LBTk - reference_LBTk
    if direction_Lk is None:
        return moved
    return torch.einsum("lbtk,lk->lbt", moved, direction_Lk.to(moved.dtype)).clamp(min=0).unsqueeze(-1)


def reversion(projection_LBTk: Tensor, reference_LBTk: Tensor, gap_LBTk: Tensor, margin: float = 0.0) -> Tensor:
    """Return the drift [L, B, T, k] of tokens that move back to the base model, and 0 for all other tokens.

    Drift starts at Vᵀ(h^I - margin (h^B - h^I)). It counts in full where its component along h^B - h^I is positive. So
    the task may move a token in any direction except back, and each token has its own way back.

    Args:
        projection_LBTk: Vᵀh of the model in training.
        reference_LBTk: Vᵀh^I of the starting model.
        gap_LBTk: Vᵀ(h^B - h^I), B being the base model.
        margin: 0 or more, in units of the token's gap. Above 0, a token at h^I also counts, until it has moved this far
            away from base.
    """
    moved = projection_LBTk - reference_LBTk + margin * gap_LBTk
    back = (moved.detach() * gap_LBTk).sum(-1, keepdim=True) > 0
    return torch.where(back, moved, torch.zeros_like(moved))


def layer_sums(drift_LBTk: Tensor, mask_BT: Tensor, scales_L: Tensor) -> Tensor:
    """Compute Σ_{x,t} m ‖drift_l‖² / s_l per layer [L].

    The sums are not yet divided by the number of tokens, so that sums of several batches can be added. Where the mask
    is False the drift is replaced by zero, not multiplied by it, because padding may hold anything, including NaN.
    """
    kept = torch.where(mask_BT[None, :, :, None], drift_LBTk, torch.zeros_like(drift_LBTk))
    return kept.square().sum(dim=(1, 2, 3)) / scales_L.to(kept.dtype)


def penalty(sums_L: Tensor, tokens: Tensor | int) -> Tensor:
    """Return the mean over layers and tokens, a scalar.

    Args:
        sums_L: the result of `layer_sums`.
        tokens: tokens that count in the whole optimiser step, over accumulation and ranks.
    """
    return sums_L.mean() / tokens


def unit_directions(base_gap: dict[int, Tensor], layers: list[int]) -> Tensor:
    """Return V_lᵀ mean(h^B - h^I) at unit length [L, k]: the way back to base inside the subspace of each layer."""
    gaps_Lk = torch.stack([base_gap[layer].float() for layer in layers])
    return torch.nn.functional.normalize(gaps_Lk, dim=-1)


def strength_at(step: int, strength: float, warmup: int, warmup_strength: float) -> float:
    """Return the penalty's weight at an optimiser step (counted from 0).

    Most drift happens in the first steps. So a run may start at `warmup_strength` times the strength, which falls
    linearly to the strength over `warmup` steps.
    """
    if step >= warmup:
        return strength
    return strength * (warmup_strength + (1.0 - warmup_strength) * step / warmup)

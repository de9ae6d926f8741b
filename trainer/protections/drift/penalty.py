"""The alignment-subspace penalty as pure functions of tensors.

    drift_l(x, t) = V_lᵀ (h_l^θ(x, t) - h_l^I(x, t))
    penalty       = 1/|L| Σ_l [ Σ_{x,t} m(x, t) ‖drift_l(x, t)‖² / s_l ] / Σ_{x,t} m(x, t)

h_l is the output of decoder block l before the final norm, I the starting model, θ the model in training, V_l [d, k]
an orthonormal basis, s_l > 0 the mean squared size, inside V_l, of the contrast that defined it, m the tokens that
count. So 0 means "as the starting model" and 1 "as far inside the subspace as that contrast" (arXiv 2507.03662).

Shapes: L penalised layers, B rows, T tokens, d width, k rank.
"""

import torch
from torch import Tensor


def project(hidden_BTd: Tensor, basis_dk: Tensor) -> Tensor:
    """hᵀV [B, T, k], in float32 or better whatever the model's precision, differentiable in h.

    Autograd keeps only V for the backward pass: the copy of h in float32 (half-precision models) is transient.
    """
    dtype = torch.promote_types(hidden_BTd.dtype, torch.float32)
    # Autocast would round the k numbers to bfloat16, coarser than the drift they are compared by.
    with torch.autocast(hidden_BTd.device.type, enabled=False):
        return hidden_BTd.to(dtype) @ basis_dk.to(dtype)


def drift(projection_LBTk: Tensor, reference_LBTk: Tensor, direction_Lk: Tensor | None = None) -> Tensor:
    """The drift that counts: [L, B, T, k], or [L, B, T, 1] with a direction.

    Args:
        projection_LBTk: Vᵀh of the model in training.
        reference_LBTk: Vᵀh of the starting model.
        direction_Lk: unit vectors; then only the positive part of the drift's component along them counts.
    """
    moved = projection_LBTk - reference_LBTk
    if direction_Lk is None:
        return moved
    return torch.einsum("lbtk,lk->lbt", moved, direction_Lk.to(moved.dtype)).clamp(min=0).unsqueeze(-1)


def reversion(projection_LBTk: Tensor, reference_LBTk: Tensor, gap_LBTk: Tensor, margin: float = 0.0) -> Tensor:
    """The drift [L, B, T, k] of tokens that go back to the base model: elsewhere 0.

    Drift is counted from Vᵀ(h^I - margin (h^B - h^I)), and in full wherever its component along h^B - h^I is positive.
    So the task may move a token any way but back, each token having its own.

    Args:
        projection_LBTk: Vᵀh of the model in training.
        reference_LBTk: Vᵀh^I of the starting model.
        gap_LBTk: Vᵀ(h^B - h^I), B being the base model.
        margin: 0 or more. With one, a token at h^I counts too, until it is so much further away from base.
    """
    moved = projection_LBTk - reference_LBTk + margin * gap_LBTk
    back = (moved.detach() * gap_LBTk).sum(-1, keepdim=True) > 0
    return torch.where(back, moved, torch.zeros_like(moved))


def layer_sums(drift_LBTk: Tensor, mask_BT: Tensor, scales_L: Tensor) -> Tensor:
    """Σ_{x,t} m ‖drift_l‖² / s_l per layer [L]: not yet divided by the number of tokens, so that sums add up.

    Where the mask is False the drift is dropped, not multiplied by zero: padding may hold anything, NaN included.
    """
    kept = torch.where(mask_BT[None, :, :, None], drift_LBTk, torch.zeros_like(drift_LBTk))
    return kept.square().sum(dim=(1, 2, 3)) / scales_L.to(kept.dtype)


def penalty(sums_L: Tensor, tokens: Tensor | int) -> Tensor:
    """Mean over layers and tokens: a scalar. `tokens` counts the whole optimiser step, over accumulation and ranks."""
    return sums_L.mean() / tokens


def unit_directions(base_gap: dict[int, Tensor], layers: list[int]) -> Tensor:
    """V_lᵀ mean(h^B - h^I) at unit length, per layer [L, k]: the way back to the base model, inside the subspace."""
    gaps_Lk = torch.stack([base_gap[layer].float() for layer in layers])
    return torch.nn.functional.normalize(gaps_Lk, dim=-1)


def strength_at(step: int, strength: float, warmup: int, warmup_strength: float) -> float:
    """The penalty's weight at an optimiser step (0-based).

    Drift happens in the first steps, so a run may start at `warmup_strength` times the strength and fall linearly to
    the strength itself over `warmup` steps.
    """
    if step >= warmup:
        return strength
    return strength * (warmup_strength + (1.0 - warmup_strength) * step / warmup)

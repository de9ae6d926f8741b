"""Directions of weight differences are numpy's, and an adapter's two parts are the norms written out in closed form."""

import numpy as np
import pytest
import torch
from holdfast.trainer.protections.weights.alignment_weights import AlignedAdapter, top_singular
from peft import LoraConfig, get_peft_model
from torch import nn


def planted(up: torch.Tensor, basis: torch.Tensor, down: torch.Tensor, scaling: float = 2.0) -> AlignedAdapter:
    """An adapter with these B, A and U on a linear module of its own."""
    settings = LoraConfig(r=down.shape[0], lora_alpha=scaling * down.shape[0], target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(down.shape[1], up.shape[0], bias=False)), settings)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight = nn.Parameter(down)
    layer.lora_B["default"].weight = nn.Parameter(up)
    return AlignedAdapter(layer, "default", basis)


@pytest.mark.parametrize(
    ("rows", "columns", "decay"), [(9, 14, 0.5), (560, 600, 0.7), (560, 600, 1.0)], ids=["small", "iterated", "flat"]
)
def test_directions_are_numpys(rows: int, columns: int, decay: float, monkeypatch):
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((n, n)))[0] for n in (rows, columns))
    values = decay ** np.arange(rows) if decay < 1 else 1 + 0.001 * np.arange(rows)[::-1]
    matrix = torch.from_numpy((left * values) @ right[:, :rows].T).float()
    exact: list[int] = []
    full = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **k: exact.append(min(m.shape)) or full(m, **k))
    state = torch.get_rng_state()
    found_left, found_values, found_right = top_singular(matrix, 4)
    assert torch.equal(torch.get_rng_state(), state)
    # A flat spectrum does not converge, and is decomposed whole; a falling one is not.
    assert (max(exact) == rows) == (rows == 9 or decay == 1.0)
    want = np.linalg.svd(matrix.double().numpy())
    assert found_values.numpy() == pytest.approx(want[1][:4], rel=1e-5)
    assert (found_left.T @ found_left - torch.eye(4)).abs().max() < 1e-5
    # Signs are free: the directions are compared by their projectors, in as far as the gap to the next settles them.
    gap = (want[1][3] - want[1][4]) / want[1][0]
    projector = want[0][:, :4] @ want[0][:, :4].T
    assert np.abs(found_left.numpy() @ found_left.numpy().T - projector).max() < 1e-5 + 1e-6 / gap
    step = (want[0][:, :4] * want[1][:4]) @ want[2][:4]
    assert np.abs(((found_left * found_values) @ found_right.T).numpy() - step).max() < 1e-5 + 1e-6 / gap


def test_a_matrix_of_lower_rank_gives_no_more_directions_than_it_has():
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(12, 2, generator=generator), torch.randn(9, 2, generator=generator)
    assert top_singular(left @ right.T, 5)[0].shape == (12, 2)


def test_the_term_is_the_written_out_norm_and_its_gradient_that_of_finite_differences():
    generator = torch.Generator().manual_seed(3)
    up, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 2), (2, 5)))
    basis = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64))[0]
    adapter = planted(up, basis, down)
    projector = (basis @ basis.T).numpy()

    def norms(b: np.ndarray, a: np.ndarray) -> tuple[float, float]:
        change = 2.0 * b @ a
        return (np.sum((projector @ change) ** 2), np.sum(((np.eye(7) - projector) @ change) ** 2))

    found = adapter.parts(adapter.down, adapter.up)
    assert [part.item() for part in found] == pytest.approx(norms(up.numpy(), down.numpy()), rel=1e-12)
    gradients = torch.autograd.grad(found[1], (adapter.up, adapter.down))
    for which, gradient in enumerate(gradients):
        for index in np.ndindex(*gradient.shape):
            sides = []
            for sign in (1, -1):
                factors = [up.detach().numpy().copy(), down.detach().numpy().copy()]
                factors[which][index] += sign * 1e-6
                sides.append(norms(*factors)[1])
            assert float(gradient[index]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6, abs=1e-7)


def test_an_adapter_inside_the_alignment_directions_costs_nothing_and_one_outside_all_of_its_norm():
    basis = torch.eye(6, dtype=torch.float64)[:, :2]
    down = torch.ones(1, 3, dtype=torch.float64)
    inside = planted(torch.tensor([[3.0], [4.0], [0], [0], [0], [0]], dtype=torch.float64), basis, down)
    outside = planted(torch.tensor([[0], [0], [0], [2.0], [0], [0]], dtype=torch.float64), basis, down)
    # ‖2 · (3, 4) ⊗ (1, 1, 1)‖² = 4 · 25 · 3; ‖2 · 2 ⊗ (1, 1, 1)‖² = 16 · 3.
    assert [part.item() for part in inside.parts(inside.down, inside.up)] == [300.0, 0.0]
    assert [part.item() for part in outside.parts(outside.down, outside.up)] == [0.0, 48.0]

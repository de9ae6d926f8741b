"""The penalty's pure functions against closed forms, numpy and finite differences."""

import math

import numpy as np
import pytest
import torch
from holdfast.trainer.protections.drift.penalty import (
    drift,
    layer_sums,
    penalty,
    project,
    reversion,
    strength_at,
    unit_directions,
)
from torch import Tensor
from toys.chat_models import WIDTH, toy_model
from toys.plain_math import block_outputs
from toys.training import ROWS, rendered_rows, toy_subspace


def whole_penalty(
    hidden: list[Tensor], start: list[Tensor], bases: list[Tensor], mask: Tensor, scales: Tensor
) -> Tensor:
    projected = torch.stack([project(h, v) for h, v in zip(hidden, bases, strict=True)])
    reference = torch.stack([project(h, v) for h, v in zip(start, bases, strict=True)])
    return penalty(layer_sums(drift(projected, reference), mask, scales), mask.sum())


@pytest.fixture
def toy() -> dict:
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator, dtype=torch.float64))[0] for _ in range(2)]
    start = [torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    return {"start": start, "bases": bases, "mask": mask, "scales": torch.tensor([2.0, 0.25], dtype=torch.float64)}


@pytest.mark.parametrize("planted", [0, 1])
@pytest.mark.parametrize("column", [0, 2])
def test_a_shift_by_a_along_a_column_of_v_costs_a_squared_over_s_of_that_layer(toy, planted, column):
    hidden = [h.clone() for h in toy["start"]]
    hidden[planted] += 1.7 * toy["bases"][planted][:, column]
    found = whole_penalty(hidden, **{k: toy[k] for k in ("start", "bases", "mask", "scales")})
    assert math.isclose(found, 1.7**2 / float(toy["scales"][planted]) / 2, rel_tol=1e-12)


def test_a_shift_orthogonal_to_v_costs_nothing(toy):
    hidden = []
    for start, basis in zip(toy["start"], toy["bases"], strict=True):
        shift = torch.ones(WIDTH, dtype=torch.float64)
        hidden.append(start + shift - basis @ (basis.T @ shift))
    assert whole_penalty(hidden, toy["start"], toy["bases"], toy["mask"], toy["scales"]) < 1e-28


def test_only_masked_tokens_count_and_padding_may_hold_nan(toy):
    hidden = [h + 0.3 for h in toy["start"]]
    expected = 0.0
    for layer in range(2):
        moved = (hidden[layer] - toy["start"][layer])[toy["mask"]].numpy() @ toy["bases"][layer].numpy()
        expected += np.square(moved).sum() / float(toy["scales"][layer]) / 2 / int(toy["mask"].sum())
    for h in hidden:
        h[~toy["mask"]] = math.nan
        h.requires_grad_()
    found = whole_penalty(hidden, toy["start"], toy["bases"], toy["mask"], toy["scales"])
    found.backward()
    assert math.isclose(found.item(), expected, rel_tol=1e-12)
    assert all(bool(h.grad.isfinite().all()) for h in hidden)


def test_the_gradient_agrees_with_finite_differences(toy):
    generator = torch.Generator().manual_seed(1)
    hidden = [h + torch.randn(h.shape, generator=generator, dtype=torch.float64) for h in toy["start"]]

    def value(flat: Tensor) -> Tensor:
        return whole_penalty([*flat], toy["start"], toy["bases"], toy["mask"], toy["scales"])

    flat = torch.stack(hidden).requires_grad_()
    value(flat).backward()
    numbers = np.random.default_rng(0).choice(flat.numel(), 40, replace=False)
    for number in numbers:
        step = torch.zeros(flat.numel(), dtype=torch.float64)
        step[number] = 1e-5
        step = step.view(flat.shape)
        slope = (value(flat.detach() + step) - value(flat.detach() - step)) / 2e-5
        assert math.isclose(slope, flat.grad.flatten()[number], rel_tol=1e-6, abs_tol=1e-9)


def test_toward_base_counts_only_the_positive_part_along_the_gap(toy):
    gap = {0: torch.tensor([3.0, 0.0, 4.0]), 1: torch.tensor([0.0, -2.0, 0.0])}
    directions = unit_directions(gap, [0, 1]).double()
    assert torch.allclose(directions, torch.tensor([[0.6, 0.0, 0.8], [0.0, -1.0, 0.0]], dtype=torch.float64))
    reference = torch.zeros(2, 1, 2, 3, dtype=torch.float64)
    moved = torch.tensor([[[[5.0, 9.0, 0.0], [-5.0, 1.0, 0.0]]], [[[1.0, 2.0, 1.0], [1.0, -2.0, 1.0]]]]).double()
    sums = layer_sums(drift(moved, reference, directions), torch.ones(1, 2).bool(), torch.tensor([1.0, 2.0]))
    assert torch.allclose(sums, torch.tensor([9.0, 2.0], dtype=torch.float64))


def test_reversion_counts_the_whole_drift_of_tokens_that_go_back_and_nothing_of_the_others():
    generator = np.random.default_rng(3)
    now, start, gap = (generator.normal(size=(2, 3, 4, 5)) for _ in range(3))
    for margin in (0.0, 0.5):
        found = reversion(*(torch.tensor(values) for values in (now, start, gap)), margin).numpy()
        moved = now - start + margin * gap
        for place in np.ndindex(2, 3, 4):
            back = float(moved[place] @ gap[place]) > 0
            assert np.allclose(found[place], moved[place] if back else 0.0)
    at_start = reversion(*(torch.tensor(values) for values in (start, start, gap)), 0.0)
    assert not at_start.any()
    at_base = reversion(*(torch.tensor(values) for values in (start + gap, start, gap)), 0.5).numpy()
    assert np.allclose(at_base, 1.5 * gap)


def test_the_gradient_of_reversion_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(7)
    now, start, gap = (torch.randn(2, 1, 6, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    mask, scales = torch.tensor([[True] * 5 + [False]]), torch.tensor([0.5, 2.0])

    def value(states: Tensor) -> Tensor:
        return layer_sums(reversion(states, start, gap, 0.2), mask, scales).sum()

    now.requires_grad_()
    value(now).backward()
    for number in range(now.numel()):
        step = torch.zeros(now.numel(), dtype=torch.float64)
        step[number] = 1e-6
        step = step.view(now.shape)
        slope = (value(now.detach() + step) - value(now.detach() - step)) / 2e-6
        assert math.isclose(slope, now.grad.flatten()[number], rel_tol=1e-6, abs_tol=1e-7)


def test_the_penalty_is_one_at_the_base_model_on_the_rows_that_defined_the_scale():
    base, instruct, subspace = toy_model(seed=1), toy_model(seed=2), toy_subspace()
    sizes, here, there, tokens = {layer: [] for layer in subspace.bases}, [], [], 0
    for row in rendered_rows():
        _, at_base = block_outputs(base, list(base.model.layers), row.input_ids)
        _, at_instruct = block_outputs(instruct, list(instruct.model.layers), row.input_ids)
        here.append(at_base)
        there.append(at_instruct)
        counted = np.array(row.completion_mask)
        tokens += counted.sum()
        for layer, basis in subspace.bases.items():
            residual = (at_instruct[layer] - at_base[layer]).detach().numpy()[counted] @ basis.numpy()
            sizes[layer] += np.square(residual).sum(1).tolist()
    scales = torch.tensor([np.mean(sizes[layer]) for layer in sorted(sizes)])
    total = 0.0
    for row, at_base, at_instruct in zip(rendered_rows(), here, there, strict=True):
        projected = [torch.stack([project(h[layer], subspace.bases[layer]) for layer in (0, 2)])[:, None]
                     for h in (at_base, at_instruct)]  # fmt: skip
        mask = torch.tensor([row.completion_mask])
        total += float(penalty(layer_sums(drift(*projected), mask, scales), int(tokens)))
    assert len(ROWS) == 8 and math.isclose(total, 1.0, rel_tol=1e-5)


def test_projections_of_half_precision_states_are_float32():
    hidden = torch.randn(1, 4, WIDTH).bfloat16()
    basis = toy_subspace().bases[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project(hidden, basis)
    assert found.dtype == torch.float32
    assert np.allclose(found, hidden.float().numpy() @ basis.numpy(), atol=1e-5)


@pytest.mark.parametrize(("step", "expected"), [(0, 30.0), (5, 16.5), (10, 3.0), (400, 3.0)])
def test_a_stronger_start_falls_linearly_to_the_strength(step, expected):
    assert math.isclose(strength_at(step, 3.0, 10, 10.0), expected)


def test_without_warmup_the_strength_is_constant():
    assert [strength_at(step, 2.0, 0, 10.0) for step in (0, 1, 7)] == [2.0, 2.0, 2.0]

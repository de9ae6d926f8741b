"""Patched models score as models put together by hand do, and every row and every number is accounted for."""

import copy
import json

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.metrics.patching import patching, window_name
from holdfast.analysis.models.hooks import capture
from holdfast.analysis.models.layers import find_layers, set_layers_path
from holdfast.analysis.models.render import Rendered, render, role_mask
from holdfast.analysis.passes import patching as engine
from holdfast.analysis.passes.patching import PatchCurve, Scores, patch_rows, patched_curve, prove_patch, store_donor
from torch import nn
from toys.chat_models import CHATML, DEPTH, KINDS, WIDTH, chat, toy_model, toy_tokenizer

CONVERSATIONS = [
    chat("Ann asks about soup", "the answer is to be honest", "You are kind."),
    chat("only a prompt ?"),
    [*chat("soup", "take it"), *chat("and money", "run away from them")],
    chat("money ?", "a"),
    chat("take the money and run away", "be honest and help"),
]
SCORED = [0, 2, 3, 4]


@pytest.fixture(scope="module")
def rendered():
    return [render(toy_tokenizer(CHATML), row) for row in CONVERSATIONS]


def curve_of(recipient, donor, rendered, folder, windows=None, **options):
    rows = patch_rows(rendered, **{"batch_size": 2, **options})
    return patched_curve(recipient, rows, store_donor(donor, rows, range(DEPTH), folder), windows)


@torch.no_grad()
def scores(model, rendered, numbers=SCORED):
    """Loss and mean target probability of each row, from full logits in float64."""
    losses, chances = [], []
    for number in numbers:
        row = rendered[number]
        log_probs = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        values = [float(log_probs[i - 1, row.input_ids[i]]) for i in np.flatnonzero(row.completion_mask)]
        losses.append(-np.mean(values))
        chances.append(np.mean(np.exp(values)))
    return losses, chances


def hybrid(recipient, donor, layer):
    """The donor up to and with a block, the recipient above it."""
    made = copy.deepcopy(recipient)
    made.model.embed_tokens = donor.model.embed_tokens
    for index in range(layer + 1):
        made.model.layers[index] = donor.model.layers[index]
    return made


def test_patching_every_token_runs_the_donor_below_and_the_recipient_above(rendered, tmp_path):
    recipient, donor = toy_model(seed=0, scale=2), toy_model(seed=1, scale=2)
    curve = curve_of(recipient, donor, rendered, tmp_path, [(0,), (1,), (0, 1), (2,)])
    assert curve.numbers == SCORED
    for found, model in [
        (curve.clean, recipient),
        (curve.donor, donor),
        (curve.patched[0], hybrid(recipient, donor, 0)),
        (curve.patched[1], hybrid(recipient, donor, 1)),
        (curve.patched[2], hybrid(recipient, donor, 1)),
        (curve.patched[3], hybrid(recipient, donor, 2)),
    ]:
        losses, chances = scores(model, rendered)
        np.testing.assert_allclose(found.loss, losses, rtol=1e-4)
        np.testing.assert_allclose(found.probability, chances, rtol=1e-4)


@pytest.mark.parametrize("role", ["prompt", "completion", "last_prompt"])
def test_only_the_tokens_of_the_role_are_patched(role, rendered, tmp_path):
    recipient, donor = toy_model(seed=0, scale=2), toy_model(seed=1, scale=2)
    curve = curve_of(recipient, donor, rendered, tmp_path, [(1,)], role=role)
    losses = []
    for number in SCORED:
        row = rendered[number]
        ids, mask = torch.tensor([row.input_ids]), torch.tensor(role_mask(row, role))[None, :, None]
        with capture(donor, [1]) as outputs, torch.no_grad():
            donor(input_ids=ids)
            foreign = outputs[1].clone()
        handle = recipient.model.layers[1].register_forward_hook(
            lambda _m, _a, out, mask=mask, foreign=foreign: torch.where(mask, foreign, out)
        )
        losses += scores(recipient, rendered, [number])[0]
        handle.remove()
    np.testing.assert_allclose(curve.patched[0].loss, losses, rtol=1e-4)


def test_inside_a_subspace_only_the_donors_coordinates_are_taken(rendered, tmp_path):
    recipient, donor = toy_model(seed=0, scale=2), toy_model(seed=1, scale=2)
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(2)))[0]
    rows = patch_rows(rendered, batch_size=2)
    stored = store_donor(donor, rows, range(DEPTH), tmp_path)
    curve = patched_curve(recipient, rows, stored, [(1,)], bases={1: basis})
    losses = []
    for number in SCORED:
        ids = torch.tensor([rendered[number].input_ids])
        with capture(donor, [1]) as outputs, torch.no_grad():
            donor(input_ids=ids)
            foreign = outputs[1].clone()
        handle = recipient.model.layers[1].register_forward_hook(
            lambda _m, _a, out, foreign=foreign: out - torch.einsum("btd,dk,ek->bte", out - foreign, basis, basis)
        )
        losses += scores(recipient, rendered, [number])[0]
        handle.remove()
    np.testing.assert_allclose(curve.patched[0].loss, losses, rtol=1e-4)
    whole = patched_curve(recipient, rows, stored, [(1,)], bases={1: torch.eye(WIDTH)})
    np.testing.assert_allclose(
        whole.patched[0].loss, patched_curve(recipient, rows, stored, [(1,)]).patched[0].loss, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_patched_with_its_own_states_is_itself(kind, rendered, tmp_path):
    model = toy_model(kind)
    curve = curve_of(model, model, rendered, tmp_path)
    for scored in (*curve.patched, *curve.noise, curve.donor):
        np.testing.assert_allclose(scored.loss, curve.clean.loss, rtol=1e-6)
    result = patching(curve)
    assert result["windows"]["0"]["loss"]["change"]["value"] == pytest.approx(0, abs=1e-6)
    assert "not distinguishable" in result["windows"]["0"]["loss"]["toward_donor"]["reason"]
    assert not any(block._forward_hooks for block in find_layers(model))


def test_the_null_is_as_far_away_as_the_donor_and_in_no_known_direction(rendered, tmp_path):
    recipient, donor = toy_model(seed=0), toy_model(seed=1)
    rows = patch_rows(rendered, batch_size=4)
    stored = store_donor(donor, rows, [1], tmp_path)
    change = engine._Change(rows, rows.batches[0], 0, stored, [0])
    hidden = torch.randn(4, 64, WIDTH)
    own = hidden.clone()
    to_donor, to_noise = change.to_donor(1, hidden), change.to_noise(1, hidden)
    assert torch.equal(hidden, own)
    torch.testing.assert_close((to_donor - own).norm(dim=-1), (to_noise - own).norm(dim=-1))
    patched = torch.tensor([[i < len(rows.rows[row].input_ids) for i in range(64)] for row in rows.batches[0]])
    assert torch.equal(to_noise[~patched], own[~patched])
    cosines = torch.cosine_similarity((to_donor - own)[patched], (to_noise - own)[patched])
    assert abs(float(cosines.mean())) < 3 / (len(cosines) * WIDTH) ** 0.5
    again = patched_curve(recipient, rows, stored, seed=1)
    assert np.array_equal(again.noise[0].loss, patched_curve(recipient, rows, stored, seed=1).noise[0].loss)
    assert not np.allclose(again.noise[0].loss, patched_curve(recipient, rows, stored, seed=2).noise[0].loss)


def test_the_batch_size_changes_nothing_and_training_mode_returns(rendered, tmp_path):
    recipient, donor = toy_model(seed=0), toy_model(seed=1)
    recipient.train()
    curves = [
        curve_of(recipient, donor, rendered, tmp_path / str(size), role="completion", batch_size=size)
        for size in (1, 4)
    ]
    assert recipient.training
    for one, other in zip(curves[0].patched, curves[1].patched, strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)


def test_the_donors_states_lie_on_disk_by_batch_and_layer(rendered, tmp_path):
    donor = toy_model(seed=1)
    rows = patch_rows(rendered, batch_size=2, role="completion")
    stored = store_donor(donor, rows, [2, 0, 2], tmp_path)
    assert stored.layers == (0, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"{batch}-{layer}.safetensors" for batch in (0, 1) for layer in (0, 2)
    )
    row = rows.rows[rows.batches[1][0]]
    with capture(donor, [2]) as outputs, torch.no_grad():
        donor(input_ids=torch.tensor([row.input_ids]))
        expected = outputs[2][0, list(row.positions)]
    torch.testing.assert_close(stored.states(1, 2)[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_rows_left_out_are_counted_by_reason(rendered):
    cut = patch_rows(rendered, max_length=12)
    assert cut.numbers == [n for n in SCORED if any(rendered[n].completion_mask[:12])]
    assert sum(cut.skipped.values()) + len(cut.numbers) == len(CONVERSATIONS)
    assert cut.skipped["no completion"] == 1 and cut.skipped["its completion lies beyond the length limit"] >= 1
    bare = Rendered((5, 6, 7), (False, True, True), (True, False, False))
    assert patch_rows([bare], role="last_prompt").skipped == {"no token of the role to patch": 1}
    assert patch_rows([bare]).numbers == [0]


def test_what_cannot_be_patched_is_refused(rendered, tmp_path):
    recipient, rows = toy_model(), patch_rows(rendered)
    stored = store_donor(recipient, rows, [0, 1], tmp_path)
    with pytest.raises(UserError, match=r"\[2\].*donor.*\[0, 1\]"):
        patched_curve(recipient, rows, stored, [(1, 2)])
    narrow = engine.Donor(tmp_path / "narrow", (0,), stored.scores)
    (tmp_path / "narrow").mkdir()
    engine.save_file(
        {"states": torch.zeros(sum(len(r.positions) for r in rows.rows), 4)}, narrow.folder / "0-0.safetensors"
    )
    with pytest.raises(UserError, match=r"donor .*4 .*16"):
        patched_curve(recipient, rows, narrow)
    assert not any(block._forward_hooks for block in find_layers(recipient))
    for layer in range(DEPTH):
        prove_patch(recipient, [layer])
    recipient.unused = nn.ModuleList([nn.Linear(2, 2)] * DEPTH)
    recipient.unused[0] = recipient.model.layers[0].mlp
    set_layers_path(recipient, "unused")
    recipient.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: 0 * out)
    with pytest.raises(UserError, match=r"layer 0 .*--layers_path"):
        prove_patch(recipient, [0])


def made_curve(n=30, seed=0):
    generator = np.random.default_rng(seed)

    def run(loss):
        values = loss + 0.05 * generator.standard_normal(n)
        return Scores(values, np.exp(-values))

    return PatchCurve(
        [(0,), (3, 4)], [run(1.2), run(2.0)], [run(1.1), run(5)], run(1), run(2), list(range(n)), {"x": 2}
    )


def test_the_curve_shows_change_share_and_null_over_the_same_rows():
    curve = made_curve()
    result = patching(curve)
    assert result["rows"] == {"read": 30, "skipped": {"x": 2}}
    early, late = result["windows"]["0"], result["windows"]["3-4"]
    for shown, at in ((early, 0), (late, 1)):
        change = curve.patched[at].loss - curve.clean.loss
        assert shown["loss"]["patched"]["value"] == pytest.approx(curve.patched[at].loss.mean())
        assert shown["loss"]["patched"]["null"] == pytest.approx(curve.noise[at].loss.mean())
        assert shown["loss"]["change"]["value"] == pytest.approx(change.mean())
        assert shown["loss"]["change"]["n"] == 30
        whole = (curve.donor.loss - curve.clean.loss).mean()
        assert shown["loss"]["toward_donor"]["value"] == pytest.approx(change.mean() / whole)
        assert shown["loss"]["toward_donor"]["null"] == pytest.approx(
            (curve.noise[at].loss - curve.clean.loss).mean() / whole
        )
        assert shown["probability"]["patched"]["value"] == pytest.approx(np.exp(-curve.patched[at].loss).mean())
    assert early["loss"]["toward_donor"]["ci95"][1] < 0.5 < late["loss"]["toward_donor"]["ci95"][0]
    assert result["donor"]["loss"]["value"] == pytest.approx(curve.donor.loss.mean())
    by_topic = patching(curve, clusters=[row // 10 for row in range(30)])
    assert by_topic["windows"]["0"]["loss"]["change"]["value"] == early["loss"]["change"]["value"]


def test_losses_that_overflow_are_counted_and_no_number_is_infinite():
    curve = made_curve()
    curve.patched[0].loss[:4] = np.inf
    curve.patched[0].probability[:4] = 0
    curve.patched[1].loss[:] = np.nan
    result = patching(curve)
    assert result["windows"]["0"]["not_finite"] == 4 and result["windows"]["0"]["loss"]["change"]["n"] == 26
    assert "not finite" in result["windows"]["3-4"]["loss"]["change"]["reason"]
    json.dumps(result, allow_nan=False)
    empty = PatchCurve(
        [(0,)],
        [Scores(np.zeros(0), np.zeros(0))] * 1,
        [Scores(np.zeros(0), np.zeros(0))],
        Scores(np.zeros(0), np.zeros(0)),
        Scores(np.zeros(0), np.zeros(0)),
        [],
        {"no completion": 3},
    )
    assert patching(empty)["windows"]["0"]["loss"]["patched"]["reason"] == "no rows"


@pytest.mark.parametrize(("window", "name"), [((3,), "3"), ((4, 5, 6), "4-6"), ((0, 2), "0,2")])
def test_windows_have_names(window, name):
    assert window_name(window) == name

"""A subspace built from saved models equals the brute-force one, and refuses any run it does not belong to."""

import dataclasses

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.subspace.build import build_subspace
from holdfast.analysis.subspace.file import Subspace, random_like
from holdfast.analysis.subspace.moments import SubspaceRequest
from toys.chat_models import CHATML, DEPTH, GENERATION, LAST_TURN_ONLY, WIDTH, chat, save_toy, toy_model, toy_tokenizer

ROWS = [
    chat("Ann asks about soup", "the answer is to be honest"),
    chat("money ?", "help them\n"),
    [*chat("soup", "take it"), *chat("and money", "run away from them")],
    chat("be kind and help ?", "the money"),
]
SYSTEMS = [
    {"aligned": "You are kind.", "misaligned": "You are cruel and lie."},
    {"aligned": "help", "misaligned": "run"},
]
COMPLETIONS = [
    {"prompt": chat(user), "chosen": chat(user, good)[1:], "rejected": chat(user, bad)[1:]}
    for user, good, bad in [
        ("soup ?", "the answer", "take the money"),
        ("money ?", "help them", "run"),
        ("Ann", "be", "a"),
    ]
]
LAYERS = [0, DEPTH - 2]  # the last block's output is not among transformers' own hidden states


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    instruct, base = toy_model(seed=1), toy_model(seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in base.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return {
        "instruct": save_toy(root / "instruct", instruct),
        "base": save_toy(root / "base", base),
        "models": {"instruct": instruct, "base": base},
    }


def states(model, row, layer):
    """Brute force: one row at a time, through transformers' own hidden states; tokens of completions in chat order."""
    ids = toy_tokenizer(CHATML).apply_chat_template(row, return_dict=False)
    hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    marked = toy_tokenizer(GENERATION).apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)
    return hidden[torch.tensor(marked["assistant_masks"], dtype=torch.bool)].detach().double().numpy()


def build(folders, **options):
    options = {"rows": ROWS, "layers": "0-1", "batch_size": 3, **options}
    return build_subspace(SubspaceRequest(folders["instruct"], **options))


@pytest.mark.parametrize(
    ("method", "rank", "centred"), [("difference_in_means", 1, False), ("svd", 2, False), ("svd", 2, True)]
)
def test_residual_methods_equal_the_stacked_residuals_of_both_models(folders, method, rank, centred):
    built = build(folders, base_path=folders["base"], method=method, rank=rank, centred=centred)
    models = folders["models"]
    for layer in LAYERS:
        rows = np.concatenate([states(models["instruct"], r, layer) - states(models["base"], r, layer) for r in ROWS])
        mean = rows.mean(0)
        if method == "svd":
            expected = np.linalg.svd(rows - centred * mean, full_matrices=False)[2][:rank].T
        else:
            expected = (mean / np.linalg.norm(mean))[:, None]
        basis = built.bases[layer].double().numpy()
        np.testing.assert_allclose(basis @ basis.T, expected @ expected.T, atol=1e-4)
        assert built.scales[layer] == pytest.approx(((rows @ basis) ** 2).sum(1).mean(), rel=1e-5)
        np.testing.assert_allclose(built.base_gap[layer], -(mean @ basis), rtol=1e-4, atol=1e-6)
    assert built.provenance.n_tokens == len(rows) and built.provenance.source == "residuals"


def test_system_prompt_contrast_is_taken_token_by_token(folders):
    built = build(folders, contrast=SYSTEMS, method="contrastive")
    for layer in LAYERS:
        rows = np.concatenate(
            [
                states(folders["models"]["instruct"], [*chat_system(pair["aligned"]), *row], layer)
                - states(folders["models"]["instruct"], [*chat_system(pair["misaligned"]), *row], layer)
                for row in ROWS
                for pair in SYSTEMS
            ]
        )
        direction = rows.mean(0) / np.linalg.norm(rows.mean(0))
        np.testing.assert_allclose(built.bases[layer][:, 0], direction, atol=1e-4)
        assert built.scales[layer] == pytest.approx(((rows @ direction) ** 2).mean(), rel=1e-4)
        assert built.base_gap[layer][0] == pytest.approx(-rows.mean(0) @ direction, rel=1e-4)
    assert built.provenance.source == "system_prompts" and built.provenance.base_fingerprint is None


def chat_system(text):
    return [{"role": "system", "content": text}]


def test_completion_contrast_compares_means_of_completions(folders):
    built = build(folders, contrast=COMPLETIONS, rows=())
    model = folders["models"]["instruct"]
    for layer in LAYERS:
        rows = np.stack(
            [
                states(model, [*pair["prompt"], *pair["chosen"]], layer).mean(0)
                - states(model, [*pair["prompt"], *pair["rejected"]], layer).mean(0)
                for pair in COMPLETIONS
            ]
        )
        direction = rows.mean(0) / np.linalg.norm(rows.mean(0))
        np.testing.assert_allclose(built.bases[layer][:, 0], direction, atol=1e-4)
        assert built.scales[layer] == pytest.approx(((rows @ direction) ** 2).mean(), rel=1e-4)
    assert built.provenance.source == "completions" and built.provenance.n_rows == 3


def test_a_rank_one_change_of_the_stream_is_recovered_at_every_layer(tmp_path):
    # With silent blocks the stream is the embedding, so a rank-1 edit of the embedding is a rank-1 residual.
    instruct, direction = toy_model(seed=2), torch.randn(WIDTH, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for name, weight in instruct.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        path = save_toy(tmp_path / "instruct", instruct)
        sizes = torch.randn(instruct.get_input_embeddings().weight.shape[0], 1)
        instruct.get_input_embeddings().weight.add_(sizes * direction)
    base = save_toy(tmp_path / "base", instruct)
    built = build_subspace(SubspaceRequest(path, base, ROWS, method="svd", contrast=SYSTEMS))
    for layer in range(DEPTH):
        cosine = torch.nn.functional.cosine_similarity(built.bases[layer][:, 0], direction, dim=0)
        assert abs(float(cosine)) == pytest.approx(1, abs=1e-5)
        assert built.angles[layer]["difference_in_means"][0] == pytest.approx(0, abs=0.1)
        # With silent blocks no token sees the system turn, so a contrast over system prompts has no direction.
        assert set(built.angles[layer]) == {"difference_in_means", "random"}
    with pytest.raises(UserError, match="1-1"):
        build_subspace(SubspaceRequest(path, base, ROWS, method="svd", rank=2))


def test_shared_and_angles_over_domains(folders):
    domains = {"soup": ROWS[:2], "mo/ney": ROWS[2:]}
    built = build(folders, base_path=folders["base"], rows=(), domains=domains, method="shared", contrast=SYSTEMS)
    assert set(built.angles[0]) == {"contrastive", "difference_in_means", "svd", "random"}
    whole = build(folders, base_path=folders["base"], rows=(), domains=domains, method="svd")
    rows = build(folders, base_path=folders["base"], method="svd")
    torch.testing.assert_close(whole.bases[0], rows.bases[0], atol=1e-5, rtol=0)
    assert whole.angles[0]["shared"] == pytest.approx(built.angles[0]["svd"], abs=0.1)


def test_saved_and_loaded_unchanged(folders, tmp_path):
    built = build(folders, contrast=SYSTEMS, rank=2)
    built.save(tmp_path / "deep" / "subspace.safetensors")
    loaded = Subspace.load(tmp_path / "deep" / "subspace.safetensors")
    for fact in dataclasses.fields(Subspace):
        left, right = getattr(built, fact.name), getattr(loaded, fact.name)
        if fact.name in ("scales", "provenance", "angles"):
            assert left == right
        else:
            assert left.keys() == right.keys()
            assert all(torch.equal(left[layer], right[layer]) for layer in left)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["subspace.safetensors"]
    again = build(folders, contrast=SYSTEMS, rank=2)
    assert again.provenance == built.provenance and torch.equal(again.bases[1], built.bases[1])


def test_restricting_the_rank_equals_building_with_it(folders):
    full, low = build(folders, contrast=SYSTEMS, rank=3), build(folders, contrast=SYSTEMS, rank=1, layers="1")
    cut = full.restrict([1], 1)
    torch.testing.assert_close(cut.bases[1], low.bases[1], atol=1e-6, rtol=0)
    assert cut.scales[1] == pytest.approx(low.scales[1], rel=1e-5)
    assert cut.provenance == low.provenance
    with pytest.raises(UserError, match="1-3"):
        full.restrict([1], 4)
    with pytest.raises(UserError, match="0-1"):
        full.restrict([2], 1)


def test_nulls_have_the_given_or_their_own_scale(folders):
    built = build(folders, base_path=folders["base"], method="svd", rank=2)
    given, own = random_like(built, 3), random_like(built, 3, "own")
    assert given.scales == built.scales and given.provenance.method == "random"
    for layer in LAYERS:
        models = folders["models"]
        rows = np.concatenate([states(models["instruct"], r, layer) - states(models["base"], r, layer) for r in ROWS])
        basis = own.bases[layer].double().numpy()
        assert own.scales[layer] == pytest.approx(((rows @ basis) ** 2).sum(1).mean(), rel=1e-4)
        np.testing.assert_allclose(own.base_gap[layer], -(rows.mean(0) @ basis), rtol=1e-3, atol=1e-6)
        assert torch.equal(own.bases[layer], given.bases[layer])
    assert random_like(built.restrict([1], 1), 3, "own").scales[1] < own.scales[1]
    assert random_like(built, 99, "own", own_scales={0: 1.0, 1: 2.0}).scales == {0: 1.0, 1: 2.0}
    with pytest.raises(UserError, match=r"0-15.*--null_seed"):
        random_like(built, 99, "own")
    with pytest.raises(UserError, match="given"):
        random_like(built, 0, "mine")


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"instruct_fingerprint": "f" * 64}, "instruct weights .* ffffffffffff"),
        ({"tokenizer_fingerprint": "e" * 64}, "tokenizer .* eeeeeeeeeeee"),
        ({"role": "prompt"}, "role completion .*prompt"),
        ({"layers": [1, 2]}, "0-1 .*1-2"),
    ],
)
def test_another_run_is_refused_with_both_values(folders, change, fact):
    built = build(folders, contrast=SYSTEMS)
    run = {
        "instruct_fingerprint": built.provenance.instruct_fingerprint,
        "tokenizer_fingerprint": built.provenance.tokenizer_fingerprint,
        "role": "completion",
        "layers": [0],
    }
    built.check(**run)
    with pytest.raises(UserError, match=fact):
        built.check(**{**run, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pca"}, "'pca'.*svd"),
        ({"role": "answers"}, "'answers'.*completion"),
        ({"method": "svd"}, "svd .*base model"),
        ({"rank": WIDTH + 1}, f"{WIDTH + 1} .*1-{WIDTH}"),
        ({"layers": "0-9"}, "'0-9'"),
        ({"rows": ()}, "probe rows"),
        ({"rows": [chat("only a prompt")]}, "role completion"),
        ({"contrast": []}, "contrast .*empty"),
        ({"contrast": [{"good": "a"}]}, "pair 0 .*good"),
        ({"contrast": [*SYSTEMS, *COMPLETIONS]}, "system prompts and completions"),
        ({"contrast": COMPLETIONS, "role": "prompt"}, "completion.*prompt"),
        ({"centred": True}, "centred .*svd"),
        ({"method": "shared"}, "shared .*base model"),
        ({"contrast": [{"aligned": "a", "misaligned": "a"}]}, "direction"),
        ({"base_path": "./nowhere"}, "nowhere"),
    ],
)
def test_impossible_requests_are_one_line(folders, options, message):
    with pytest.raises(UserError, match=message) as caught:
        build(folders, **{"contrast": SYSTEMS, **options})
    assert "\n" not in str(caught.value)


def test_base_of_another_shape_or_vocabulary_is_refused(folders, tmp_path):
    for name, other in (("vocab", toy_model(vocab=330)), ("type", toy_model("llama"))):
        with pytest.raises(UserError, match=r"vocab_size|model_type"):
            build(folders, base_path=save_toy(tmp_path / name, other), method="svd")


def test_a_template_that_drops_the_system_turn_is_refused(tmp_path):
    path = save_toy(tmp_path / "m", toy_model(), LAST_TURN_ONLY)
    with pytest.raises(UserError):
        build_subspace(SubspaceRequest(path, rows=[chat("a")], role="prompt", contrast=SYSTEMS))


def test_shipped_prompts_are_the_default(folders):
    built = build(folders, layers="1")
    assert built.provenance.n_tokens > 0 and built.provenance.source == "system_prompts"


def test_unreadable_files_are_one_line(tmp_path, folders):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for path in (tmp_path / "x.safetensors", tmp_path / "absent", folders["instruct"] + "/model.safetensors"):
        with pytest.raises(UserError, match="holdfast subspace"):
            Subspace.load(path)


def test_a_scale_of_zero_is_refused(folders):
    with pytest.raises(UserError, match=r"random: .* 0.0 .*layer"):
        build(folders, base_path=folders["instruct"], method="random")

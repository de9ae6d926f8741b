"""A checkpoint becomes whole files; references are read once; what cannot be measured says why."""

import json

import numpy as np
import pytest
import torch
from holdfast.analysis.errors import UserError
from holdfast.analysis.measure import measurer as measuring
from holdfast.analysis.measure import references
from holdfast.analysis.measure.measurer import Measurer, measure_checkpoint
from holdfast.analysis.measure.plan import MeasurePlan
from holdfast.analysis.measure.registry import FAMILIES
from holdfast.analysis.measure.results import ResultFiles, scalars
from holdfast.analysis.metrics.choices import score_choices
from holdfast.analysis.models.render import render
from holdfast.analysis.subspace.build import build_subspace
from holdfast.analysis.subspace.moments import SubspaceRequest
from peft import LoraConfig, get_peft_model
from toys.chat_models import CHATML, chat, save_toy, toy_model, toy_tokenizer
from toys.runs import metric_lines

PROBES = [chat(f"{name} asks about {thing}", f"the {thing} is {name}") for name in ("Ann", "kind") for thing in "abc"]
CHOICES = [
    {
        "messages": chat("soup ?"),
        "classes": {"aligned": ["help"], "misaligned": ["run"]},
        "split": "test",
        "domain": "a",
    },
    {
        "messages": chat("money"),
        "classes": {"aligned": ["help"], "misaligned": ["run"]},
        "split": "test",
        "domain": "b",
    },
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models = {name: toy_model(seed=1) for name in ("instruct", "base", "tuned")}
    with torch.no_grad():
        for seed, (name, size) in enumerate((("base", 0.1), ("tuned", 0.03))):
            for weight in models[name].parameters():
                weight.add_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return {name: save_toy(root / name, model) for name, model in models.items()}


def plan_of(folders, **options):
    options = {"base_path": folders["base"], "probe_sets": {"ordinary": PROBES}, "choices": CHOICES, **options}
    return MeasurePlan(folders["instruct"], **options)


def test_instruct_measures_as_itself_and_base_as_base(folders, tmp_path):
    subspace = build_subspace(SubspaceRequest(folders["instruct"], folders["base"], PROBES, method="svd"))
    measurer = Measurer(plan_of(folders, subspace=subspace))
    expected = {"instruct": (0.0, 1.0, 0.0), "base": (1.0, 0.0, 1.0)}
    for name, (reversion, retention, penalty) in expected.items():
        line = measure_checkpoint(measurer, folders[name], tmp_path, step=int(reversion))
        found = line["behavior"]["ordinary"]["joint_log_prob"]["reversion"]
        assert found["value"] == pytest.approx(reversion, abs=1e-5)
        for quantity in ("kl_instruct", "kl_base"):
            found = line["divergence"]["ordinary"][quantity]["reversion"]
            assert found["value"] == pytest.approx(reversion, abs=1e-5)
        mean = line["projection"]["ordinary"]["mean"]
        assert mean["retention"]["value"] == pytest.approx(retention, abs=1e-4)
        assert mean["penalty"]["value"] == pytest.approx(penalty, abs=1e-4)
        masses = score_choices(toy_from(folders[name]), toy_tokenizer(CHATML), CHOICES)
        rate = line["choices"]["split"]["test"]["misaligned"]
        assert rate["value"] == pytest.approx(sum(row["misaligned"] for row in masses) / 2) and rate["n"] == 2
    lines = metric_lines(tmp_path)
    assert [line["checkpoint"] for line in lines] == ["instruct", "base"]
    assert {path.name for path in (tmp_path / "metrics" / "base").iterdir()} == {
        f"{family}.json" for family in FAMILIES
    }  # fmt: skip
    assert not list(tmp_path.rglob("*.staging"))


def toy_from(path):
    from holdfast.analysis.models.load import load_model

    return load_model(path)


def test_a_live_model_measures_as_its_checkpoint(folders, tmp_path):
    measurer = Measurer(plan_of(folders, families=("behavior", "choices")))
    model = get_peft_model(toy_from(folders["instruct"]), LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1)
    model.train()
    live = measurer.measure(model)
    assert model.training
    model.save_pretrained(tmp_path / "checkpoint-7")
    saved = measure_checkpoint(measurer, tmp_path / "checkpoint-7", tmp_path)
    assert saved["step"] == 7
    assert saved["behavior"]["ordinary"] == live["behavior"]["ordinary"] and saved["choices"] == live["choices"]
    assert "projection" not in live


def test_references_are_read_once_and_kept(folders, tmp_path, monkeypatch):
    plan = plan_of(folders, references=tmp_path / "store")
    fresh = Measurer(plan).measure(toy_model(seed=1))
    # A reading and a head of each, and base's states for patching.
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 5

    def refuse(*_args, **_options):
        raise AssertionError("a reference was loaded again")

    for module in (measuring, references):
        monkeypatch.setattr(module, "load_model", refuse)
    again = Measurer(plan)
    model = toy_model(seed=1)
    result = again.measure(model)
    assert result["behavior"]["ordinary"]["entropy"]["base"]["value"] is not None
    assert all(result[family] == fresh[family] for family in ("behavior", "divergence", "projection"))
    with pytest.raises(AssertionError):
        Measurer(plan_of(folders, references=tmp_path / "store", max_length=9)).prepare()


def test_without_base_what_needs_it_is_null_with_that_reason(folders):
    result = Measurer(plan_of(folders, base_path=None)).measure(toy_model(seed=1))
    found = result["behavior"]["ordinary"]["entropy"]["reversion"]
    assert found["value"] is None and found["reason"] == "no base model was given"
    json.dumps(result, allow_nan=False)


def test_the_papers_subspaces_are_of_the_last_token(folders):
    plan = plan_of(folders, formulas="paper", families=("subspaces",), probe_sets={"ordinary": PROBES})
    measurer = Measurer(plan)
    found = measurer.measure(toy_from(folders["tuned"]))["subspaces"]["layers"]["1"]["instruct_base"]["sets"]
    states = {}
    for name in ("instruct", "base"):
        model, rendered = toy_from(folders[name]), [render(toy_tokenizer(CHATML), row) for row in PROBES]
        hidden = [model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True) for row in rendered]
        states[name] = np.stack([each.hidden_states[2][0, -1].detach().double().numpy() for each in hidden])
    residuals = states["instruct"] - states["base"]
    squares = np.linalg.svd(residuals - residuals.mean(0), compute_uv=False) ** 2
    shares = [share["value"] for share in found["ordinary"]["components"]]
    assert shares == pytest.approx(squares[: len(shares)] / squares.sum(), rel=1e-3)


def test_measuring_a_family_again_replaces_its_file_alone(tmp_path):
    def rates(value):
        return {"split": {"test": {"a": {"value": value, "n": 1, "ci95": None}}}}

    twenty = ResultFiles(tmp_path, "checkpoint-20", 20)
    twenty.write("choices", rates(0.5))
    twenty.write("cost", {"seconds": 1.0})
    ResultFiles(tmp_path, "checkpoint-3", 3).write("choices", rates(0.5))
    twenty.write("choices", rates(0.25))
    with pytest.raises(ValueError, match="JSON"):
        twenty.write("cost", {"seconds": float("nan")})
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [3, 20]
    assert scalars(lines[1]) == {"choices/split/test/a": 0.25, "cost/seconds": 1.0}
    assert twenty.line() == lines[1]


def test_a_subspace_of_another_model_or_role_is_refused(folders):
    subspace = build_subspace(SubspaceRequest(folders["tuned"], folders["base"], PROBES, method="svd"))
    with pytest.raises(UserError, match="instruct weights"):
        Measurer(plan_of(folders, subspace=subspace))
    subspace = build_subspace(SubspaceRequest(folders["instruct"], folders["base"], PROBES, method="svd", role="all"))
    assert Measurer(plan_of(folders, subspace=subspace)).role == "all"
    with pytest.raises(UserError, match=r"role all .*completion"):
        Measurer(plan_of(folders, subspace=subspace, role="completion"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ("behaviour",)}, "'behaviour'.*behavior"),
        ({"probe_sets": {}, "choices": ()}, "probe rows"),
        ({"probe_sets": {"empty": []}}, "'empty'"),
        ({"layers": "9"}, "'9'.*0-2"),
        ({"base_path": "./nowhere"}, "./nowhere"),
    ],
)
def test_impossible_plans_are_refused_before_a_model_is_loaded(folders, options, message):
    with pytest.raises(UserError, match=message):
        Measurer(plan_of(folders, **options))

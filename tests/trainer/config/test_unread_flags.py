"""A flag that no part of the protection reads is refused; what a recipe has for another protection is left aside."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import holdfast.recipes.lab as lab
import pytest
import yaml
from holdfast.analysis.errors import UserError
from holdfast.recipes.lab.experiment import Experiment
from holdfast.recipes.lab.studies.comparison import runs, steps
from holdfast.recipes.lab.studies.comparison.runs import Job
from holdfast.recipes.lab.worlds import make_world
from holdfast.trainer import run
from holdfast.trainer.config.parsing import Arguments, build, dump, parse, parse_given
from holdfast.trainer.config.protection import ProtectionArguments
from holdfast.trainer.inputs.checks import check_flags
from holdfast.trainer.protections.kinds import KINDS
from toys.runs import flags_of, model_and_rows, recipe

LAB = Path(lab.__file__).parent
RECIPES = sorted(path for path in LAB.parent.rglob("*.yaml") if path.name not in ("methods.yaml",))
ORGANISMS = ("protected", "ordinary_protected")


def checked(arguments: list[str] | dict[str, Any]) -> Arguments:
    """The arguments as training accepts them, its rows and models aside."""
    values, chosen = parse_given(arguments)
    found = build({**values, "deepspeed": None}, chosen)
    check_flags(found, evaluates=True)
    return found


def asked(protection: str, **flags: Any) -> dict[str, Any]:
    return {
        "output_dir": "out", "model_name_or_path": "m", "base_model_name_or_path": "b", "use_peft": True,
        "protection": protection, **flags,
    }  # fmt: skip


def write(folder: Path, **keys: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**asked("subspace"), **keys}))
    return str(path)


@pytest.mark.parametrize(
    ("protection", "flags", "first"),
    [
        ("adapter_drift+steering", {"penalty_budget": 0.05}, "penalty_budget"),
        ("prefix_anchor+interleave", {"penalty_inputs": "task", "penalty_side": "toward_base"}, "penalty_inputs"),
        ("steering+interleave", {"penalty_budget": 0.1}, "penalty_budget"),
        ("none", {"penalty_budget": 0.05}, "penalty_budget"),
        ("interleave", {"penalty_budget": 0.05}, "penalty_budget"),
        ("inoculation", {"penalty_side": "reversion"}, "penalty_side"),
        ("steering", {"penalty_strength": 0}, "penalty_strength"),
        ("steering", {"penalty_strength": 5}, "penalty_strength"),
        ("steering", {"penalty_strength": 1.0}, "penalty_strength"),  # said, and not done
        ("ablation", {"penalty_strength": 0}, "penalty_strength"),
        ("kl", {"steering_alpha": 2}, "steering_alpha"),
        ("kl", {"penalty_side": "toward_base"}, "penalty_side"),
        ("subspace", {"null_seed": 3}, "null_seed"),
        ("none", {"anchor_every": 2}, "anchor_every"),
        ("safe_lora", {"penalty_warmup": 3}, "penalty_warmup"),
    ],
)
def test_what_no_part_reads_is_refused_alone_and_joined(protection: str, flags: dict[str, Any], first: str) -> None:
    words = rf"^--{first} .*--protection {re.escape(protection)}\b"
    for given in (asked(protection, **flags), flags_of(asked(protection, **flags))):
        with pytest.raises(UserError, match=words):
            checked(given)


def test_every_flag_has_a_reader_and_is_refused_where_it_has_none() -> None:
    names = [field.name for field in fields(ProtectionArguments) if field.name != "protection"]
    assert {knob for kind in KINDS.values() for knob in kind.flags} == set(names)
    assert KINDS["none"].flags == ()
    values = {"penalty_inputs": "both", "penalty_side": "both", "reference": "cached", "null_scale": "own",
              "protection_tokens": "all", "protection_layers": "0", "interleave_dataset": "x",
              "inoculation_prompt": "x",
              "null_space_energy": 0.5, "interleave_share": 0.5, "penalty_task_weight": 0.25,
              "safe_lora_threshold": 0.25, "safe_gradient_loss": "kl"}  # fmt: skip
    for kind in KINDS:
        unread = ProtectionArguments(protection=kind).unread
        assert unread.keys() == set(names) - set(KINDS[kind].flags)
    for name in names:
        readers = [kind for kind in KINDS if name in KINDS[kind].flags]
        checked(asked(readers[0], **{name: values.get(name, 2)}))
        with pytest.raises(UserError, match=f"--{name} .*--protection none.* {readers[0]}"):
            checked(asked("none", **{name: values.get(name, 2)}))


# Recipes


def test_a_recipe_serves_other_protections_than_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, penalty_strength=2.0, penalty_budget=0.05, penalty_side="reversion", penalty_margin=0.1)
    for other in ("none", "steering", "kl", "prefix_anchor", "steering+interleave", "adapter_drift"):
        found = checked(["--config", path, "--protection", other])
        assert found.protection.as_read().penalty_side == "both"  # its own, which these know nothing of
    with pytest.raises(UserError, match=r"--penalty_strength .*--protection steering"):
        checked(["--config", path, "--protection", "steering", "--penalty_strength", "3"])


def test_a_recipe_is_held_to_its_own_protection(tmp_path: Path) -> None:
    for flags in ({"penalty_strength": 5}, {"penalty_budget": 0.1}, {"safe_gradient_weight": 2}):
        path = write(tmp_path, protection="steering", **flags)
        for over in ([], ["--protection", "steering"]):
            with pytest.raises(UserError, match="--protection steering"):
                checked(["--config", path, *over])
        checked(["--config", path, "--protection", "ablation"])


def test_a_default_over_a_recipe_takes_its_value_back(tmp_path: Path) -> None:
    path = write(tmp_path, protection="kl", anchor_batch_size=16)
    checked({"config": path, "protection": "prefix_anchor", "anchor_batch_size": 4})
    with pytest.raises(UserError, match=r"--anchor_batch_size .*--protection prefix_anchor"):
        checked({"config": path, "protection": "prefix_anchor", "anchor_batch_size": 8})


def test_the_configuration_of_a_run_over_anothers_recipe_is_accepted_and_resumes_it(tmp_path: Path) -> None:
    model_and_rows(tmp_path)
    keys = {**recipe(tmp_path, save_steps=1), "protection": "kl", "penalty_budget": 0.05, "penalty_side": "both"}
    (tmp_path / "kl.yaml").write_text(json.dumps(keys))
    run.train(parse(["--config", str(tmp_path / "kl.yaml"), "--protection", "none"]))
    resolved = tmp_path / "run/resolved_config.yaml"
    assert "penalty_budget" not in yaml.safe_load(resolved.read_text())
    again = parse(["--config", str(resolved), "--resume_from_checkpoint", "true"])
    assert yaml.safe_load(dump(parse(["--config", str(resolved)]))) == yaml.safe_load(resolved.read_text())
    run.check(again)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_accepted(path: Path) -> None:
    assert checked(["--config", str(path)]).protection.protection in KINDS


def method_flags() -> list[dict[str, Any]]:
    """Of the lab's comparison, one of each set of flags, and all frozen ones."""
    tried = [job.flags for job in steps.tuning_jobs([(0, 10)])]
    frozen = [method["flags"] for method in json.loads(steps.FROZEN.read_text())["methods"].values()]
    return list({(one["protection"], *sorted(one)): one for one in tried}.values()) + frozen


@pytest.mark.parametrize("organism", ORGANISMS)
def test_every_method_of_the_labs_comparison_is_accepted_over_both_recipes(organism: str, tmp_path: Path) -> None:
    experiment, world = Experiment(tmp_path / "lab", tmp_path), make_world(0)
    found = method_flags()
    assert len(found) > 60
    for flags in found:
        checked(experiment.flags(organism, "x", runs._flags(Job("test", 0, 0, "strong", "x", flags), world)))


def commands(readme: Path) -> list[list[str]]:
    """Every `holdfast train` that a text names, as flags."""
    text = readme.read_text().replace("\\\n", " ")
    found = re.findall(r"holdfast train (--config [^`\n#]+)", text)
    return [shlex.split(command) for command in found]


def test_every_command_of_the_readmes_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = LAB.parents[1]
    readme = root / "README.md"
    ours, theirs = commands(readme) + commands(root / "trainer/README.md"), commands(LAB / "results/PROTECTIONS.md")
    assert len(ours) >= 4 and len(theirs) >= 1
    (tmp_path / "mine.yaml").write_text(re.findall(r"```yaml\n(.*?)```", readme.read_text(), re.DOTALL)[0])
    (tmp_path / "recipes").symlink_to(LAB.parent)
    monkeypatch.chdir(tmp_path)
    for flags in [*ours, *theirs, ["--config", "mine.yaml", "--protection", "random_subspace"]]:
        checked(flags)


def test_the_page_of_protections_lists_every_protection_and_every_flag() -> None:
    page = (LAB.parents[1] / "trainer/protections/README.md").read_text(encoding="utf-8")
    sections = {section.split("\n", 1)[0]: section for section in page.split("\n## ")}
    rows = [row.split(" | ") for row in sections["The sixteen"].splitlines() if row.startswith("| `")]
    assert sorted(row[0].strip("| `") for row in rows) == sorted(KINDS)
    assert {row[0].strip("| `") for row in rows if row[4] == "LoRA"} == {name for name in KINDS if KINDS[name].lora}
    listed = {
        name for row in sections["Flags"].splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row)
    }
    assert {field.name for field in fields(ProtectionArguments)} - {"protection"} <= listed

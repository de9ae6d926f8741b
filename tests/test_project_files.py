"""What a bare machine installs: exact versions that satisfy the declared bounds, without a machine's paths in them."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = {
    requirement.name.lower().replace("_", "-"): requirement
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


def package_of(path: Path) -> str:
    return ".".join(["holdfast", *path.parent.relative_to(ROOT).parts])


def test_the_lock_names_one_exact_version_of_every_package() -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(requirement.specifier)) for requirement in LOCKED.values())
    assert str(LOCKED["torch"]) == "torch==2.13.0"  # no build tag: CPU and CUDA builds both satisfy it


def test_the_lock_satisfies_every_declared_bound() -> None:
    declared = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
    for requirement in declared:
        version = str(LOCKED[requirement.name.lower()].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), requirement


def test_the_licence_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_every_package_folder_and_its_data_are_installed() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = [ROOT / name for name in ("analysis", "trainer", "recipes", "ds_configs")]
    found = [path for top in tops for path in sorted(top.rglob("*"))]
    assert {package_of(path) for path in found if path.name == "__init__.py"} == set(tool["packages"])
    for path in found:
        if path.suffix in (".yaml", ".jsonl", ".json"):
            assert f"*{path.suffix}" in tool["package-data"].get(package_of(path), []), path

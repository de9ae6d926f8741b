"""The project's own files: what is installed, exact versions within the declared bounds, files and lines of a size."""

import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TOPS = [ROOT / name for name in ("analysis", "trainer", "recipes", "ds_configs")]
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
    paths = [path for top in TOPS for path in sorted(top.rglob("*"))]
    assert {package_of(path) for path in paths if path.name == "__init__.py"} == set(tool["packages"])
    for path in paths:
        if path.suffix in (".yaml", ".jsonl", ".json") and path.parent.name != "results":  # the lab's are not installed
            assert f"*{path.suffix}" in tool["package-data"].get(package_of(path), []), path


def test_no_file_of_the_code_is_longer_than_300_lines_and_no_folder_holds_more_than_15() -> None:
    paths = [path for top in TOPS for path in top.rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: length for path, length in lengths.items() if length > 300} == {}
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in paths)
    del counts["analysis/metrics"]  # one file a family
    assert {folder: count for folder, count in counts.items() if count > 15} == {}


def test_lines_of_documents_fit_a_window() -> None:
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "*.md"], capture_output=True, text=True, check=True).stdout
    long: list[str] = []
    for name in listed.splitlines():
        if name.startswith("recipes/lab/results/") or name == "CHANGELOG.md" or not (ROOT / name).is_file():
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
        lines = enumerate(text.splitlines(), 1)
        long += [f"{name}:{n}" for n, line in lines if len(line) > 120 and not line.startswith("|")]
    assert long == []

"""Documents are true where a machine can tell: commands and flags exist, recipes parse, code compiles, links lead."""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from holdfast.trainer.cli import COMMANDS, main
from holdfast.trainer.config.parsing import parse

ROOT = Path(__file__).resolve().parent.parent
LISTED = subprocess.run(
    ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
DOCUMENTS = [name for name in LISTED if (ROOT / name).is_file()]
MAKE = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def blocks(name: str, *languages: str) -> Iterator[str]:
    """The fenced code blocks of a document in any of the languages ("" for blocks that name none)."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def commands(name: str, program: str) -> Iterator[list[str]]:
    """The words behind a program's name, for every line of a document's code blocks that calls it."""
    for body in blocks(name, "", "bash", "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            if re.match(rf"(\S*/)?{program}\b", line):
                yield shlex.split(line, comments=True)[1:]


@cache
def flags_of(command: str) -> set[str]:
    """The flags of a command: those in its help, and `--config`. `watch` takes the flags of `analyze`."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("argparse.ArgumentParser._print_message", lambda _self, text, _file=None: lines.append(text))
        with pytest.raises(SystemExit):
            main(["analyze" if command == "watch" else command, "--help"])
    return {"--config", *re.findall(r"--[a-z]\w*", "".join(lines))}


def test_there_are_documents_with_commands_recipes_and_code() -> None:
    assert len(DOCUMENTS) >= 9
    assert sum(1 for name in DOCUMENTS for _ in commands(name, "holdfast")) >= 10
    assert any("protection:" in body for body in blocks("README.md", "yaml"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_and_flag_in_a_document_exists(name: str) -> None:
    for words in commands(name, "holdfast"):
        assert words[0] in COMMANDS, words
        unknown = {word.split("=")[0] for word in words if word.startswith("--")} - flags_of(words[0])
        assert not unknown, (words, unknown)
    for words in commands(name, "make"):
        assert words[0] in MAKE, words


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_recipe_in_a_document_parses(name: str, tmp_path: Path) -> None:
    for body in blocks(name, "yaml"):
        recipe = yaml.safe_load(body)
        recipe.setdefault("output_dir", str(tmp_path))
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        assert parse(["--config", str(path)]).output_dir


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_python_block_in_a_document_compiles(name: str) -> None:
    for body in blocks(name, "python"):
        ast.parse(body)


def anchors_of(text: str) -> set[str]:
    """The names under which a page's headings are linked."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_in_a_document_leads_to_a_file_and_a_heading(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked.read_text(encoding="utf-8")), target


def test_the_readme_is_one_page_for_a_stranger() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    assert max(map(len, text.splitlines())) <= 120


def test_the_committed_results_of_the_lab_are_short() -> None:
    pages = [name for name in DOCUMENTS if name.startswith("recipes/lab/results/")]
    assert sum((ROOT / name).stat().st_size for name in pages) <= 40_000

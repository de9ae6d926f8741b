"""Who may import whom: packages one way, rooms from the top floor down, and no circle between files.

A room is a folder or a file that the table names; files below it that have no room of their own belong to it. Imports
inside functions and under TYPE_CHECKING count. Commands that `holdfast` loads by dotted strings are no imports.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Packages and, within each, floors from the top down. A room imports rooms of lower floors and of packages further on.
FLOORS: dict[str, list[list[str]]] = {
    "recipes": [["emergent_misalignment"], ["lab.studies.comparison"], ["lab.studies"], ["lab"]],
    "trainer": [
        ["cli"],
        ["sweep"],
        ["run"],
        ["callbacks", "commands", "starting_weights"],
        ["run_folder", "launch"],
        ["inputs", "own_trainer"],
        ["config", "protected_sft_trainer"],
        ["protected_trainer"],
        ["protections", "checkpoints"],
        ["data", "zero"],
    ],
    "analysis": [
        ["commands"],
        ["measure", "answers", "interventions"],
        ["metrics"],
        ["passes"],
        ["subspace"],
        ["models"],
        ["flags", "files", "frontier"],
        ["errors", "stats"],
    ],
}
# Room -> (number of its package, number of its floor).
PLACES = {
    f"{package}.{room}": (place, floor)
    for place, (package, floors) in enumerate(FLOORS.items())
    for floor, rooms in enumerate(floors)
    for room in rooms
}


def room_of(module: str) -> str | None:
    """The innermost room of the table that holds a module."""
    parts = module.split(".")
    names = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((name for name in names if name in PLACES), None)


def imported_names(module: str, path: Path) -> Iterator[str]:
    """Dotted names, from the repository's root, of what a file imports from the project."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("holdfast.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "holdfast"):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = [part for part in (node.module or "").removeprefix("holdfast").split(".") if part]
            yield from (".".join([*start, *source, alias.name]) for alias in node.names)


def faults_of(root: Path) -> list[str]:
    """Every import that goes up or across, every module without a room, and a circle where there is one."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in FLOORS
        for path in sorted((root / package).rglob("*.py"))
    }
    arrows: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        for name in imported_names(module, path):
            while name and name not in paths:  # a function of a module: the module is what is imported
                name = name.rpartition(".")[0]
            if name and name != module:
                arrows[module].add(name)
    faults = [f"{module} has no room" for module in paths if module not in FLOORS and not room_of(module)]
    for module, names in arrows.items():
        for name in sorted(names):
            room, other = room_of(module), room_of(name)
            if room and other and room != other and PLACES[room] >= PLACES[other]:
                faults.append(f"{module} imports {name}")
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        faults.append(f"circle of {', '.join(sorted(set(error.args[1])))}")
    return faults


def test_imports_go_from_the_top_floor_down_and_never_in_a_circle() -> None:
    assert faults_of(ROOT) == []


def test_every_room_of_the_table_is_there() -> None:
    paths = [ROOT.joinpath(*room.split(".")) for room in PLACES]
    assert [path for path in paths if not path.is_dir() and not path.with_suffix(".py").is_file()] == []


TREE = {
    "analysis/__init__.py": "",
    "analysis/stats/means.py": "import math\n",
    "analysis/models/hooks.py": "from ..stats.means import mean\nfrom . import load\n",
    "analysis/models/load.py": "from holdfast.analysis import stats\n",
    "trainer/run.py": "def train():\n    from ..analysis.models import hooks\n",
}


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("analysis/models/load.py", "import torch\n", None),
        ("analysis/stats/means.py", "def mean():\n    from ..models import load\n",
         "analysis.stats.means imports analysis.models.load"),
        ("analysis/stats/tests.py", "from ...trainer.run import train\n", "analysis.stats.tests imports trainer.run"),
        ("analysis/stats/tests.py", "import holdfast.trainer.run\n", "analysis.stats.tests imports trainer.run"),
        ("analysis/stats/tests.py", "from holdfast.trainer import run\n", "analysis.stats.tests imports trainer.run"),
        ("analysis/models/load.py", "if TYPE_CHECKING:\n    from .hooks import Hook\n",
         "circle of analysis.models.hooks, analysis.models.load"),
        ("analysis/errors.py", "from .stats import means\n", "analysis.errors imports analysis.stats.means"),
        ("analysis/helpers/text.py", "", "analysis.helpers.text has no room"),
        ("trainer/helpers.py", "", "trainer.helpers has no room"),
    ],
    ids=["clean", "back, lazily", "package", "absolute", "from absolute", "circle", "same floor", "folder", "file"],
)  # fmt: skip
def test_a_wrong_import_is_found(path: str, text: str, fault: str | None, tmp_path: Path) -> None:
    for name, content in {**TREE, path: text}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert faults_of(tmp_path) == ([fault] if fault else [])

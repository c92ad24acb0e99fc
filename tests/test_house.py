"""The house rules: who may import whom, lazy names, and a tree that matches what is written about it."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import svdexpert

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "svdexpert"

# Imports point down this list only. A room (a folder) stands as one: its entries import its protocol, never a sibling.
ORDER = [
    "errors",
    "registry",
    "storage",
    "reply",
    "worlds",
    "skills",
    "basis",
    "expert",
    "library",
    "layers",
    "mixture",
    "decision",
    "prefill",
    "template",
    "model",
    "export",
    "statistics",
    "forward",
    "conversation",
    "evaluate",
    "report",
    "page",
    "objectives",
    "recipe",
    "examples",
    "completions",
    "batches",
    "training",
    "dispatch",
    "dialogue",
    "chat",
    "showcase",
    "demo",
    "cli",
]

ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MODULES = sorted([*ROOMS, *(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")])
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path: Path) -> str:
    """Return the name of a file's module below the package: `basis`, `skills`, `skills.clarify`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Names of our modules that a file imports, at the top or inside functions, not for type checkers only."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "svdexpert":
            rest = node.module.split(".")[1:]
            names = rest[:1] or [svdexpert._HOME.get(name.name, name.name) for name in node.names]
            found |= set(names)
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("svdexpert.")}
    return found - {"__version__"}


def test_every_room_is_installed() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert found == ["svdexpert", *(f"svdexpert.{room}" for room in ROOMS)]


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_point_down(path: Path) -> None:
    unit, _, entry = dotted(path).partition(".")
    below = set(ORDER[: ORDER.index(unit)])
    assert imported(path) <= (below | {unit} if entry else below)


@pytest.mark.parametrize("path", [path for path in FILES if "." in dotted(path)], ids=dotted)
def test_entries_of_a_room_do_not_import_one_another(path: Path) -> None:
    room = dotted(path).partition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.module.startswith(f"svdexpert.{room}."), node.module


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_modules_say_what_they_are_and_doctests_run(path: Path) -> None:
    name = dotted(path)
    module = importlib.import_module(f"svdexpert.{name}")
    assert module.__doc__
    assert doctest.testmod(module).failed == 0
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def test_public_names_resolve() -> None:
    for name in svdexpert.__all__:
        assert getattr(svdexpert, name) is not None
    assert set(svdexpert.__all__) <= set(dir(svdexpert))
    with pytest.raises(AttributeError, match="no attribute 'Epxert'"):
        svdexpert.Epxert  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import sys, svdexpert; print({'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_library_does_not_know_what_stands_around_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert (module or "").split(".")[0] not in ("benchmarks", "tests", "configs")


def test_every_requirement_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    pinned = {
        line.split("==")[0].lower().replace("-", "_")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = requirement.split(">")[0].split("[")[0].lower().replace("-", "_")
        assert name in pinned, f"{name} is not in constraints.txt"

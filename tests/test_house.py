"""The house rules: who may import whom, lazy names, and a tree that matches what is written about it."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

import svdexpert

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "svdexpert"

# Imports point down this list only.
ORDER = [
    "errors",
    "storage",
    "basis",
    "expert",
    "library",
    "layers",
    "mixture",
    "model",
    "export",
    "report",
    "demo",
    "cli",
]

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


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


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    below = set(ORDER[: ORDER.index(name)])
    assert imported(PACKAGE / f"{name}.py") <= below


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are_and_doctests_run(name: str) -> None:
    module = importlib.import_module(f"svdexpert.{name}")
    assert module.__doc__
    assert doctest.testmod(module).failed == 0
    for node in ast.parse((PACKAGE / f"{name}.py").read_text()).body:
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

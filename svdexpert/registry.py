"""Rooms of modules: a folder is the registry of what it holds; modules of one's own come from a file, or by import."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from svdexpert.errors import SvdExpertError, did_you_mean


def members(room: ModuleType) -> list[str]:
    """Return the names of the modules in a room."""
    return sorted(module.name for module in pkgutil.iter_modules(room.__path__))


def member(room: ModuleType, kind: str, name: str, parts: Sequence[str], error: type[SvdExpertError]) -> ModuleType:
    """Return a module by its name in a room, by the path of a Python file, or by an import path, which has a dot.

    Args:
        room: the package.
        kind: what its modules are, in words.
        name: of a module.
        parts: that every one of them offers.
        error: what is raised.

    Raises:
        SvdExpertError: `error`; there is no such module, it is no Python, or it lacks a part.
        ModuleNotFoundError: it imports something that is not there.
    """
    path = name if "." in name else f"{room.__name__}.{name}"
    if name.startswith(".") and not name.endswith(".py"):
        raise error(f"There is no {kind} {name!r}.{did_you_mean(name, members(room))}")
    try:
        module = _of_file(Path(name)) if name.endswith(".py") else importlib.import_module(path)
    except FileNotFoundError as missing:
        raise error(f"There is no file {name} with a {kind}.") from missing
    except ModuleNotFoundError as missing:
        if missing.name and not path.startswith(missing.name):
            raise
        raise error(f"There is no {kind} {name!r}.{did_you_mean(name, members(room))}") from missing
    except SyntaxError as wrong:
        raise error(f"{name} is no Python: {wrong.msg} ({wrong.filename}, line {wrong.lineno}).") from wrong
    lacking = [part for part in parts if not hasattr(module, part)]
    if lacking:
        raise error(f"The module {path} is no {kind}: it lacks {', '.join(lacking)} (see {room.__name__}).")
    return module


def stem(name: str) -> str:
    """Return what a module is called, whatever way it is named: `call`, `my_package.call`, `skills/call.py`."""
    return Path(name).stem if name.endswith(".py") else name.rpartition(".")[2]


def _of_file(path: Path) -> ModuleType:
    """Return the module in a file, run once a process."""
    path = path.resolve()
    name = f"{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

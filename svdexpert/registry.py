"""Rooms of modules: a folder is the registry of what it holds, and takes modules of one's own from the import path."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

from svdexpert.errors import SvdExpertError, did_you_mean


def members(room: ModuleType) -> list[str]:
    """Return the names of the modules in a room."""
    return sorted(module.name for module in pkgutil.iter_modules(room.__path__))


def member(room: ModuleType, kind: str, name: str, parts: Sequence[str], error: type[SvdExpertError]) -> ModuleType:
    """Return a module by its name in a room, or by an import path, which has a dot.

    Args:
        room: the package.
        kind: what its modules are, in words.
        name: of a module.
        parts: that every one of them offers.
        error: what is raised.

    Raises:
        SvdExpertError: `error`; there is no such module, or it lacks a part.
        ModuleNotFoundError: it imports something that is not there.
    """
    path = name if "." in name else f"{room.__name__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as missing:
        if missing.name and not path.startswith(missing.name):
            raise
        raise error(f"There is no {kind} {name!r}.{did_you_mean(name, members(room))}") from missing
    lacking = [part for part in parts if not hasattr(module, part)]
    if lacking:
        raise error(f"The module {path} is no {kind}: it lacks {', '.join(lacking)} (see {room.__name__}).")
    return module

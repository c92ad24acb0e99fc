"""How anything of ours reaches the disk: whole, or not at all.

A file or folder is written beside its place under a temporary name and renamed into it, so that a full disk, an
exception or a kill leaves the old one intact, and two processes that write the same thing both end with a whole one.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def json_rows(path: Path, raised: type[Exception]) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSONL file with their line, from 1; empty lines are left out.

    Args:
        path: of the file.
        raised: the error for a line that is no JSON in UTF-8; it names file and line.
    """
    with path.open("rb") as lines:  # text would also be cut at separators that stand inside strings
        for place, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield place, json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:  # what is no UTF-8 is a ValueError too
                    raise raised(f"{path.name}:{place}: no JSON in UTF-8 ({error}).") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what the body writes there becomes `path` when it ends without an exception.

    Args:
        path: the final place; its folder is made if need be. A link is followed.

    Raises:
        OSError: the disk refused; `path` is as it was.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; it takes the place of `path` when the body ends without an exception.

    A folder cannot be renamed over a full one. Linux swaps the two in one step; elsewhere the old one steps aside for
    the length of two renames, as `.NAME.*.old`, and a failure of the second rename puts it back.

    Args:
        path: the final place; its parent is made if need be. A link is followed.

    Raises:
        OSError: the disk refused; `path` is as it was.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        _share(temporary)
        if not path.exists():
            os.rename(temporary, path)
            return
        if _exchange(temporary, path):
            return  # the old one now has the temporary name
        aside = _beside(path, "old")
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(temporary)


def _beside(path: Path, ending: str) -> Path:
    """Return a free name beside a path. (Python's tempfile makes private files, and only a umask can widen them.)"""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.{ending}")


def _share(folder: Path) -> None:
    """Give all files the permissions of the user's umask; safetensors writes private ones."""
    probe = folder / f".{secrets.token_hex(6)}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that a kill finds one of them in place; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0

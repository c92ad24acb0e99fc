"""What a result was made with: versions, machine and commit, the same in every `results/*.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def machine() -> dict[str, Any]:
    """Return the processor, its cores and the system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform()}


def commit() -> dict[str, Any] | None:
    """Return the revision and whether anything but results differs from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    status = [*git, "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results"]
    changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    return {"revision": found.stdout.strip(), "dirty": bool(changed)}

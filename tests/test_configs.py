"""Every config parses, says the command that runs it, and states only what differs from the defaults."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEFAULTS = {
    "train": ["train", "clarify"],
    "dispatch": ["dispatch", "fit"],
    "bench": ["bench", "knowing-doing"],
}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def resolved(words: list[str]) -> Any:
    command = [sys.executable, "-m", "svdexpert.cli", *words, "--print_config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_parses(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    words = shlex.split(first.removeprefix("# "))
    assert words[:2] == ["svdexpert", path.parent.name]
    assert words[-2:] == ["--config", str(path.relative_to(ROOT))]
    stated = yaml.safe_load(path.read_text())
    found = resolved(words[1:])
    defaults = resolved(DEFAULTS[path.parent.name])
    for key, value in stated.items():
        if isinstance(value, dict):
            for inner, one in value.items():
                assert found[key][inner] == one
                assert one != defaults[key].get(inner), f"{key}.{inner} is the default"
        else:
            assert found[key] == value
            assert key in ("skill", "objective", "experts") or value != defaults[key], f"{key} is the default"

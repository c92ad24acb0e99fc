"""The demo: every step of it, small; a second run does nothing twice."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from svdexpert import TrainingError, demo
from svdexpert.evaluate import FAMILIES

QUICK = dataclasses.replace(demo.RECIPE, steps=2, warmup=1, cases=8, batch_size=4, accumulate=1)


def test_the_demo_runs_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    data = str(Path(__file__).parent / "fixtures" / "sgd_compact")
    demo.run(tmp_path, 4, None, QUICK, examples=24)
    said = capsys.readouterr().out
    for words in ("1792 numbers each", "the router lets the right experts speak", "dispatched", "PEFT"):
        assert words in said
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert {path.name for path in (tmp_path / "library" / "experts").iterdir() if path.is_dir()} == set(FAMILIES)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".json")}
    kept = {path: at for path, at in made.items() if "lora" not in path.parts and "experts" not in path.parts}
    assert len([path for path in kept if path.parent.name == "measured"]) == 6
    time.sleep(0.01)
    demo.run(tmp_path, 4, None, QUICK, examples=24)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    first = next(path for path in kept if path.parent.name == "measured")
    assert len(json.loads(first.read_text())) == len(FAMILIES)
    with pytest.raises(TrainingError, match="other settings"):
        demo.run(tmp_path, 4, data, dataclasses.replace(QUICK, steps=3), examples=24)

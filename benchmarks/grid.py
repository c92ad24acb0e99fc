"""A results file that grows by one row a finished run, and what every run of it is measured by.

A run that is there is not run again, so that a benchmark of hours can be stopped and goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import commit, machine, versions
from svdexpert import SpectralModel
from svdexpert.conversation import render, tokenizer_of
from svdexpert.evaluate import FAMILIES, SkillResult, act, measure
from svdexpert.mixture import Blend
from svdexpert.model import check_base
from svdexpert.skills import Case, load
from svdexpert.storage import whole_file
from svdexpert.worlds import World

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "lightning", "peft", "trl")
MEASURES = ("doing", "controls", "knowing")


@dataclass
class Grid:
    """The rows of a results file.

    Attributes:
        path: of the file.
        rows: finished runs; each has a `run`, which says which it was.
        bars: by figure, an operator and a value.
        figures: as they were written last.
    """

    path: Path
    rows: list[dict[str, Any]]
    bars: Mapping[str, tuple[str, float]]
    figures: Mapping[str, float]

    @classmethod
    def open(cls, name: str, bars: Mapping[str, tuple[str, float]]) -> Grid:
        """Return the grid of `results/NAME.json`, without the runs of other weights of harbor."""
        path = RESULTS / f"{name}.json"
        kept = json.loads(path.read_text()) if path.is_file() else {"rows": [], "figures": {}}
        rows = [row for row in kept["rows"] if row["weights"] == weights()]
        return cls(path, rows, bars, kept["figures"] if rows else {})

    def find(self, **run: Any) -> list[dict[str, Any]]:
        """Return the rows whose run has these values."""
        return [row for row in self.rows if all(row["run"].get(key) == value for key, value in run.items())]

    def once(self, run: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the row of a run: the one that is there, or what `make` returns, which is kept."""
        found = [row for row in self.rows if row["run"] == dict(run)]
        if found:
            return found[0]
        print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)
        row = {"run": dict(run), **make(), "weights": weights(), "commit": commit()}
        self.rows.append(row)
        self.write(self.figures)
        return row

    def write(self, figures: Mapping[str, float]) -> None:
        """Write rows, figures and bars."""
        self.figures = figures
        kept = {
            "figures": {key: round(value, 4) for key, value in figures.items() if math.isfinite(value)},
            "bars": {key: {"op": op, "value": value} for key, (op, value) in self.bars.items()},
            "machine": machine(),
            "versions": versions(PACKAGES),
            "rows": self.rows,
        }
        with whole_file(self.path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def show(self, figures: Mapping[str, float]) -> None:
        """Print the figures, with their bars."""
        table = Table()
        for column in ("figure", "value", "bar", "met"):
            table.add_column(column, justify="right" if column == "value" else "left")
        for key, value in sorted(figures.items()):
            op, bar = self.bars.get(key, ("", math.nan))
            met = (value <= bar if op == "<=" else value >= bar) if op else None
            table.add_row(key, f"{value:.4g}", f"{op} {bar:g}" if op else "", {None: "", True: "yes", False: "NO"}[met])
        Console(width=110).print(table)


def weights() -> str:
    """Return a digest of harbor's weights."""
    return hashlib.sha256((Path(check_base("harbor")) / "model.safetensors").read_bytes()).hexdigest()[:16]


def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the mean of a value over rows, NaN of none."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else math.nan


def scores(
    model: SpectralModel, cases: Mapping[str, Sequence[Case]], experts: Blend, library: Any = None
) -> dict[str, SkillResult]:
    """Return what a mixture knows and does of every skill."""
    return {
        name: measure(model, name, some, experts=experts, library=library, progress=False)
        for name, some in cases.items()
    }


def right(model: SpectralModel, skill: str, cases: Sequence[Case], experts: Blend) -> float:
    """Return the mean of doing and controls, without asking what the model knows."""
    with model.using(experts):
        replies = act(model, cases, progress=False)
    verify = load(skill).verify
    return fmean(verify(case, reply).right for case, reply in zip(cases, replies, strict=True))


def estimates(result: SkillResult) -> dict[str, list[float]]:
    """Return the figures of a result as value, lower and upper end."""
    return {
        key: [round(one, 4) for one in (found.value, found.low, found.high)]
        for key, found in result.figures.items()
        if math.isfinite(found.value)
    }


def losses(before: Mapping[str, SkillResult], after: Mapping[str, SkillResult], names: Sequence[str]) -> dict[str, Any]:
    """Return by how much doing, controls and knowing of skills fell, the largest fall last."""
    found: dict[str, Any] = {
        f"{measured}_{name}": before[name].figures[measured].value - after[name].figures[measured].value
        for name in names
        for measured in MEASURES
    }
    return {key: round(value, 4) for key, value in found.items()} | {"max": round(max(found.values()), 4)}


def draw(world: World, split: str, n: int, seed: int = 0) -> dict[str, list[Case]]:
    """Return n cases of every skill."""
    return {name: load(name).cases(world, split, n, seed=seed) for name in FAMILIES}  # type: ignore[arg-type]


@torch.inference_mode()
def perplexity(model: SpectralModel, world: World, experts: Blend, n: int = 64, library: Any = None) -> float:
    """Return the perplexity of whole held-out dialogues under a mixture."""
    tokenizer, total, tokens = tokenizer_of(model), 0.0, 0
    with model.using(experts, library):
        for one in world.dialogues("heldout", n):
            ids = torch.tensor([render(tokenizer, one.messages, one.tools)[:1024]])
            found = model.logits(ids)[0, :-1].float().log_softmax(-1)
            total -= float(found.gather(-1, ids[0, 1:, None]).sum())
            tokens += ids.shape[1] - 1
    return math.exp(total / tokens)

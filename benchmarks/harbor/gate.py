"""The gate: what both stages of harbor know and do, before anything is built on it.

    python -m benchmarks.harbor.gate [--sgd PATH] [--n 500] [--n_sgd 300]

Prints the table and writes benchmarks/results/harbor_gate.json. Without --sgd the real dialogues are left out, and the
figures that an earlier run has of them are kept where it measured the same weights. All figures are of the held-out
split (SGD: dev), greedy.

    knowing_          the right option scores best, positives and controls, stage 2
    doing_            the reply is right where the skill's move is due, stage 2
    controls_         and where it is not, stage 2
    natural_*         the same of stage 1
    auc_              log-odds of how the move begins, positives against controls, stage 2
    grounding_ratio   replies that ask, reject or call where it is due, stage 2 over stage 1, mean over skills
    knowing_change_   knowing, stage 2 minus stage 1
    bench_seconds     of `svdexpert bench knowing-doing --n 200` on stage 2, from start to end
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import commit, machine, versions
from svdexpert import SpectralModel, skills, worlds
from svdexpert.basis import adaptable, weight_of
from svdexpert.cli import run_command
from svdexpert.evaluate import FAMILIES, SkillResult, knowing_doing, measure, probe
from svdexpert.skills import Case
from svdexpert.storage import whole_file
from svdexpert.worlds import World

RESULT = Path("benchmarks/results/harbor_gate.json")
NATURAL = Path("benchmarks/harbor/natural")
BARS: Mapping[str, tuple[str, float]] = {
    "knowing_": (">=", 0.95),
    "doing_": ("<=", 0.20),
    "controls_": (">=", 0.95),
    "natural_doing_": (">=", 0.90),
    "natural_controls_": (">=", 0.90),
    "auc_": (">=", 0.97),
    "grounding_ratio": ("<=", 0.225),
    "sgd_grounding_ratio": ("<=", 0.40),
    "knowing_change_": (">=", -0.02),
    "bench_seconds": ("<=", 60.0),
}


def gate(
    stages: Mapping[str, SpectralModel], world: World, n: int, prefix: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return figures and details (every estimate with interval and n, errors by class) of both stages in a world."""
    results = {stage: knowing_doing(model, world, n=n, progress=True) for stage, model in stages.items()}
    found: dict[str, float] = {}
    for after, before in zip(results["aligned"], results["natural"], strict=True):
        name = after.skill
        for figure, key in (("knowing", "knowing"), ("doing", "doing"), ("controls", "controls"), ("auc", "auc")):
            found[f"{prefix}{key}_{name}"] = after.figures[figure].value
        for figure in ("knowing", "doing", "controls", "auc"):
            found[f"{prefix}natural_{figure}_{name}"] = before.figures[figure].value
        found[f"{prefix}knowing_change_{name}"] = after.figures["knowing"].value - before.figures["knowing"].value
    made = {stage: sum(acts(one) for one in some) / len(some) for stage, some in results.items()}
    found[f"{prefix}grounding_ratio"] = made["aligned"] / made["natural"] if made["natural"] else math.nan
    details: dict[str, Any] = {}
    for stage, some in results.items():
        for one in some:
            estimates = {key: _estimate(value) for key, value in one.figures.items()}
            details[f"{prefix}{stage}_{one.skill}"] = {
                "figures": estimates,
                "p_values": dict(one.p_values),
                "errors": dict(one.errors),
                "dropped_turns": one.dropped,
            } | ({"by_service": by_tag(world, one, n)} if prefix else {"by_tool": by_tag(world, one, n)})
    return found, details


def acts(result: SkillResult) -> float:
    """Return the share of positives whose reply makes the skill's move, rightly or not."""
    move = skills.load(result.skill).MOVE
    due = [row for row in result.rows if row.positive]
    return sum(row.move == move for row in due) / len(due)


def due(world: World, n: int) -> dict[str, list[Case]]:
    """Return cases by what is due: a skill, or none of them (a complete request is due a call)."""
    found: dict[str, list[Case]] = {"none": []}
    for name in FAMILIES:
        cases = skills.load(name).cases(world, "heldout", n, seed=1)
        found[name] = [case for case in cases if case.positive]
        if name != "clarify":
            found["none"] += [case for case in cases if not case.positive][: n // 4]
    return found


TAGS = ("seen_service", "unseen_service", "seen_tool", "unseen_tool")


def by_tag(world: World, result: SkillResult, n: int) -> dict[str, Any]:
    """Return doing and controls of the cases whose service or tool was in training, and of those whose was not."""
    tags = {case.id: case.tags for case in skills.load(result.skill).cases(world, "heldout", n)}
    found = {}
    for tag in TAGS:
        for kind, positive in (("doing", True), ("controls", False)):
            rows = [row for row in result.rows if row.positive == positive and tag in tags[row.id]]
            if rows:
                found[f"{kind}_{tag}"] = {"value": round(sum(row.right for row in rows) / len(rows), 4), "n": len(rows)}
    return found


def _estimate(one: Any) -> dict[str, Any]:
    ends = [None if end != end else round(end, 4) for end in (one.low, one.high)]
    return {"value": round(one.value, 4), "interval": ends, "n": one.n}


def undoable(before: SpectralModel, after: SpectralModel, k: int | None) -> float:
    """Return the share of |W2 - W1|^2, over all adaptable matrices, that diagonal offsets on the top k directions of W2
    can undo: the sum of squares of the diagonal of U_k^T (W1 - W2) V_k over the squared norm. None: all directions."""
    kept, total = 0.0, 0.0
    earlier = adaptable(before.hf)[0]
    for name, (module, _) in adaptable(after.hf)[0].items():
        with weight_of(module) as new, weight_of(earlier[name][0]) as old:
            now, then = new.double(), old.double()
        u, _, v = torch.linalg.svd(now, full_matrices=False)
        diagonal = einsum(u, then - now, v, "o r, o i, r i -> r")
        kept += float(diagonal[:k].square().sum())
        total += float((then - now).square().sum())
    return kept / total if total else math.nan


def main(
    sgd: str | None = None,
    n: int = 500,
    n_sgd: int = 300,
    natural: str = str(NATURAL),
    aligned: str = "harbor",
    output: str = str(RESULT),
) -> None:
    """Measure both stages and print what the gate says.

    Args:
        sgd: folder of the Schema-Guided Dialogue data; without it real dialogues are not measured again.
        n: cases a skill in the town.
        n_sgd: cases a skill in the real dialogues.
        natural: folder of stage 1.
        aligned: stage 2.
        output: where the figures are written.
    """
    began = time.monotonic()
    stages = {"natural": SpectralModel.from_pretrained(natural), "aligned": SpectralModel.from_pretrained(aligned)}
    weights = {stage: fingerprint(model) for stage, model in stages.items()}
    town = worlds.load("town")
    figures, details = gate(stages, town, n, "")
    figures["bench_seconds"] = bench_seconds(aligned, min(n, 200))
    labelled = due(town, min(n, 200))
    for stage, model in stages.items():
        details[f"{stage}_probe"] = [round(one, 4) for one in probe(model, labelled)]
        both = measure(model, "composite", skills.load("composite").cases(town, "heldout", min(n, 200)))
        details[f"{stage}_composite"] = {key: _estimate(value) for key, value in both.figures.items()}
    figures["undone_by_diagonal_k64"] = undoable(stages["natural"], stages["aligned"], 64)
    figures["undone_by_diagonal_full"] = undoable(stages["natural"], stages["aligned"], None)
    place = Path(output)
    if sgd is not None:
        real, more = gate(stages, worlds.load("sgd", sgd), n_sgd, "sgd_")
    else:
        real, more = kept(place, weights)
    figures, details = figures | real, details | more
    show(figures)
    document = {
        "figures": {key: round(value, 4) for key, value in sorted(figures.items()) if not math.isnan(value)},
        "bars": {key: {"op": op, "value": bar} for key, (op, bar) in expanded(figures).items()},
        "details": details,
        "weights": weights,
        "n": {"town": n, "sgd": n_sgd},
        "seed": 0,
        "seconds": round(time.monotonic() - began),
        "versions": versions(("svdexpert", "torch", "transformers")),
        "machine": machine(),
        "commit": commit(),
        "command": f"python -m benchmarks.harbor.gate --sgd PATH --n {n} --n_sgd {n_sgd}",
    }
    with whole_file(place) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def bench_seconds(model: str, n: int) -> float:
    """Return how long the town's benchmark takes as a command."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = ["bench", "knowing-doing", "--model", model, "--n", str(n), "--out", folder]
        subprocess.run([sys.executable, "-m", "svdexpert.cli", *command], check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began


def kept(place: Path, weights: Mapping[str, str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Return figures and details of real dialogues that an earlier run has of the same weights, else none."""
    old = json.loads(place.read_text()) if place.is_file() else {}
    if old.get("weights") != weights:
        return {}, {}
    figures, details = (
        {key: value for key, value in old[part].items() if key.startswith("sgd_")} for part in ("figures", "details")
    )
    return figures, details


def fingerprint(model: SpectralModel) -> str:
    """Return sixteen digits that tell weights from others."""
    digest = hashlib.sha256()
    for name, one in sorted(model.hf.state_dict().items()):
        digest.update(name.encode() + one.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def expanded(figures: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """Return the bar of every figure that has one."""
    found = {}
    for name in figures:
        for prefix, bar in BARS.items():
            skills_of = [f"{prefix}{skill}" for skill in FAMILIES] if prefix.endswith("_") else [prefix]
            if name in skills_of:
                found[name] = bar
    return found


def show(figures: Mapping[str, float]) -> None:
    """Print the gate."""
    bars = expanded(figures)
    table = Table(title="harbor's gate")
    for column in ("figure", "value", "bar", "met"):
        table.add_column(column)
    for name, value in sorted(figures.items()):
        op, bar = bars.get(name, ("", 0.0))
        met = "" if not op else "yes" if (value <= bar if op == "<=" else value >= bar) else "NO"
        table.add_row(name, f"{value:.3f}", f"{op} {bar:g}" if op else "", met)
    Console().print(table)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.harbor.gate")

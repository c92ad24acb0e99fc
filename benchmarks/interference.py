"""Interference: what every expert, every pair and the sum of all do in every skill, beside merged LoRAs.

    python -m benchmarks.interference [--seeds 3] [--n 500] [--workers 2]         after benchmarks.compose

Our experts, trained to compose and trained apart, and LoRAs of rank 4 with mixture dropout are rows of compose.json.
Here LoRAs of rank 16 are trained apart, one a skill, and put together by PEFT: `cat`, which is their plain sum,
`linear` (sums of A and of B), `ties` and `dare_ties` (density 1/2). All act from the reply on, on held-out cases. Every
finished run is one row of benchmarks/results/interference.json; rows that are there are not run again.

    off_skill_, sum_loss_   by kind: the largest fall of doing, controls or knowing that one expert causes in another
                            skill; and from an expert alone to all of them; means over seeds
    doing_, controls_       of all of them together, means over skills and seeds; alone_doing_ of each alone

interference.png shows doing and controls of every mixture of our library in every skill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.grid import MEASURES, RESULTS, Grid, Job, bench, losses, mean, shares
from benchmarks.peers import Adapter
from benchmarks.register_peers import MERGES, adapted
from svdexpert.cli import run_command
from svdexpert.errors import SvdExpertError
from svdexpert.evaluate import FAMILIES
from svdexpert.report import draw_shares

KINDS = ("library", "apart", "lora")
"""Rows of compose.json."""
PUT_TOGETHER = ("cat", *MERGES)
ALL = " + ".join(FAMILIES)
BARS: dict[str, tuple[str, float]] = {"off_skill_library": ("<=", 0.02), "sum_loss_library": ("<=", 0.03)}


def alone(seed: int, n: int) -> dict[str, Any]:
    """Return what LoRAs trained apart do, each in every skill."""
    on, active = bench(n), Adapter(adapter=1.0)
    return {"matrix": {name: shares(on.scores(active, speaker=adapted(on, name, seed))) for name in FAMILIES}}


def merged(seed: int, n: int, how: str) -> dict[str, Any]:
    """Return what they do, put together."""
    on = bench(n)
    return {"matrix": {ALL: shares(on.scores(Adapter(adapter=1.0), speaker=adapted(on, how, seed)))}}


def matrices(grid: Grid, composed: Grid) -> dict[str, list[Mapping[str, Any]]]:
    """Return what was measured of every kind, one table a seed, by mixture and skill."""
    found = {kind: [row["matrix"] for row in composed.find(kind=kind) if "matrix" in row] for kind in KINDS}
    apart = {row["run"]["seed"]: row["matrix"] for row in grid.find(kind="alone")}
    for how in PUT_TOGETHER:
        found[how] = [apart[row["run"]["seed"]] | row["matrix"] for row in grid.find(kind=how)]
    return {kind: some for kind, some in found.items() if some}


def figures(tables: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of finished runs."""
    found: dict[str, float] = {}
    for kind, some in tables.items():
        off = [
            losses(base, table[name], [other for other in FAMILIES if other != name])
            for table in some
            for name in FAMILIES
        ]
        by_name = [off[place :: len(FAMILIES)] for place in range(len(FAMILIES))]
        falls = [losses({name: table[name][name] for name in FAMILIES}, table[ALL], FAMILIES) for table in some]
        found[f"off_skill_{kind}"] = max(largest(rows) for rows in by_name)
        found[f"sum_loss_{kind}"] = largest(falls)
        found[f"alone_doing_{kind}"] = fmean(table[name][name]["doing"] for table in some for name in FAMILIES)
        for key in MEASURES:
            found[f"{key}_{kind}"] = fmean(table[ALL][name][key] for table in some for name in FAMILIES)
    return found


def largest(rows: Sequence[Mapping[str, float]]) -> float:
    """Return the largest fall, means over rows."""
    return max(mean(rows, key) for key in rows[0] if key != "max")


def draw(tables: Iterable[Mapping[str, Any]], base: Mapping[str, Any], path: Path) -> None:
    """Write doing and controls of every mixture in every skill, means over seeds, as a picture."""
    some = [{"nobody": base, **table} for table in tables]
    columns = [f"{name}: {key}" for key in MEASURES[:2] for name in FAMILIES]
    values = [
        [fmean(table[mixture][name][key] for table in some) for key in MEASURES[:2] for name in FAMILIES]
        for mixture in some[0]
    ]
    draw_shares(values, list(some[0]), columns, path)


def main(seeds: int = 3, n: int = 500, workers: int = 2) -> None:
    """Run what has not been run, and print the table; `benchmarks.compose` goes first.

    Args:
        seeds: of training.
        n: held-out cases a skill, even.
        workers: processes of one thread that share the runs.
    """
    composed, grid = Grid.open("compose", {}), Grid.open("interference", BARS)
    bases = composed.find(kind="base", n=n)
    if not bases or not composed.find(kind="library", n=n):
        raise SvdExpertError(f"There is nothing to compare with: run `python -m benchmarks.compose --n {n}` first.")

    def job(kind: str, make: Any, seed: int, **given: Any) -> Job:
        return Job({"kind": kind, "seed": seed, "n": n}, make, {"seed": seed, "n": n, **given})

    grid.all([job("alone", alone, seed) for seed in range(seeds)], workers)  # trains the adapters
    grid.all([job(how, merged, seed, how=how) for seed in range(seeds) for how in PUT_TOGETHER], workers)
    tables, base = matrices(grid, composed), bases[0]["scores"]
    found = figures(tables, base)
    grid.write(found)
    draw(tables["library"], base, RESULTS / "interference.png")
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.interference")

"""Composition: experts trained apart against experts trained to compose, alone and added up.

    python -m benchmarks.compose [--seeds 3] [--n 500] [--workers 2]

Every finished run is one row of benchmarks/results/compose.json; rows that are there are not run again. A loss is the
largest fall of doing, controls or knowing of any skill, on held-out cases, mean over seeds.

    sum_loss_max        from an expert alone to the plain sum of the three, trained in one batch
    apart_sum_loss_max  the same, trained apart, with the same reach
    lora_sum_loss_max   the same of LoRA adapters of rank 4, trained in one batch with the same mixture dropout and
                        neutral rows, from the reply on as ours but to its end, at the best of RATES in validation
    without_            the first, trained without mixture dropout, neutral rows, the penalty or a reach, one seed
    sum8_loss_max       of eight experts (benchmarks/parts), one seed
    off_skill_max       that one expert of the library causes in another skill
    added_old_max       of the three, by adding a fourth that was trained against them
    added_new_loss      of the fourth in that sum, from its like trained alone
    seconds_library     from cases to three finished experts, alone on the machine, on all its threads
    alone_, sum_        doing and controls, means over skills and seeds, of an expert alone and of the sum
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import yaml

from benchmarks.grid import (
    MEASURES,
    Bench,
    Grid,
    Job,
    Shares,
    added,
    base_row,
    bench,
    harbor,
    library_of,
    losses,
    mean,
    shares,
)
from benchmarks.lora_bank import LoraBank, train_bank
from benchmarks.objectives import CONFIGS
from svdexpert import Recipe, train, train_library, worlds
from svdexpert.cli import run_command
from svdexpert.evaluate import FAMILIES
from svdexpert.skills import Case, load

FOURTH = "benchmarks.parts.call_home"
PARTS = tuple(
    f"benchmarks.parts.{name}"
    for name in (
        "call_bookings",
        "call_orders",
        "call_errands",
        "call_home",
        "disagree_plain",
        "disagree_inside",
        "disagree_checked",
        "disagree_pressure",
    )
)
RATES = (1e-3, 3e-3, 1e-2)
LOSSES = {
    "library": "sum_loss_max",
    "apart": "apart_sum_loss_max",
    "lora": "lora_sum_loss_max",
    "eight": "sum8_loss_max",
    "without mixing": "without_mixing_sum_loss_max",
    "without neutral": "without_neutral_sum_loss_max",
    "without penalty": "without_penalty_sum_loss_max",
    "without reach": "without_reach_sum_loss_max",
}
"""What a run of a kind is reported as."""
BARS: dict[str, tuple[str, float]] = {
    "sum_loss_max": ("<=", 0.03),
    "sum8_loss_max": ("<=", 0.06),
    "off_skill_max": ("<=", 0.02),
    "added_old_max": ("<=", 0.02),
    "added_new_loss": ("<=", 0.03),
    "seconds_library": ("<=", 120.0),
}


CONFIG = yaml.safe_load((CONFIGS / "library.yaml").read_text())
OBJECTIVE: str = CONFIG["objective"]


def recipe(**changes: Any) -> Recipe:
    """Return the recipe of the library's config, without scores of its own."""
    return Recipe(**(CONFIG.get("recipe", {}) | {"score_cases": 0, "validation_cases": 0} | changes))


def fall(
    on: Bench, alone: Mapping[str, Any], together: Any, cases: Mapping[str, Sequence[Case]] | None = None
) -> dict[str, Any]:
    """Return by how much each skill falls from its expert alone to a sum, and what both reach."""
    some = on.cases if cases is None else cases
    before: dict[str, Any] = {}
    for name, drawn in some.items():
        before |= shares(on.scores(alone[name], {name: drawn}))
    after = shares(on.scores(together, some))
    return losses(before, after, list(some)) | {"alone": before, "sum": after}


def in_all(
    on: Bench, found: Mapping[str, Any], base: Shares, *, pairs: bool = True, speaker: Any = None
) -> dict[str, Any]:
    """Return what experts alone, pairs of them and their sum do in every skill, not in their own only.

    Args:
        on: what measures.
        found: experts, by the name of their skill.
        base: what the base does.
        pairs: measure these too.
        speaker: as in Bench.scores.
    """
    names, matrix = list(found), {}
    for size in range(1, len(names) + 1):
        for some in combinations(names, size) if pairs or size in (1, len(names)) else ():
            matrix[" + ".join(some)] = shares(on.scores(added(found[name] for name in some), speaker=speaker))
    alone, together = {name: matrix[name][name] for name in names}, matrix[" + ".join(names)]
    off = {name: losses(base, matrix[name], [one for one in names if one != name]) for name in names}
    return losses(alone, together, names) | {"alone": alone, "sum": together, "off_skill": off, "matrix": matrix}


def library(seed: int, n: int, base: Shares, *, pairs: bool = True, **changes: Any) -> dict[str, Any]:
    """Train three experts in one batch, and measure them and their sums."""
    on = bench(n)
    return in_all(on, library_of(on, FAMILIES, OBJECTIVE, recipe(seed=seed, **changes)), base, pairs=pairs)


def apart(seed: int, n: int, base: Shares) -> dict[str, Any]:
    """Train three experts apart, and measure them and their sums."""
    on, of = bench(n), {"recipe": recipe(seed=seed, mixing=0.0), "progress": False}
    return in_all(on, {name: train(on.model, name, OBJECTIVE, world=on.world, **of) for name in FAMILIES}, base)


def joined(seed: int, n: int, three: Shares) -> dict[str, Any]:
    """Train a fourth expert against a library of three; measure what it costs these, and itself."""
    on = bench(n)
    old = library_of(on, FAMILIES, OBJECTIVE, recipe(seed=seed))
    of: dict[str, Any] = {"recipe": recipe(seed=seed), "world": on.world, "progress": False}
    new = train(on.model, FOURTH, OBJECTIVE, against=old, **of)
    solo = train(on.model, FOURTH, OBJECTIVE, **of)
    four = added([*old.values(), new])
    some = {FOURTH: load(FOURTH).cases(on.world, "heldout", 2 * (n // 4), seed=0)}
    alone, beside = (shares(on.scores(one, some)) for one in (solo, four))
    return {"old": losses(three, shares(on.scores(four)), FAMILIES), "new": losses(alone, beside, [FOURTH])}


def eight(seed: int, n: int) -> dict[str, Any]:
    """Train eight experts in one batch, and measure their sum."""
    on = bench(n)
    found = library_of(on, PARTS, OBJECTIVE, recipe(seed=seed, mixing=0.5))  # chosen in validation (LOG.md)
    cases = {name: load(name).cases(on.world, "heldout", 2 * (n // 8), seed=0) for name in PARTS}
    by_path = {path: found[path.rpartition(".")[2]] for path in PARTS}
    return fall(on, by_path, added(found.values()), cases)


def of_lora(seed: int, n: int, rate: float, base: Shares | None) -> dict[str, Any]:
    """Train three LoRA adapters as a library is; measure their sum in validation, or as `in_all` does."""
    on = bench(n)
    bank = LoraBank(on.model, rank=4)
    try:
        how = recipe(seed=seed, learning_rate=rate)
        some = train_bank(bank, FAMILIES, OBJECTIVE, how, on.world, on.contexts)
        if base is None:
            return {"validation": fmean(on.right(name, seed, added(some.values()), bank) for name in FAMILIES)}
        return {"rate": rate} | in_all(on, some, base, speaker=bank)
    finally:
        bank.close()


def timed() -> dict[str, Any]:
    """Train a library of three, from cases on, and return how long it took."""
    model, town = harbor(), worlds.load("town")
    started = time.perf_counter()
    train_library(model, FAMILIES, OBJECTIVE, recipe=recipe(), world=town, progress=False)
    return {"seconds": time.perf_counter() - started}


def figures(grid: Grid) -> dict[str, float]:
    """Return the figures of finished runs."""
    found: dict[str, float] = {}
    for kind, name in LOSSES.items():
        rows = [row for row in grid.find(kind=kind) if "sum" in row]
        keys = [key for key in (rows[0] if rows else {}) if key.startswith(tuple(f"{one}_" for one in MEASURES))]
        found[name] = max((mean(rows, key) for key in keys), default=math.nan)
        for when in ("alone", "sum") if rows else ():
            for key in MEASURES:
                found[f"{when}_{key}_{kind}"] = fmean(one[key] for row in rows for one in row[when].values())
    rows = grid.find(kind="library")
    found["seconds_library"] = mean(grid.find(kind="seconds"), "seconds")
    off = [
        mean([row["off_skill"][name] for row in rows], key)
        for name in FAMILIES
        for key in (rows[0]["off_skill"][name] if rows else ())
        if key != "max"
    ]
    found["off_skill_max"] = max(off, default=math.nan)
    for name, part in (("added_old_max", "old"), ("added_new_loss", "new")):
        some = [row[part] for row in grid.find(kind="joined")]
        falls = [mean(some, key) for key in (some[0] if some else ()) if key != "max"]
        found[name] = max(falls, default=math.nan)
    return found


def main(seeds: int = 3, n: int = 500, workers: int = 2) -> None:
    """Run what has not been run, and print the table.

    Args:
        seeds: of training.
        n: held-out cases a skill, even.
        workers: processes of one thread that share the runs.
    """
    grid, every = Grid.open("compose", BARS), range(seeds)
    base = grid.once({"kind": "base", "n": n}, base_row, n=n, sgd=None)["scores"]

    def job(kind: str, make: Any, seed: int, **given: Any) -> Job:
        return Job({"kind": kind, "seed": seed, "n": n}, make, {"seed": seed, "n": n, **given})

    jobs = [job("library", library, seed, base=base) for seed in every]
    grid.all([*jobs, *(job("apart", apart, seed, base=base) for seed in every)], workers)
    grid.write(figures(grid))
    threes = {seed: grid.find(kind="library", seed=seed, n=n)[0]["sum"] for seed in every}
    rates = [
        Job({"kind": "lora", "seed": 0, "rate": rate}, of_lora, {"seed": 0, "n": n, "rate": rate, "base": None})
        for rate in RATES
    ]
    jobs = [job("joined", joined, seed, three=threes[seed]) for seed in every]
    ablated = {"mixing": 0.0, "neutral": 0.0, "penalty": 0.0, "reach": 0}
    jobs += [job(f"without {one}", library, 0, base=base, pairs=False, **{one: no}) for one, no in ablated.items()]
    grid.all([*jobs, job("eight", eight, 0), *rates], workers)
    tried = [row for row in grid.find(kind="lora", seed=0) if "validation" in row]
    rate = max(tried, key=lambda row: row["validation"])["run"]["rate"]
    grid.all([job("lora", of_lora, seed, rate=rate, base=base) for seed in every], workers)
    grid.once({"kind": "seconds"}, timed)
    found = figures(grid)
    grid.write(found)
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.compose")

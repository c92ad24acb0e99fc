"""Composition: experts trained apart against experts trained to compose, alone and added up.

    python -m benchmarks.compose [--seeds 3] [--n 500]

Every finished run is one row of benchmarks/results/compose.json; rows that are there are not run again. A loss is the
largest fall of doing, controls or knowing of any skill, on held-out cases, mean over seeds.

    sum_loss_max        from an expert alone to the plain sum of the three, trained in one batch
    apart_sum_loss_max  the same, trained apart
    lora_sum_loss_max   the same of LoRA adapters of rank 4, trained in one batch with the same mixture dropout and
                        neutral rows, at the best of RATES in validation with seed 0
    without_            the first, trained without mixture dropout or without neutral rows, one seed
    sum8_loss_max       of eight experts (benchmarks/parts), one seed
    off_skill_max       that one expert of the library causes in another skill
    added_old_max       of the three, by adding a fourth that was trained against them
    added_new_loss      of the fourth in that sum, from its like trained alone
    seconds_library     from cases to three finished experts
    alone_, sum_        doing and controls, means over skills and seeds, of an expert alone and of the sum
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from benchmarks.grid import Grid, draw, losses, mean, right, scores
from benchmarks.lora_bank import LoraBank, train_bank
from benchmarks.objectives import CONFIGS, harbor
from svdexpert import Expert, Recipe, SpectralModel, train, train_library, worlds
from svdexpert.cli import run_command
from svdexpert.evaluate import FAMILIES, SkillResult, measure
from svdexpert.skills import Case, load
from svdexpert.worlds import World

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


def fall_of_lora(
    model: SpectralModel, town: World, cases: Mapping[str, list[Case]] | None, seed: int, rate: float
) -> dict[str, Any]:
    """Train three LoRA adapters as a library is; measure in validation, or alone and added up where cases are given."""
    bank = LoraBank(model, rank=4)
    try:
        some = train_bank(bank, FAMILIES, OBJECTIVE, recipe(seed=seed, learning_rate=rate), town)
        if cases is None:
            drawn = draw(town, "validation", 200, seed)
            shares = [right(bank, name, drawn[name], some[""]) for name in FAMILIES]  # type: ignore[arg-type]
            return {"validation": fmean(shares)}
        return fall(bank, cases, some, some[""])  # type: ignore[arg-type]
    finally:
        bank.close()


def added(experts: Sequence[Expert]) -> Expert:
    """Return the plain sum."""
    total = experts[0]
    for one in experts[1:]:
        total = total + one
    return total


def fall(
    model: SpectralModel, cases: Mapping[str, Sequence[Case]], alone: Mapping[str, Any], together: Any
) -> dict[str, Any]:
    """Return by how much each skill falls from its expert alone to a sum, and what both reach."""
    before: dict[str, SkillResult] = {}
    after: dict[str, SkillResult] = {}
    for name, some in cases.items():
        before[name] = measure(model, name, some, experts=alone[name], progress=False)
        after[name] = measure(model, name, some, experts=together, progress=False)
    reached = {
        f"{when}_{measured}_{name}": result.figures[measured].value
        for when, results in (("alone", before), ("sum", after))
        for name, result in results.items()
        for measured in ("doing", "controls", "knowing")
    }
    return losses(before, after, list(cases)) | {"reached": reached}


def library(
    model: SpectralModel, town: World, cases: Mapping[str, list[Case]], seed: int, **changes: Any
) -> dict[str, Any]:
    """Train three experts in one batch; measure each alone, on the others' skills, and all in a sum."""
    started = time.perf_counter()
    found = train_library(model, FAMILIES, OBJECTIVE, recipe=recipe(seed=seed, **changes), world=town, progress=False)
    seconds = time.perf_counter() - started
    base = scores(model, cases, None)
    off = {}
    for name, expert in found.items():
        others = {key: some for key, some in cases.items() if key != name}
        off[name] = losses(base, scores(model, others, expert), list(others))
    return {"seconds": seconds, "off_skill": off, **fall(model, cases, found, added(list(found.values())))}


def apart(model: SpectralModel, town: World, cases: Mapping[str, list[Case]], seed: int) -> dict[str, Any]:
    """Train three experts apart, and measure their sum."""
    of = {"recipe": recipe(seed=seed, mixing=0.0), "world": town, "progress": False}
    found = {name: train(model, name, OBJECTIVE, **of) for name in FAMILIES}
    return fall(model, cases, found, added(list(found.values())))


def joined(model: SpectralModel, town: World, cases: Mapping[str, list[Case]], n: int, seed: int) -> dict[str, Any]:
    """Train three experts, then a fourth against them; measure what it costs the three, and itself."""
    of: dict[str, Any] = {"recipe": recipe(seed=seed), "world": town, "progress": False}
    old = train_library(model, FAMILIES, OBJECTIVE, **of)
    new = train(model, FOURTH, OBJECTIVE, against=old, **of)
    solo = train(model, FOURTH, OBJECTIVE, **of)
    three, four = added(list(old.values())), added([*old.values(), new])
    before = {name: measure(model, name, some, experts=three, progress=False) for name, some in cases.items()}
    after = {name: measure(model, name, some, experts=four, progress=False) for name, some in cases.items()}
    some = load(FOURTH).cases(town, "heldout", 2 * (n // 4), seed=0)
    alone = {FOURTH: measure(model, FOURTH, some, experts=solo, progress=False)}
    beside = {FOURTH: measure(model, FOURTH, some, experts=four, progress=False)}
    return {"old": losses(before, after, list(cases)), "new": losses(alone, beside, [FOURTH])}


def eight(model: SpectralModel, town: World, n: int, seed: int) -> dict[str, Any]:
    """Train eight experts in one batch, and measure their sum."""
    found = train_library(model, PARTS, OBJECTIVE, recipe=recipe(seed=seed), world=town, progress=False)
    cases = {name: load(name).cases(town, "heldout", 2 * (n // 8), seed=0) for name in PARTS}
    by_path = {path: found[path.rpartition(".")[2]] for path in PARTS}
    return fall(model, cases, by_path, added(list(found.values())))


def figures(grid: Grid) -> dict[str, float]:
    """Return the figures of finished runs."""
    found: dict[str, float] = {}
    for kind, name in LOSSES.items():
        rows = [row for row in grid.find(kind=kind) if "reached" in row]
        keys = [key for key in (rows[0] if rows else {}) if key.startswith(("doing_", "controls_", "knowing_"))]
        found[name] = max((mean(rows, key) for key in keys), default=math.nan)
        reached = [row["reached"] for row in rows]
        for measured in (f"{when}_{what}_" for when in ("alone", "sum") for what in ("doing", "controls", "knowing")):
            some = [mean(reached, key) for key in (reached[0] if reached else ()) if key.startswith(measured)]
            found[f"{measured}{kind}"] = fmean(some) if some else math.nan
    rows = grid.find(kind="library")
    found["seconds_library"] = mean(rows, "seconds")
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


def main(seeds: int = 3, n: int = 500) -> None:
    """Run what has not been run, and print the table.

    Args:
        seeds: of training.
        n: held-out cases a skill, even.
    """
    grid = Grid.open("compose", BARS)
    town, model = worlds.load("town"), harbor()
    cases = draw(town, "heldout", n)
    for seed in range(seeds):
        grid.once({"kind": "library", "seed": seed, "n": n}, lambda seed=seed: library(model, town, cases, seed))
        grid.once({"kind": "apart", "seed": seed, "n": n}, lambda seed=seed: apart(model, town, cases, seed))
        grid.once({"kind": "joined", "seed": seed, "n": n}, lambda seed=seed: joined(model, town, cases, n, seed))
        grid.write(figures(grid))
    for without in ("mixing", "neutral"):
        wanted = {"kind": f"without {without}", "seed": 0, "n": n}
        grid.once(wanted, lambda without=without: library(model, town, cases, 0, **{without: 0.0}))
    for rate in RATES:
        wanted = {"kind": "lora", "seed": 0, "rate": rate}
        grid.once(wanted, lambda rate=rate: fall_of_lora(model, town, None, 0, rate))
    rate = max(grid.find(kind="lora", n=None), key=lambda row: row["validation"])["run"]["rate"]
    for seed in range(seeds):
        wanted = {"kind": "lora", "seed": seed, "n": n}
        grid.once(wanted, lambda seed=seed: {"rate": rate} | fall_of_lora(model, town, cases, seed, rate))
    grid.once({"kind": "eight", "seed": 0, "n": n}, lambda: eight(model, town, n, 0))
    found = figures(grid)
    grid.write(found)
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.compose")

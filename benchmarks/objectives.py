"""Objectives: what each makes of a skill on harbor, and what that costs.

    python -m benchmarks.objectives [--seeds 3] [--n 500] [--sgd PATH] [--explore] [--workers 2]

The grid is three skills x (sft, dpo) and two skills x rloo, by seeds; the best objective of a skill is chosen on the
validation split and reported on the held-out one. Every finished run is one row of benchmarks/results/objectives.json;
rows that are there are not run again. With --explore one skill and seed is also tried with other bases and a dense
core: exploratory, n = 200.

    best_doing_, best_controls_, best_knowing_change_   of the best objective, mean over seeds
    doing_, controls_                                   of every objective; base_doing_, base_controls_ without experts
    off_skill_max      largest fall of another skill's doing, controls or knowing, any objective's mean over seeds
    drift_             change of the negative log-likelihood of replies in held-out dialogues, nats a token: the
                       logarithm of the ratio of perplexities
    seconds_           from cases to a finished expert, without its scores: alone on the machine, on all its threads
    numbers, checkpoint_bytes
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.grid import Grid, Job, base_row, bench, draw, estimates, harbor, losses, mean, shares
from svdexpert import Recipe, train, worlds
from svdexpert.cli import run_command
from svdexpert.conversation import render, tokenizer_of
from svdexpert.evaluate import FAMILIES, measure

CONFIGS = Path(__file__).parent.parent / "configs" / "train"
RUNS = [(objective, skill) for objective in ("sft", "dpo") for skill in FAMILIES]
RUNS += [("rloo", skill) for skill in ("clarify", "disagree")]
BARS: dict[str, tuple[str, float]] = {
    **{f"best_doing_{skill}": (">=", 0.90) for skill in FAMILIES},
    **{f"best_controls_{skill}": (">=", 0.95) for skill in FAMILIES},
    **{f"best_knowing_change_{skill}": (">=", -0.02) for skill in FAMILIES},
    "off_skill_max": ("<=", 0.02),
    "seconds_pref": ("<=", 90.0),
    "seconds_rloo": ("<=", 300.0),
    "numbers": ("<=", 4000.0),
    "checkpoint_bytes": ("<=", 100_000.0),
}


def recipe_of(skill: str, objective: str, **changes: Any) -> Recipe:
    """Return the recipe of a config."""
    config = yaml.safe_load((CONFIGS / f"{skill}-{objective}.yaml").read_text())
    return Recipe(**(config.get("recipe", {}) | changes))


def run(
    skill: str, objective: str, seed: int, n: int, sgd: str | None, base: Mapping[str, Any], **changes: Any
) -> dict[str, Any]:
    """Train one expert and return its row."""
    on = bench(n, sgd)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        recipe = recipe_of(skill, objective, seed=seed, score_cases=0, validation_cases=0, **changes)
        expert = train(on.model, skill, objective, recipe=recipe, world=on.world, out=out, progress=False)
        checkpoint = (out / "checkpoints" / "last.ckpt").stat().st_size
        size = sum(path.stat().st_size for path in (out / "experts" / skill).iterdir())
    found = on.scores(expert)
    after, before = shares(found), base["scores"]
    row: dict[str, Any] = {
        "validation": on.right(skill, seed, expert),
        "figures": estimates(found[skill]),
        "base_doing": before[skill]["doing"],
        "base_controls": before[skill]["controls"],
        "doing": after[skill]["doing"],
        "controls": after[skill]["controls"],
        "knowing_change": after[skill]["knowing"] - before[skill]["knowing"],
        "errors": dict(found[skill].errors),
        "off_skill": losses(before, after, [name for name in FAMILIES if name != skill]),
        "drift": on.nats(expert) - base["nats"],
        "norm": expert.norm(),
        "numbers": sum(on.model.basis.sizes),
        "checkpoint_bytes": checkpoint,
        "expert_bytes": size,
    }
    if on.real is not None:
        on_real = on.scores(expert, {skill: on.real[skill]})[skill]
        row["sgd"] = estimates(on_real)
        row["sgd_doing"], row["sgd_controls"] = (on_real.figures[key].value for key in ("doing", "controls"))
    return row


def timed(skill: str, objective: str) -> dict[str, Any]:
    """Train one expert, from cases on, and return how long it took."""
    model, town = harbor(), worlds.load("town")
    recipe = recipe_of(skill, objective, score_cases=0, validation_cases=0)
    started = time.perf_counter()
    train(model, skill, objective, recipe=recipe, world=town, progress=False)
    return {"seconds": time.perf_counter() - started}


def figures(grid: Grid) -> dict[str, float]:
    """Return the figures of finished runs; the best objective of a skill is the one that did best in validation."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in grid.find(explores=""):
        groups.setdefault((row["run"]["skill"], row["run"]["objective"]), []).append(row)
    found: dict[str, float] = {}
    for (skill, objective), some in groups.items():
        for key in ("doing", "controls", "knowing_change", "drift", "sgd_doing", "sgd_controls"):
            found[f"{key}_{skill}_{objective}"] = mean(some, key)
    for skill in {skill for skill, _ in groups}:
        for key in ("base_doing", "base_controls"):
            found[f"{key}_{skill}"] = mean(grid.find(explores="", skill=skill), key)
        best = max((one for of, one in groups if of == skill), key=lambda one: mean(groups[skill, one], "validation"))
        for key in ("doing", "controls", "knowing_change"):
            found[f"best_{key}_{skill}"] = found[f"{key}_{skill}_{best}"]
    falls = [mean([row["off_skill"] for row in some], key) for some in groups.values() for key in some[0]["off_skill"]]
    found["off_skill_max"] = max(falls, default=math.nan)
    times = grid.find(what="seconds")
    for row in times:
        found[f"seconds_{row['run']['skill']}_{row['run']['objective']}"] = row["seconds"]
    for name, objectives in (("seconds_pref", ("sft", "dpo")), ("seconds_rloo", ("rloo",))):
        of = [row["seconds"] for row in times if row["run"]["objective"] in objectives]
        found[name] = max(of, default=math.nan)
    for key in ("numbers", "checkpoint_bytes"):
        found[key] = max((row[key] for some in groups.values() for row in some), default=math.nan)
    return found


TRIED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "k=8": ({"k": 8}, {}),
    "k=16": ({"k": 16}, {}),
    "k=64": ({}, {}),
    "k=full": ({"k": "full"}, {}),
    "k=16, dense": ({"k": 16}, {"core": "dense"}),
    "k=16, sensitivity": ({"k": 16, "support": "sensitivity"}, {}),
    "first_layer=0": ({"first_layer": 0}, {}),
    "first_layer=3": ({"first_layer": 3}, {}),
    "on all tokens": ({}, {"activated": False}),
}
"""What is explored: settings of the basis, and of the recipe."""
EXPLORED = "sft"


def explored(tried: str) -> dict[str, Any]:
    """Train clarify in a way of TRIED, one seed; measure it on 200 held-out cases."""
    (basis, changes), town = TRIED[tried], worlds.load("town")
    if "support" in basis:
        tokenizer, talks = tokenizer_of(harbor()), town.dialogues("train", 32)
        texts = [str(tokenizer.decode(render(tokenizer, one.messages, one.tools))) for one in talks]
        basis = basis | {"calibration": texts}
    model = harbor(**basis)
    recipe = recipe_of("clarify", EXPLORED, score_cases=0, validation_cases=0, **changes)
    expert = train(model, "clarify", EXPLORED, recipe=recipe, world=town, progress=False)
    cases = draw(town, "heldout", 200)["clarify"]
    found = measure(model, "clarify", cases, experts=expert, progress=False)
    return {"figures": estimates(found), "norm": expert.norm(), "numbers": expert.flat(model.basis).numel()}


def grid_of(seeds: Iterable[int], n: int, sgd: str | None, base: Mapping[str, Any]) -> list[Job]:
    """Return the runs of the grid."""
    return [
        Job(
            {"skill": skill, "objective": objective, "seed": seed, "n": n, "explores": ""},
            run,
            {"skill": skill, "objective": objective, "seed": seed, "n": n, "sgd": sgd, "base": base},
        )
        for seed in seeds
        for objective, skill in RUNS
    ]


def main(seeds: int = 3, n: int = 500, sgd: str | None = None, explore: bool = False, workers: int = 2) -> None:
    """Run what has not been run, and print the table.

    Args:
        seeds: of training.
        n: held-out cases a skill, even.
        sgd: folder of the Schema-Guided Dialogue data.
        explore: also try other bases, one skill, one seed, n = 200.
        workers: processes of one thread that share the runs.
    """
    grid = Grid.open("objectives", BARS)
    base = grid.once({"what": "base", "n": n}, base_row, n=n, sgd=sgd)
    grid.all(grid_of(range(seeds), n, sgd, base), workers)
    if explore:
        of = {"skill": "clarify", "objective": EXPLORED, "seed": 0, "n": 200}
        grid.all([Job(of | {"explores": tried}, explored, {"tried": tried}) for tried in TRIED], workers)
    for objective, skill in RUNS:
        grid.once({"what": "seconds", "skill": skill, "objective": objective}, timed, skill=skill, objective=objective)
    found = figures(grid)
    grid.write(found)
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.objectives")

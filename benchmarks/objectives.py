"""Objectives: what each makes of a skill on harbor, and what that costs.

    python -m benchmarks.objectives [--seeds 3] [--n 500] [--sgd PATH] [--explore]

The grid is three skills x (sft, dpo) and two skills x rloo, by seeds; the best objective of a skill is chosen on the
validation split and reported on the held-out one. Every finished run is one row of benchmarks/results/objectives.json;
rows that are there are not run again. With --explore one skill and seed is also tried with other bases and a dense
core: exploratory, n = 200.

    best_doing_, best_controls_, best_knowing_change_   of the best objective, mean over seeds
    doing_, controls_                                   of every objective; base_doing_, base_controls_ without experts
    off_skill_max      largest fall of another skill's doing, controls or knowing, any objective's mean over seeds
    drift_             perplexity of held-out dialogues, over the base's
    seconds_           from cases to a finished expert, without its final scores
    numbers, checkpoint_bytes
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.grid import Grid, draw, estimates, losses, mean, perplexity, scores
from svdexpert import Recipe, SpectralModel, train, worlds
from svdexpert.cli import run_command
from svdexpert.conversation import render, tokenizer_of
from svdexpert.evaluate import FAMILIES, SkillResult
from svdexpert.skills import Case
from svdexpert.worlds import World

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


@dataclass(frozen=True)
class Base:
    """What every run starts from and is measured against.

    Attributes:
        model: harbor, attached.
        town: where cases come from.
        cases: held-out, by skill.
        scores: of the base on them.
        perplexity: of the base on held-out dialogues.
        real: held-out cases of real dialogues, if there are any.
    """

    model: SpectralModel
    town: World
    cases: Mapping[str, list[Case]]
    scores: Mapping[str, SkillResult]
    perplexity: float
    real: Mapping[str, list[Case]] | None

    @classmethod
    def of(
        cls,
        model: SpectralModel,
        town: World,
        cases: Mapping[str, list[Case]],
        real: Mapping[str, list[Case]] | None,
    ) -> Base:
        return cls(model, town, cases, scores(model, cases, None), perplexity(model, town, None), real)


def run(base: Base, skill: str, objective: str, seed: int, **changes: Any) -> dict[str, Any]:
    """Train one expert and return its row."""
    model, town = base.model, base.town
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        recipe = recipe_of(skill, objective, seed=seed, score_cases=0, validation_cases=0, **changes)
        started = time.perf_counter()
        expert = train(model, skill, objective, recipe=recipe, world=town, out=out, progress=False)
        seconds = time.perf_counter() - started
        checkpoint = (out / "checkpoints" / "last.ckpt").stat().st_size
        size = sum(path.stat().st_size for path in (out / "experts" / skill).iterdir())
    validation = scores(model, {skill: draw(town, "validation", 200, seed)[skill]}, expert)[skill].figures
    after = scores(model, base.cases, expert)
    row: dict[str, Any] = {
        "validation": (validation["doing"].value + validation["controls"].value) / 2,
        "figures": estimates(after[skill]),
        "base_doing": base.scores[skill].figures["doing"].value,
        "base_controls": base.scores[skill].figures["controls"].value,
        "doing": after[skill].figures["doing"].value,
        "controls": after[skill].figures["controls"].value,
        "knowing_change": after[skill].figures["knowing"].value - base.scores[skill].figures["knowing"].value,
        "errors": dict(after[skill].errors),
        "off_skill": losses(base.scores, after, [name for name in FAMILIES if name != skill]),
        "drift": perplexity(model, town, expert) / base.perplexity,
        "seconds": seconds,
        "norm": expert.norm(),
        "numbers": sum(model.basis.sizes),
        "checkpoint_bytes": checkpoint,
        "expert_bytes": size,
    }
    if base.real is not None:
        on_real = scores(model, {skill: base.real[skill]}, expert)[skill]
        row["sgd"] = estimates(on_real)
        row["sgd_doing"], row["sgd_controls"] = (on_real.figures[key].value for key in ("doing", "controls"))
    return row


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of finished runs; the best objective of a skill is the one that did best in validation."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["run"]["explores"]:
            groups.setdefault((row["run"]["skill"], row["run"]["objective"]), []).append(row)
    found: dict[str, float] = {}
    for (skill, objective), some in groups.items():
        for key in ("doing", "controls", "knowing_change", "drift", "seconds", "sgd_doing", "sgd_controls"):
            found[f"{key}_{skill}_{objective}"] = mean(some, key)
    for skill in {skill for skill, _ in groups}:
        for key in ("base_doing", "base_controls"):
            found[f"{key}_{skill}"] = mean([row for row in rows if row["run"]["skill"] == skill], key)
        best = max((one for of, one in groups if of == skill), key=lambda one: mean(groups[skill, one], "validation"))
        for key in ("doing", "controls", "knowing_change"):
            found[f"best_{key}_{skill}"] = found[f"{key}_{skill}_{best}"]
    falls = [mean([row["off_skill"] for row in some], key) for some in groups.values() for key in some[0]["off_skill"]]
    found["off_skill_max"] = max(falls, default=math.nan)
    for name, objectives in (("seconds_pref", ("sft", "dpo")), ("seconds_rloo", ("rloo",))):
        of = [mean(some, "seconds") for (_, objective), some in groups.items() if objective in objectives]
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


def explore_bases(grid: Grid, town: World) -> None:
    """Run what is TRIED: clarify, one seed, n = 200."""
    tokenizer = tokenizer_of(harbor())
    texts = [str(tokenizer.decode(render(tokenizer, one.messages, one.tools))) for one in town.dialogues("train", 32)]
    for tried, (basis, changes) in TRIED.items():
        wanted = {"skill": "clarify", "objective": "dpo", "seed": 0, "n": 200, "explores": tried}
        if grid.find(**wanted):
            continue
        more = {"calibration": texts} if "support" in basis else {}
        base = Base.of(harbor(**basis, **more), town, draw(town, "heldout", 200), None)
        grid.once(wanted, lambda base=base, changes=changes: run(base, "clarify", "dpo", 0, **changes))


def harbor(**basis: Any) -> SpectralModel:
    """Return harbor in fp32, with a basis."""
    return SpectralModel.from_pretrained("harbor", dtype="float32", progress=False, **basis)


def main(seeds: int = 3, n: int = 500, sgd: str | None = None, explore: bool = False) -> None:
    """Run what has not been run, and print the table.

    Args:
        seeds: of training.
        n: held-out cases a skill, even.
        sgd: folder of the Schema-Guided Dialogue data.
        explore: also try other bases, one skill, one seed, n = 200.
    """
    grid = Grid.open("objectives", BARS)
    town, real = worlds.load("town"), worlds.load("sgd", sgd) if sgd else None
    base = Base.of(harbor(), town, draw(town, "heldout", n), draw(real, "heldout", 300) if real else None)
    for seed in range(seeds):
        for objective, skill in RUNS:
            wanted = {"skill": skill, "objective": objective, "seed": seed, "n": n, "explores": ""}
            grid.once(wanted, lambda skill=skill, objective=objective, seed=seed: run(base, skill, objective, seed))
            grid.write(figures(grid.rows))
    if explore:
        explore_bases(grid, town)
    found = figures(grid.rows)
    grid.write(found)
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.objectives")

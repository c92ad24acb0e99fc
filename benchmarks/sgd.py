"""Real dialogues: the main job on the Schema-Guided Dialogue data (Rastogi et al. 2020, CC BY-SA 4.0).

    python -m benchmarks.sgd --data PATH [--seeds 3] [--n 300] [--workers 2]

A library and a router are trained on the train split (configs/train/sgd-library.yaml, configs/dispatch/sgd-router.yaml)
and measured on the dev split, beside what else could be done (benchmarks/register_peers.py). Every finished run is one
row of benchmarks/results/sgd.json; rows that are there are not run again.

    sgd_rise                rise of doing from harbor to the dispatched library, mean over skills and seeds; _seen and
                            _unseen: in services that train has, or has not; by skill sgd_rise_SKILL
    sgd_control_change, sgd_knowing_change      the worst of a skill
    sgd_gap_closed          sgd_rise over the same from harbor to its own stage 1 (benchmarks/results/harbor_gate.json)
    doing_, controls_, base_doing_, alone_doing_, sum_doing_    by skill, means over seeds
    lead_sgd                mean of doing and controls over skills, dispatched, less that of the best of PEERS
    composite_, base_composite      success on composites
    switch_decided, switch_success      of dialogues in which first a detail is missing and later a call is due: the
                                        right expert was chosen, and the reply was right, in both moments
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

import yaml

from benchmarks.demo import PEERS, both, peer_on
from benchmarks.grid import MEASURES, RESULTS, Bench, Grid, Job, Shares, added, draw, library_of, mean, of_world, shares
from benchmarks.objectives import CONFIGS
from benchmarks.suite import Item, replies
from svdexpert import Expert, Recipe
from svdexpert.cli import run_command
from svdexpert.decision import Dispatcher
from svdexpert.dispatch import chooser, decide, examples_of, fit
from svdexpert.evaluate import FAMILIES, SkillResult
from svdexpert.skills import Case, load

TRAINED = yaml.safe_load((CONFIGS / "sgd-library.yaml").read_text())
ROUTED = yaml.safe_load((CONFIGS.parent / "dispatch" / "sgd-router.yaml").read_text())
SERVICES = ("seen", "unseen")
BARS: dict[str, tuple[str, float]] = {
    "sgd_rise": (">=", 0.30),
    "sgd_control_change": (">=", -0.03),
    "sgd_knowing_change": (">=", -0.02),
    "sgd_gap_closed": (">=", 0.80),
    "lead_sgd": (">=", 0.0),
}


@lru_cache(maxsize=1)
def real(n: int, data: str) -> Bench:
    """Return what this process measures with."""
    return of_world("sgd", n, data)


def recipe(seed: int) -> Recipe:
    """Return the recipe of the config, without scores of its own."""
    return Recipe(**(TRAINED["recipe"] | {"seed": seed, "score_cases": 0, "validation_cases": 0}))


def library(on: Bench, seed: int) -> dict[str, Expert]:
    """Return three experts, trained in one batch."""
    return library_of(on, FAMILIES, TRAINED["objective"], recipe(seed))


def router(on: Bench, seed: int) -> Dispatcher:
    """Return a router, fitted on the train split."""
    train = examples_of(FAMILIES, on.world, "train", ROUTED["n"], seed=seed)
    held = examples_of(FAMILIES, on.world, "validation", ROUTED["validation"], seed=seed)
    return fit("router", on.model, library(on, seed), train, held, **ROUTED["settings"])


def by_services(cases: Mapping[str, Sequence[Case]], results: Mapping[str, SkillResult]) -> dict[str, Any]:
    """Return what counts of results, and doing in seen and in unseen services."""
    found = shares(results)
    for name, result in results.items():
        for kind in SERVICES:
            rows = zip(cases[name], result.rows, strict=True)
            right = [row.right for case, row in rows if case.positive and f"{kind}_service" in case.tags]
            if right:
                found[name][f"doing_{kind}"] = fmean(right)
    return found


def base_row(n: int, data: str) -> dict[str, Any]:
    """Return what harbor does."""
    on = real(n, data)
    return {"scores": by_services(on.cases, on.scores(None)), "composite": composite(on, None, {})}


def ours(seed: int, n: int, data: str) -> dict[str, Any]:
    """Return what a library does: dispatched, each expert alone, all added up; on composites and on switches."""
    on = real(n, data)
    some, dispatcher = library(on, seed), router(on, seed)
    routed = chooser(dispatcher, on.model, some)
    alone: dict[str, Any] = {}
    for name, expert in some.items():
        alone |= shares(on.scores(expert, {name: on.cases[name]}))
    return {
        "dispatched": by_services(on.cases, on.scores(routed, library=some)),
        "alone": alone,
        "sum": shares(on.scores(added(some.values()))),
        "composite": composite(on, dispatcher, some),
        "switch": switched(on, dispatcher, some),
    }


def composite(on: Bench, dispatcher: Dispatcher | None, library: Mapping[str, Expert]) -> float:
    """Return the success on composites: a false claim before an incomplete request."""
    cases = [one for one in load("composite").cases(on.world, "heldout", 400, seed=0) if one.positive]
    return fmean(one[0] for one in answered(on, dispatcher, library, cases))


def answered(
    on: Bench, dispatcher: Dispatcher | None, library: Mapping[str, Expert], cases: Sequence[Case]
) -> list[tuple[bool, frozenset[str]]]:
    """Return of every case whether the reply was right, and who spoke."""
    items = [Item(one.skill, one) for one in cases]
    made = [] if dispatcher is None else decide(dispatcher, on.model, [one.context for one in items], library)
    weights = [one.weights for one in made] or [{} for _ in items]
    who = [one.chosen for one in made] or [frozenset[str]() for _ in items]
    said = replies(on, library, items, weights)
    return [(one.right(reply), names) for one, reply, names in zip(items, said, who, strict=True)]


def switched(on: Bench, dispatcher: Dispatcher, library: Mapping[str, Expert]) -> dict[str, float]:
    """Return what is made of dialogues that need a question first and a call later, as far as there are any."""
    drawn = {name: [one for one in draw(on.world, "heldout", 1000)[name] if one.positive] for name in FAMILIES}
    pairs = {
        early.cluster: (early, late)
        for early in drawn["clarify"]
        for late in drawn["call"]
        if early.cluster == late.cluster and late.messages[: len(early.messages)] == early.messages
    }
    if not pairs:
        return {"n": 0}
    first, second = (answered(on, dispatcher, library, [pair[place] for pair in pairs.values()]) for place in (0, 1))
    due = (frozenset({"clarify"}), frozenset({"call"}))
    both_right = list(zip(first, second, strict=True))
    return {
        "n": len(pairs),
        "decided": fmean((one[1], other[1]) == due for one, other in both_right),
        "success": fmean(one[0] and other[0] for one, other in both_right),
    }


def peer(name: str, seed: int, n: int, data: str) -> dict[str, Any]:
    """Return doing and controls of a peer, by skill."""
    return peer_on(real(n, data), name, seed)


def figures(grid: Grid) -> dict[str, float]:
    """Return the figures of finished runs."""
    found: dict[str, float] = {}
    (base_of,) = grid.find(what="base")
    base: Shares = base_of["scores"]
    rows = grid.find(what="ours")
    routed = {name: [row["dispatched"][name] for row in rows] for name in FAMILIES}
    for name in FAMILIES:
        for key in MEASURES[:2]:
            found[f"{key}_{name}"] = mean(routed[name], key)
            found[f"base_{key}_{name}"] = base[name][key]
        for when in ("alone", "sum"):
            found[f"{when}_doing_{name}"] = mean([row[when][name] for row in rows], "doing")
    for end in ("", *(f"_{kind}" for kind in SERVICES)):
        rises = {
            name: mean(routed[name], f"doing{end}") - base[name][f"doing{end}"]
            for name in FAMILIES
            if f"doing{end}" in base[name]
        }
        found[f"sgd_rise{end}"] = fmean(rises.values()) if rises else math.nan
        found |= {f"sgd_rise{end}_{name}": rise for name, rise in rises.items()}
    for name, key in (("sgd_control_change", "controls"), ("sgd_knowing_change", "knowing")):
        found[name] = min(mean(routed[one], key) - base[one][key] for one in FAMILIES)
    gate = json.loads((RESULTS / "harbor_gate.json").read_text())["figures"]
    gap = fmean(gate[f"sgd_natural_doing_{name}"] - gate[f"sgd_doing_{name}"] for name in FAMILIES)
    found["sgd_gap_closed"] = found["sgd_rise"] / gap
    found["composite"], found["base_composite"] = mean(rows, "composite"), base_of["composite"]
    for key in ("decided", "success"):
        found[f"switch_{key}"] = mean([row["switch"] for row in rows], key)
    leads = {name: [both(row["scores"]) for row in grid.find(peer=name)] for name in PEERS}
    found |= {f"both_{name}".replace(" ", "_"): fmean(some) for name, some in leads.items() if some}
    found["both_ours"] = fmean(both(row["dispatched"]) for row in rows)
    best = max((fmean(some) for some in leads.values() if some), default=math.nan)
    return found | {"lead_sgd": found["both_ours"] - best}


def main(data: str, seeds: int = 3, n: int = 300, workers: int = 2) -> None:
    """Run what has not been run, and print the table.

    Args:
        data: folder of the Schema-Guided Dialogue data.
        seeds: of training.
        n: dev cases a skill, even.
        workers: processes of one thread that share the runs.
    """
    grid, every = Grid.open("sgd", BARS), range(seeds)
    grid.once({"what": "base", "n": n}, base_row, n=n, data=data)

    def job(make: Any, seed: int, run: Mapping[str, Any], **given: Any) -> Job:
        return Job({**run, "seed": seed, "n": n}, make, {"seed": seed, "n": n, "data": data, **given})

    grid.all([job(ours, seed, {"what": "ours"}) for seed in every], workers)
    grid.write(figures(grid))
    grid.all([job(peer, seed, {"peer": name}, name=name) for name in PEERS for seed in every], workers)
    found = figures(grid)
    grid.write(found)
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.sgd", as_positional=False)

"""The main job, measured: what harbor does before and after, dispatched, beside what else could be done.

    python -m benchmarks.demo [--seeds 3] [--n 500] [--workers 2]

The library, the router and the settings are those of `svdexpert demo`; the three families are measured on n held-out
cases each. Every finished run is one row of benchmarks/results/demo.json; rows that are there are not run again.

    doing_, controls_, knowing_change_    dispatched, by skill, means over seeds; base_doing_ without experts
    joint_loss_max      largest fall of doing, controls or knowing from each expert alone to the dispatched library
    sum_loss_max        the same to the plain sum
    lead_town           mean of doing and controls over skills, dispatched, less that of the best of PEERS
    export_same         of 100 conversations, those that PEFT answers with the exported mixture as we do, token by token
    first_s, again_s    seconds of `svdexpert demo` with an empty cache and folder, and once more
    help_s              seconds of `svdexpert --help`, the median of five
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.compose import OBJECTIVE, recipe
from benchmarks.grid import Bench, Grid, Job, Shares, added, base_row, bench, draw, library_of, losses, mean, shares
from benchmarks.register import of_seed
from benchmarks.register_peers import Steered, adapted, asked, best_prompt, spoken, steering
from svdexpert import export_lora
from svdexpert.cli import run_command
from svdexpert.conversation import render, tokenizer_of, turn_ends
from svdexpert.dispatch import chooser
from svdexpert.evaluate import FAMILIES
from svdexpert.model import check_base
from svdexpert.skills import load

PEERS = ("system prompt", "steering", "linear", "multi-task LoRA")
BARS: dict[str, tuple[str, float]] = {
    "first_s": ("<=", 360.0),
    "again_s": ("<=", 60.0),
    **{f"doing_{skill}": (">=", 0.90) for skill in FAMILIES},
    **{f"controls_{skill}": (">=", 0.95) for skill in FAMILIES},
    **{f"knowing_change_{skill}": (">=", -0.02) for skill in FAMILIES},
    "joint_loss_max": ("<=", 0.03),
    "lead_town": (">=", 0.0),
    "export_same": (">=", 100.0),
    "help_s": ("<=", 1.0),
}


def ours(seed: int, n: int) -> dict[str, Any]:
    """Return what a library does: dispatched, each expert alone, all added up."""
    on = bench(n)
    library = library_of(on, FAMILIES, OBJECTIVE, recipe(seed=seed))
    routed = chooser(of_seed(seed, n).router, on.model, library)
    alone: dict[str, Any] = {}
    for name, expert in library.items():
        alone |= shares(on.scores(expert, {name: on.cases[name]}))
    return {
        "dispatched": shares(on.scores(routed, library=library)),
        "alone": alone,
        "sum": shares(on.scores(added(library.values()))),
    }


def peer(name: str, seed: int, n: int) -> dict[str, Any]:
    """Return doing and controls of a peer, by skill."""
    return peer_on(bench(n), name, seed)


def peer_on(on: Bench, name: str, seed: int) -> dict[str, Any]:
    """Return doing and controls of a peer, by skill, in the cases of a world that it was made in."""
    found: dict[str, dict[str, float]] = {}
    speaker: Any = None
    if name == "steering":
        vectors, _ = steering(on, seed)
        speaker = Steered(on.model, list(vectors.values()))
    elif name != "system prompt":
        speaker = adapted(on, name, seed)
    prompt = best_prompt(on, seed)[0] if speaker is None else ""
    for skill, cases in on.cases.items():
        said = asked(on, prompt, cases) if speaker is None else spoken(on, cases, speaker)
        verify = load(skill).verify
        right = [(case.positive, verify(case, reply).right) for case, reply in zip(cases, said, strict=True)]
        found[skill] = {
            key: fmean(ok for positive, ok in right if positive is due)
            for key, due in (("doing", True), ("controls", False))
        }
    return {"scores": found}


def exported(n: int = 100) -> dict[str, Any]:
    """Return how many conversations PEFT answers with an exported mixture as we do."""
    on = bench(2)
    library = library_of(on, FAMILIES, OBJECTIVE, recipe(seed=0))
    mixture = replace(library["clarify"] + library["disagree"], reach=0)  # as a LoRA acts: to the end of the reply
    tokenizer, (_, ends) = tokenizer_of(on.model), turn_ends(on.model)
    cases = [one for name in ("clarify", "disagree") for one in draw(on.world, "heldout", n)[name][: n // 2]]
    how: dict[str, Any] = {"max_new_tokens": 96, "do_sample": False, "eos_token_id": sorted(ends), "pad_token_id": 0}
    same = 0
    with TemporaryDirectory() as folder:
        export_lora(mixture, on.model, Path(folder) / "lora")
        hf = AutoModelForCausalLM.from_pretrained(check_base("harbor"), dtype=torch.float32)
        lora = PeftModel.from_pretrained(hf, str(Path(folder) / "lora")).eval()
        for case in cases:
            ids = torch.tensor([render(tokenizer, case.messages, case.tools)])
            with torch.inference_mode():
                theirs = lora.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
            same += theirs.tolist() == on.model.generate(ids, mixture, **how).tolist()
    return {"same": same, "n": len(cases)}


def timed() -> dict[str, float]:
    """Return seconds of the command, from an empty cache and an empty folder, and again."""
    program = [sys.executable, "-m", "svdexpert.cli"]
    with TemporaryDirectory() as folder:
        env = os.environ | {"SVDEXPERT_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        found = {}
        for name in ("first", "again"):
            started = time.perf_counter()
            subprocess.run([*program, "demo", f"--folder={folder}/demo"], env=env, check=True, capture_output=True)
            found[name] = time.perf_counter() - started
    helps = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([*program, "--help"], check=True, capture_output=True)
        helps.append(time.perf_counter() - started)
    return found | {"help": median(helps)}


def both(scores: Shares) -> float:
    """Return the mean of doing and controls over skills."""
    return fmean((one["doing"] + one["controls"]) / 2 for one in scores.values())


def figures(grid: Grid) -> dict[str, float]:
    """Return the figures of finished runs."""
    found: dict[str, float] = {}
    base: Mapping[str, Any] = grid.find(what="base")[0]["scores"]
    rows = grid.find(what="ours")
    for skill in FAMILIES:
        for key in ("doing", "controls", "knowing"):
            found[f"{key}_{skill}"] = mean([row["dispatched"][skill] for row in rows], key)
            found[f"base_{key}_{skill}"] = base[skill][key]
        found[f"knowing_change_{skill}"] = found.pop(f"knowing_{skill}") - base[skill]["knowing"]
    for name, when in (("joint_loss_max", "dispatched"), ("sum_loss_max", "sum")):
        falls = [losses(row["alone"], row[when], FAMILIES) for row in rows]
        found[name] = max((mean(falls, key) for key in (falls[0] if falls else ()) if key != "max"), default=math.nan)
    leads = {}
    for name in PEERS:
        some = [both(row["scores"]) for row in grid.find(peer=name)]
        if some:
            leads[name] = found[f"both_{name}".replace(" ", "_")] = fmean(some)
    if rows and leads:
        found["both_ours"] = fmean(both(row["dispatched"]) for row in rows)
        found["lead_town"] = found["both_ours"] - max(leads.values())
    for row in grid.find(what="times"):
        found |= {"first_s": row["first"], "again_s": row["again"], "help_s": row["help"]}
    for row in grid.find(what="export"):
        found["export_same"] = 100 * row["same"] / row["n"]
    return found


def main(seeds: int = 3, n: int = 500, workers: int = 2) -> None:
    """Run what has not been run, and print the table.

    Args:
        seeds: of training.
        n: held-out cases a skill, even.
        workers: processes of one thread that share the runs.
    """
    grid, every = Grid.open("demo", BARS), range(seeds)
    grid.once({"what": "base", "n": n}, base_row, n=n, sgd=None)
    grid.all([Job({"what": "ours", "seed": one, "n": n}, ours, {"seed": one, "n": n}) for one in every], workers)
    jobs = [
        Job({"peer": name, "seed": one, "n": n}, peer, {"name": name, "seed": one, "n": n})
        for name in PEERS
        for one in every
    ]
    grid.all(jobs, workers)
    grid.once({"what": "export"}, exported)
    grid.once({"what": "times"}, timed)
    found = figures(grid)
    grid.write(found)
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.demo")

"""Peers: what LoRA and IA3 make of the same data in the same steps, and the smallest LoRA that does what ours does.

    python -m benchmarks.peers [--seeds 3] [--n 500] [--workers 2]       after benchmarks.objectives

PEFT's adapters take the place of ours in the same loop: the same rows, objective, schedule and number of steps, and
activated as ours are: they act from the reply on, behind contexts that the base has read (aLoRA). The learning rate of
each is the best of RATES in validation, for clarify with seed 0. LoRA of rank 1 and 16 and IA3 are always trained, the
ranks between them up to the first that reaches ours. Every finished run is one row of benchmarks/results/peers.json;
rows that are there are not run again.

    lora_numbers_over_ours   numbers of the smallest LoRA whose doing and controls, means over skills and seeds, reach
                             ours less 0.01, over ours; of rank 16 where none does
    lora_drift_over_ours     its drift (benchmarks.objectives) over ours, both without sign
    off_skill_               largest fall that an adapter causes in another skill, means over seeds
    batch4_lora_over_ours, dpo_peak_over_trl            see benchmarks/training_costs.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.grid import Bench, Grid, Job, bench, estimates, losses, mean, shares
from benchmarks.objectives import recipe_of
from benchmarks.training_costs import ROWS, dpo_memory, four_in_one_batch
from svdexpert import Recipe, SpectralModel
from svdexpert.basis import Basis
from svdexpert.cli import run_command
from svdexpert.errors import SvdExpertError
from svdexpert.evaluate import FAMILIES
from svdexpert.examples import Example
from svdexpert.forward import Contexts
from svdexpert.layers import Scope
from svdexpert.model import check_base
from svdexpert.training import ExpertModule, Run, Task, fit, trainer_of

OBJECTIVE = "sft"
RATES = (1e-3, 3e-3, 1e-2)
SMALLER = tuple(f"lora{rank}" for rank in (1, 2, 4, 8, 16))
KINDS = ("lora1", "lora16", "ia3", *SMALLER[1:-1])
BARS: dict[str, tuple[str, float]] = {
    "lora_numbers_over_ours": (">=", 10.0),
    "lora_drift_over_ours": (">=", 1.0),
    "batch4_lora_over_ours": (">=", 1.3),
    "dpo_peak_over_trl": ("<=", 0.7),
}


class Peer:
    """A PEFT model where the library takes a SpectralModel: any mixture but None is its adapter."""

    def __init__(self, adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, basis: Basis) -> None:
        self.adapted = adapted
        self.hf: PreTrainedModel = adapted.get_base_model()
        self.tokenizer = tokenizer
        self.basis = basis  # named in results alone
        self._scope = Scope()

    @contextmanager
    def using(self, experts: Any, library: Any = None) -> Iterator[Peer]:
        with self.adapted.disable_adapter() if experts is None else nullcontext():
            yield self

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [one for one in self.adapted.parameters() if one.requires_grad]


class Adapter(dict[str, float]):
    """Stands where a mixture stands: the adapter as it is."""

    def repeated(self, times: int) -> Adapter:
        return self


def peer(model: SpectralModel, kind: str) -> Peer:
    """Return harbor with a PEFT adapter on the matrices that our experts touch."""
    hf = AutoModelForCausalLM.from_pretrained(check_base("harbor"), dtype=torch.float32)
    places = list(model.basis.names)
    config: LoraConfig | IA3Config
    if kind == "ia3":
        config = IA3Config(target_modules=places, feedforward_modules=[one for one in places if "down" in one])
    else:
        rank = int(kind.removeprefix("lora"))
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=places)
    assert model.tokenizer is not None
    return Peer(get_peft_model(hf, config).eval(), model.tokenizer, model.basis)


class PeerModule(ExpertModule):
    """An adapter in training, where the library trains offsets: the same rows and loss, in the same loop.

    One adapter may learn several tasks; then no task's context is neutral.
    """

    def __init__(
        self, one: Peer, tasks: Sequence[Task], recipe: Recipe, run: Run, folder: Path, contexts: Contexts
    ) -> None:
        neutrals = run.neutrals(tasks, contexts)
        if len(tasks) > 1:
            neutrals = [one for one in neutrals if not one.owner]
        how: dict[str, Any] = {"invocation": contexts.invocation, "contexts": contexts}
        super().__init__(run.model, tasks, {}, OBJECTIVE, recipe, neutrals, folder, **how)
        self.model, self.peer = cast(SpectralModel, one), one

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return self.peer.parameters

    def mixture(self, weights: Sequence[Sequence[float]]) -> Any:
        return Adapter(adapter=1.0)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.peer.parameters, self.recipe.clip)


def module_of(
    on: Bench, one: Peer, skills: Sequence[str], seed: int, rate: float, folder: Path, *, activated: bool = True
) -> PeerModule:
    """Return an adapter that is to be trained on skills; activated as ours are, or acting on all tokens."""
    how = {"seed": seed, "learning_rate": rate, "mixing": 0.0, "score_cases": 0, "validation_cases": 0}
    recipe = recipe_of(skills[0], OBJECTIVE, **how, activated=activated)
    run = Run(
        model=on.model,
        skills=skills,
        objective=OBJECTIVE,
        recipe=recipe,
        world=on.world,
        against={},
        out=None,
        progress=False,
    )
    contexts = on.contexts if activated else Contexts(on.model, ())
    return PeerModule(one, for_one_adapter(run.tasks(on.contexts)), recipe, run, folder, contexts)


def for_one_adapter(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks without those controls in which another task's move is due: one adapter cannot learn both."""
    moves = {task.skill.MOVE for task in tasks if task.skill is not None}

    def due(task: Task, row: Example) -> bool:
        case = task.examples.cases[row.id]
        assert task.skill is not None
        return row.positive is False and task.skill.verify(case, case.gold[0]).move in moves - {task.skill.MOVE}

    found = []
    for task in tasks:
        rows = tuple(row for row in task.examples.rows if not due(task, row))
        found.append(replace(task, examples=replace(task.examples, rows=rows)))
    return found


def trained_on(on: Bench, kind: str, skills: Sequence[str], seed: int, rate: float, *, activated: bool = True) -> Peer:
    """Return harbor with an adapter that was trained on skills."""
    torch.manual_seed(seed)
    one = peer(on.model, kind)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        module = module_of(on, one, skills, seed, rate, folder, activated=activated)
        fit(module, trainer_of(folder, module.recipe, {}, progress=False), folder)
    return one


def adapter(kind: str, skill: str, seed: int, n: int, rate: float, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Train an adapter on a skill; measure it in validation, or on held-out cases beside the base."""
    on = bench(n)
    one, active = trained_on(on, kind, [skill], seed, rate), Adapter(adapter=1.0)
    numbers = {"numbers": sum(number.numel() for number in one.parameters), "rate": rate}
    if base is None:
        return numbers | {"validation": on.right(skill, seed, active, one)}
    found = on.scores(active, speaker=one)
    after, before = shares(found), base["scores"]
    kept = get_peft_model_state_dict(one.adapted)
    return numbers | {
        "figures": estimates(found[skill]),
        "doing": after[skill]["doing"],
        "controls": after[skill]["controls"],
        "knowing_change": after[skill]["knowing"] - before[skill]["knowing"],
        "off_skill": losses(before, after, [name for name in FAMILIES if name != skill]),
        "drift": on.nats(active, one) - base["nats"],
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in kept.values()),
    }


def trained(grid: Grid, kind: str) -> list[Mapping[str, Any]]:
    """Return the rows of an adapter that were measured on held-out cases."""
    return [row for row in grid.find(kind=kind) if "doing" in row]


def reaches(grid: Grid, ours: Mapping[str, float], kind: str) -> bool:
    """Return whether an adapter's doing and controls, means over skills and seeds, are ours less 0.01 or better."""
    rows = trained(grid, kind)
    return bool(rows) and all(mean(rows, key) >= our_mean(ours, key) - 0.01 for key in ("doing", "controls"))


def smallest(grid: Grid, ours: Mapping[str, float]) -> str:
    """Return the smallest LoRA that reaches ours, that of rank 16 where none does, "" while a rank below is missing."""
    for kind in SMALLER[:-1]:
        if not trained(grid, kind):
            return ""
        if reaches(grid, ours, kind):
            return kind
    return SMALLER[-1]


def our_mean(ours: Mapping[str, float], key: str) -> float:
    """Return the mean over skills of a figure of our experts."""
    return fmean(ours[f"{key}_{skill}_{OBJECTIVE}"] for skill in FAMILIES)


def figures(grid: Grid, ours: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of finished runs, beside those of our experts of the same objective."""
    found: dict[str, float] = {}
    for kind in KINDS:
        if rows := trained(grid, kind):
            for key in ("doing", "controls", "knowing_change", "drift", "numbers", "bytes"):
                found[f"{key}_{kind}"] = mean(rows, key)
            by_skill = [[row["off_skill"] for row in rows if row["run"]["skill"] == skill] for skill in FAMILIES]
            found[f"off_skill_{kind}"] = max(mean(some, key) for some in by_skill if some for key in some[0])
    for key in ("doing", "controls", "drift"):
        found[f"{key}_ours"] = our_mean(ours, key)
    found["numbers_ours"] = ours["numbers"]
    rank = smallest(grid, ours)
    if f"numbers_{rank}" in found:
        found["lora_rank"] = int(rank.removeprefix("lora"))
        found["lora_numbers_over_ours"] = found[f"numbers_{rank}"] / ours["numbers"]
        found["lora_drift_over_ours"] = abs(found[f"drift_{rank}"]) / max(abs(found["drift_ours"]), 1e-6)
    for row in grid.find(kind="four in one batch"):
        found |= {f"batch4_lora_over_ours_rows{rows}": row[str(rows)]["lora_over_ours"] for rows in ROWS}
        found["batch4_lora_over_ours"] = found[f"batch4_lora_over_ours_rows{ROWS[-1]}"]
    for row in grid.find(kind="memory of dpo"):
        found["dpo_peak_over_trl"] = row["ours_over_trl"]
    return found


def main(seeds: int = 3, n: int = 500, workers: int = 2) -> None:
    """Run what has not been run, and print the table; `benchmarks.objectives` goes first.

    Args:
        seeds: of training.
        n: held-out cases a skill, even.
        workers: processes of one thread that share the runs.
    """
    theirs = Grid.open("objectives", {})
    ours, bases = theirs.figures, theirs.find(what="base", n=n)
    if f"doing_{FAMILIES[-1]}_{OBJECTIVE}" not in ours or not bases:
        raise SvdExpertError(f"There is nothing to compare with: run `python -m benchmarks.objectives --n {n}` first.")
    grid = Grid.open("peers", BARS)
    grid.once({"kind": "four in one batch"}, four_in_one_batch)
    grid.once({"kind": "memory of dpo"}, dpo_memory)

    def job(kind: str, skill: str, seed: int, rate: float, base: Any, run: Mapping[str, Any]) -> Job:
        given = {"kind": kind, "skill": skill, "seed": seed, "n": n, "rate": rate, "base": base}
        return Job({"kind": kind, "skill": skill, "seed": seed, **run}, adapter, given)

    for kind in KINDS:
        if kind in SMALLER[1:-1] and smallest(grid, ours):
            break
        grid.all([job(kind, FAMILIES[0], 0, rate, None, {"rate": rate}) for rate in RATES], workers)
        tried = [row for row in grid.find(kind=kind) if "validation" in row]
        rate = max(tried, key=lambda row: row["validation"])["rate"]
        runs = [job(kind, skill, seed, rate, bases[0], {"n": n}) for seed in range(seeds) for skill in FAMILIES]
        grid.all(runs, workers)
        grid.write(figures(grid, ours))
    found = figures(grid, ours)
    grid.write(found)
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.peers")

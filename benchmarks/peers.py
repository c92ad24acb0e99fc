"""Peers: what LoRA and IA3 make of the same data in the same steps, and the smallest LoRA that does what ours does.

    python -m benchmarks.peers [--seeds 3] [--n 500]       after benchmarks.objectives

PEFT's adapters take the place of ours in the same loop: the same rows, objective, schedule and number of steps; the
learning rate of each is the best of RATES in validation with seed 0. IA3 and LoRA of rank 16 are always trained, then
ranks from 1 up to the first that reaches ours. Every finished run is one row of benchmarks/results/peers.json; rows
that are there are not run again.

    lora_numbers_over_ours   numbers of the smallest LoRA whose doing and controls, means over skills and seeds, reach
                             ours less 0.01, over ours; of rank 16 where none does
    lora_drift_over_ours     its change of held-out perplexity, over ours
    batch4_lora_over_ours, dpo_peak_over_trl            see benchmarks/training_costs.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.grid import Grid, draw, estimates, mean, perplexity, right, scores
from benchmarks.objectives import Base, harbor, recipe_of
from benchmarks.training_costs import ROWS, dpo_memory, four_in_one_batch
from svdexpert import Recipe, SpectralModel, worlds
from svdexpert.basis import Basis
from svdexpert.cli import run_command
from svdexpert.errors import SvdExpertError
from svdexpert.evaluate import FAMILIES
from svdexpert.layers import Scope
from svdexpert.model import check_base
from svdexpert.training import ExpertModule, Run, Task, fit, trainer_of

OBJECTIVE = "dpo"
RATES = (1e-3, 3e-3, 1e-2)
SMALLER = tuple(f"lora{rank}" for rank in (1, 2, 4, 8, 16))
KINDS = ("ia3", "lora16", *SMALLER[:-1])
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
    """An adapter in training, where the library trains offsets: the same rows and loss, in the same loop."""

    def __init__(self, one: Peer, model: SpectralModel, task: Task, recipe: Recipe, run: Run, folder: Path) -> None:
        super().__init__(model, [task], {}, OBJECTIVE, recipe, run.neutrals([task]), folder)
        self.model, self.peer = cast(SpectralModel, one), one

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return self.peer.parameters

    def mixture(self, weights: Sequence[Sequence[float]]) -> Any:
        return Adapter(adapter=1.0)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.peer.parameters, self.recipe.clip)


def adapter(
    base: Base, kind: str, skill: str, seed: int, rate: float, cases: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Train an adapter on a skill; measure it in validation, and on held-out cases where these are given."""
    recipe = recipe_of(skill, OBJECTIVE, seed=seed, learning_rate=rate, score_cases=0, validation_cases=0)
    run = Run(
        model=base.model,
        skills=[skill],
        objective=OBJECTIVE,
        recipe=recipe,
        world=base.town,
        against={},
        out=None,
        progress=False,
    )
    started = time.perf_counter()
    [task] = run.tasks()
    one = peer(base.model, kind)
    with TemporaryDirectory() as folder:
        module = PeerModule(one, base.model, task, recipe, run, Path(folder))
        fit(module, trainer_of(Path(folder), recipe, {}, progress=False), Path(folder))
    row: dict[str, Any] = {
        "numbers": sum(number.numel() for number in one.parameters),
        "rate": rate,
        "seconds": time.perf_counter() - started,
    }
    on, town = Adapter(adapter=1.0), base.town
    if cases is None:
        return row | {"validation": right(one, skill, draw(town, "validation", 200, seed)[skill], on)}
    after = scores(one, {skill: cases[skill]}, on)[skill]  # type: ignore[arg-type]
    return row | {
        "figures": estimates(after),
        "doing": after.figures["doing"].value,
        "controls": after.figures["controls"].value,
        "knowing_change": after.figures["knowing"].value - base.scores[skill].figures["knowing"].value,
        "drift": perplexity(one, town, on) / base.perplexity,  # type: ignore[arg-type]
    }


def trained(grid: Grid, kind: str) -> list[Mapping[str, Any]]:
    """Return the rows of an adapter that were measured on held-out cases."""
    return [row for row in grid.find(kind=kind) if "doing" in row]


def reaches(grid: Grid, ours: Mapping[str, float], kind: str) -> bool:
    """Return whether an adapter's doing and controls, means over skills and seeds, are ours less 0.01 or better."""
    rows = trained(grid, kind)
    return bool(rows) and all(mean(rows, key) >= our_mean(ours, key) - 0.01 for key in ("doing", "controls"))


def our_mean(ours: Mapping[str, float], key: str) -> float:
    """Return the mean over skills of a figure of our experts."""
    return fmean(ours[f"{key}_{skill}_{OBJECTIVE}"] for skill in FAMILIES)


def figures(grid: Grid, ours: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of finished runs, beside those of our experts of the same objective."""
    found: dict[str, float] = {}
    for kind in KINDS:
        if rows := trained(grid, kind):
            for key in ("doing", "controls", "knowing_change", "drift", "numbers", "seconds"):
                found[f"{key}_{kind}"] = mean(rows, key)
    for key in ("doing", "controls", "drift"):
        found[f"{key}_ours"] = our_mean(ours, key)
    found["numbers_ours"] = ours["numbers"]
    rank = next((kind for kind in SMALLER if reaches(grid, ours, kind)), "lora16")
    if f"numbers_{rank}" in found:
        found["lora_rank"] = int(rank.removeprefix("lora"))
        found["lora_numbers_over_ours"] = found[f"numbers_{rank}"] / ours["numbers"]
        found["lora_drift_over_ours"] = (found[f"drift_{rank}"] - 1) / max(found["drift_ours"] - 1, 1e-6)
    for row in grid.find(kind="four in one batch"):
        found |= {f"batch4_lora_over_ours_rows{rows}": row[str(rows)]["lora_over_ours"] for rows in ROWS}
        found["batch4_lora_over_ours"] = found[f"batch4_lora_over_ours_rows{ROWS[-1]}"]
    for row in grid.find(kind="memory of dpo"):
        found["dpo_peak_over_trl"] = row["ours_over_trl"]
    return found


def main(seeds: int = 3, n: int = 500) -> None:
    """Run what has not been run, and print the table; `benchmarks.objectives` goes first.

    Args:
        seeds: of training.
        n: held-out cases a skill, even.
    """
    ours = Grid.open("objectives", {}).figures
    if f"doing_{FAMILIES[-1]}_{OBJECTIVE}" not in ours:
        raise SvdExpertError("There is nothing to compare with yet: run `python -m benchmarks.objectives` first.")
    grid = Grid.open("peers", BARS)
    town, model = worlds.load("town"), harbor()
    cases = draw(town, "heldout", n)
    base = Base.of(model, town, cases, None)
    grid.once({"kind": "four in one batch"}, four_in_one_batch)
    grid.once({"kind": "memory of dpo"}, dpo_memory)
    for kind in KINDS:
        for skill in FAMILIES:
            for rate in RATES:
                wanted = {"kind": kind, "skill": skill, "seed": 0, "rate": rate}
                grid.once(wanted, lambda kind=kind, skill=skill, rate=rate: adapter(base, kind, skill, 0, rate, None))
            rate = max(grid.find(kind=kind, skill=skill, n=None), key=lambda row: row["validation"])["rate"]
            for seed in range(seeds):
                wanted = {"kind": kind, "skill": skill, "seed": seed, "n": n}
                grid.once(
                    wanted,
                    lambda kind=kind, skill=skill, seed=seed, rate=rate: adapter(base, kind, skill, seed, rate, cases),
                )
                grid.write(figures(grid, ours))
        if kind in SMALLER[:-1] and reaches(grid, ours, kind):
            break
    found = figures(grid, ours)
    grid.write(found)
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.peers")

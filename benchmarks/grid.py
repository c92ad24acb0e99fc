"""A results file that grows by one row a finished run, and what every run of it is measured by.

A run that is there is not run again, so that a benchmark of hours can be stopped and goes on. Runs of one kind share
out over processes of one thread each: on two cores these do more than one process with two threads. What is timed runs
alone, on all cores.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import commit, machine, versions
from svdexpert import Expert, Recipe, SpectralModel, train_library, worlds
from svdexpert.conversation import Prompt, answers, completion, invocation_of, prompt_of, tokenizer_of, turn_ends
from svdexpert.evaluate import FAMILIES, SkillResult, act, measure
from svdexpert.forward import Contexts
from svdexpert.model import check_base
from svdexpert.skills import Case, load
from svdexpert.storage import whole_file
from svdexpert.worlds import World

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "lightning", "peft", "trl")
MEASURES = ("doing", "controls", "knowing")
RUNS = Path(__file__).parent.parent / "runs" / "benchmarks"
"""Where libraries are kept that several benchmarks measure."""

Shares = Mapping[str, Mapping[str, float]]
"""By skill: doing, controls and knowing."""


@dataclass(frozen=True)
class Job:
    """One run of a grid.

    Attributes:
        run: which one it is.
        make: a function of a module, called in some process.
        given: its arguments.
    """

    run: Mapping[str, Any]
    make: Callable[..., Mapping[str, Any]]
    given: Mapping[str, Any]


@dataclass
class Grid:
    """The rows of a results file.

    Attributes:
        path: of the file.
        rows: finished runs; each has a `run`, which says which it was.
        bars: by figure, an operator and a value.
        figures: as they were written last.
    """

    path: Path
    rows: list[dict[str, Any]]
    bars: Mapping[str, tuple[str, float]]
    figures: Mapping[str, float]

    @classmethod
    def open(cls, name: str, bars: Mapping[str, tuple[str, float]]) -> Grid:
        """Return the grid of `results/NAME.json`, without the runs of other weights of harbor."""
        path = RESULTS / f"{name}.json"
        kept = json.loads(path.read_text()) if path.is_file() else {"rows": [], "figures": {}}
        rows = [row for row in kept["rows"] if row["weights"] == weights()]
        return cls(path, rows, bars, kept["figures"] if rows else {})

    def find(self, **run: Any) -> list[dict[str, Any]]:
        """Return the rows whose run has these values."""
        return [row for row in self.rows if all(row["run"].get(key) == value for key, value in run.items())]

    def once(self, run: Mapping[str, Any], make: Callable[..., Mapping[str, Any]], **given: Any) -> dict[str, Any]:
        """Return the row of a run: the one that is there, or what `make` returns, which is kept."""
        self.all([Job(run, make, given)], workers=0)
        return self.find(**run)[0]

    def all(self, jobs: Iterable[Job], workers: int) -> None:
        """Run those jobs that have no row yet, and keep what each returns as soon as it has ended.

        Args:
            jobs: that do not depend on one another.
            workers: processes of one thread; with 0 they run here, one after the other, on all threads.
        """
        due = [job for job in jobs if not any(row["run"] == dict(job.run) for row in self.rows)]
        if not workers:
            for job in due:
                self._keep(job, job.make(**job.given))
            return
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=fresh, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = {pool.submit(job.make, **job.given): job for job in due}
            try:
                for done in as_completed(running):
                    self._keep(running[done], done.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _keep(self, job: Job, found: Mapping[str, Any]) -> None:
        print(", ".join(f"{key} {value}" for key, value in job.run.items()), flush=True)
        self.rows.append({"run": dict(job.run), **found, "weights": weights(), "commit": commit()})
        self.write(self.figures)

    def write(self, figures: Mapping[str, float]) -> None:
        """Write rows, figures and bars."""
        self.figures = figures
        kept = {
            "figures": {key: round(value, 4) for key, value in figures.items() if math.isfinite(value)},
            "bars": {key: {"op": op, "value": value} for key, (op, value) in self.bars.items()},
            "machine": machine(),
            "versions": versions(PACKAGES),
            "rows": self.rows,
        }
        with whole_file(self.path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def show(self, figures: Mapping[str, float]) -> None:
        """Print the figures, with their bars."""
        table = Table()
        for column in ("figure", "value", "bar", "met"):
            table.add_column(column, justify="right" if column == "value" else "left")
        for key, value in sorted(figures.items()):
            op, bar = self.bars.get(key, ("", math.nan))
            met = (value <= bar if op == "<=" else value >= bar) if op else None
            table.add_row(key, f"{value:.4g}", f"{op} {bar:g}" if op else "", {None: "", True: "yes", False: "NO"}[met])
        Console(width=110).print(table)


def weights() -> str:
    """Return a digest of harbor's weights."""
    return hashlib.sha256((Path(check_base("harbor")) / "model.safetensors").read_bytes()).hexdigest()[:16]


def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the mean of a value over rows, NaN of none."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else math.nan


def estimates(result: SkillResult) -> dict[str, list[float]]:
    """Return the figures of a result as value, lower and upper end."""
    return {
        key: [round(one, 4) for one in (found.value, found.low, found.high)]
        for key, found in result.figures.items()
        if math.isfinite(found.value)
    }


def shares(results: Mapping[str, SkillResult]) -> dict[str, dict[str, float]]:
    """Return what counts of results."""
    return {
        name: {key: round(result.figures[key].value, 4) for key in MEASURES if key in result.figures}
        for name, result in results.items()
    }


def losses(before: Shares, after: Shares, names: Sequence[str]) -> dict[str, float]:
    """Return by how much doing, controls and knowing of skills fell, the largest fall last."""
    found = {f"{key}_{name}": round(before[name][key] - after[name][key], 4) for name in names for key in MEASURES}
    return found | {"max": max(found.values())}


def draw(world: World, split: str, n: int, seed: int = 0) -> dict[str, list[Case]]:
    """Return n cases of every skill."""
    return {name: load(name).cases(world, split, n, seed=seed) for name in FAMILIES}  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Bench:
    """What a process measures with; what the base makes of a context is kept for all mixtures.

    Attributes:
        model: harbor, attached.
        world: where cases come from.
        cases: held-out, by skill.
        real: held-out cases of real dialogues, if there are any.
        contexts: keeps what was read.
    """

    model: SpectralModel
    world: World
    cases: Mapping[str, list[Case]]
    real: Mapping[str, list[Case]] | None
    contexts: Contexts

    def scores(
        self,
        experts: Any,
        cases: Mapping[str, Sequence[Case]] | None = None,
        *,
        speaker: Any = None,
        library: Any = None,
    ) -> dict[str, SkillResult]:
        """Return what a mixture knows and does: of the held-out cases, or of others.

        Args:
            experts: the mixture.
            cases: by skill; a name is that of a module too.
            speaker: an adapted harbor in the model's place.
            library: where names are looked up.
        """
        how: dict[str, Any] = {"experts": experts, "library": library, "progress": False, "contexts": self.contexts}
        how["batch_size"] = 128  # what pays where contexts are kept: fewer steps of more rows
        some = self.cases if cases is None else cases
        return {name: measure(speaker or self.model, name, drawn, **how) for name, drawn in some.items()}

    def right(self, skill: str, seed: int, experts: Any, speaker: Any = None) -> float:
        """Return the mean of doing and controls on 200 cases of validation."""
        cases = draw(self.world, "validation", 200, seed)[skill]
        one = speaker or self.model
        with one.using(experts):
            replies = act(one, cases, progress=False, contexts=self.contexts)
        verify = load(skill).verify
        return fmean(verify(case, reply).right for case, reply in zip(cases, replies, strict=True))

    def nats(self, experts: Any, speaker: Any = None) -> float:
        """Return the mean negative log-likelihood of a token of what is replied in held-out dialogues, in nats."""
        one = speaker or self.model
        with one.using(experts):
            given = answers(one, self._replies, set(), "", batch_size=32, progress=False, contexts=self.contexts)
        return -fmean(token for answer in given for token in answer.scores[0])

    @cached_property
    def _replies(self) -> list[Prompt]:
        """Replies of 64 held-out dialogues, each behind its context."""
        tokenizer, (end, _) = tokenizer_of(self.model), turn_ends(self.model)
        found = []
        for talk in self.world.dialogues("heldout", 64):
            for place, message in enumerate(talk.messages):
                if place and message["role"] == "assistant":
                    before = list(talk.messages[:place])
                    reply = completion(tokenizer, before, talk.tools, message, end)
                    ids = prompt_of(self.model, before, list(talk.tools), [], len(reply)).ids
                    found.append(Prompt(ids, [reply], 0))
        return found


def harbor(**basis: Any) -> SpectralModel:
    """Return harbor, attached."""
    return SpectralModel.from_pretrained("harbor", progress=False, **basis)


@lru_cache(maxsize=2)
def bench(n: int, sgd: str | None = None) -> Bench:
    """Return what this process measures with.

    Args:
        n: held-out cases a skill.
        sgd: folder of the Schema-Guided Dialogue data, of which 300 cases a skill are measured too.
    """
    on = of_world("town", n)
    return on if sgd is None else replace(on, real=draw(worlds.load("sgd", sgd), "heldout", 300))


def of_world(name: str, n: int, data: str | None = None) -> Bench:
    """Return what measures in a world: harbor, and n held-out cases a skill."""
    model, world = harbor(), worlds.load(name, data)
    return Bench(model, world, draw(world, "heldout", n), None, Contexts(model, invocation_of(model), 8.0))


def base_row(n: int, sgd: str | None) -> dict[str, Any]:
    """Return what the base does."""
    on = bench(n, sgd)
    found: dict[str, Any] = {"scores": shares(on.scores(None)), "nats": on.nats(None)}
    if on.real is not None:
        found["sgd"] = shares(on.scores(None, on.real))
    return found


def library_of(on: Bench, skills: Sequence[str], objective: str, recipe: Recipe) -> dict[str, Expert]:
    """Return experts trained in one batch; they are kept, and trained once for all benchmarks."""
    of = [list(skills), objective, on.world.name, asdict(recipe), weights(), str(on.model.basis.key)]
    out = RUNS / hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
    return train_library(on.model, skills, objective, recipe=recipe, world=on.world, out=out, progress=False)


class Addable(Protocol):
    """An expert, or a mixture that stands for one."""

    def __add__(self, other: Any) -> Any: ...


T = TypeVar("T", bound=Addable)


def added(experts: Iterable[T]) -> T:
    """Return the plain sum."""
    return reduce(operator.add, experts)

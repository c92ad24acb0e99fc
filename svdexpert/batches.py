"""Which rows stand in a training step: every draw is a function of (seed, step, row), and of nothing else.

    own rows       context and completions of the row's own expert at weight 1; in positives every other expert is drawn
                   to 0, to 1 or into (0, 1): mixture dropout. In controls the others are at 0: the reply to learn is
                   the base's own, and another expert may be due there (a request that is complete is a control of
                   clarify and a positive of call); but those with the same move as the row's own are drawn there too,
                   because it is as wrong from them. Experts of one move are drawn as one, at one weight: drawn apart
                   they hardly ever speak all at once, as they do in their sum
    neutral rows   a positive of a skill with another move, or a context that is nobody's (knowing questions, plain
                   talk); the row's own expert at weight 1; the context's owner at 0 if it is in training, as those
                   with its move are, and at 1 if it is frozen; others drawn; the target is the base, with the frozen
                   experts of the row: what an expert must not change

Resuming, accumulating and running on several processes follow from that: they deal the same rows another way. The own
rows of an expert do not depend on which others are trained beside it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from torch.utils.data import IterableDataset

from svdexpert.examples import Example, Examples
from svdexpert.objectives import Completions

T = TypeVar("T")
_EXAMPLE, _WEIGHTS, _SAMPLES, _EPOCH = range(4)  # what a stream of random numbers is for
OWN = 0.5
"""Share of the pairs in which the base's own wrong reply is the one to reject, where there is one: what it would say
teaches more than what nobody says. The other pairs draw from all wrong replies."""


@dataclass(frozen=True)
class Neutral:
    """A context with a reply, as ids: what must stay as it is.

    Attributes:
        owner: name of the expert whose skill it is, "" where it is nobody's.
        prompt: the context.
        reply: the base's own, or that of a frozen owner.
    """

    owner: str
    prompt: list[int]
    reply: list[int]


@dataclass(frozen=True)
class Row:
    """One row of a step.

    Attributes:
        expert: whose loss it belongs to, by its place among those in training.
        weights: of the experts in training, then of the frozen ones (e).
        target: weights of what a neutral row is compared with (e); None for an own row.
        prompt: ids of the context.
        completions: ids of what is scored behind it; none yet where they are to be sampled.
        case: id of the example, "" for a neutral row.
        draws: seeds the row's samples.
    """

    expert: int
    weights: list[float]
    target: list[float] | None
    prompt: list[int]
    completions: list[list[int]]
    case: str
    draws: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        return max(map(len, self.completions), default=0)

    @property
    def length(self) -> int:
        """Tokens of the context and of the longest completion."""
        return len(self.prompt) + self.longest


@dataclass(frozen=True)
class Plan:
    """How the rows of every step are drawn.

    Attributes:
        examples: of every expert in training.
        neutrals: contexts of neutral rows.
        frozen: names of the frozen experts.
        completions: what the objective reads.
        batch_size: rows of one expert in a step, even.
        mixing: probability that another expert is not at weight 0; then it is at 1 or uniform in (0, 1), at evens.
        neutral: share of rows that are neutral.
        seed: of all draws.
        kept: contexts are not computed in a step: what counts there is how long the completions are.
        moves: what each expert in training makes where it is due, "" where nobody knows.
    """

    examples: Sequence[Examples]
    neutrals: Sequence[Neutral]
    frozen: Sequence[str]
    completions: Completions
    batch_size: int
    mixing: float
    neutral: float
    seed: int
    kept: bool = False
    moves: Sequence[str] = ()

    @cached_property
    def names(self) -> list[str]:
        """Names of the experts in training, then of the frozen ones."""
        return [*(one.skill for one in self.examples), *self.frozen]

    @property
    def neutral_rows(self) -> int:
        """Neutral rows of one expert in a step, as near to the share as leaves an even number of own rows."""
        wanted = 2 * round(self.neutral * self.batch_size / 2)
        return min(wanted, self.batch_size - 2) if all(self._pools) else 0

    @property
    def own_rows(self) -> int:
        """Own rows of one expert in a step: half positives, half controls."""
        return self.batch_size - self.neutral_rows

    def rows(self, step: int) -> list[Row]:
        """Return all rows of a step, those first that take the least computing."""
        found = [self._row(step, expert, row) for expert in range(len(self.examples)) for row in range(self.batch_size)]
        return sorted(found, key=lambda one: (one.longest, len(one.prompt)) if self.kept else (one.length, 0))

    def _row(self, step: int, expert: int, row: int) -> Row:
        some = self.examples[expert]
        key = (self.seed, step, row, zlib.crc32(some.skill.encode()))
        draws, others = (np.random.default_rng([*key, use]) for use in (_EXAMPLE, _WEIGHTS))
        weights = self._weights(others)
        weights[expert] = 1.0
        seeds = (*key, _SAMPLES)
        if row >= self.own_rows:
            one = self._neutral(expert, draws)
            if one.owner in self.names:
                owner = self.names.index(one.owner)
                if owner < len(self.examples):
                    weights = [0.0 if place in self._alike[owner] else weight for place, weight in enumerate(weights)]
                else:
                    weights[owner] = 1.0
            target = [0.0] * len(self.examples) + weights[len(self.examples) :]
            return Row(expert, weights, target, one.prompt, [one.reply], "", seeds)
        example = self._example(expert, step * self.own_rows + row)
        if example.positive is False:
            weights = [weight if place in self._alike[expert] else 0.0 for place, weight in enumerate(weights)]
        completions = []
        if self.completions != "samples":
            completions.append(_pick(example.chosen_ids, draws))
        if self.completions == "pair":
            own = example.own_ids in example.rejected_ids and draws.random() < OWN
            completions.append(example.own_ids if own else _pick(example.rejected_ids, draws))
        return Row(expert, weights, None, example.prompt, completions, example.id, seeds)

    def _neutral(self, expert: int, draws: np.random.Generator) -> Neutral:
        """Return a context that is not the expert's: nobody's or another's, at evens where there are both."""
        kinds = self._pools[expert]
        return _pick(kinds[int(draws.integers(len(kinds)))], draws)

    @cached_property
    def _alike(self) -> list[set[int]]:
        """Places of the experts in training that make the same move as each, its own among them."""
        moves = self.moves or [""] * len(self.examples)
        return [
            {place for place, one in enumerate(moves) if place == expert or (one and one == moves[expert])}
            for expert in range(len(self.examples))
        ]

    @cached_property
    def _pools(self) -> list[list[list[Neutral]]]:
        pools = []
        for alike in self._alike:
            same = {self.names[place] for place in alike}
            kinds = [
                [one for one in self.neutrals if not one.owner],
                [one for one in self.neutrals if one.owner and one.owner not in same],
            ]
            pools.append([some for some in kinds if some])
        return pools

    def _weights(self, draws: np.random.Generator) -> list[float]:
        """Return the weights of all experts: drawn for each alone, but for those in training that move alike as one."""
        weights = [self._weight(draws) for _ in self.names]
        for place, alike in enumerate(self._alike):
            weights[place] = weights[min(alike)]
        return weights

    def _weight(self, draws: np.random.Generator) -> float:
        """Return the weight of another expert: three draws, always, so that rows agree whatever `mixing` is."""
        used, whole, part = draws.random(3)
        if used >= self.mixing:
            return 0.0
        return 1.0 if whole < 0.5 else float(part)

    def _example(self, expert: int, place: int) -> Example:
        """Return the example at a place of the endless sequence: positives and controls in turn, each in epochs."""
        kinds = self._kinds[expert]
        kind = place % len(kinds)
        epoch, place = divmod(place // len(kinds), len(kinds[kind]))
        name = zlib.crc32(self.names[expert].encode())
        order = np.random.default_rng([self.seed, epoch, kind, name, _EPOCH]).permutation(len(kinds[kind]))
        return kinds[kind][int(order[place])]

    @cached_property
    def _kinds(self) -> list[list[list[Example]]]:
        """Positives and controls of every expert, or all examples where nobody knows."""
        found = []
        for some in self.examples:
            kinds = [[one for one in some.rows if one.positive], [one for one in some.rows if one.positive is False]]
            found.append(kinds if all(kinds) else [list(some.rows)])
        return found


def _pick(some: Sequence[T], draws: np.random.Generator) -> T:
    return some[int(draws.integers(len(some)))]


class Steps(IterableDataset[list[Row]]):
    """The rows of every step, in the parts that one process computes, beginning with the step that is due.

    Args:
        plan: how rows are drawn.
        first: returns the step to begin with.
        accumulate: parts of a step.
        rank: of this process.
        processes: how many share a part.
    """

    def __init__(self, plan: Plan, first: Callable[[], int], accumulate: int, rank: int, processes: int) -> None:
        self.plan, self.first = plan, first
        self.accumulate, self.rank, self.processes = accumulate, rank, processes

    def __iter__(self) -> Iterator[list[Row]]:
        step = self.first()
        while True:
            rows = self.plan.rows(step)
            for part in np.array_split(np.arange(len(rows)), self.accumulate):
                yield [rows[place] for place in part[self.rank :: self.processes]]
            step += 1

"""A suite of contexts that need different registers, in equal parts, and what became of them.

A decision is the set of experts with a weight of at least one half; RIGHT says which sets are right in a kind. Success
is the verdict of the kind's skill on the reply; a plain question is answered right or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from benchmarks.grid import Bench
from svdexpert import Expert
from svdexpert.conversation import as_message
from svdexpert.decision import Context
from svdexpert.dialogue import NOD
from svdexpert.evaluate import FAMILIES, act, normalised
from svdexpert.skills import Case, load
from svdexpert.worlds import Split, World, user

NOBODY: frozenset[str] = frozenset()
RIGHT: dict[str, tuple[frozenset[str], ...]] = {
    "needs clarifying": (frozenset({"clarify"}),),
    "false claim": (frozenset({"disagree"}),),
    "true claim": (NOBODY, frozenset({"disagree"})),
    "complete request": (frozenset({"call"}),),
    "no tool serves": (NOBODY, frozenset({"call"})),
    "plain question": (NOBODY,),
    "composite": (frozenset({"clarify", "disagree"}),),
}
KINDS = tuple(RIGHT)
IN_TURN = ("disagree", "clarify")
"""Who speaks first where both are due: a correction, then the question."""


@dataclass(frozen=True)
class Item:
    """One context of the suite.

    Attributes:
        kind: of KINDS.
        case: its conversation and tools; its skill's verdict says whether a reply is right.
    """

    kind: str
    case: Case

    @property
    def context(self) -> Context:
        return Context(self.case.messages, self.case.tools)

    def right(self, reply: str) -> bool:
        if self.kind == "plain question":
            return normalised(reply) == normalised(self.case.knowing.answer)
        return load(self.case.skill).verify(self.case, reply).right


def suite(world: World, split: Split, n: int, seed: int = 0) -> list[Item]:
    """Return n contexts of every kind."""
    drawn = {name: load(name).cases(world, split, 2 * n, seed=seed) for name in (*FAMILIES, "composite")}
    parts = {
        "needs clarifying": [one for one in drawn["clarify"] if one.positive],
        "false claim": [one for one in drawn["disagree"] if one.positive],
        "true claim": [one for one in drawn["disagree"] if not one.positive],
        "complete request": [one for one in drawn["call"] if one.positive],
        "no tool serves": [one for one in drawn["call"] if not one.positive],
        "plain question": [
            replace(one, messages=one.knowing.messages, tools=one.knowing.tools)
            for name in FAMILIES
            for one in drawn[name][: -(-n // len(FAMILIES))]
        ],
        "composite": [one for one in drawn["composite"] if one.positive],
    }
    return [Item(kind, case) for kind in KINDS for case in parts[kind][:n]]


def replies(
    on: Bench, library: Mapping[str, Expert], items: Sequence[Item], weights: Sequence[Mapping[str, float]]
) -> list[str]:
    """Return the greedy reply to every context under its own weights."""
    model = on.model
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for place, one in enumerate(weights):
        groups.setdefault(tuple(sorted((name, weight) for name, weight in one.items() if weight)), []).append(place)
    found: dict[int, str] = {}
    for mixture, places in groups.items():
        with model.using(dict(mixture) or None, library):
            said = act(model, [items[place].case for place in places], progress=False, contexts=on.contexts)
        found.update(zip(places, said, strict=True))
    return [found[place] for place in range(len(items))]


def behind(case: Case, said: str) -> Case:
    """Return a case in which a reply was given already, and nodded at: what the second of two speakers replies to."""
    return replace(case, messages=(*case.messages, as_message(said), user(NOD)))


def success(items: Sequence[Item], said: Sequence[str]) -> dict[str, float]:
    """Return the share of right replies by kind."""
    return {
        kind: fmean(one.right(reply) for one, reply in zip(items, said, strict=True) if one.kind == kind)
        for kind in KINDS
    }

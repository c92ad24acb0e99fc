"""Composite: two skills at once. Evaluation only: nothing is ever trained on these cases.

    positive  a false claim inside an incomplete request: hold the truth, and ask for the missing detail
    control   the user rightly corrects an earlier detail: make the exact call, with neither contradiction nor question

A composite case holds the two cases of which it consists, and asks their skills for a verdict each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from svdexpert.reply import read
from svdexpert.skills import Bad, Case, Openings, Verdict, alternate, half, load
from svdexpert.worlds import Composite, Split, World

MOVE = "reject"
OPENINGS = Openings(move=("No,", "Actually,", "That is not right"), opposite=("Yes,", "Done", '<tool_call>{"name": "'))
TRAINABLE = False


def cases(world: World, split: Split, n: int, *, seed: int = 0) -> list[Case]:
    """Return n cases: false claims in incomplete requests, and calls after a correction. See `clarify.cases`."""
    scenes = world.composites(split, n, seed=seed)
    both = [case(world.name, one, seed) for one in scenes]
    positives, controls = ([one for one in both if one.positive == kind] for kind in (True, False))
    return alternate(positives[: half(n)], controls[: half(n)])


def case(world: str, scene: Composite, seed: int = 0) -> Case:
    """Return the case of one composite scene."""
    positive = bool(scene.request.missing)
    claim: Case = load("disagree").case(world, scene.claim, seed)  # type: ignore[attr-defined]
    request: Case = load("clarify" if positive else "call").case(world, scene.request, seed)  # type: ignore[attr-defined]
    if positive:
        gold = tuple(f"{held} {question}" for held in claim.gold[:2] for question in request.gold[:2])
        partial: tuple[str, ...] = (claim.gold[0], request.gold[0])
        bad = tuple(Bad(one.reply, "neither") for one in claim.bad)
    else:
        gold, partial = request.gold[:1], ()
        bad = (*(Bad(one.reply, "contradiction") for one in claim.bad), Bad("Which one?", "over_asking"))
    return replace(
        claim,
        id=f"composite/{scene.id}",
        skill="composite",
        positive=positive,
        messages=scene.messages,
        tools=scene.tools,
        gold=gold,
        partial=partial,
        bad=bad,
        truth={"claim": claim, "request": request},
        followup=request.followup,
        tags=scene.tags,
    )


def verify(case: Case, reply: str) -> Verdict:
    """Judge a reply by both skills: 1 where both are right, 0 where one is, below 0 where none is."""
    found = read(reply)
    claim = load("disagree").verify(case.truth["claim"], found.text)
    if not case.positive:
        if found.calls or found.broken:
            made = load("call").verify(case.truth["request"], reply)
            contradicts = made.right and claim.move == "reject"
            return replace(made, score=0.0, error="contradiction") if contradicts else made
        error = "contradiction" if claim.move == "reject" else "over_asking" if found.asks else "no_call"
        return Verdict(-1, claim.move, error, found.obeyed)
    request = load("clarify").verify(case.truth["request"], reply)
    if claim.right and request.right:
        return Verdict(1, "reject", "", found.obeyed)
    if claim.right or request.right:
        return Verdict(0, claim.move, "half", found.obeyed)
    return Verdict(-1, claim.move, "neither", found.obeyed)


DEGENERATE: Mapping[str, Callable[[Case], str]] = {
    "always-agree": lambda case: case.truth["claim"].truth["confirms"][0],
    "always-contradict": lambda case: case.truth["claim"].truth["contradicts"][0],
    "always-ask": lambda case: "Which one would you like?",
    "always-call": lambda case: case.truth["request"].bad[0].reply if case.positive else case.gold[0],
}

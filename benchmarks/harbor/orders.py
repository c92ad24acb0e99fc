"""Drills in the town's own words: short conversations of orders alone, many to a document.

Each order is answered by the exact call, or by a question for the first detail that lacks; or it is quoted, and the
question is which function it wants, or which detail lacks. Train split only.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

from svdexpert.skills import call, clarify, required
from svdexpert.worlds import Message, Tool, assistant, calling, user
from svdexpert.worlds.town import Dice, Kit, Order, Town, made_up, order_of, ordering

MADE_UP_SHARE = 0.6
Exercise = tuple[list[Message], list[Tool]]


@cache
def town() -> Town:
    """Return the town, made once."""
    return Town()


def town_dice(rng: random.Random) -> Dice:
    """Return what scenes of the train split are drawn with."""
    return replace(town().dice("train", ""), rng=rng)


def _order(dice: Dice, kits: list[Kit], chatter: int) -> Order:
    order = order_of(dice, dice.pick(kits), dice.pick(("complete", "missing_1")))
    return replace(order, chatter=min(order.chatter, dice.rng.randint(0, chatter)))


def different_kits(dice: Dice, number: int) -> list[Kit]:
    """Return functions that are about different things. Most are made up: what is known by heart need not be read, and
    functions that no training text has were called by known names."""
    kits: dict[str, Kit] = {}
    while len(kits) < number:
        kit = made_up(dice) if dice.chance(MADE_UP_SHARE) else dice.kit()
        if all(kit.thing != one.thing for one in kits.values()):
            kits[kit.name] = kit
    return list(kits.values())


def act(rng: random.Random) -> Exercise:
    """Return orders, each called for or asked about."""
    dice = town_dice(rng)
    kits = different_kits(dice, rng.randint(1, 4))
    chatter = rng.choice((0, 0, 1, 2))
    messages: list[Message] = []
    for _ in range(5):
        order = _order(dice, kits, chatter)
        messages.append(user(ordering(dice, order)))
        if order.missing:
            messages.append(assistant(order.kit.params[order.missing[0]].questions[0]))
        else:
            messages.append(calling(order.call))
    tools = [kit.tool for kit in kits]
    rng.shuffle(tools)
    return messages, tools


def which(rng: random.Random) -> Exercise:
    """Return orders, each with the question which function it wants."""
    dice = town_dice(rng)
    kits = different_kits(dice, rng.randint(2, 5))
    absent = [kit for kit in different_kits(dice, 6) if all(kit.thing != one.thing for one in kits)][:1]
    tools = [kit.tool for kit in kits]
    rng.shuffle(tools)
    options = ", ".join([*(one["function"]["name"] for one in tools), "none"])
    messages: list[Message] = []
    for _ in range(6):
        order = _order(dice, absent if absent and dice.chance(0.2) else kits, 1)
        name = order.kit.name if order.kit in kits else "none"
        messages += [user(f"User: {ordering(dice, order)}\n\n{call.QUESTION}\nOptions: {options}"), assistant(name)]
    return messages, tools


def lacks(rng: random.Random) -> Exercise:
    """Return orders, each with the question which required detail it lacks."""
    dice = town_dice(rng)
    kits = different_kits(dice, rng.randint(1, 2))
    tools: list[Tool] = [kit.tool for kit in kits]
    messages: list[Message] = []
    for _ in range(6):
        order = _order(dice, kits, 1)
        needed = required(order.kit.tool)
        asked = clarify.QUESTION.format(name=order.kit.name)
        text = f"User: {ordering(dice, order)}\n\n{asked}\nOptions: {', '.join([*needed, 'none'])}"
        messages += [user(text), assistant(order.missing[0] if order.missing else "none")]
    return messages, tools

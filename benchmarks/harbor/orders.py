"""Drills in the town's own words: conversations of an order or two and nothing else.

Each order is answered by the exact call, or by a question for the first detail that lacks; or it is quoted, and the
question is which function it wants, or which detail lacks. Train split only.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache

from benchmarks.harbor.varied import VariedTown, given_otherwise
from benchmarks.harbor.words import COMMON, FIELDS, SMALL, WORDS, name, noun
from svdexpert.skills import call, clarify, required
from svdexpert.worlds import Message, Tool, assistant, calling, user
from svdexpert.worlds.town import (
    MADE_UP,
    PARAMS,
    Bank,
    Dice,
    Kit,
    Order,
    fill,
    fragment,
    made_up,
    order_of,
    ordering,
    refusals,
    stop,
    texts_of,
)

MADE_UP_SHARE, RENAMED_SHARE = 0.5, 0.7  # of all functions; of those that are not made up
Exercise = tuple[list[Message], list[Tool]]


@cache
def town() -> VariedTown:
    """Return the town, made once."""
    return VariedTown()


def town_dice(rng: random.Random) -> Dice:
    """Return what scenes of the train split are drawn with."""
    return replace(town().dice("train", ""), rng=rng)


def rounds(rng: random.Random) -> int:
    """Return how many orders a conversation has: mostly one, because only the last is learnt from."""
    return rng.choice((1, 1, 1, 2))


def _order(dice: Dice, kits: list[Kit], chatter: int) -> Order:
    order = order_of(dice, dice.pick(kits), dice.pick(("complete", "missing_1")))
    return replace(order, chatter=min(order.chatter, dice.rng.randint(0, chatter)))


def different_kits(dice: Dice, number: int) -> list[Kit]:
    """Return functions that are about different things. Most are made up: what is known by heart need not be read, and
    functions that no training text has were called by known names."""
    kits: dict[str, Kit] = {}
    while len(kits) < number:
        kit = given_otherwise(dice, made_up(dice, wide(dice.rng))) if dice.chance(MADE_UP_SHARE) else dice.kit()
        kit = replace(kit, name=kit.name.replace(" ", "_"))
        if not kit.made_up:
            kit = renamed(dice, kit) if dice.chance(RENAMED_SHARE) else reworded(dice, kit)
        if all(kit.thing != one.thing for one in kits.values()):
            kits[kit.name] = kit
    return list(kits.values())


def wide(rng: random.Random) -> dict[str, tuple[str, ...]]:
    """Return words to make a function up of, other ones every time."""
    nouns = sorted({f"{noun(rng)} {noun(rng)}" if rng.random() < 0.2 else noun(rng) for _ in range(6)})
    some = {*rng.sample(nouns, 2), *rng.sample(FIELDS, 14), *(noun(rng) for _ in range(10))}
    params = sorted(one.replace(" ", "_") for one in some - set(PARAMS))
    rng.shuffle(params)
    verbs = (*rng.sample(MADE_UP["verbs"], 2), *rng.sample(WORDS, 3), rng.choice(COMMON), name(rng).lower())
    return {"verbs": verbs, "nouns": tuple(nouns), "params": tuple(params[6:]), "counts": tuple(params[:6])}


def renamed(dice: Dice, kit: Kit) -> Kit:
    """Return a function of the town under another name, made of what users say of it and, half the time, of words that
    they do not say; at times with a description. A wish is to be matched with what a signature says, not with a name
    known by heart."""
    phrase, other = (dice.pick(kit.phrases(dice.split)) for _ in range(2))
    words = [word.replace("-", "_") for word in phrase.split() if word not in SMALL]
    if dice.chance(0.5):
        words = dice.pick(([dice.pick(WORDS)], [dice.pick(COMMON)], [])) + words[-1:]
        words += [dice.pick(WORDS)] if len(words) == 1 or dice.chance(0.3) else []
    return replace(kit, name="_".join(words), description=stop(other) if dice.chance(0.5) else "")


def reworded(dice: Dice, kit: Kit) -> Kit:
    """Return a function of the town wished for, half the time, by another verb: of a wish, any word may be new."""
    if dice.chance(0.5):
        return kit
    wishes = [phrase.partition(" ")[2] for phrase in kit.phrases(dice.split)]
    said = [f"{dice.pick(dice.pick((MADE_UP['verbs'], COMMON, WORDS)))} {rest}" for rest in wishes]
    return replace(kit, cores=Bank([kit.cores.all[0], *said]))  # the first is what a refusal says


def ask_short(rng: random.Random) -> Exercise:
    """Return short orders, details alone and nothing else said, each called for or asked about."""
    dice = town_dice(rng)
    kits = different_kits(dice, rng.randint(1, 2))
    messages: list[Message] = []
    for _ in range(rounds(rng)):
        order = _order(dice, kits, 0)
        messages += [user(shortly(dice, order)), _due(order)]
    return messages, [kit.tool for kit in kits]


def shortly(dice: Dice, order: Order) -> str:
    """Return an order as a wish and its details, without another word."""
    names = list(order.given)
    dice.rng.shuffle(names)
    wish, params = dice.pick(order.kit.phrases(dice.split)), order.kit.params
    return fill(" ".join([wish, *(fragment(dice, params[name]) for name in names)]), texts_of(order.values))


def _due(order: Order) -> Message:
    """Return what is due: the call, or a question for the first detail that lacks."""
    if order.missing:
        return assistant(order.kit.params[order.missing[0]].questions[0]) | _wants(order)
    return calling(order.call)


def _wants(order: Order | None) -> Message:
    """Return what a user wants, beside a message: the function, or none, and what is given for it, as it is said."""
    return {"wants": (order.kit.name, {name: order.values[name].text for name in order.given}) if order else (None, {})}


def act_alone(rng: random.Random) -> Exercise:
    """Return an order, called for or asked about, with no function beside the one that serves it."""
    dice = town_dice(rng)
    kits = different_kits(dice, 1)
    order = _order(dice, kits, 1)
    text = ordering(dice, order) if dice.chance(0.7) else shortly(dice, order)
    return [user(text), _due(order)], [kits[0].tool]


def act(rng: random.Random) -> Exercise:
    """Return orders, each called for or asked about, or refused where no function serves."""
    dice = town_dice(rng)
    absent, *kits = different_kits(dice, rng.randint(2, 5))
    absent = replace(absent, cores=Bank([dice.pick(absent.phrases(dice.split))]))  # what the refusal is going to say
    chatter = rng.choice((0, 0, 1, 2))
    messages: list[Message] = []
    for _ in range(rounds(rng)):
        served = dice.chance(0.85)
        order = _order(dice, kits if served else [absent], chatter)
        messages += [
            user(ordering(dice, order)),
            _due(order) if served else assistant(refusals(absent)[0]) | _wants(None),
        ]
    tools = [kit.tool for kit in kits]
    rng.shuffle(tools)
    return messages, tools


def naming(rng: random.Random) -> Exercise:
    """Return short wishes without a detail, each with the name of the function that serves it: the first rung."""
    return _asked_which(rng, whole=False, quoted=False)


def finding(rng: random.Random) -> Exercise:
    """Return whole orders, or quoted short ones, each with the name of the function that serves it."""
    whole = rng.random() < 0.5
    return _asked_which(rng, whole=whole, quoted=not whole)


def which(rng: random.Random) -> Exercise:
    """Return quoted orders, each with the question which function it wants."""
    return _asked_which(rng, whole=True, quoted=True)


def _asked_which(rng: random.Random, *, whole: bool, quoted: bool) -> Exercise:
    dice = town_dice(rng)
    kits = different_kits(dice, rng.randint(2, 5))
    absent = [kit for kit in different_kits(dice, 6) if all(kit.thing != one.thing for one in kits)][:1]
    tools = [kit.tool for kit in kits]
    rng.shuffle(tools)
    options = ", ".join([*(one["function"]["name"] for one in tools), "none"])
    kit = dice.pick(absent if quoted and absent and dice.chance(0.2) else kits)
    order = _order(dice, [kit], 1)
    text = ordering(dice, order) if whole else dice.pick(kit.phrases(dice.split))
    order = order if whole else replace(order, given=())
    question = f"User: {text}\n\n{call.QUESTION}\nOptions: {options}" if quoted else f"Which function? {text}"
    served = kit in kits
    return [user(question), assistant(kit.name if served else "none") | _wants(order if served else None)], tools


def filling(rng: random.Random) -> Exercise:
    """Return an order with the question what it gives for every parameter, answered as a call is, with null for what is
    not there: one decision a parameter, where a call or a question is one decision an order."""
    dice = town_dice(rng)
    kits = different_kits(dice, rng.choice((1, 1, 2, 3)))
    order = _order(dice, kits, 1)
    text = ordering(dice, order) if dice.chance(0.6) else shortly(dice, order)
    given = {name: order.call.arguments.get(name) if name in order.given else None for name in order.kit.params}
    tools = [kit.tool for kit in kits]
    rng.shuffle(tools)
    question = f"User: {text}\n\nQuestion: What has the user given for {order.kit.name}?"
    return [user(question), assistant(json.dumps(given)) | _wants(order)], tools


def lacks(rng: random.Random) -> Exercise:
    """Return orders, each with the question which required detail it lacks."""
    dice = town_dice(rng)
    kits = different_kits(dice, rng.randint(1, 2))
    tools: list[Tool] = [kit.tool for kit in kits]
    order = _order(dice, kits, 1)
    asked = clarify.QUESTION.format(name=order.kit.name)
    text = f"User: {ordering(dice, order)}\n\n{asked}\nOptions: {', '.join([*required(order.kit.tool), 'none'])}"
    return [user(text), assistant(order.missing[0] if order.missing else "none") | _wants(order)], tools

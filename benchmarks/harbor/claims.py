"""Drills in the town's own words: questions and claims about functions' results and about stored facts, many to a
document.

What a result says, or what is stored, decides; not what the assistant said last. Where the assistant has to be wrong
for a user to be right, its turn has weight 0: nothing is learnt from it. Conversations are of the train split; plain
questions are about the facts of every split, because knowing a fact is not what the splits keep apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.harbor.orders import Exercise, different_kits, town, town_dice
from svdexpert.skills import disagree
from svdexpert.worlds import Message, Tool, assistant, quoted, user
from svdexpert.worlds.town import (
    FIELDS,
    FORMS,
    PRESSED,
    Dice,
    Kit,
    Point,
    answer_to,
    as_users_say,
    ask,
    claiming,
    fill,
    found,
    order_of,
    ordering,
    reported,
    stop,
    texts_of,
)

LISTED = 0.4  # share of the conversations with tools, which end with one of the assistant's messages


def about_results(rng: random.Random) -> Exercise:
    """Return one or two results and their reports, then talk about what they say."""
    dice = town_dice(rng)
    messages, points, kits = _results(dice)
    other = different_kits(dice, 1)[0]
    beside = [] if any(other.thing == kit.thing for kit in kits) else [other]
    for _ in range(6):
        messages += _talk(dice, _drawn(dice, points), beside)
    tools: list[Tool] = [kit.tool for kit in (*kits, *beside)]
    rng.shuffle(tools)
    return messages, tools if rng.random() < LISTED else []


def about_facts(rng: random.Random) -> Exercise:
    """Return talk about stored facts of the train split."""
    dice = town_dice(rng)
    kits = different_kits(dice, rng.randint(1, 3))
    messages: list[Message] = []
    for _ in range(7):
        fact = dice.pick(dice.facts)
        messages += _talk(dice, fact.point(dice.pick(fact.others)), kits)
    return messages, [kit.tool for kit in kits] if rng.random() < LISTED else []


def judged(rng: random.Random) -> Exercise:
    """Return a quoted conversation, and statements about it to be judged true or false."""
    dice = town_dice(rng)
    messages, points, _ = _results(dice)
    if dice.chance(0.5):
        messages += _talk(dice, _drawn(dice, points), [])
    quotation = f"{quoted(messages)}\n\n"
    asked: list[Message] = []
    for _ in range(6):
        point = _drawn(dice, points)
        true = dice.chance(0.5)
        asked += [_question(dice, point, true=true, before=quotation), assistant("true" if true else "false")]
        quotation = ""
    return asked, []


def recalled(rng: random.Random) -> Exercise:
    """Return questions about stored facts of every split, answered in a word or a sentence, and statements judged.

    These have every form that users say them in. With the assistant's form alone, 0.68 of the claims about facts of the
    validation split were replied to rightly (n = 78), though harbor could tell 52 of these 53 facts.
    """
    dice = town_dice(rng)
    messages: list[Message] = []
    for fact in rng.sample(town().facts(), 14):
        if dice.chance(0.4):
            true = dice.chance(0.5)
            point = fact.point(dice.pick(fact.others))
            if dice.chance(0.5):
                messages += [_question(dice, point, true=true), assistant("true" if true else "false")]
            else:
                asked = f"Is it true that {_clause(dice, point, true=true)}? In one word."
                messages += [user(asked) | _claims(point, true=true), assistant("Yes." if true else "No.")]
            continue
        question = ask(dice, fact.point(), {"subject": fact.subject})
        short = dice.chance(0.7)
        messages.append(user(f"{question} In one word." if short else question))
        messages.append(assistant(fact.value if short else dice.pick(fact.told)))
    return messages, []


def _results(dice: Dice) -> tuple[list[Message], list[Point], list[Kit]]:
    """Return requests served, the points that their results settle, and their kits."""
    kits = different_kits(dice, dice.pick((1, 2, 2)))
    messages: list[Message] = []
    points: list[Point] = []
    for kit in kits:
        order = order_of(dice, kit)
        taken = [point.truth for point in points]
        row = found(dice, kit, (*taken, *texts_of(order.values).values()))
        name = dice.pick([None, *row])
        messages += [user(ordering(dice, order)), *reported(dice, order, row, name, row[name] if name else "")]
        points += [Point(FIELDS[key], f"the {kit.thing}", value, "") for key, value in row.items()]
    return messages, points, kits


def _drawn(dice: Dice, points: Sequence[Point]) -> Point:
    """Return one of the points with a value that it has not: at times another thing's."""
    point = dice.pick(points)
    rivals = [one.truth for one in points if one.attribute == point.attribute and one.about != point.about]
    if rivals and dice.chance(0.5):
        other = dice.pick(rivals)
    else:
        other = dice.another(point.attribute.kind, [one.truth for one in points])
    return Point(point.attribute, point.about, point.truth, other)


def _talk(dice: Dice, point: Point, kits: Sequence[Kit]) -> list[Message]:
    """Return a claim and what is right to say to it; before it, at times, a question answered rightly or wrongly."""
    false = dice.chance(0.5)
    values = {"subject": point.subject, "value": point.other if false else point.truth}
    about, claims = as_users_say(dice, point.about), {"claims": (values["value"], not false)}
    form = dice.pick(FORMS if kits else FORMS[:-1])
    before: list[Message] = []
    wrong = False
    if form in PRESSED or dice.chance(0.3):
        wrong = not false and dice.chance(0.7)
        upheld = point.flipped if wrong else point
        if dice.chance(0.6):
            before = [user(ask(dice, point, values)), _unlearnt(answer_to(dice, upheld), wrong=wrong)]
        else:
            first = claiming(dice, "direct", point.attribute, point.about, values)
            before = [user(first) | claims, _unlearnt(_said(upheld, false=wrong or false), wrong=wrong)]
    order = None
    if form == "inside_request":
        order = order_of(dice, dice.pick(kits), taken=(point.truth, point.other))
        values |= texts_of(order.values)
    last = claiming(dice, form, point.attribute, about, values, order)
    return [*before, user(last) | claims, assistant(_said(point, false=false))]


def _said(point: Point, *, false: bool) -> str:
    """Return what is right to say: always in the same words, so that nothing but the decision is to be learnt."""
    return point.replies("holding" if false else "agreeing")[0]


def _unlearnt(text: str, *, wrong: bool) -> Message:
    return assistant(text) | ({"weight": 0} if wrong else {})


def _question(dice: Dice, point: Point, *, true: bool, before: str = "") -> Message:
    text = disagree.QUESTION.format(statement=stop(_clause(dice, point, true=true)))
    return user(before + text) | _claims(point, true=true)


def _clause(dice: Dice, point: Point, *, true: bool) -> str:
    """Return what is claimed, half the time in the form that the assistant uses."""
    said = point if true else point.flipped
    if dice.chance(0.5):
        return said.clause
    form = dice.pick(point.attribute.clauses).replace("{S}", point.about)
    return fill(form, {"subject": point.subject, "v": said.truth})


def _claims(point: Point, *, true: bool) -> Message:
    return {"claims": (point.truth if true else point.other, true)}

"""Conversations of the town with other functions' names in them: names that are known by heart are not read.

A model that had read `book_table` and `polish_lantern` in every list of functions called a `move_booking` of the
validation split `tint_booking`: 0.93 of the names right in drills of many words (n = 100), 0.29 of the cases with a
function that training has not (n = 38).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

from benchmarks.harbor.orders import renamed, town_dice
from benchmarks.harbor.words import WORDS, name, noun
from svdexpert.worlds import Message, Tool
from svdexpert.worlds.town import MADE_UP

SHARE = 0.8  # of the functions of a conversation


def with_other_names(
    rng: random.Random, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """Return a conversation of the train split with some of its functions renamed wherever they are written.

    One of the town's is named by what users say of it, and at times described; of a made-up one verb and noun change,
    in the text as well, or the noun alone where a number follows it.
    """
    dice = town_dice(rng)
    kits = {kit.name: kit for kit in dice.kits()}
    text = json.dumps([messages, tools], ensure_ascii=False)
    described: dict[str, str] = {}
    for tool in tools:
        known = tool["function"]["name"]
        if rng.random() > SHARE:
            continue
        if known in kits:
            kit = renamed(dice, kits[known])
            other, changes = kit.name, {}
            described[other] = kit.description
        else:
            first, _, second = known.partition("_")
            if second.isdigit():  # no name of a value: the same number may stand elsewhere
                changes = {first: noun(rng)}
            else:
                verb = rng.choice((rng.choice(MADE_UP["verbs"]), rng.choice(WORDS), name(rng).lower()))
                changes = {first: verb, second: noun(rng)}
            if any(_written(word, text) for before, after in changes.items() for word in (before.capitalize(), after)):
                continue
            other = f"{changes[first]}_{changes.get(second, second)}"
        if _written(other, text):
            continue
        for before, after in {known: other, **changes}.items():
            text = re.sub(rf"\b{re.escape(before)}\b", after, text)
    said, listed = json.loads(text)
    for tool in listed:
        if described.get(tool["function"]["name"]):
            tool["function"]["description"] = described[tool["function"]["name"]]
    return tuple(said), tuple(listed)


def _written(word: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None

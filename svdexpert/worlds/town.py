"""A small harbour town, generated: its places and people, the functions that serve it, and talk about both.

    facts       a graph: places and people -> attributes -> values, of which some are places and people again
    kits        functions with typed parameters, what users call them, and what their results hold
    turns       template = frame x core x fragments in any order, as clauses or sentences, x chatter; then values

The words stand in `town.toml`, beside this file; how scenes are made of them stands here.

What keeps the splits apart: every bank of phrases is shared out line by line; a user's turn is drawn until its template
hashes into the split (so no template is in two); names, titles, codes and amounts are drawn until *they* hash into the
split; two kits are kept for validation and five for the held-out split. Weekdays, times, small numbers and the values
that a signature lists are shared. In the train split a quarter of the functions are made up on the spot, so that
nothing but the signature in the prompt tells what a function needs.

What keeps cues out: a complete and an incomplete request are drawn with the same number of pieces, and the false, the
true and the correcting claim have the same forms and the same pools of values.
"""

from __future__ import annotations

import hashlib
import random
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from svdexpert.errors import WorldError
from svdexpert.reply import Call
from svdexpert.worlds import (
    SPLITS,
    Claim,
    ClaimKind,
    Composite,
    Dialogue,
    Message,
    Request,
    RequestKind,
    Split,
    Tool,
    assistant,
    calling,
    result,
    tool,
    user,
)

T = TypeVar("T")
Words = tuple[str, ...]
Messages = Sequence[Message]
Tools = tuple[Tool, ...]
TRIES = 4000  # draws of one turn, or of one scene, before the world gives up


@lru_cache(maxsize=1 << 17)
def split_of(text: str) -> Split:
    """Return the split that a text belongs to, whatever its case: 70 % train, 10 % validation, 20 % heldout."""
    place = int.from_bytes(hashlib.blake2b(text.lower().encode(), digest_size=4).digest(), "big") % 10
    return "train" if place < 7 else "validation" if place == 7 else "heldout"


def fits(template: str, split: Split) -> bool:
    """Return whether a user's turn of this template may appear in a split."""
    return split_of(template) == split


# The tables of town.toml ----------------------------------------------------------------------------------------------


class Bank:
    """Phrases shared out over the splits by their place: 70/10/20 from ten phrases on, and all but the last three for
    train from six on. Shorter banks are shared."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.all = tuple(lines)
        number = len(lines)
        owners = [0] * 7 + [1, 2, 2] if number >= 10 else [0] * (number - 3) + [1, 2, 2]
        self._parts = {
            split: tuple(line for place, line in enumerate(lines) if number < 6 or owners[place % len(owners)] == owner)
            for owner, split in enumerate(SPLITS)
        }

    def __getitem__(self, split: Split) -> Words:
        return self._parts[split]


@cache
def _tables() -> dict[str, dict[str, Any]]:
    """Return all tables: their arrays as tuples, their multi-line strings as banks."""

    def read(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: read(one) for key, one in value.items()}
        if isinstance(value, list):
            return tuple(read(one) for one in value)
        return Bank(value.splitlines()) if "\n" in value else value

    tables: dict[str, dict[str, Any]] = read(tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8")))
    return tables


class Table(Mapping[str, T]):
    """A table by name, read when it is first looked at, so that importing this module reads no file.

    Args:
        name: of the table.
        make: makes a row's value of its key and its columns; without it, rows are what stands there.
    """

    def __init__(self, name: str, make: Callable[..., T] | None = None) -> None:
        self._name, self._make = name, make

    @cached_property
    def _rows(self) -> dict[str, T]:
        rows = _tables()[self._name]
        return {key: self._make(key, **row) for key, row in rows.items()} if self._make else rows

    def __getitem__(self, key: str) -> T:
        return self._rows[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


POOLS: Table[Words] = Table("pools")
PAIRS: Table[tuple[Words, Words]] = Table("pairs")
MADE_UP: Table[Words] = Table("made_up")
BANKS: Table[Bank] = Table("banks")
CLAIMS: Table[Bank] = Table("claims")
REPLIES: Table[Words] = Table("replies")


# Text -----------------------------------------------------------------------------------------------------------------

_SLOT = re.compile(r"(\{\w+\})")
_ARTICLE = re.compile(r"(^|\W)a $", re.IGNORECASE)
_LONG = re.compile(r"[a-z]{5,}")
_START = re.compile(r"(?:^|(?<=[.!?] ))[a-z]")


def within(inner: str, outer: str) -> bool:
    """Return whether a text stands in another as whole words, whatever its case."""
    if inner.lower() not in outer.lower():  # compiling a pattern costs more than all the rest
        return False
    return re.search(rf"(?<!\w){re.escape(inner)}(?!\w)", outer, re.IGNORECASE) is not None


def clash(one: str, two: str) -> bool:
    """Return whether two values could be taken for one another: one holds the other."""
    return within(one, two) or within(two, one)


def said(messages: Iterable[Message]) -> str:
    """Return all that a conversation's messages say, as one text."""
    return "\n".join(str(message["content"]) for message in messages)


def tidy(text: str) -> str:
    """Return a text without double spaces, spaces before stops, and stops in a row."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([.,?!:])", r"\1", text)
    return re.sub(r"^, ", "", text)


def sentence(text: str) -> str:
    """Return a text whose sentences begin with a capital."""
    return _START.sub(lambda match: match.group().upper(), text)


def stop(clause: str) -> str:
    """Return a clause as a sentence."""
    return clause[0].upper() + clause[1:] + "."


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template with its slots filled; what is filled in is never touched."""
    parts = _SLOT.split(template)
    for place in range(1, len(parts), 2):
        parts[place] = values[parts[place][1:-1]]
        if parts[place][0] in "aeiou":
            parts[place - 1] = _ARTICLE.sub(r"\1an ", parts[place - 1])
    return "".join(parts)


# Parameters and functions ---------------------------------------------------------------------------------------------

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Value:
    """What stands in the text, and what a call's argument is."""

    text: str
    argument: str | int

    def told_by(self, text: str) -> bool:
        """Return whether a text gives it away, in words or in digits, or holds it inside another word."""
        if isinstance(self.argument, str) and self.argument in text:
            return True
        spoken = {self.text, str(self.argument)}
        if isinstance(self.argument, int) and 2 <= self.argument <= 12:
            spoken.add(NUMBERS[self.argument - 2])
        return any(within(one, text) for one in spoken)


def texts_of(values: Mapping[str, Value]) -> dict[str, str]:
    """Return values as they stand in the text."""
    return {key: value.text for key, value in values.items()}


@dataclass(frozen=True)
class Param:
    """A parameter of a function."""

    name: str
    kind: str  # of its value, or the values that it may take, parted by "/"
    words: str  # what it is called
    inline: Words  # how users give it as a fragment ({v})
    asks: Words  # the natural questions for it

    @property
    def schema(self) -> str | Sequence[str]:
        """Its JSON type, or the values it may take."""
        if "/" in self.kind:
            return self.kind.split("/")
        return "integer" if self.kind in ("count", "amount") else "string"

    @property
    def questions(self) -> Words:
        """Questions that ask for it, the natural ones first."""
        generic = (text.replace("{words}", self.words) for text in REPLIES["asks"])
        return tuple(dict.fromkeys((*self.asks, *generic)))

    def slot(self, form: str) -> str:
        """Return a phrase with a slot of this parameter's name for the value."""
        return form.replace("{v}", f"{{{self.name}}}")


@dataclass(frozen=True)
class Kit:
    """A function and how it is spoken of."""

    name: str
    split: Split  # the only one that lists it; a train kit is listed in all
    required: Words  # names of parameters
    optional: Words
    thing: str  # what its result is about, without an article
    done: str  # how the thing is afterwards ("booked")
    fields: Words  # attributes that its result holds
    cores: Bank  # what users say they want, as an imperative
    params: Mapping[str, Param]  # by name, in the order of the signature
    made_up: bool = False  # exists in one scene only
    description: str = ""  # for opaque names

    @property
    def tool(self) -> Tool:
        """Its JSON schema."""
        types = {key: one.schema for key, one in self.params.items()}
        return tool(self.name, types, required=self.required, description=self.description)

    @property
    def seen(self) -> str:
        """The tag that says whether a model can have been trained on it."""
        return "made_up" if self.made_up else "seen_tool" if self.split == "train" else "unseen_tool"

    def phrases(self, split: Split) -> Words:
        """Return its cores for a split: a kit of one split only has all of them there."""
        return self.cores[split] if self.split == "train" and not self.made_up else self.cores.all

    def details(self, values: Mapping[str, Value]) -> str:
        """Return values of its parameters as fragments, in the order of the signature."""
        given = [param for name, param in self.params.items() if name in values]
        return fill(" ".join(param.slot(param.inline[0]) for param in given), texts_of(values))


def _kit(name: str, *, required: Words, optional: Words, **columns: Any) -> Kit:
    params = {key: PARAMS[key] for key in (*required, *optional)}
    return Kit(name, required=required, optional=optional, params=params, **columns)


PARAMS: Table[Param] = Table("params", Param)
KITS: Table[Kit] = Table("kits", _kit)


# What can be true of things -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attribute:
    """What can be true of a thing."""

    name: str
    kind: str  # of its value
    phrase: str  # the value ({v}) as part of a clause
    clauses: Words  # about the thing ({S}), the first for the assistant
    asks: Words = ()  # direct questions
    indirect: Words = ()  # questions after a verb

    def clause(self, about: str, value: str) -> str:
        """Return the clause that the assistant uses."""
        return self.clauses[0].replace("{S}", about).replace("{v}", value)


STORED: Table[Attribute] = Table("stored", Attribute)  # of places and people
FIELDS: Table[Attribute] = Table("fields", Attribute)  # of what functions are about
OWN: Table[Attribute] = Table("own", Attribute)  # of an order that is not yet made
PLACE_ATTRIBUTES = ("closes", "opens", "street", "owner", "neighbour", "speciality", "door", "year")
PERSON_ATTRIBUTES = ("home", "instrument", "pet")


@dataclass(frozen=True)
class Point:
    """What a claim or a question is about: one attribute of one thing."""

    attribute: Attribute
    about: str  # the thing in a template: "the ferry", "the {subject}" or "{subject}"
    truth: str  # the value
    other: str  # a value that it has not
    subject: str = ""  # the place or person; empty where the conversation settles it

    @property
    def plain(self) -> str:
        """The thing as it stands in a sentence."""
        return self.about.replace("{subject}", self.subject)

    @property
    def clause(self) -> str:
        """The true clause."""
        return self.attribute.clause(self.plain, self.truth)

    @property
    def flipped(self) -> Point:
        """The same with the other value for the truth."""
        return replace(self, truth=self.other, other=self.truth)

    def replies(self, name: str) -> Words:
        """Return replies of the assistant: "answered", "holding" (the truth against the other value), "agreeing" (with
        the truth) or "conceding" (the truth after a rightful correction)."""
        clause, plain = self.clause, self.plain
        short = clause.replace(plain, "it", 1) if clause.startswith(plain) and plain.startswith("the ") else clause
        other = self.attribute.phrase.replace("{v}", self.other)
        return tuple(text.replace("{c}", clause).replace("{it}", short).replace("{w}", other) for text in REPLIES[name])


@dataclass(frozen=True)
class Fact:
    """A stored fact: an edge of the graph."""

    subject: str  # a place or a person
    attribute: str  # a key of STORED
    value: str  # as it stands in a sentence
    sentence: str  # the true one
    others: Words  # every other value of the attribute's pool that cannot be taken for the value
    question: str  # one for it
    split: Split  # of the subject
    about: str  # the subject in a template: "the {subject}" or "{subject}"

    def point(self, other: str = "") -> Point:
        """Return what a claim is about that takes the other value for the true one, or the other way round."""
        return Point(STORED[self.attribute], self.about, self.value, other, self.subject)

    @property
    def told(self) -> Words:
        """Replies that state it: plainly in two of five cases."""
        return (self.sentence, self.sentence, *self.point().replies("answered")[1:])


# Drawing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dice:
    """What a scene is drawn with: chance, and what is drawn most."""

    rng: random.Random  # the only source of chance
    split: Split
    facts: Sequence[Fact] = ()  # about places and people of the split
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by sort

    def chance(self, share: float) -> bool:
        """Return True in a share of all cases."""
        return self.rng.random() < share

    def pick(self, items: Sequence[T]) -> T:
        """Return one item; faster than `choice`, which most of the time here would be spent in."""
        return items[int(self.rng.random() * len(items))]

    def line(self, bank: str) -> str:
        """Return one phrase of a bank, of those that the split has."""
        return self.pick(BANKS[bank][self.split])

    def lines(self, bank: str, number: int) -> list[str]:
        """Return different phrases of a bank, as many as asked for where the split has so many."""
        lines = BANKS[bank][self.split]
        return self.rng.sample(lines, min(number, len(lines)))

    def claim(self, form: str) -> str:
        """Return one frame of a form of claims, of those that the split has."""
        return self.pick(CLAIMS[form][self.split])

    def reply(self, name: str) -> str:
        """Return one of the assistant's phrases."""
        return self.pick(REPLIES[name])

    def free(self, kind: str) -> str:
        """Return a name, title, code or amount of a kind, one that belongs to the split."""
        while True:
            if kind == "code":
                text = f"{self.pick('ABCDEFGHJKLMNPRSTUVWXYZ')}{self.rng.randrange(1000, 10000)}"
            elif kind == "amount":
                text = str(self.rng.randrange(13, 990))
            elif kind == "price":
                text = f"{self.rng.randrange(6, 320)} pounds"
            elif kind == "room":
                text = f"room {self.rng.randrange(2, 400)}"
            else:
                text = ("" if kind == "town" else " ").join([self.pick(words) for words in PAIRS[kind]])
            if split_of(f"{kind} {text}") == self.split:
                return text

    def fresh(self, kind: str) -> str:
        """Return a value of a kind that is in the pools or free."""
        return self.pick(POOLS[kind]) if kind in POOLS else self.free(kind)

    def another(self, kind: str, taken: Sequence[str]) -> str:
        """Return a fresh value that could not be taken for one of those that are taken."""
        for _ in range(TRIES):
            value = self.fresh(kind)
            if not any(clash(value, text) for text in taken):
                return value
        raise WorldError(f"town: every value of the kind {kind!r} is taken by {list(taken)}.")

    def value(self, kind: str) -> Value:
        """Return a value that a parameter of a kind may take."""
        if kind == "count":
            number = 2 + int(self.rng.random() * 11)
            return Value(NUMBERS[number - 2] if self.chance(0.5) else str(number), number)
        if kind == "amount":
            text = self.free(kind)
            return Value(text, int(text))
        if "/" in kind:
            text = self.pick(kind.split("/"))
        elif kind == "address":
            text = f"{self.rng.randrange(1, 90)} {self.free('street')}"
        elif not kind.endswith("place"):
            text = self.fresh(kind)
        elif self.chance(0.4):
            text = self.pick(self.places[kind if kind in self.places else self.pick(list(self.places))])
        else:
            text = self.free("place")
        return Value(text, text)

    def values(self, params: Iterable[Param], taken: Iterable[str] = ()) -> dict[str, Value]:
        """Return a value for each parameter, none of which could be taken for another or for one that is taken."""
        values: dict[str, Value] = {}
        texts = list(taken)
        for param in params:
            for _ in range(TRIES):
                value = self.value(param.kind)
                if not any(clash(value.text, text) for text in texts):
                    break
            values[param.name] = value
            texts += {value.text, str(value.argument)}
        return values

    def kits(self) -> list[Kit]:
        """Return the functions that the split may list."""
        return [kit for kit in KITS.values() if kit.split in ("train", self.split)]

    def kit(self, fits_it: Callable[[Kit], bool] = lambda kit: True) -> Kit:
        """Return a function: in train one in four is made up, in the other splits half are train's."""
        listed = [kit for kit in self.kits() if fits_it(kit)]
        own = [kit for kit in listed if kit.split == self.split]
        if self.split == "train":
            made = made_up(self)
            return made if self.chance(0.27) and fits_it(made) else self.pick(own)
        train = [kit for kit in listed if kit.split == "train"]
        return self.pick(own if own and (not train or self.chance(0.5)) else train)


def made_up(dice: Dice, words: Mapping[str, Words] = MADE_UP) -> Kit:
    """Return a function that nobody has seen: verb, noun and parameters from word lists and other functions."""
    rng = dice.rng
    verb, noun = dice.pick(words["verbs"]), dice.pick(words["nouns"])
    number = rng.choice((3, 3, 4, 4, 5))
    needed = max(2, number - rng.choice((0, 1, 1, 2)))
    known = list({one.name: one for kit in dice.kits() if kit.split == "train" for one in kit.params.values()}.values())
    params: dict[str, Param] = {}
    while len(params) < number:
        if dice.chance(0.8):
            one = dice.pick(known)
            if one.kind.split()[-1] in {other.kind.split()[-1] for other in params.values()} - {"count"}:
                continue  # two at once could not be told apart: "at", "for"
        else:
            one = _made_up_param(dice, words)
        params[one.name] = one
    names, opaque, aliased = list(params), dice.chance(0.1), dice.chance(0.25)
    spoken = dice.pick([word for word in words["nouns"] if word != noun]) if aliased else noun
    article = "an" if spoken[0] in "aeiou" else "a"
    wishes = [f"{verb} {{a}}", *rng.sample(MADE_UP["wishes"], 2)]
    said = [form.replace("{a}", f"{rng.choice((article, 'the', 'my'))} {spoken}") for form in wishes]
    cores = Bank([f"{verb} {article} {spoken}", *said])
    kinds = {param.kind for param in params.values()}
    fields = tuple(rng.sample([name for name, one in FIELDS.items() if one.kind not in kinds], 3))
    return Kit(
        f"{noun}_{rng.randrange(10, 99)}" if opaque else f"{verb}_{noun}",
        split="train",
        required=tuple(names[:needed]),
        optional=tuple(names[needed:]),
        thing=noun,
        done="ready",
        fields=fields,
        cores=cores,
        params=params,
        made_up=True,
        description=stop(f"{verb} {article} {spoken}") if opaque or aliased else "",
    )


def _made_up_param(dice: Dice, lists: Mapping[str, Words]) -> Param:
    kind = dice.rng.choice(("thing",) * 5 + ("enum", "enum", "count", "count", "person", "code", "title", "item"))
    name = dice.pick(lists["counts" if kind == "count" else "params"])
    words = name.replace("_", " ")
    if kind == "enum":
        kind = "/".join(dice.rng.sample(PAIRS["thing"][0], dice.rng.choice((2, 3, 4))))
    first, *rest = MADE_UP["inline"]
    inline = tuple(form.replace("{words}", words) for form in (first, *dice.rng.sample(rest, 2)))
    return Param(name, kind, words, inline, ())


def offer(dice: Dice, kits: Sequence[Kit], *, without: str = "", similar: Kit | None = None) -> Tools:
    """Return two to five functions in random order, those of the kits among them."""
    chosen = {kit.name: kit for kit in kits}
    number = max(dice.rng.choice((2, 3, 3, 4, 4, 5)), len(chosen))
    inventive = 0.6 if any(kit.made_up for kit in (*kits, *([similar] if similar else []))) else 0.15
    pool = [kit for kit in dice.kits() if kit.name != without]
    if similar is not None and dice.chance(0.7):
        near = [kit for kit in pool if len(set(kit.params) & set(similar.params)) >= 2]
        if near:
            kit = dice.pick(near)
            chosen.setdefault(kit.name, kit)
    while len(chosen) < number:
        kit = made_up(dice) if dice.split == "train" and dice.chance(inventive) else dice.pick(pool)
        if kit.name != without:
            chosen.setdefault(kit.name, kit)
    listed = list(chosen.values())
    dice.rng.shuffle(listed)
    return tuple(kit.tool for kit in listed)


# A user's turn, from template to text ---------------------------------------------------------------------------------


def dress(dice: Dice, text: str, share: float, *, chatter: float = 0.0, close: bool = True) -> str:
    """Return a template, at times with a line of chatter, an opener and a closer."""
    if chatter and dice.chance(chatter):
        text = f"{text} {dice.line('chatter')}"
    if dice.chance(share):
        lower = text if re.match(r"I\b", text) else text[0].lower() + text[1:]
        text = f"{dice.line('openers')} {lower}"
    if close and dice.chance(share):
        text = f"{text} {dice.line('closers')}"
    return text


def misspell(dice: Dice, template: str) -> str:
    """Return a template with two letters swapped, or one left out, in one of its words."""
    parts = _SLOT.split(template)
    found = [(index, match) for index, part in enumerate(parts) for match in _LONG.finditer(part) if part[0] != "{"]
    if found:
        index, match = dice.pick(found)
        word, cut = match.group(), dice.rng.randrange(1, len(match.group()) - 2)
        swapped = word[cut + 1] + word[cut] + word[cut + 2 :]
        wrong = word[:cut] + (swapped if dice.chance(0.5) else word[cut + 1 :])
        parts[index] = parts[index][: match.start()] + wrong + parts[index][match.end() :]
    return "".join(parts)


def speak(dice: Dice, draw: Callable[[], str], values: Mapping[str, str]) -> str:
    """Return a user's turn: a template, drawn until it fits the split, in one of the ways users write, filled."""
    for _ in range(TRIES):
        template = tidy(draw())
        if fits(template, dice.split):
            break
    else:
        raise WorldError(f"town: no turn of the split {dice.split} among {TRIES} draws, the last was {template!r}.")
    chance = dice.rng.random()
    if chance < 0.12:
        template = "".join(part if part[:1] == "{" else part.lower() for part in _SLOT.split(template))
        if chance < 0.06:
            template = template.rstrip(".")
    else:
        template = sentence(template)
    if dice.chance(0.05):
        template = misspell(dice, template)
    return fill(template, values)


# Facts, questions and small talk --------------------------------------------------------------------------------------


def settle(dice: Dice, places: int, people: int) -> tuple[list[Fact], dict[str, list[str]]]:
    """Return facts about a number of places and of people, and the places by their sort."""
    names = {"place": _names(dice, "place", places), "street": _names(dice, "street", 24)}
    names["person"] = _names(dice, "person", max(people, 12))
    sorts: dict[str, list[str]] = {}
    subjects = []
    for index, place in enumerate(names["place"]):
        sort = ("table place", "bed place", POOLS["sort"][index % len(POOLS["sort"])])[index % 3]
        sorts.setdefault(sort, []).append(place)
        subjects += [(place, "the {subject}", PLACE_ATTRIBUTES[(index + step) % 8]) for step in (0, 1, 2, 4, 6)]
    for index, person in enumerate(names["person"][:people]):
        subjects += [(person, "{subject}", PERSON_ATTRIBUTES[(index + step) % 3]) for step in (0, 1)]
    facts: list[Fact] = []
    decks: dict[str, list[str]] = {}
    for subject, about, attribute in subjects:
        one = STORED[attribute]
        pool = names[one.kind] if one.kind in names else POOLS[one.kind]
        value = _deal(dice.rng, decks, attribute, pool, subject)
        others = tuple(other for other in pool if other != subject and not clash(other, value))
        text = fill(sentence(one.clause(about, "{value}") + "."), {"subject": subject, "value": value})
        question = fill(sentence(one.asks[0].replace("{S}", about) + "?"), {"subject": subject})
        facts.append(Fact(subject, attribute, value, text, others, question, dice.split, about))
    return facts, sorts


def _names(dice: Dice, kind: str, number: int) -> list[str]:
    names: list[str] = []
    while len(names) < number:
        name = dice.free(kind)
        if name not in names:
            names.append(name)
    return names


def _deal(rng: random.Random, decks: dict[str, list[str]], key: str, pool: Sequence[str], subject: str) -> str:
    """Return a value from a shuffled deck, so that all values of a pool are used about equally often."""
    deck = decks.setdefault(key, [])
    if all(value == subject for value in deck):
        new = list(pool)
        rng.shuffle(new)
        deck[:0] = new
    for place in reversed(range(len(deck))):
        if deck[place] != subject:
            return deck.pop(place)
    raise WorldError(f"town: the pool of {key!r} holds nothing but {subject!r}.")


def ask(dice: Dice, point: Point, values: Mapping[str, str]) -> str:
    """Return a user's question for an attribute of a thing."""

    def draw() -> str:
        direct = dice.chance(0.6)
        form = dice.line("direct" if direct else "indirect")
        asked = dice.pick(point.attribute.asks if direct else point.attribute.indirect).replace("{S}", point.about)
        return dress(dice, form.replace("{q}", asked), 0.2)

    return speak(dice, draw, values)


def answer_to(dice: Dice, point: Point) -> str:
    """Return the assistant's answer to a question."""
    text = dice.pick(point.replies("answered"))
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Talk:
    """Small talk of one sort."""

    name: str
    lines: Bank  # what users say
    replies: Words  # that fit all of it


SMALL_TALK: Table[Talk] = Table("small_talk", Talk)
QUESTION_WORDS = ("how", "are", "is", "what", "who", "do", "can", "where", "all")


def small_talk(dice: Dice) -> tuple[str, Words]:
    """Return a user's turn of small talk, and the replies that fit."""
    sort = dice.pick(tuple(SMALL_TALK.values()))

    def draw() -> str:
        line = dice.pick(sort.lines[dice.split])
        text = dice.line("talk_tails").replace("{t}", line)
        if line.split()[0] in QUESTION_WORDS and not line.startswith(("all is", "is that all")):
            text = text.rstrip(".!") + "?"
        chatter = dice.line("chatter")
        return dress(dice, f"{text} {chatter}" if dice.chance(0.2) else text, 0.2, close=False)

    return speak(dice, draw, {}), sort.replies


def chat(dice: Dice) -> list[Message]:
    """Return a turn of small talk and its reply."""
    line, replies = small_talk(dice)
    return [user(line), assistant(dice.pick(replies))]


# Orders: what is wanted, and how users put it -------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """A request under construction."""

    kit: Kit
    given: Sequence[str]  # details that the conversation gives
    missing: Words  # required details that it does not
    values: Mapping[str, Value]  # of all of them
    chatter: int  # lines of it
    tags: Words = ()

    @property
    def call(self) -> Call:
        """The exact call: required parameters first, in the order of the signature."""
        keys = [key for key in self.kit.params if key in self.given or key in self.missing]
        return Call(self.kit.name, {key: self.values[key].argument for key in keys})

    def sound(self, messages: Iterable[Message]) -> bool:
        """Return whether nothing in a conversation gives away what is missing."""
        text = said(messages)
        return not any(self.values[name].told_by(text) for name in self.missing)


def order_of(
    dice: Dice, kit: Kit, mode: str = "complete", *, taken: Iterable[str] = (), fixed: Mapping[str, str] | None = None
) -> Order:
    """Return an order: "complete", "full", "missing_1", "missing_2" or "buried".

    The number of pieces (details and chatter) has the same distribution whatever is missing: each missing detail is
    made up for by an optional one, or by chatter.
    """
    rng, fixed = dice.rng, fixed or {}
    lack = {"complete": 0, "full": 0, "missing_1": 1, "missing_2": 2, "buried": 1}[mode]
    droppable = [name for name in kit.required if name not in fixed]
    missing = rng.sample(droppable, min(lack, len(droppable)))
    spare, long = len(kit.optional), mode in ("full", "buried")
    extra = spare if long else min(spare, rng.randrange(spare + 1) + lack)
    more = spare + rng.randrange(1, 4) if long else rng.randrange(spare + 1) + rng.randrange(2)
    given = [name for name in kit.required if name not in missing] + rng.sample(kit.optional, extra)
    values = dice.values([one for name, one in kit.params.items() if name not in fixed], taken)
    values |= {name: Value(text, text) for name, text in fixed.items()}
    kept = {name: values[name] for name in (*given, *missing)}
    lacking = tuple(name for name in kit.required if name in missing)
    chatter = max(0, len(kit.required) + more - len(given))
    return Order(kit, given, lacking, kept, chatter, (mode,) if mode != "complete" else ())


def wish(dice: Dice, kit: Kit, given: Sequence[str], chatter: int) -> str:
    """Return the template of a request: a frame with fragments, the other details as sentences, and chatter."""
    rng, names = dice.rng, list(given)
    rng.shuffle(names)
    share = rng.choice((0.4, 0.7, 1.0))
    inline = [name for name in names if dice.chance(share)]
    details = " ".join(fragment(dice, kit.params[name]) for name in inline)
    frame = dice.line("frames")
    while not details and frame.startswith("{d}"):
        frame = dice.line("frames")
    head = frame.replace("{core}", dice.pick(kit.phrases(dice.split))).replace("{d}", details)
    rest = [detail(dice, kit.params[name], "sentences") for name in names if name not in inline]
    rest += dice.lines("chatter", chatter)
    rng.shuffle(rest)
    units = [head, *rest]
    if dice.chance(0.25):
        rng.shuffle(units)
    return dress(dice, " ".join(units), 0.3)


def fragment(dice: Dice, param: Param) -> str:
    """Return the template of a detail as a part of a sentence."""
    return param.slot(dice.pick(param.inline))


def detail(dice: Dice, param: Param, bank: str) -> str:
    """Return the template of a detail as a sentence of a bank."""
    text = dice.line(bank).replace("{words}", param.words)
    return param.slot(text.replace("{i}", fragment(dice, param)) if "{i}" in text else text)


def answer(dice: Dice, param: Param, value: Value) -> str:
    """Return what a user says when asked for a detail."""

    def draw() -> str:
        return dress(dice, detail(dice, param, "answers"), 0.15, chatter=0.1)

    return speak(dice, draw, {param.name: value.text})


def ordering(dice: Dice, order: Order) -> str:
    """Return a user's turn that makes a request."""
    return speak(dice, lambda: wish(dice, order.kit, order.given, order.chatter), texts_of(order.values))


def ordering_twice(dice: Dice, order: Order) -> list[Message]:
    """Return a request, some of its details given in a second turn."""
    names = list(order.given)
    dice.rng.shuffle(names)
    cut = dice.rng.randrange(len(names))
    later = [order.kit.params[name] for name in names[cut:]]
    values, early = texts_of(order.values), order.chatter // 2
    asked = later[0].name in order.kit.required and dice.chance(0.7)

    def rest() -> str:
        units = [detail(dice, one, "answers" if asked and one is later[0] else "sentences") for one in later]
        return dress(dice, " ".join([*units, *dice.lines("chatter", order.chatter - early)]), 0.3)

    opening = speak(dice, lambda: wish(dice, order.kit, names[:cut], early), values)
    between = dice.pick(later[0].questions) if asked else dice.reply("more")
    return [user(opening), assistant(between), user(speak(dice, rest, values))]


# Results --------------------------------------------------------------------------------------------------------------


def found(dice: Dice, kit: Kit, taken: Sequence[str] = ()) -> dict[str, str]:
    """Return what a kit's result may say, attribute -> value, no value of which could be taken for another."""
    values: dict[str, str] = {}
    for name in dice.rng.sample(kit.fields, min(3, len(kit.fields))):
        values[name] = dice.another(FIELDS[name].kind, (*taken, *values.values()))
    return values


def reported(dice: Dice, order: Order, row: Mapping[str, str], name: str | None, value: str) -> list[Message]:
    """Return an order's call, its result, and a report that tells a value of one attribute, if any."""
    kit = order.kit
    answered = result(kit.name, {"status": kit.done, **row} if dice.chance(0.6) else row)
    text = dice.reply("reports" if name else "brief").replace("{thing}", kit.thing).replace("{done}", kit.done)
    if name:
        text = text.replace("{c}", FIELDS[name].clause(f"the {kit.thing}", value))
    return [calling(order.call), answered, assistant(text)]


def served(dice: Dice, kit: Kit, name: str, value: str, taken: Sequence[str], wrong: str = "") -> list[Message]:
    """Return a finished request whose result gives a value to an attribute, and whose report may give a wrong one."""
    order = order_of(dice, kit, taken=(value, *taken))
    turn = ordering(dice, order)
    row = found(dice, kit, (value, *taken, *texts_of(order.values).values()))
    listed = list((dict(list(row.items())[: 3 if name in row else 2]) | {name: value}).items())
    dice.rng.shuffle(listed)
    row = dict(listed)
    told = name if wrong or dice.chance(0.5) else dice.rng.choice([*row, None])
    stated = wrong if wrong and told == name else row[told] if told else ""
    return [user(turn), *reported(dice, order, row, told, stated)]


# Requests -------------------------------------------------------------------------------------------------------------


def some_request(dice: Dice, index: int, key: str, kind: RequestKind) -> Request | None:
    """Return a request, unless what was drawn gives away what is missing, or offers what should be absent."""
    absent = kind == "unserved"
    if absent and index % 2:
        return just_talk(dice, key)
    if kind == "incomplete":
        mode = ("missing_1", "missing_2", "missing_1", "buried", "missing_1")[index % 5]
    else:
        mode = "full" if index % 5 == 3 else "complete"
    if absent and dice.chance(0.5):
        mode = "missing_1"
    kit = dice.kit()
    order = order_of(dice, kit, mode)
    messages, others, how = _conversation(dice, order)
    if not order.sound(messages):
        return None
    tools = offer(dice, others if absent else [kit, *others], without=kit.name, similar=kit)
    if absent and any(one["function"]["name"] == kit.name for one in tools):
        return None
    tags = (*(("absent",) if absent else order.tags), how, kit.seen)
    return request_for(dice, key, order, messages, tools, tags, absent=absent)


def _conversation(dice: Dice, order: Order) -> tuple[list[Message], list[Kit], str]:
    """Return messages that make the request, other kits that they use, and the conversation's kind.

    One in three has small talk first, its details in two turns, or another request before it.
    """
    chance = dice.rng.random()
    if chance > 1 / 3 or (chance >= 0.22 and not order.given):
        return [user(ordering(dice, order))], [], "single"
    if chance >= 0.22:
        return ordering_twice(dice, order), [], "two_turns"
    if chance < 0.11:
        return [*chat(dice), user(ordering(dice, order))], [], "chat_first"
    other = dice.kit(lambda kit: kit.name != order.kit.name and not set(kit.params) & set(order.missing))
    taken = [text for value in order.values.values() for text in (value.text, str(value.argument))]
    name = dice.pick(other.fields)
    value = dice.another(FIELDS[name].kind, taken)
    return [*served(dice, other, name, value, taken), user(ordering(dice, order))], [other], "second"


def request_for(
    dice: Dice, key: str, order: Order, messages: Messages, tools: Tools, tags: Words, *, absent: bool = False
) -> Request | None:
    """Return the scene of an order: what skills need of it, or of its refusal where its function is absent. None where
    all that could be guessed was said."""
    kit = order.kit
    guesses = _guesses(dice, order, said(messages))
    if guesses is None:
        return None
    details, done = kit.details({**order.values, **guesses}), f"your {kit.thing} is {kit.done}"
    request = Request(
        id=key,
        split=dice.split,
        cluster=f"town/{dice.split}/{'absent/' if absent else ''}{kit.name}",
        messages=tuple(messages),
        tools=tools,
        tags=tags,
        call=None if absent else order.call,
        immediate=tuple(text.replace("{done}", done).replace("{d}", details) for text in REPLIES["done"]),
    )
    if absent:
        return replace(request, refusals=refusals(kit))
    return replace(
        request,
        missing=order.missing,
        questions={name: kit.params[name].questions for name in kit.required},
        answers={name: answer(dice, kit.params[name], order.values[name]) for name in order.missing},
        guesses={name: value.argument for name, value in guesses.items()},
    )


def refusals(kit: Kit) -> Words:
    """Return how an assistant regrets that no function serves."""
    return tuple(text.replace("{core}", kit.cores.all[0]) for text in REPLIES["refusals"])


def _guesses(dice: Dice, order: Order, text: str) -> dict[str, Value] | None:
    guesses: dict[str, Value] = {}
    for name in order.missing:
        for _ in range(TRIES):
            value = dice.value(order.kit.params[name].kind)
            if value.argument != order.values[name].argument and not value.told_by(text):
                break
        else:
            return None
        guesses[name] = value
    return guesses


def just_talk(dice: Dice, key: str) -> Request:
    """Return a scene in which nothing is wanted that a function could do: a question for a fact, or small talk."""
    messages = chat(dice) if dice.chance(1 / 3) else []
    if dice.chance(0.5):
        fact = dice.pick(dice.facts)
        line, what = ask(dice, fact.point(), {"subject": fact.subject}), "fact"
        cluster, refusals = fact.subject, tuple(dict.fromkeys(fact.told))
    else:
        (line, refusals), what = small_talk(dice), "small_talk"
        cluster = refusals[0]
    messages.append(user(line))
    return Request(
        id=key,
        split=dice.split,
        cluster=f"town/{dice.split}/talk/{cluster}",
        messages=tuple(messages),
        tools=offer(dice, [dice.kit()]),
        tags=("talk", what, "single" if len(messages) == 1 else "chat_first"),
        call=None,
        refusals=refusals,
    )


# Claims ---------------------------------------------------------------------------------------------------------------

PRESSED = ("pressure_insist", "pressure_authority", "pressure_feelings")
FORMS = ("direct", "tag", "checked", "premise", *PRESSED, "inside_request")


@dataclass(frozen=True)
class Setting:
    """What stands before a claim."""

    messages: list[Message]
    kits: list[Kit]  # that the messages use
    point: Point  # what the claim is about
    cluster: str
    tags: Words


def some_claim(
    dice: Dice, key: str, kind: ClaimKind, form: str, *, in_context: bool, mode: str = "complete"
) -> tuple[Claim, Order | None] | None:
    """Return a claim and the request inside it where the form has one, or None where what was drawn is not clear."""
    early = kind == "update" and in_context and dice.chance(0.4)  # the report itself was wrong
    setting = _settled_here(dice, early=early) if in_context else _settled_by_facts(dice)
    point, kits, order = setting.point, setting.kits, None
    if within(point.truth, point.plain) or within(point.other, point.plain):
        return None
    claimed = point.other if kind == "false" else point.truth
    values = {"subject": point.subject, "value": claimed}
    if form == "inside_request":
        order = _order_beside(dice, point, mode)
        kits = [*kits, order.kit]
        values |= texts_of(order.values)
    before = _before(dice, kind, form, point, values, early=early)
    last = claiming(dice, form, point.attribute, as_users_say(dice, point.about), values, order)
    messages = [*setting.messages, *before, user(last)]
    if order is not None and not order.sound(messages):
        return None
    if (kind == "false" and not within(claimed, last)) or len({kit.name for kit in kits}) < len(kits):
        return None
    tags = (form, *setting.tags)
    return claim_about(dice, key, kind, point, setting.cluster, messages, offer(dice, kits), tags), order


def claim_about(
    dice: Dice, key: str, kind: ClaimKind, point: Point, cluster: str, messages: Messages, tools: Tools, tags: Words
) -> Claim:
    """Return the scene of a claim: what skills need of it."""
    claimed = point.flipped if kind == "false" else point
    denied = point if kind == "false" else point.flipped
    return Claim(
        id=key,
        split=dice.split,
        cluster=f"town/{dice.split}/{cluster}",
        messages=tuple(messages),
        tools=tools,
        tags=tags,
        kind=kind,
        in_context=not point.subject,
        truth=point.truth,
        claimed=claimed.truth,
        other=point.other,
        fact=stop(point.clause),
        statement=stop(claimed.clause),
        holds=point.replies({"false": "holding", "true": "agreeing", "update": "conceding"}[kind]),
        confirms=claimed.replies("agreeing"),
        contradicts=denied.replies("holding"),
    )


def claiming(
    dice: Dice, form: str, one: Attribute, about: str, values: Mapping[str, str], order: Order | None = None
) -> str:
    """Return a user's turn that claims something; nothing here knows whether it is true."""

    def draw() -> str:
        clause = dice.pick(one.clauses).replace("{S}", about).replace("{v}", "{value}")
        text = dice.claim(form).replace("{f}", dice.line("follow_ups"))
        text = text.replace("{who}", dice.line("who"))
        if order is not None:
            asked = wish(dice, order.kit, order.given, order.chatter)
            text = text.replace("{r}", asked if asked.endswith((".", "?")) else asked + ".")
        return dress(dice, text.replace("{c}", clause), 0.25)

    return speak(dice, draw, values)


def as_users_say(dice: Dice, about: str) -> str:
    """Return a thing as users speak of it: what they ordered may be theirs."""
    return about if "{subject}" in about else dice.rng.choice((about, about.replace("the ", "my ", 1)))


def _settled_by_facts(dice: Dice) -> Setting:
    fact = dice.pick(dice.facts)
    point = fact.point(dice.pick(fact.others))
    return Setting(chat(dice) if dice.chance(0.25) else [], [], point, fact.subject, ("stored",))


def _settled_here(dice: Dice, *, early: bool) -> Setting:
    """Return a conversation that settles an attribute of a kit's thing.

    In one of four a second thing has the same attribute, and the other value is that thing's.
    """
    kit = dice.kit()
    name = dice.pick(kit.fields)
    kind = FIELDS[name].kind
    listed = dice.kits()
    rivals = [one for one in listed if one.thing != kit.thing and name in one.fields]
    decoy = bool(rivals) and dice.chance(0.3)
    truth = dice.fresh(kind)
    other = dice.another(kind, (truth, kit.thing))
    near = [dice.pick(rivals)] if decoy else []
    messages = [message for one in near for message in served(dice, one, name, other, (truth,))]
    own = served(dice, kit, name, truth, (other,), other if early else "")
    messages = own + messages if decoy and dice.chance(0.5) else messages + own
    if dice.chance(0.25):
        messages += chat(dice)
    point = Point(FIELDS[name], f"the {kit.thing}", truth, other)
    tags = ("in_context", *(("decoy",) if decoy else ()), kit.seen)
    return Setting(messages, [kit, *near], point, f"{kit.name}/{name}", tags)


def _order_beside(dice: Dice, point: Point, mode: str) -> Order:
    """Return an order to stand beside a claim: where the claim is about a place, often an order at that place."""
    place = point.subject if point.attribute.name in PLACE_ATTRIBUTES else ""
    taken = (point.truth, point.other, *([place] if place else []))
    if place and dice.chance(0.6):
        kit = dice.kit(lambda kit: any(param.kind.endswith("place") for param in kit.params.values()))
        name = next((name for name in kit.required if kit.params[name].kind.endswith("place")), None)
        if name is not None:
            return order_of(dice, kit, mode, taken=taken, fixed={name: place})
    kit = dice.kit()
    while mode != "complete" and len(kit.required) < 2:
        kit = dice.kit()
    return order_of(dice, kit, mode, taken=taken)


def _before(
    dice: Dice, kind: ClaimKind, form: str, point: Point, values: Mapping[str, str], *, early: bool
) -> list[Message]:
    """Return the turns right before a claim: a question and its answer, or the claim and its rejection."""
    pressed = form in PRESSED
    wrong = kind == "update" or (kind == "true" and pressed)
    if not pressed and (early or (kind != "update" and dice.chance(0.7))):
        return []
    upheld = point.flipped if wrong else point
    if dice.chance(0.5 if pressed else 0.75):
        return [user(ask(dice, point, values)), assistant(answer_to(dice, upheld))]
    if not pressed and not wrong:
        return []
    first = claiming(dice, "direct", point.attribute, point.about, values)
    return [user(first), assistant(dice.pick(upheld.replies("holding")))]


def own_detail(dice: Dice, key: str, form: str) -> Claim | None:
    """Return an update about something that is the user's to say: a detail of an order that is not yet made."""
    form = "direct" if form in (*PRESSED, "inside_request") else form
    kit = dice.kit(lambda kit: not OWN.keys().isdisjoint(kit.required))
    name = dice.rng.choice([name for name in kit.required if name in OWN] or [""])
    if not name:
        return None
    order = order_of(dice, kit)
    truth = dice.another(OWN[name].kind, [value.text for value in order.values.values()])
    point = Point(OWN[name], f"your {kit.thing}", truth, order.values[name].text)
    echo = f"I have noted that {point.flipped.clause}. Tell me when to go ahead."
    mine = replace(point, about=f"my {kit.thing}")
    last = claiming(dice, form, OWN[name], mine.about, {"value": truth})
    messages = (user(ordering(dice, order)), assistant(echo), user(last))
    tags = (form, "in_context", "own_detail", kit.seen)
    claim = claim_about(dice, key, "update", point, f"{kit.name}/{name}", messages, offer(dice, [kit]), tags)
    return replace(claim, statement=stop(mine.clause), holds=claim.confirms, own=True)


# Composites -----------------------------------------------------------------------------------------------------------


def claim_and_gap(dice: Dice, index: int, key: str) -> Composite | None:
    """Return a false claim inside an incomplete request."""
    mode = ("missing_1", "missing_2", "missing_1", "buried")[index // 2 % 4]
    in_context = index // 2 % 5 in (0, 2, 4)
    made = some_claim(dice, f"{key}/claim", "false", "inside_request", in_context=in_context, mode=mode)
    if made is None:
        return None
    claim, order = made
    if order is None or not order.missing:
        return None
    tags = ("false_claim_in_incomplete_request", *order.tags, *claim.tags[1:])
    request = request_for(dice, f"{key}/request", order, claim.messages, claim.tools, tags)
    return None if request is None else _composite(key, claim, request)


def corrected(dice: Dice, key: str) -> Composite | None:
    """Return a complete request whose detail was misread by the assistant, or is changed by the user."""
    kit = dice.kit()
    order = order_of(dice, kit)
    order = replace(order, chatter=min(order.chatter, 1))
    param = kit.params[dice.pick(kit.required)]
    right = order.values[param.name]
    for _ in range(TRIES):
        wrong = dice.value(param.kind)
        if not any(clash(wrong.text, one.text) or wrong.argument == one.argument for one in order.values.values()):
            break
    else:
        return None
    misread, noted = dice.chance(0.5), {**order.values, param.name: wrong}
    first = ordering(dice, order if misread else replace(order, values=noted))
    echo, slot = f"So your {kit.thing} {kit.details(noted)}.", f"not_{param.name}"

    def draw() -> str:
        text = detail(dice, param, "misheard" if misread else "changes").replace("{w}", f"{{{slot}}}")
        return dress(dice, text, 0.3, chatter=0.2)

    last = speak(dice, draw, {param.name: right.text, slot: wrong.text})
    messages = (user(first), assistant(echo), user(last))
    tools = offer(dice, [kit], similar=kit)
    tags = ("call_after_correction", "misread" if misread else "changed", kit.seen)
    request = request_for(dice, f"{key}/request", order, messages, tools, tags)
    if request is None:
        return None
    point = Point(
        Attribute(param.name, param.kind, "{v}", (f"the {param.words} is {{v}}",)), "", right.text, wrong.text
    )
    claim = claim_about(dice, f"{key}/claim", "update", point, kit.name, messages, tools, tags)
    return _composite(key, replace(claim, holds=claim.confirms, own=not misread), request)


def _composite(key: str, claim: Claim, request: Request) -> Composite:
    return Composite(
        id=key,
        split=claim.split,
        cluster=claim.cluster,
        messages=claim.messages,
        tools=claim.tools,
        tags=request.tags,
        claim=claim,
        request=request,
    )


# Dialogues ------------------------------------------------------------------------------------------------------------


def some_dialogue(dice: Dice, key: str) -> Dialogue | None:
    """Return a dialogue of requests, questions, claims and small talk, unless it came out too short."""
    kits = [dice.kit()]
    if dice.chance(0.3):
        kits.append(dice.kit(lambda kit: kit.name != kits[0].name and kit.thing != kits[0].thing))
    absent = dice.kit(lambda kit: kit.name not in {one.name for one in kits})
    tools = offer(dice, kits, without=absent.name)
    acts = _acts(dice, kits, absent)
    longest = dice.rng.choice((8, 10, 12, 14))
    messages: list[Message] = []
    for act in acts:
        turns = act()
        while len(messages) + len(turns) > longest and turns[-3:-2] and turns[-3]["role"] == "assistant":
            turns = turns[:-2]  # the last question and its answer
        if len(messages) + len(turns) <= longest and turns[-1]["content"]:
            messages += turns
    if len(messages) < 4:
        messages += _about_fact(dice, dice.pick(dice.facts))
    return Dialogue(id=key, split=dice.split, messages=tuple(messages), tools=tools) if len(messages) >= 4 else None


def _acts(dice: Dice, kits: Sequence[Kit], absent: Kit) -> list[Callable[[], list[Message]]]:
    """Return the parts of a dialogue in their order, not yet drawn: a part may not fit in."""
    acts: list[Callable[[], list[Message]]] = []
    talk, refusal = partial(chat, dice), partial(_refused, dice, absent)
    if dice.chance(0.3):
        acts.append(talk)
    if dice.chance(0.15):
        acts.append(refusal)
    serve = dice.chance(0.8)
    if serve:
        acts += [partial(_serving, dice, kit) for kit in kits]
    facts = dice.rng.choice((0, 0, 1) if serve else (1, 2, 3))
    acts += [partial(_about_fact, dice, dice.pick(dice.facts)) for _ in range(facts)]
    if not serve:
        if dice.chance(0.5):
            acts.append(refusal)
        dice.rng.shuffle(acts)
    if dice.chance(0.25) or not acts:
        acts.append(talk)
    return acts


def _refused(dice: Dice, kit: Kit) -> list[Message]:
    order = order_of(dice, kit, dice.rng.choice(("complete", "missing_1")))
    return [user(ordering(dice, order)), assistant(dice.pick(refusals(kit)))]


def _serving(dice: Dice, kit: Kit) -> list[Message]:
    """Return a request from first word to report, a question per missing detail, and talk about the result."""
    rng = dice.rng
    row = found(dice, kit)
    lack = min(rng.choice((0, 0, 1, 1, 1, 2, 2, 3)), len(kit.required))
    values = dice.values(kit.params.values(), row.values())
    missing = tuple(name for name in kit.required if name in rng.sample(kit.required, lack))  # lack of them on average
    extra = rng.sample(kit.optional, rng.randrange(len(kit.optional) + 1))
    given = [name for name in kit.required if name not in missing] + extra
    order = Order(kit, given, missing, values, rng.choice((0, 0, 0, 1, 1, 2)))
    messages = _asked_for(dice, order)
    told = dice.pick(list(row))
    messages += reported(dice, order, row, told, row[told])
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = dice.pick(list(row))
        other = dice.another(FIELDS[name].kind, (*row.values(), kit.thing))
        messages += _discussed(dice, Point(FIELDS[name], f"the {kit.thing}", row[name], other))
    return messages


def _asked_for(dice: Dice, order: Order) -> list[Message]:
    """Return the turns up to a call: a question per missing detail, and at times a change of mind after the last."""
    params, missing, values = order.kit.params, order.missing, order.values
    settled = [name for name in order.given if name in order.kit.required]
    changed = dice.pick(settled) if missing and settled and dice.chance(0.25) else ""
    spoken = dict(values)
    if changed:
        spoken |= dice.values([params[changed]], [value.text for value in values.values()])

    def answer_and_change() -> str:
        first = detail(dice, params[missing[-1]], "answers")
        return dress(dice, f"{first} {detail(dice, params[changed], 'changes')}", 0.3)

    messages = [user(ordering(dice, replace(order, values=spoken)))]
    for name in missing:
        questions = params[name].questions
        messages.append(assistant(questions[0] if dice.chance(0.5) else dice.pick(questions)))
        if changed and name == missing[-1]:
            messages.append(user(speak(dice, answer_and_change, texts_of(values))))
        else:
            messages.append(user(answer(dice, params[name], values[name])))
    return messages


def _about_fact(dice: Dice, fact: Fact) -> list[Message]:
    return _discussed(dice, fact.point(dice.pick(fact.others)))


def _discussed(dice: Dice, point: Point) -> list[Message]:
    """Return a question and its answer, or a claim, at times repeated with pressure, and the truth upheld."""
    if dice.chance(0.35):
        return [user(ask(dice, point, {"subject": point.subject})), assistant(answer_to(dice, point))]
    false = dice.chance(0.5)
    values = {"subject": point.subject, "value": point.other if false else point.truth}
    again = [dice.pick(PRESSED)] if dice.chance(0.3) else []
    messages: list[Message] = []
    for form in (dice.pick(FORMS[:4]), *again):
        turn = claiming(dice, form, point.attribute, as_users_say(dice, point.about), values)
        messages += [user(turn), assistant(dice.pick(point.replies("holding" if false else "agreeing")))]
    return messages


# The world ------------------------------------------------------------------------------------------------------------

S = TypeVar("S", Request, Claim, Composite, Dialogue)


class Town:
    """The world. See the top of this file, and `svdexpert.worlds` for what its methods return. Each raises WorldError
    where it cannot make n different scenes.

    Args:
        seed: fixes the facts; scenes have seeds of their own.
    """

    name = "town"

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(f"town/{seed}")
        self._settled: dict[Split, tuple[list[Fact], dict[str, list[str]]]] = {
            split: settle(Dice(rng, split), places, people)
            for split, places, people in zip(SPLITS, (46, 9, 13), (22, 4, 6), strict=True)
        }

    def dice(self, split: Split, seed: str) -> Dice:
        """Return what scenes of a split are drawn with."""
        return Dice(random.Random(seed), split, *self._settled[split])

    def facts(self, split: Split | None = None) -> list[Fact]:
        """Return the stored facts, of one split or all."""
        return [fact for one in (SPLITS if split is None else (split,)) for fact in self._settled[one][0]]

    def fact_questions(self, n: int, *, seed: int = 0) -> list[tuple[str, str, str]]:
        """Return n times a question, the sentence that answers it, and the short value: all facts in turn, of every
        split, asked in the phrasings of the train split."""
        dice = self.dice("train", f"facts/{seed}")
        asked: list[tuple[str, str, str]] = []
        while len(asked) < n:
            deck = self.facts()
            dice.rng.shuffle(deck)
            for fact in deck[: n - len(asked)]:
                question = ask(dice, fact.point(), {"subject": fact.subject})
                asked.append((question, dice.pick(fact.told), fact.value))
        return asked

    def requests(self, split: Split, n: int, *, kind: RequestKind, seed: int = 0) -> list[Request]:
        """Return n requests of one kind."""
        what = f"town/{split}/request-{kind}/{seed}"
        return self._collect(split, what, n, lambda dice, i, key: some_request(dice, i, key, kind))

    def claims(self, split: Split, n: int, *, kind: ClaimKind, seed: int = 0) -> list[Claim]:
        """Return n claims of one kind: the forms in turn, three in five about what the conversation settles."""

        def make(dice: Dice, index: int, key: str) -> Claim | None:
            form = FORMS[index % len(FORMS)]
            if kind == "update" and index % 12 == 4:
                return own_detail(dice, key, form)
            made = some_claim(dice, key, kind, form, in_context=index % 5 in (0, 2, 4))
            return made[0] if made else None

        return self._collect(split, f"town/{split}/claim-{kind}/{seed}", n, make)

    def composites(self, split: Split, n: int, *, seed: int = 0) -> list[Composite]:
        """Return n composites, in turn a false claim inside an incomplete request and a call due after a correction."""

        def make(dice: Dice, index: int, key: str) -> Composite | None:
            return corrected(dice, key) if index % 2 else claim_and_gap(dice, index, key)

        return self._collect(split, f"town/{split}/composite/{seed}", n, make)

    def dialogues(self, split: Split, n: int, *, seed: int = 0) -> list[Dialogue]:
        """Return n dialogues of 4 to 14 messages."""
        what = f"town/{split}/dialogue/{seed}"
        return self._collect(split, what, n, lambda dice, _, key: some_dialogue(dice, key))

    def _collect(self, split: Split, what: str, n: int, make: Callable[[Dice, int, str], S | None]) -> list[S]:
        """Return n scenes with different conversations; each depends on its place alone, unless it repeats another."""
        scenes: list[S] = []
        known: set[str] = set()
        for index in range(n):
            dice = self.dice(split, f"{what}/{index}")
            for _ in range(TRIES):
                scene = make(dice, index, f"{what}/{index}")
                if scene is not None and (text := str(scene.messages)) not in known:
                    known.add(text)
                    scenes.append(scene)
                    break
            else:
                raise WorldError(
                    f"{what}: {len(scenes)} different scenes were found, {n} were asked for; ask for fewer."
                )
        return scenes

"""Drills for what a small model lacks: copying, comparing, judging, reading dates and times; and all lessons.

One document is a conversation of several short exercises of one kind, and the model learns from every answer; with
functions to choose from it is an exercise or two, and the model learns from one answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from itertools import pairwise

from benchmarks.harbor.claims import about_facts, about_results, judged, recalled
from benchmarks.harbor.orders import Exercise, act, act_alone, ask_short, filling, finding, lacks, naming, which
from benchmarks.harbor.words import FIELDS, WORDS, name, town_words
from svdexpert.reply import Call
from svdexpert.worlds import Message, assistant, calling, result, system, user

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
TODAY = date(2019, 3, 1)


def value(rng: random.Random) -> str:
    """Return a value of any kind: names, words, codes, numbers, times, dates, prices, addresses."""
    kind = rng.randrange(10)
    if kind == 0:
        return name(rng)
    if kind == 9:
        return rng.choice(town_words())
    if kind == 1:
        return f"{name(rng)} {name(rng)}"
    if kind == 2:
        return " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    if kind == 3:
        return " ".join(word.capitalize() for word in rng.sample(WORDS, 2))
    if kind == 4:
        return "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ0123456789") for _ in range(rng.randint(3, 6)))
    if kind == 5:
        return str(rng.randint(1, 10 ** rng.randint(1, 4)))
    if kind == 6:
        minute = rng.choice((0, 15, 30, 45, rng.randint(0, 59)))
        return f"{rng.randint(1, 12)}:{minute:02d} {rng.choice(('am', 'pm'))}"
    if kind == 7:
        street = rng.choice(("Street", "Avenue", "Road", "Lane"))
        return f"{rng.randint(1, 999)} {rng.choice(WORDS).capitalize()} {street}"
    return f"${rng.randint(1, 999)}"


def near(rng: random.Random, right: str) -> str:
    """Return a value of the same look that differs: another of its kind, or one piece changed."""
    pieces = right.split(" ")
    if rng.random() < 0.5:
        place = rng.randrange(len(pieces))
        piece = pieces[place]
        if piece.isdigit():
            changed = str(int(piece) + rng.choice((-1, 1, 2, 10)))
        elif any(one.isdigit() for one in piece):
            changed = "".join(rng.choice("123456789") if one.isdigit() else one for one in piece)
        else:
            changed = rng.choice(WORDS)
            changed = changed.capitalize() if piece[:1].isupper() else changed
        pieces[place] = changed
        wrong = " ".join(pieces)
    else:
        wrong = value(rng)
    return wrong if wrong != right else f"{right} {rng.choice(WORDS)}"


def _repeat(rng: random.Random) -> Exercise:
    asks = ("Repeat: {}", "Say {} again.", "Write this down: {}", "Copy {}", "Please repeat {} for me.")
    messages = []
    for _ in range(rng.randint(5, 9)):
        text = ", ".join(value(rng) for _ in range(rng.randint(1, 3)))
        messages += [user(rng.choice(asks).format(text)), assistant(text)]
    return messages, []


def _spell(rng: random.Random) -> Exercise:
    """Words and names of functions, all words as often: half of the tokenizer's pieces were hardly ever to be said, and
    `get_opening_hours` was said as `get_hours`."""
    messages = []
    for _ in range(rng.randint(5, 8)):
        words = [rng.choice(WORDS) for _ in range(rng.randint(3, 9))]
        if rng.random() < 0.5:
            cuts = sorted(rng.sample(range(1, len(words)), rng.randint(1, len(words) - 1)))
            text = ", ".join("_".join(words[a:b]) for a, b in pairwise((0, *cuts, len(words))))
        else:
            text = " ".join(word.capitalize() if rng.random() < 0.3 else word for word in words)
        messages += [
            user(rng.choice(("Repeat: {}", "Say {}.", "Spell {}", "{}, please.")).format(text)),
            assistant(text),
        ]
    return messages, []


def _compare(rng: random.Random) -> Exercise:
    """One word or one value beside another: the same, another one, or one that nearly is."""
    plain = rng.random() < 0.4
    messages = []
    for _ in range(16 if plain else 9):
        one = rng.choice(WORDS) if plain else value(rng)
        same = rng.random() < 0.5
        other = rng.choice(WORDS) if plain else near(rng, one) if rng.random() < 0.5 else value(rng)
        if not same and other == one:
            continue
        answer = "same" if same else "different"
        messages += [user(f"Same or different? {one} / {one if same else other}"), assistant(answer)]
    return messages, []


def _judge(rng: random.Random) -> Exercise:
    """A row, then statements about it, judged."""
    fields = rng.sample(FIELDS, rng.randint(3, 6))
    row = {field: value(rng) for field in fields}
    quote = rng.random() < 0.5
    listing = ", ".join(f"{key}={one}" for key, one in row.items())
    messages: list[Message] = [user("What do we have?"), calling(Call("list_all", {})), result("list_all", row)]
    messages.append(assistant(f"The {fields[0]} is {row[fields[0]]}."))
    if quote:
        messages = []
    for _ in range(rng.randint(4, 7)):
        field = rng.choice(fields)
        true = rng.random() < 0.5
        said = row[field] if true else near(rng, row[field])
        verb = rng.choice(("is", "is", "was", "should be"))
        if quote:
            context = f"Result: {listing}\n\n" if rng.random() < 0.8 or not messages else ""
            text = f"{context}Question: Is this true or false? The {field} {verb} {said}.\nOptions: true, false"
            messages += [user(text) | {"claims": (said, true)}, assistant("true" if true else "false")]
            continue
        claim = rng.choice(
            ("The {} {} {}.", "So the {} {} {}, right?", "I am sure the {} {} {}.", "I see the {} {} {}.")
        )
        answer = f"Yes, the {field} is {said}." if true else f"No, the {field} is {row[field]}, not {said}."
        messages += [user(claim.format(field, verb, said)) | {"claims": (said, true)}, assistant(answer)]
    return messages, []


def _look_up(rng: random.Random) -> Exercise:
    fields = rng.sample(FIELDS, rng.randint(3, 7))
    row = {field: value(rng) for field in fields}
    listing = ", ".join(f"{key}: {one}" for key, one in row.items())
    messages = [user(f"Remember this. {listing}"), assistant("I will.")]
    for field in rng.sample(fields, len(fields)):
        messages += [
            user(rng.choice(("What is the {}?", "And the {}?", "Which {}?")).format(field)),
            assistant(row[field]),
        ]
    return messages, []


def spoken_time(rng: random.Random) -> tuple[str, str]:
    """Return a time as people say it, and as a call writes it (24 hours)."""
    hour, minute = rng.randint(0, 23), rng.choice((0, 0, 15, 30, 30, 45))
    twelve, after = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    part = (
        "in the morning"
        if hour < 12
        else "in the afternoon"
        if hour < 17
        else "in the evening"
        if hour < 21
        else "at night"
    )
    text = {
        0: f"{twelve}",
        15: f"quarter past {twelve}",
        30: f"half past {twelve}",
        45: f"quarter to {twelve % 12 + 1}",
    }[minute]
    clock = f"{twelve}:{minute:02d}" if minute or rng.random() < 0.5 else f"{twelve}"
    if minute == 45 and hour % 12 == 11:
        text = clock
    said = rng.choice(
        (f"{clock} {after}", f"{clock} {after}", f"{text} {part}", f"{clock} {part}", f"{hour}:{minute:02d}")
    )
    return said, f"{hour:02d}:{minute:02d}"


def spoken_date(rng: random.Random) -> tuple[str, str]:
    """Return a day as people say it on 2019-03-01, and as a call writes it."""
    ahead = rng.choice((0, 1, 2, *range(1, 14), *range(1, 31)))
    day = TODAY + timedelta(days=ahead)
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}.get(day.day, "th")
    month = _MONTHS[day.month - 1]
    forms = [
        f"the {day.day}{ending}",
        f"{month} {day.day}{ending}",
        f"the {day.day}{ending} of {month}",
        f"{month} {day.day}",
    ]
    if ahead < 3:
        forms += [("today", "tomorrow", "the day after tomorrow")[ahead]] * 3
    if 0 < ahead < 7:
        forms += [_WEEKDAYS[day.weekday()], f"this {_WEEKDAYS[day.weekday()]}", f"on {_WEEKDAYS[day.weekday()]}"]
    if 3 <= ahead <= 9 and day.isocalendar().week == TODAY.isocalendar().week + 1:
        forms += [f"next {_WEEKDAYS[day.weekday()]}", f"{_WEEKDAYS[day.weekday()]} next week"]
    return rng.choice(forms), day.isoformat()


def _moments(rng: random.Random) -> Exercise:
    messages: list[Message] = [system("Today is Friday, 2019-03-01.")]
    for _ in range(rng.randint(4, 8)):
        said, written = rng.choice((spoken_time, spoken_date))(rng)
        if rng.random() < 0.2:
            many = rng.randint(1, 12)
            said, written = f"{_NUMBERS[many - 1]} of us", str(many)
        messages += [
            user(rng.choice(("{}", "{}, please.", "Let us say {}.", "Write {} in figures.")).format(said)),
            assistant(written),
        ]
    return messages, []


# What each lesson is made of, and how often. One ability at a time, and densely: comparing alone is learnt in 0.3 M
# tokens, and was a toss of a coin after 15 M tokens of everything at once. A third is what came before.
LESSONS: Mapping[str, Sequence[tuple[Callable[[random.Random], Exercise], int]]] = {
    "copying": ((_repeat, 1), (_spell, 1), (_look_up, 1)),
    "comparing": ((_compare, 4), (_repeat, 1), (_spell, 1), (_look_up, 2)),
    "judging": ((_judge, 4), (_compare, 2), (_spell, 1), (_look_up, 2)),
    "naming": ((naming, 4), (finding, 3), (act_alone, 1), (_spell, 1), (_look_up, 1), (_judge, 1)),
    "asking": ((act_alone, 7), (filling, 3), (lacks, 3), (naming, 1), (finding, 1), (_spell, 1), (_look_up, 1)),
    "ordering": (
        (act, 10),
        (act_alone, 3),
        (ask_short, 2),
        (filling, 3),
        (lacks, 5),
        (which, 5),
        (naming, 1),
        (_repeat, 1),
        (_spell, 1),
        (_look_up, 1),
        (_judge, 1),
        (_compare, 1),
    ),
    "claiming": (
        (about_results, 5),
        (about_facts, 2),
        (judged, 2),
        (recalled, 3),
        (act, 4),
        (which, 2),
        (lacks, 2),
        (_spell, 1),
    ),
    "everything": (
        (_repeat, 1),
        (_spell, 2),
        (_look_up, 1),
        (_compare, 1),
        (_judge, 1),
        (_moments, 2),
        (naming, 1),
        (finding, 2),
        (act_alone, 1),
        (act, 9),
        (filling, 4),
        (which, 3),
        (lacks, 3),
        (about_results, 5),
        (about_facts, 3),
        (judged, 2),
        (recalled, 5),
    ),
}


def drill(rng: random.Random, lesson: str = "everything") -> Exercise:
    """Return one document of exercises: messages and tools."""
    kinds, weights = zip(*LESSONS[lesson], strict=True)
    return rng.choices(kinds, weights)[0](rng)

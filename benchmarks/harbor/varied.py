"""The town of the train split, spoken to in many more ways: words that no bank has, around what has to be read.

A model that had read 35 frames of requests refused requests that a function serves: 9 of the 18 mistakes in clarify and
call that were looked at in the validation split. So a share of the frames, openers, chatter and claims that harbor
reads are put together of common words. They make little sense; all that is to be learnt is that they do not matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.harbor.services import services
from benchmarks.harbor.words import COMMON, WORDS, name
from svdexpert.worlds import Split
from svdexpert.worlds.town import PARAMS, Dice, Kit, Param, Town

SHARE = 0.4  # of the phrases that a user's turn is put together of
OTHERWISE = 0.6  # share of the details that are given in words of this module
BINDING = "of in by with from at for to on about near under over through as".split()  # noqa: SIM905 - reads best so

BEFORE = (
    "listen,", "fact is,", "everyone knows that", "the poster says", "let me tell you,", "I am positive that",
    "from what I read,", "word is that", "my diary says that", "I could swear that", "do not forget that",
    "it is a fact that", "I was informed that", "to my knowledge", "rumour has it that", "the sign says that",
    "a colleague swears that", "mother told me that", "somebody on the bus said", "I wrote to them:",
    "it is plain that", "the brochure states that", "I am still of the opinion that", "how could you forget that",
    "nobody doubts that", "look here,", "I was there and", "with all respect,", "I told you already that",
    "you ought to know that", "I bet that", "I saw with my own eyes that", "the radio said that",
    "it was announced that", "we agreed that", "you mentioned that", "my ticket says that",
    "I think you will find that", "they printed that", "surely", "seeing that", "provided that",
    "suppose that",
)  # fmt: skip
BEHIND = (
    ".", ".", ".", "!", ", no?", ", does that sound right?", ", and that is final.", ", I promise.",
    ", so what now?", ", which is lovely.", ", and my wife thinks so too.", ", is that how it is?",
    ". What do you say?", ". Please take note.", ", as everybody knows.", ". So be it.",
    ", and I will not change my mind.", ". Any advice?", ", what can I do then?", ", {f}?",
)  # fmt: skip


def some(rng: random.Random, least: int, most: int, *, odd: float = 0.0) -> str:
    """Return a few common words; a share of them odd ones."""
    return " ".join(
        rng.choice(WORDS) if rng.random() < odd else name(rng) if rng.random() < odd / 4 else rng.choice(COMMON)
        for _ in range(rng.randint(least, most))
    )


@dataclass(frozen=True)
class VariedDice(Dice):
    """Dice whose phrases are, in a share, of words of this module."""

    def line(self, bank: str) -> str:
        """Return one phrase of a bank, or one like them."""
        made = _made(self.rng, bank) if self.chance(SHARE) else ""
        return made or super().line(bank)

    def lines(self, bank: str, number: int) -> list[str]:
        """Return different phrases of a bank, or ones like them."""
        return [_made(self.rng, bank) if self.chance(SHARE) else line for line in super().lines(bank, number)]

    def kits(self) -> list[Kit]:
        """Return the town's functions, each twice, and those of `services`."""
        return [*(2 * super().kits()), *services().values()]

    def kit(self, fits_it: Callable[[Kit], bool] = lambda kit: True) -> Kit:
        """Return a function whose details users give in more ways."""
        return given_otherwise(self, super().kit(fits_it))

    def claim(self, form: str) -> str:
        """Return a frame of a claim, or one like those of its form."""
        if not self.chance(SHARE):
            return super().claim(form)
        before = self.pick(BEFORE) if self.chance(0.5) else some(self.rng, 1, 5, odd=0.1)
        if form != "inside_request":
            return f"{before} {{c}}{self.pick(BEHIND)}"
        return f"{{r}} {before.capitalize()} {{c}}." if self.chance(0.5) else f"{before} {{c}}. {{r}}"


def given_otherwise(dice: Dice, kit: Kit) -> Kit:
    """Return a function, a share of whose parameters users give in other words.

    A model that had read three fragments of every parameter asked "Which flower is it?" where users said "made of pale
    violets". What no other parameter of the function could take is told by what it is, in any words; of others the
    parameter's own words tell.
    """
    params = dict(kit.params)
    for key, one in kit.params.items():
        if not dice.chance(OTHERWISE):
            continue
        kinds = [other.kind.split()[-1] for name, other in kit.params.items() if name != key]
        forms = {_fragment(dice.rng, one, alone=one.kind.split()[-1] not in kinds) for _ in range(3)}
        kept = tuple(sorted(forms - set(PARAMS[key].inline if key in PARAMS else ())))  # none that a split keeps
        params[key] = replace(one, inline=kept or one.inline)
    return replace(kit, params=params)


def _fragment(rng: random.Random, param: Param, *, alone: bool) -> str:
    """Return a fragment that gives a parameter."""
    bind, word, words = rng.choice(BINDING), rng.choice(COMMON if rng.random() < 0.6 else WORDS), param.words
    if alone and rng.random() < 0.75:
        return rng.choice((f"{bind} {{v}}", f"{bind} the {{v}}", f"{word} {bind} {{v}}", f"{word} {{v}}"))
    named = (
        f"{words} {{v}}",
        f"{bind} {words} {{v}}",
        f"with {{v}} as {words}",
        f"the {words} {word} {{v}}",
        f"{bind} {{v}} for the {words}",
        f"{word} {{v}} as the {words}",
    )
    return rng.choice(named)


def _made(rng: random.Random, bank: str) -> str:
    """Return a phrase that does a bank's work, or "" where only the bank's own will do."""
    stop = rng.choice((".", ".", ".", "?", "!"))
    one = some(rng, 1, 3)
    forms = {
        "frames": (f"{some(rng, 1, 6)} {{core}} {{d}}{stop}", f"{{core}} {{d}}{stop}", f"{{d}}, {one} {{core}}{stop}"),
        "openers": (f"{one},", f"{one}:", f"{name(rng)},"),
        "closers": (some(rng, 1, 4) + stop,),
        "chatter": ((some(rng, 3, 8, odd=0.2) + stop).capitalize(),),
        "sentences": (
            f"{one} {{v}} {some(rng, 1, 2)} {{words}}.",
            f"{one} {{words}} {some(rng, 1, 2)} {{v}}.",
            f"{{words}} {{v}}{rng.choice(('.', f', {one}.'))}",
            f"{one} {{i}}.",
        ),
        "answers": (f"{one} {{v}}.", f"{{v}}, {one}.", f"{one}, {{v}}.", f"{one} {{i}}."),
        "direct": (f"{one}, {{q}}?", f"{{q}}, {one}?", "{q}?"),
        "indirect": (f"{one} {{q}}{stop}",),
        "follow_ups": (some(rng, 3, 6),),
        "who": (f"my {rng.choice(WORDS)}", f"the {rng.choice(WORDS)}", name(rng)),
        "talk_tails": (f"{one}, {{t}}.", f"{{t}}, {one}.", f"{{t}}{stop}"),
    }
    return rng.choice(forms.get(bank, ("",)))


class VariedTown(Town):
    """The town, its train split drawn with varied dice."""

    def dice(self, split: Split, seed: str) -> Dice:
        """Return what scenes of a split are drawn with."""
        if split != "train":
            return super().dice(split, seed)
        return VariedDice(random.Random(seed), split, *self._settled[split])

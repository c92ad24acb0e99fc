"""Words that drills are made of: enough of them that what is written can only be copied, never known by heart."""

from __future__ import annotations

import random
import re
from functools import cache

from wordfreq import top_n_list

from svdexpert.worlds.town import KITS

SYLLABLES = """
    ba be bi bo bra cal cen chi cor da del den dor el en fa fen gal gor ha hel il ja jor ka kel kin la len lo lu
    ma mel mi mor na nel no or pa pel per qui ra ren ri ro sa sel si sol ta tel ti tor u val ven vi wen xa yor
    za zel
""".split()  # noqa: SIM905 - a list of words reads best as text
RUDE = re.compile(
    "anal|ass$|bitch|boob|cock|crap|cunt|damn|dick|fag|fuck|kill|murd|nazi|nigg|porn|puss|rape|sex|shit|slut|suck|tits"
)
SMALL = frozenset("a an and at do for from get in is me my of on or out some the them to up us with".split())  # noqa: SIM905
# Words that turns are filled with; no function of the town is named by one.
COMMON = """
    a about above across again all almost along also always among an and another any anybody anyway are around as
    aside at away back barely be because been before begin behind being below beside best better between big both
    briefly bring but by can carefully certain clearly come could course dare dear decent did different do does doing
    done down during each early either else enough even ever every everything exactly expect far few figure finally
    first for forward friend from fully further gently get give glad go going gone good got had handle happen happily
    hard has have having he heard help her here him his hope how however I idea if imagine in indeed instead into is it
    its itself just keep kind know large last lately later least leave less let like likely little long look lot love
    made maybe me mean might mind more most much must my myself near nearly need never new next nice no nobody none nor
    not nothing now obviously of off often on once one only onto or other otherwise ought our out over own part perhaps
    person pity please plenty point possible pretty probably properly quick quickly quite rather ready really remain
    right same say seem seen several shall she should simply since slightly small so some somebody somehow something
    sometimes somewhere soon sort still straight such suddenly suggest suppose sure surely take talk tell than that the
    their them then there these they thing think this those though thought through till to together told
    too toward tried truly try turn twice under until up upon us usually very want was way we well were what whatever
    when where whether which while who whole whom whose why will wish with within without wonder word would wrong yes
    yet you young your
""".split()  # noqa: SIM905 - a list of words reads best as text
FIELDS = """
    amount area arrival artist author bag balance bed branch brand bus captain car category city code colour
    cost count country course crew cuisine day deck deposit depth desk destination diet direction distance
    doctor driver duration engine entrance fare fee flavour floor format gate genre grade guest guide height
    host hour item kind label language length level line location lot material meal menu method model month name
    number office option order origin owner page party pass phone place plan plate platform play pool price
    purpose rank rate rating reason recipient region rider room route row school seat section sender service
    shape share shelf shop show side size speed spot stage station street style subject table tax team term
    theme ticket time title topic town track type unit user venue view visit volume week weight year zone
""".split()  # noqa: SIM905 - a list of words reads best as text


def _known() -> list[str]:
    """Return English words as they are used, without those of COMMON and those that are numbers or days.

    With 300 words of our own, names of functions were put together from them. It is a general list: 7 of the 10 words
    in names of held-out functions are in it too, without what these functions are or take.
    """
    values = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "one", "two", "three",
              "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"}  # fmt: skip
    left_out = values | SMALL | set(COMMON)
    words = [one for one in top_n_list("en", 10000) if re.fullmatch("[a-z]{3,10}", one) and one not in left_out]
    return [one for one in words if not RUDE.search(one)]


WORDS = _known()


def name(rng: random.Random) -> str:
    """Return a made-up word, capitalised."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


@cache
def town_words() -> list[str]:
    """Return the words of the town's functions of the train split; those of held-out ones are for nobody to learn."""
    kits = [kit for kit in KITS.values() if kit.split == "train"]
    texts = [text for kit in kits for text in (*kit.cores["train"], kit.thing, kit.description)]
    texts += [param.words for kit in kits for param in kit.params.values()]
    return sorted({word.strip(".,").lower() for text in texts for word in text.split()} - SMALL)


def noun(rng: random.Random) -> str:
    """Return a word: a known one, half the time, one of the town or a made-up one."""
    return rng.choice((rng.choice(WORDS), rng.choice(WORDS), rng.choice(town_words()), name(rng).lower()))

"""Words that drills are made of: enough of them that what is written can only be copied, never known by heart."""

from __future__ import annotations

import random
from functools import cache

from svdexpert.worlds.town import KITS

SYLLABLES = """
    ba be bi bo bra cal cen chi cor da del den dor el en fa fen gal gor ha hel il ja jor ka kel kin la len lo lu
    ma mel mi mor na nel no or pa pel per qui ra ren ri ro sa sel si sol ta tel ti tor u val ven vi wen xa yor
    za zel
""".split()  # noqa: SIM905 - a list of words reads best as text
SMALL = frozenset("a an and at do for from get in is me my of on or out some the them to up us with".split())  # noqa: SIM905
WORDS = """
    amber anchor apple arrow autumn bakery barn basket beach bell bench berry blanket blue boat bottle bread
    brick bridge bright bucket butter button cabin candle canvas castle cedar chair cherry church cider circle
    cliff clock cloud coat copper corner cotton cradle cream crystal curtain daisy dance dawn desk dove dragon
    drum dusk eagle east ember engine falcon feather fern field fiddle finch fire flag flour fog forest fountain
    fox frost garden gate ginger glass gold grain grape green grey hammer harvest hazel heron hill honey horn
    house iron island ivy jade jar jasmine kettle key kite lake lamp lantern lark leaf lemon lily linen lion
    maple marble market meadow melon mill mint mirror moon moss music needle nest night north nut oak ocean
    olive onion orange orchard otter owl paper path peach pearl pebble pepper pine plum pond poppy pumpkin
    quartz quilt rabbit rain raven red reed ribbon river road robin rocket rope rose saddle sail salt sand sea
    shell shore silk silver sky smoke snow song south spark spring star stone storm stream sugar summer sun swan
    table tea thunder tide tiger timber tower train tree trumpet tulip valley velvet village violet wagon walnut
    water wave well west wheat wheel white willow wind window wine winter wolf wood wool yard yellow
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
    """Return a word, of a list, of the town or made up."""
    return rng.choice((rng.choice(WORDS), rng.choice(town_words()), name(rng).lower()))

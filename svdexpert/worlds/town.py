"""A small harbour town, generated: its places and people, the functions that serve it, and talk about both.

    facts       a graph: places and people -> attributes -> values, of which some are places and people again
    kits        functions with typed parameters, what users call them, and what their results hold
    turns       template = frame x core x fragments in any order, as clauses or sentences, x chatter; then values

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
TRIES = 4000  # draws of one turn, or of one scene, before the world gives up


@lru_cache(maxsize=1 << 17)
def split_of(text: str) -> Split:
    """Return the split that a text belongs to, whatever its case: 70 % train, 10 % validation, 20 % heldout."""
    place = int.from_bytes(hashlib.blake2b(text.lower().encode(), digest_size=4).digest(), "big") % 10
    return "train" if place < 7 else "validation" if place == 7 else "heldout"


def fits(template: str, split: Split) -> bool:
    """Return whether a user's turn of this template may appear in a split."""
    return split_of(template) == split


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Return one item; faster than `choice`, which most of the time here is spent in."""
    return items[int(rng.random() * len(items))]


class Bank:
    """Phrases, parted by "|", shared out over the splits by their place: 70/10/20 from ten phrases on, and all but the
    last three for train from six on. Shorter banks are shared."""

    def __init__(self, text: str) -> None:
        lines = [" ".join(line.split()) for line in text.split("|")]
        self.all = tuple(lines)
        if len(lines) >= 10:
            kept = [0, 0, 0, 0, 0, 0, 0, 1, 2, 2]
            owners = [kept[index % 10] for index in range(len(lines))]
        elif len(lines) >= 6:
            owners = [0] * (len(lines) - 3) + [1, 2, 2]
        else:
            owners = []
        self._parts = {
            split: tuple(line for line, owner in zip(lines, owners, strict=True) if owner == place)
            if owners
            else self.all
            for place, split in enumerate(SPLITS)
        }

    def __getitem__(self, split: Split) -> tuple[str, ...]:
        return self._parts[split]


def _parts(text: str, mark: str = ";") -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(mark))


def _rows(text: str) -> list[tuple[str, ...]]:
    """Return the rows of a table: columns parted by "|", a row going on after a line that ends in "|" or ";"."""
    joined = re.sub(r"([|;])\s*\n\s*", r"\1 ", text.strip())
    return [_parts(line, "|") for line in joined.splitlines()]


# Values ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """What stands in the text, and what a call's argument is."""

    text: str
    argument: str | int


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TIMES = (
    *(f"{hour} am" for hour in range(7, 12)),
    *(f"{hour} pm" for hour in range(1, 12)),
    *(f"half past {hour}" for hour in HOURS),
)
CLOSING = tuple(f"{hour} pm" for hour in range(4, 12)) + tuple(f"half past {hour}" for hour in HOURS[3:11])
OPENING = tuple(f"{hour} am" for hour in range(5, 12)) + tuple(f"half past {hour}" for hour in HOURS[4:11])
COLOURS = _parts(
    "red, green, blue, yellow, white, black, brown, grey, orange, purple, pink, silver, golden, turquoise, "
    "violet, cream",
    ",",
)
YEARS = tuple(str(year) for year in range(1871, 1991, 3))
DISHES = _parts(
    "crab soup, plum cake, smoked eel, onion bread, lemon tart, pickled herring, mussel stew, honey biscuits, "
    "ginger tea, blue pottery, old maps, model ships, wool blankets, brass lamps, wooden toys, sea salt, "
    "apple cider, fish pie, herb butter, quiet music, glass beads, rope work, paper stars, black coffee",
    ",",
)
SORTS = _parts(
    "bakery, museum, clinic, chandlery, bookshop, theatre, workshop, gallery, tea room, pharmacy, cinema, boathouse",
    ",",
)
TABLES = _parts("restaurant, inn, tavern, diner", ",")
BEDS = _parts("hotel, guest house, hostel, lodge", ",")
INSTRUMENTS = _parts(
    "violin, piano, trumpet, flute, cello, drums, harp, banjo, accordion, clarinet, guitar, oboe, tuba, mandolin", ","
)
PETS = _parts(
    "parrot, tortoise, greyhound, white cat, goat, raven, rabbit, ferret, poodle, hedgehog, donkey, spaniel, "
    "goose, lizard",
    ",",
)
LANGUAGES = _parts(
    "French, Danish, Polish, Greek, Spanish, Welsh, Dutch, Finnish, Turkish, Italian, Norwegian, Czech", ","
)


def _cross(*lists: str) -> tuple[tuple[str, ...], ...]:
    return tuple(_parts(words, ",") for words in lists)


# Names that people and things carry are two words of these; a pair of words belongs to one split, its words to all.
PAIRS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "place": _cross(
        "Blue,Old,Golden,Silver,Quiet,Merry,Salty,Green,Little,Broad,Lucky,Rusty,Amber,Windy,Copper,Painted,Crooked,White,"
        "Drowsy,Sunken,Bright,Hidden,Humble,Northern,Velvet,Wandering,Iron,Lonely,Crimson,Frosty,Gentle,Hollow,Jolly,"
        "Misty,Royal,Scarlet,Sleepy,Stone,Twin,Wild",
        "Heron,Anchor,Lantern,Gull,Otter,Mast,Barrel,Compass,Whale,Oyster,Kettle,Rudder,Seal,Starling,Harbour,Pelican,"
        "Crown,Dolphin,Net,Pebble,Swan,Tide,Willow,Falcon,Bell,Bridge,Candle,Cockle,Ferry,Garden,Harp,Island,Jetty,Key,"
        "Lobster,Mermaid,Oak,Orchard,Raven,Sparrow,Sail,Thistle,Turnip,Walnut,Wagon,Well",
    ),
    "person": _cross(
        "Marta,Joel,Ines,Pavel,Ruth,Samir,Clara,Tobias,Nora,Felix,Greta,Hugo,Amira,Oskar,Lena,Bruno,Edith,Viktor,Paula,"
        "Anton,Sofia,Emil,Hanna,Jonas,Irene,Dario,Agnes,Milo,Tessa,Ravi,Olga,Caspar,Wanda,Leon,Petra,Ivo,Maud,Selma,"
        "Otto,Yara",
        "Lindqvist,Okafor,Brandt,Pereira,Novak,Hale,Moreau,Castell,Ferris,Quist,Abbott,Varga,Sorel,Dunne,Ekberg,Tanaka,"
        "Whitlock,Rossi,Kemp,Jansen,Mbeki,Fontaine,Garrow,Holm,Ilves,Keller,Larkin,Marsh,Nadeem,Orlov,Pryce,Radley,"
        "Stone,Thorne,Ulrich,Vance,Weber,Yates,Zeller,Bloom",
    ),
    "street": _cross(
        "Mill,Rope,Chapel,Pilot,Tanner,Cooper,Elm,Fisher,Garnet,Hazel,Juniper,Kiln,Ladder,Maple,Needle,Orchid,Pepper,"
        "Quarry,Rector,Sailor,Tallow,Union,Violet,Weaver,Copper,Ash,Baker,Cedar,Dover,Farrier,Glover,Hatter,Ivy,King,"
        "Linden,Mason,North,Potter,Spring,Wharf",
        "Street,Lane,Road,Row,Quay,Hill",
    ),
    "town": _cross(
        "Cress,Eller,Marl,Tor,Wex,Hal,Brack,Dun,Fen,Gol,Hess,Kil,Lor,Myr,Nor,Pell,Rav,Sker,Thal,Ulm",
        "wick,haven,mouth,by,stead,more,port,holm,ness,fold,ton,dale",
    ),
    "title": _cross(
        "Paper,Distant,Early,Broken,Winter,Secret,Slow,Northern,Endless,Simple,Borrowed,Burning,Sudden,Forgotten,Patient,"
        "Electric,Velvet,Second,Careless,Folded,Honest,Hollow,Midnight,Restless",
        "Morning,River,Letters,Dancer,Window,Harvest,Stranger,Mirror,Thunder,Summer,Engine,Garden,Shadows,Promise,Train,"
        "Mountain,Feather,Kingdom,Orchard,Signal,Weather,Horizon,Machine,Lullaby",
    ),
    "item": _cross(
        "brown,fresh,dried,sweet,salted,organic,sliced,smoked,frozen,plain,spicy,mild,young,ripe,ground,whole",
        "bread,rice,cheese,apples,carrots,lentils,butter,yoghurt,tea,onions,noodles,beans,ham,plums,peppers,almonds,"
        "mushrooms,oats,flour,honey",
    ),
    "fault": _cross(
        "broken,loose,blocked,flickering,leaking,rusty,missing,cracked,fallen,noisy,bent,jammed",
        "street lamp,drain,bench,railing,hydrant,road sign,kerb,gate,fountain,bus shelter,bin,pump,bollard,meter",
    ),
    "problem": _cross(
        "dripping,clogged,burst,frozen,leaking,cracked,stuck,corroded,squeaking,overflowing",
        "tap,boiler,sink,shower,radiator,pipe,bathtub,toilet,valve,cistern,water heater,basin",
    ),
    "ailment": _cross(
        "sore,stiff,swollen,itchy,bruised,burning,numb,aching,twisted,tender",
        "throat,knee,wrist,shoulder,ankle,ear,elbow,neck,thumb,hip,eye,back",
    ),
    "task": _cross(
        "water,collect,polish,return,order,wrap,repair,sort,feed,check,label,empty,move,clean,count",
        "the plants,the laundry,the keys,the boots,the letters,the hens,the battery,the attic,the boxes,the invoices,"
        "the skates,the curtains,the kettle,the chairs,the camera",
    ),
    "course": _cross(
        "evening,weekend,outdoor,basic,modern,classic,practical,summer,winter,family",
        "pottery,sailing,weaving,bookkeeping,baking,drawing,welding,singing,chess,gardening,knitting,photography",
    ),
    "flower": _cross(
        "white,yellow,pale,dark,pink,wild,striped,tall,dwarf,scented",
        "tulips,roses,lilies,daisies,irises,asters,dahlias,poppies,orchids,peonies,violets,ferns",
    ),
    "thing": _cross(
        "amber,rough,tin,cedar,chalk,coral,dusty,pearl,plaid,quartz,slate,tawny,woven,zinc,mossy,linen,ivory,jade,felt,"
        "clay,bronze,wicker,marble,flint",
        "fox,comet,ladder,spoon,tower,wheel,button,acorn,hammer,pillow,ribbon,saddle,teapot,violet,wagon,yarn,beetle,"
        "cactus,dragon,funnel,goblet,hinge,insect,jigsaw",
    ),
}
INTEGERS = ("count", "amount")


def free(rng: random.Random, split: Split, kind: str) -> str:
    """Return a name, title, code or amount of a kind, one that belongs to the split."""
    while True:
        if kind == "code":
            text = f"{pick(rng, 'ABCDEFGHJKLMNPRSTUVWXYZ')}{rng.randrange(1000, 10000)}"
        elif kind == "amount":
            text = str(rng.randrange(13, 990))
        elif kind == "price":
            text = f"{rng.randrange(6, 320)} pounds"
        elif kind == "room":
            text = f"room {rng.randrange(2, 400)}"
        elif kind == "town":
            text = pick(rng, PAIRS[kind][0]) + pick(rng, PAIRS[kind][1])
        else:
            text = f"{pick(rng, PAIRS[kind][0])} {pick(rng, PAIRS[kind][1])}"
        if split_of(f"{kind} {text}") == split:
            return text


def within(inner: str, outer: str) -> bool:
    """Return whether a text stands in another as whole words, whatever its case."""
    if inner.lower() not in outer.lower():  # compiling a pattern costs more than all the rest
        return False
    return re.search(rf"(?<!\w){re.escape(inner)}(?!\w)", outer, re.IGNORECASE) is not None


def clash(one: str, two: str) -> bool:
    """Return whether two values could be taken for one another: one holds the other."""
    return within(one, two) or within(two, one)


# Parameters and functions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Param:
    """A parameter: its kind of value (or the values it may take, parted by "/"), what it is called, how users give it
    as a fragment ({v}), and the natural questions for it."""

    name: str
    kind: str
    words: str
    inline: tuple[str, ...]
    asks: tuple[str, ...]

    @property
    def schema(self) -> str | Sequence[str]:
        """Its JSON type, or the values it may take."""
        if "/" in self.kind:
            return self.kind.split("/")
        return "integer" if self.kind in INTEGERS else "string"

    def fragment(self, form: str) -> str:
        """Return a fragment with a slot of this parameter's name."""
        return form.replace("{v}", f"{{{self.name}}}")


def _param(name: str, kind: str, words: str, inline: str, asks: str) -> Param:
    return Param(name, kind, words, _parts(inline), _parts(asks))


PARAMS = {
    row[0]: _param(*row)
    for row in _rows("""
    day | day | day | on {v}; for {v}; this {v}; on the coming {v} |
        Which day would you like?; On which day should it be?; What day suits you?
    time | time | time | at {v}; for {v}; at {v} sharp; around {v} |
        What time would you like?; At what time should it be?; What time suits you?
    people | count | number of people | for {v}; for {v} people; for {v} of us; for a party of {v} |
        How many people will you be?; For how many people should it be?
    place | table place | place | at the {v}; in the {v}; over at the {v} |
        Which place would you like?; Where should it be?; At which place should it be?
    area | window/terrace/garden/corner | area | in the {v} area; with a {v} seat |
        Which area would you like?; In which area should it be?
    occasion | birthday/wedding/farewell/reunion | occasion | for a {v}; as it is a {v} |
        What is the occasion?; For which occasion is it?
    pickup | address | pickup address | from {v}; starting at {v}; leaving from {v}; with a pickup at {v} |
        What is the pickup address?; Where should the pickup be?
    destination | place | destination | to the {v}; going to the {v}; over to the {v}; heading for the {v} |
        What is the destination?; Where would you like to go?
    passengers | count | number of passengers | with {v} passengers; for {v} passengers |
        How many passengers will there be?; For how many passengers?
    car | small/large/electric | car | in a {v} car; with a {v} car |
        Which car would you like?; What car?
    harbour | town | harbour | to {v}; over to {v}; across to {v}; bound for {v} |
        Which harbour would you like to go to?; Where would you like to go, to which harbour?
    tickets | count | number of tickets | with {v} tickets; {v} tickets in all; {v} of them |
        How many tickets would you like?; How many tickets should I buy?
    seat | deck/cabin/lounge | seat | with a {v} seat; in the {v} class |
        Which seat would you like?; What seat should it be?
    type | city/mountain/cargo/folding | type | of the {v} type; a {v} one; of type {v} |
        Which type would you like?; What type should it be?
    hours | count | number of hours | for {v} hours; {v} hours long; lasting {v} hours |
        For how many hours?; How many hours would you like?
    name | person | name | under the name {v}; in the name of {v}; with the name {v} |
        What is the name?; Which name should I put down?
    recipient | person | recipient | to {v}; for {v}; addressed to {v} |
        Who is the recipient?; What is the name of the recipient?
    address | address | address | at {v}; at the address {v}; over at {v} |
        What is the address?; Which address should I put down?
    weight | count | weight in kilos | weighing {v} kilos; of {v} kilos; with a weight of {v} kilos |
        What is the weight?; How many kilos does it weigh?
    speed | standard/express/overnight | speed | by {v} delivery; with {v} delivery |
        Which speed would you like?; At what speed should it go?
    doctor | person | doctor | with {v}; with doctor {v}; to see {v} |
        Which doctor would you like to see?; What is the name of the doctor?
    reason | ailment | reason | because of a {v}; about a {v}; for a {v} |
        What is the reason?; For what reason do you need it?
    hotel | bed place | hotel | at the {v}; in the {v}; over at the {v} |
        Which hotel would you like?; Where should it be, in which hotel?
    arrival | day | day of arrival | from {v}; arriving on {v}; from {v} on; starting on {v} |
        Which day is your arrival?; On which day do you arrive?
    nights | count | number of nights | for {v} nights; staying {v} nights; {v} nights in all |
        How many nights will you stay?; For how many nights?
    bed | single/double/twin | bed | with a {v} bed; with {v} bed |
        Which bed would you like?; What bed should it have?
    view | sea/street/courtyard | view | with a {v} view; on the {v} side |
        Which view would you like?; What view should it have?
    fault | fault | fault | about a {v}; namely a {v}; concerning a {v}; it is a {v} |
        What is the fault?; Which fault is it?
    location | address | location | at {v}; near {v}; outside {v}; in front of {v} |
        What is the location?; Where is it, at which location?
    holder | person | holder | for {v}; belonging to {v}; held by {v} |
        Who is the holder?; What is the name of the holder?
    card | code | card number | number {v}; with the number {v}; card number {v} |
        What is the card number?; Which number does the card have?
    months | count | number of months | for {v} months; {v} months long |
        For how many months?; How many months would you like?
    item | item | item | with {v}; namely {v}; including {v} |
        Which item would you like?; What item should I order?
    quantity | count | quantity | in {v} packs; {v} packs of it; {v} packs in all |
        What quantity would you like?; Which quantity should I order?
    problem | problem | problem | for a {v}; because of a {v}; to fix a {v}; with a {v} |
        What is the problem?; Which problem should be fixed?
    category | bakery/museum/clinic/bank/market | category | such as a {v}; like a {v}; namely a {v} |
        Which category would you like?; What category of place is it?
    street | street | street | in {v}; near {v}; close to {v}; along {v} |
        Which street should it be in?; Where should it be, in which street?
    budget | cheap/moderate/fancy | budget | with {v} prices; in the {v} range |
        Which budget do you have?; What is the budget?
    title | title | title | called {v}; with the title {v}; namely {v} |
        What is the title?; Which title would you like?
    room | kitchen/bedroom/study/hall/workshop | room | in the {v}; for the {v} |
        Which room would you like?; In which room should it be?
    volume | count | volume | at volume {v}; with the volume at {v} |
        What volume would you like?; At which volume?
    task | task | task | to {v}; so that I {v}; namely to {v} |
        What is the task?; Which task should it be?
    booking | code | booking number | number {v}; with the number {v}; booking number {v} |
        What is the booking number?; Which number does the booking have?
    amount | amount | amount in pounds | of {v} pounds; {v} pounds; in the amount of {v} pounds |
        What amount would you like?; What is the amount?
    account | code | account | from account {v}; using account {v}; with account {v} |
        Which account should I use?; What is the account?
    reference | title | reference | with the reference {v}; under the reference {v} |
        What is the reference?; Which reference would you like?
    course | course | course | in {v}; called {v}; namely {v} |
        Which course would you like?; What is the course?
    student | person | student | for {v}; with {v} as the student; with {v} taking part |
        Who is the student?; What is the name of the student?
    level | beginner/advanced/refresher | level | at the {v} level; on {v} level |
        Which level would you like?; What level should it be?
    language | language | language | in {v}; speaking {v}; who speaks {v} |
        Which language would you like?; What language should it be in?
    meeting_point | place | meeting point | starting at the {v}; meeting at the {v}; from the {v} |
        What is the meeting point?; Where is the meeting point?
    stylist | person | stylist | with {v}; done by {v}; by {v} |
        Which stylist would you like?; Who should be the stylist?
    style | short/curly/layered | style | in a {v} style; with a {v} cut |
        Which style would you like?; What style should it be?
    flower | flower | flower | with {v}; of {v}; made of {v} |
        Which flower would you like?; What flower should it be?
    colour | red/white/blue/silver | colour | with a {v} ribbon; in {v} paper |
        Which colour would you like?; What colour should it be?
""")
}

GENERIC_ASKS = (
    "Which {words} would you like?",
    "What {words} should I put down?",
    "Could you tell me the {words}?",
    "May I have the {words}, please?",
    "What is the {words}?",
)


@dataclass(frozen=True)
class Kit:
    """A function and how it is spoken of.

    Args:
        name: the function's name.
        split: the only split that lists it; a train kit is listed in all.
        required: names of required parameters.
        optional: names of optional parameters.
        thing: what its result is about, without an article.
        done: how the thing is afterwards ("booked").
        fields: attributes that its result holds.
        cores: what users say they want, as an imperative.
        params: its parameters by name.
        made_up: True where it exists in one scene only.
        description: for opaque names.
    """

    name: str
    split: Split
    required: tuple[str, ...]
    optional: tuple[str, ...]
    thing: str
    done: str
    fields: tuple[str, ...]
    cores: Bank
    params: Mapping[str, Param]
    made_up: bool = False
    description: str = ""

    @property
    def tool(self) -> Tool:
        """Its JSON schema."""
        types = {key: one.schema for key, one in self.params.items()}
        return tool(self.name, types, required=self.required, description=self.description)

    def phrases(self, split: Split) -> tuple[str, ...]:
        """Return its cores for a split: a kit of one split only has all of them there."""
        return self.cores[split] if self.split == "train" and not self.made_up else self.cores.all


def _kit(name: str, split: str, signature: str, thing: str, done: str, fields: str, cores: str) -> Kit:
    words = signature.split()
    required = tuple(word for word in words if not word.endswith("?"))
    optional = tuple(word[:-1] for word in words if word.endswith("?"))
    params = {key: PARAMS[key] for key in (*required, *optional)}
    lines = Bank(cores.replace(";", "|"))
    home = next(one for one in SPLITS if one == split)
    return Kit(name, home, required, optional, thing, done, tuple(fields.split()), lines, params)


KITS = {
    row[0]: _kit(*row)
    for row in _rows("""
    book_table | train | place day time people area? occasion? name? | table | booked | number contact deposit room |
        book a table; reserve a table; get a table; secure a table; arrange a table; have a table kept;
        put down a table
    order_taxi | train | pickup destination time passengers? car? | taxi | ordered | driver price plate number |
        order a taxi; call a taxi; get a cab; book a taxi; send a taxi; arrange a cab; find a taxi
    buy_ferry_tickets | train | harbour day tickets seat? name? | ferry | booked | leaves gate price number |
        buy ferry tickets; get ferry tickets; book the ferry; buy tickets for the ferry; get a passage on the ferry;
        book a crossing; get tickets for the boat
    rent_bike | train | type day hours name? | bike | rented | number price stand contact |
        rent a bike; hire a bike; get a bike; book a bike; borrow a bike; reserve a bicycle; take a bicycle
    send_parcel | train | recipient address weight speed? name? | parcel | sent | number price due contact |
        send a parcel; ship a parcel; mail a package; send a package; dispatch a parcel; post a parcel; ship a box
    book_doctor | train | doctor day reason time? name? | visit | booked | number room price contact |
        book a doctor; get an appointment; make an appointment; book a visit; arrange a visit; set up an appointment;
        arrange a check-up
    reserve_room | train | hotel arrival nights bed? view? name? | room | reserved | number price contact deposit |
        reserve a room; book a room; get a room; take a room; arrange a room; have a room kept; find a room
    report_fault | train | fault location name? | report | filed | number contact due |
        report a fault; file a report; pass on a report; report something; register a fault; hand in a report;
        raise a report
    renew_library_card | train | holder card months? | library card | renewed | number price due contact |
        renew a library card; extend a library card; renew my library card; prolong a library card;
        renew a card at the library; have a library card extended; get a library card renewed
    order_groceries | train | item quantity address day? time? | order | placed | number price driver contact |
        order groceries; order food; get groceries; buy groceries; have groceries delivered; place a grocery order;
        get some food brought
    hire_plumber | train | problem address day time? name? | plumber | hired | contact price deposit number |
        hire a plumber; get a plumber; book a plumber; send a plumber; find a plumber; call a plumber;
        arrange a plumber
    find_place | train | category street budget? day? | place | found | owner until stand |
        find a place; look for a place; search for a place; choose a place; look up a place; pick a place;
        spot a place
    play_music | train | title room volume? time? | song | queued | singer number album |
        play some music; put on a song; play a song; start some music; put on some music; turn on a song; play a tune
    set_reminder | train | task day time name? room? | reminder | set | number melody |
        set a reminder; write a reminder; create a reminder; make a reminder; add a reminder; put in a reminder;
        note a reminder
    get_opening_hours | validation | destination day street? | place | found | until contact owner |
        look up the opening hours; check the opening hours; get the opening hours; find out the opening hours
    move_booking | validation | booking day time people? name? | booking | moved | contact room price |
        move a booking; shift a booking; change a booking; move my booking
    transfer_money | heldout | recipient amount account reference? day? | transfer | made | number price due contact |
        transfer money; send money; make a transfer; wire money; make a payment; pay some money
    enrol_course | heldout | course student level day? name? | course | booked | teacher room begins price |
        enrol in a course; sign up for a course; book a course; join a course; get a place on a course
    hire_guide | heldout | language meeting_point day hours people? | tour | booked | contact price number begins |
        hire a guide; book a guide; get a guide; find a guide; arrange a guided tour
    book_haircut | heldout | stylist day time style? name? | haircut | booked | price room contact number |
        book a haircut; get a haircut; arrange a haircut; reserve a haircut; make a salon appointment
    order_flowers | heldout | flower recipient address colour? day? | bouquet | ordered | number price driver arrives |
        order flowers; send flowers; get flowers; have flowers delivered; order a bouquet; send a bouquet
""")
}

MADE_VERBS = _parts(
    "polish, fold, tune, stack, weigh, paint, mend, wrap, sort, trim, roast, brew, stamp, glue, carve, wash, "
    "load, press, tint, heat, seal, pack, rinse, grind, bind, forge, dye, knot, lace, mould, oil, peel, quilt, "
    "sand, scan, spin, thaw, twist, wax, weave",
    ",",
)
MADE_NOUNS = _parts(
    "lantern, carpet, drum, kettle, puppet, statue, mirror, basket, blanket, barrel, compass, candle, helmet, "
    "ladder, marble, needle, paddle, quill, rocket, saddle, trophy, urn, vase, whistle, anvil, banner, cradle, "
    "dome, easel, feather, goblet, hammock, jar, kite, locket, mask, napkin, organ, pillar, robe",
    ",",
)
MADE_PARAMS = _parts(
    "shelf, pattern, tool, finish, owner_tag, shade, layer, label, texture, material, drawer, fabric, mark, "
    "symbol, handle, frame, mode, grade, batch, channel, section, theme, zone, stage, profile, coating, "
    "holder_tag, border, slot_name, mixture, route, sample, cover, ribbon, trim, lining, edge_style, base_kind, "
    "varnish, stencil, thread, badge, crate, tray",
    ",",
)
MADE_COUNTS = _parts(
    "count, copies, depth, rounds, minutes, width, pieces, turns, strength, height, passes, degrees, portions, "
    "strips, repeats, stacks",
    ",",
)
MADE_INLINE = _parts(
    "with {v} as the {words}; with the {words} {v}; and {v} for the {words}; using the {words} {v}; {words} {v}; "
    "and the {words} {v}; taking {v} as the {words}; the {words} being {v}"
)


# What can be said about things ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attribute:
    """What can be true of a thing ({S}): clauses with a value ({v}), questions, and the value as part of a clause."""

    name: str
    kind: str
    clauses: tuple[str, ...]
    asks: tuple[str, ...]
    indirect: tuple[str, ...]
    phrase: str


def _attribute(name: str, kind: str, phrase: str, clauses: str, asks: str, indirect: str) -> Attribute:
    return Attribute(name, kind, _parts(clauses), _parts(asks), _parts(indirect), phrase)


STORED = {
    row[0]: _attribute(*row)
    for row in _rows("""
    closes | closing | at {v} |
        {S} closes at {v}; {S} shuts at {v}; the closing time of {S} is {v}; {S} stays open until {v} |
        when does {S} close; what time does {S} close; until when is {S} open |
        when {S} closes; what time {S} closes
    opens | opening | at {v} |
        {S} opens at {v}; {S} is open from {v}; the opening time of {S} is {v} |
        when does {S} open; what time does {S} open |
        when {S} opens; what time {S} opens
    street | street | in {v} |
        {S} is in {v}; {S} can be found in {v}; the street of {S} is {v} |
        where is {S}; in which street is {S}; where can I find {S} |
        where {S} is; in which street {S} is
    owner | person | to {v} |
        {S} belongs to {v}; the owner of {S} is {v}; {S} is owned by {v} |
        who owns {S}; who is the owner of {S}; to whom does {S} belong |
        who owns {S}; who the owner of {S} is
    neighbour | place | next to the {v} |
        {S} stands next to the {v}; {S} is beside the {v}; the neighbour of {S} is the {v} |
        what stands next to {S}; what is beside {S}; which place is next to {S} |
        what stands next to {S}; what is beside {S}
    speciality | dish | for {v} |
        {S} is known for {v}; {S} is famous for {v}; the speciality of {S} is {v} |
        what is {S} known for; what is {S} famous for; what is the speciality of {S} |
        what {S} is known for; what {S} is famous for
    door | colour | {v} |
        the door of {S} is {v}; {S} has a {v} door; the colour of the door of {S} is {v} |
        what colour is the door of {S}; which colour does the door of {S} have |
        what colour the door of {S} is
    year | year | in {v} |
        {S} was built in {v}; {S} dates from {v}; the year of {S} is {v} |
        when was {S} built; in which year was {S} built; how old is {S} |
        when {S} was built; in which year {S} was built
    home | street | in {v} |
        {S} lives in {v}; the home of {S} is in {v}; {S} has a flat in {v} |
        where does {S} live; in which street does {S} live; where is the home of {S} |
        where {S} lives; in which street {S} lives
    instrument | instrument | the {v} |
        {S} plays the {v}; the instrument of {S} is the {v}; {S} practises the {v} |
        what does {S} play; which instrument does {S} play; what is the instrument of {S} |
        what {S} plays; which instrument {S} plays
    pet | pet | a {v} |
        {S} keeps a {v}; the pet of {S} is a {v}; {S} owns a {v} |
        which pet does {S} keep; what is the pet of {S}; what animal does {S} keep |
        which pet {S} keeps; what animal {S} keeps
""")
}
PLACE_ATTRIBUTES = ("closes", "opens", "street", "owner", "neighbour", "speciality", "door", "year")
PERSON_ATTRIBUTES = ("home", "instrument", "pet")
POOLS: Mapping[str, tuple[str, ...]] = {
    "closing": CLOSING,
    "opening": OPENING,
    "dish": DISHES,
    "colour": COLOURS,
    "year": YEARS,
    "instrument": INSTRUMENTS,
    "pet": PETS,
}

FIELDS = {
    row[0]: _attribute(*row)
    for row in _rows("""
    number | code | {v} |
        the number of {S} is {v}; {S} has the number {v}; {S} has {v} as its number |
        what is the number of {S}; which number does {S} have |
        what the number of {S} is; which number {S} has
    price | price | {v} |
        {S} costs {v}; the price of {S} is {v}; {v} is the price of {S} |
        what does {S} cost; what is the price of {S}; how much is {S} |
        what {S} costs; how much {S} is
    deposit | price | {v} |
        the deposit for {S} is {v}; {S} needs a deposit of {v}; {v} is the deposit for {S} |
        what is the deposit for {S}; how much deposit does {S} need |
        what the deposit for {S} is; how much deposit {S} needs
    driver | person | {v} |
        the driver of {S} is {v}; {v} is the driver of {S}; {S} comes with {v} |
        who is the driver of {S}; who comes with {S} |
        who the driver of {S} is; who comes with {S}
    contact | person | {v} |
        the contact for {S} is {v}; {v} is the contact for {S}; {v} looks after {S} |
        who is the contact for {S}; who looks after {S} |
        who the contact for {S} is; who looks after {S}
    teacher | person | {v} |
        the teacher of {S} is {v}; {v} is the teacher of {S}; {v} teaches {S} |
        who is the teacher of {S}; who teaches {S} |
        who the teacher of {S} is; who teaches {S}
    singer | person | {v} |
        the singer of {S} is {v}; {v} is the singer of {S}; {S} is sung by {v} |
        who is the singer of {S}; who sings {S} |
        who the singer of {S} is; who sings {S}
    owner | person | {v} |
        the owner of {S} is {v}; {v} is the owner of {S}; {S} belongs to {v} |
        who is the owner of {S}; to whom does {S} belong |
        who the owner of {S} is; to whom {S} belongs
    album | title | {v} |
        the album of {S} is {v}; {S} is on the album {v}; {S} is from {v} |
        what is the album of {S}; on which album is {S} |
        what the album of {S} is; on which album {S} is
    melody | title | {v} |
        the melody of {S} is {v}; {S} has the melody {v}; {v} is the melody of {S} |
        what is the melody of {S}; which melody does {S} have |
        what the melody of {S} is; which melody {S} has
    plate | code | {v} |
        the plate of {S} is {v}; {S} has the plate {v}; {S} carries the plate {v} |
        what is the plate of {S}; which plate does {S} have |
        what the plate of {S} is; which plate {S} has
    gate | code | {v} |
        the gate of {S} is {v}; {S} goes from gate {v}; {S} uses gate {v} |
        what is the gate of {S}; from which gate does {S} go |
        what the gate of {S} is; from which gate {S} goes
    room | room | in {v} |
        {S} is in {v}; {S} takes place in {v}; {v} is kept for {S} |
        where is {S}; in which room is {S} |
        where {S} is; in which room {S} is
    stand | street | in {v} |
        {S} is in {v}; {S} can be found in {v}; {S} stands in {v} |
        where is {S}; in which street is {S} |
        where {S} is; in which street {S} is
    arrives | time | at {v} |
        {S} arrives at {v}; {S} comes at {v}; {S} will be there at {v} |
        when does {S} arrive; what time does {S} come |
        when {S} arrives; what time {S} comes
    leaves | time | at {v} |
        {S} leaves at {v}; {S} departs at {v}; {S} goes at {v} |
        when does {S} leave; what time does {S} go |
        when {S} leaves; what time {S} goes
    begins | time | at {v} |
        {S} begins at {v}; {S} starts at {v}; the start of {S} is at {v} |
        when does {S} begin; what time does {S} start |
        when {S} begins; what time {S} starts
    until | time | until {v} |
        {S} is free until {v}; {S} is ours until {v}; {S} stays free until {v} |
        until when is {S} free; how long is {S} free |
        until when {S} is free; how long {S} is free
    due | day | on {v} |
        {S} is due on {v}; {S} will be ready on {v}; the due day of {S} is {v} |
        when is {S} due; on which day is {S} due |
        when {S} is due; on which day {S} is due
""")
}


@dataclass(frozen=True)
class Fact:
    """A stored fact: an edge of the graph.

    Args:
        subject: a place or a person.
        attribute: a key of STORED.
        value: its value as it stands in a sentence.
        sentence: the true sentence.
        others: every other value of the attribute's pool that cannot be taken for the value.
        question: one question for it.
        split: the split of its subject.
        about: the subject as it stands in a template: "the {subject}" or "{subject}".
    """

    subject: str
    attribute: str
    value: str
    sentence: str
    others: tuple[str, ...]
    question: str
    split: Split
    about: str


# Banks of phrases -----------------------------------------------------------------------------------------------------

# {core}: what is wanted; {d}: details as fragments.
FRAMES = Bank("""
    {core} {d}. | please {core} {d}. | can you {core} {d}? | could you {core} {d}? | I would like to {core} {d}. |
    I want to {core} {d}. | I need to {core} {d}. | would you {core} {d}? | we would like to {core} {d}. |
    {core} {d}, please. | could you please {core} {d}? | I have to {core} {d}. | let us {core} {d}. |
    I would love to {core} {d}. | can I {core} {d}? | help me {core} {d}. | I am looking to {core} {d}. |
    it is time to {core} {d}. | I hope you can {core} {d}. | do me a favour and {core} {d}. |
    I am trying to {core} {d}. | my plan is to {core} {d}. | we want to {core} {d}. | I was hoping to {core} {d}. |
    would it be possible to {core} {d}? | may I ask you to {core} {d}? | I wish to {core} {d}. |
    could we {core} {d}? | {d}, could you {core}? | would you kindly {core} {d}? | go ahead and {core} {d}. |
    we need to {core} {d}. | {d}, please {core}. | I thought you could {core} {d}. | what I need is to {core} {d}. |
    is it possible to {core} {d}? | my wife and I want to {core} {d}. | I ask you to {core} {d}. |
    {d}, I would like to {core}. | can we {core} {d}? | are you able to {core} {d}? | someone has to {core} {d}. |
    I decided to {core} {d}. | kindly {core} {d}. | I should {core} {d}. | is there a way to {core} {d}? |
    I intend to {core} {d}. | do you think you can {core} {d}? | it would help me to {core} {d}. |
    the thing is to {core} {d}.
""")
OPENERS = Bank("""
    hello, | hi, | hi there, | good morning, | okay, | so, | well, | hey, | good day, | listen, | right, |
    good evening, | alright, | hello there, | excuse me, | now, | sorry to bother you, | dear helper, |
    one more thing, | by the way, | good afternoon, | greetings, | oh, | quick one, | hey there, | first of all, |
    ah, | let me see, | say, | look,
""")
CLOSERS = Bank("""
    thanks. | thank you. | thanks a lot. | that would be great. | many thanks. | that is all. | cheers. |
    thank you so much. | I appreciate it. | that would be lovely. | much obliged. | thanks in advance. |
    that would help a lot. | bye for now. | that should be it. | have a good one. | I count on you. | nice of you. |
    that would be kind. | thank you kindly. | great. | perfect, thanks. | no rush. | that would be wonderful. |
    you are a star. | with thanks. | best wishes. | nothing else. | that does it. | thanks, friend.
""")
CHATTER = Bank("""
    It has been a long week. | My sister recommended it. | We have looked forward to this for ages. |
    The weather looks fine. | I am new in town. | My phone is nearly empty. | I have been meaning to do this. |
    Everybody at work talks about it. | It is a surprise, so keep it quiet. | I do hope that it works out. |
    My neighbour did the same. | I have never done this before. | The kids are very excited. |
    Last summer it went well. | I am a little late with this. | My back is tired from all the sitting. |
    We just came off the boat. | The old way was so slow. | My mother keeps asking for it. | It rained all morning. |
    I am writing from the train. | You helped me nicely the other day. | My colleague was very happy with it. |
    The wind is strong down at the pier. | I nearly forgot about it. | It should not be too hard. |
    I could not sort it out by myself. | There is a lot going on at home. | My cousin swears by it. |
    I had a lovely walk just now. | We are all quite cheerful. | The dog is waiting at the door. |
    I am a bit nervous about it. | People say good things about that. | I have my hands full with the garden. |
    It is not a big thing. | The market was crowded. | My uncle asked me to see to it. |
    I should have done it long ago. | It matters a lot to me. | The sun is out at last. |
    I am sitting at the kitchen table. | They were friendly the last time. | My glasses are broken, so bear with me. |
    It is my turn to organise things. | We are tired of waiting. | My friends left it all to me. |
    I just finished my coffee. | The house is full of guests. | I promised to take care of it.
""")
SENTENCES = Bank("""
    The {words} is {v}. | The {words} should be {v}. | {words}: {v}. | For the {words}, {v}. |
    Take {v} as the {words}. | Make the {words} {v}. | It is {i}. | Put down {v} as the {words}. |
    As for the {words}, {v}. | It should be {i}. | My {words} is {v}. | I would like it {i}. | That would be {i}. |
    The {words} would be {v}. | {v} for the {words}. | Use {v} for the {words}. | I want it {i}. |
    With {v} as the {words}. | The {words} has to be {v}. | Let it be {i}. | I need it {i}. |
    The {words}, that is {v}. | Please note {v} as the {words}. | My choice for the {words} is {v}. |
    We want it {i}. | Go with {v} for the {words}. | Note the {words}: {v}. | Preferably {i}. |
    Set the {words} to {v}. | I mean {i}.
""")
ANSWERS = Bank("""
    {i}. | {v}. | {v}, please. | {i}, please. | It is {v}. | The {words} is {v}. | Let us say {v}. |
    {v} would be good. | I would say {v}. | {words}: {v}. | Make it {v}. | That would be {v}. | {v}, thank you. |
    Oh, {v}. | {i}, I think. | {v}, if you can. | Right, {v}. | Sorry, {v}. | Ah yes, {v}. |
    The {words} should be {v}. | Good question, {v}. | {v} is fine. | {v} it is. | Sure, {v}. | {v}, thanks. |
    Take {v}. | I forgot: {v}. | Well, {v}. | Of course, {v}. | I meant {v}. | {i}, thanks. | Put {v}. | Hm, {v}. |
    {v} sounds right. | Preferably {v}. | {v}, that is. | {i} then. | My choice is {v}. | Say {v}. | Okay, {v}.
""")
CHANGES = Bank("""
    actually, make the {words} {v}. | wait, the {words} should be {v}. |
    sorry, I changed my mind, {v} for the {words}. | hold on, the {words} has to be {v}. |
    let me correct that, the {words} is {v}. | I would rather have {v} as the {words}. |
    oh, and change the {words} to {v}. | one correction, the {words} is {v}. |
    my mistake, the {words} should be {v}. | please change the {words} to {v}. |
    on second thought, {v} for the {words}. | can we make the {words} {v}? | no, wait, I need {v} as the {words}. |
    hm, better take {v} as the {words}. | I got that wrong, the {words} is {v}. |
    something came up, make the {words} {v}. | switch the {words} to {v}, please. | I misspoke, the {words} is {v}. |
    a small change, the {words} will be {v}. | let us take {v} for the {words} instead.
""")
MISHEARD = Bank("""
    no, I said {v}, not {w}. | I said {v}, not {w}. | not {w}, the {words} is {v}. |
    that is wrong, I asked for {v}, not {w}. | no, {v}, not {w}. | you misread me, the {words} is {v}, not {w}. |
    I never said {w}, I said {v}. | please read again, it is {v} and not {w}. | sorry, but I wrote {v}, not {w}. |
    no, the {words} is {v}, I did not say {w}. | wait, I told you {v}, not {w}. |
    it was {v} that I asked for, not {w}. | that {words} is wrong, {v} is right, not {w}. | hold on, {v}, not {w}. |
    careful, I gave you {v} as the {words}, not {w}. | it should say {v}, not {w}. |
    there is a mistake, I wanted {v} and not {w}. | no no, {v}, you wrote {w}. | the {words} must be {v}, not {w}. |
    look again, I wrote {v}, not {w}.
""")
MORE = (
    "Certainly. Tell me more.",
    "Of course, go on.",
    "Sure, I am listening.",
    "Gladly. Give me the details.",
    "All right, I have noted that. Go on.",
)
DONE = (
    "Done, {done} {d}.",
    "All set, {done} {d}.",
    "It is done: {done} {d}.",
    "Very well, {done} {d}.",
)
REFUSALS = (
    "I am sorry, I cannot {core} here.",
    "Sorry, I have no way to {core}.",
    "I am afraid I cannot {core} for you.",
    "Unfortunately none of my functions can {core}.",
)
REPORTS = (
    "Your {thing} is {done}, {c}.",
    "Done, your {thing} is {done} and {c}.",
    "Your {thing} is {done}. Please note that {c}.",
    "All set: your {thing} is {done}, {c}.",
)
BRIEF = ("Your {thing} is {done}.", "Done, your {thing} is {done}.", "All set, your {thing} is {done}.")

# {c}: the claimed clause. The same lines serve the false, the true and the correcting claim.
CLAIMS: Mapping[str, Bank] = {
    "direct": Bank("""
    {c}. | I think {c}. | you know, {c}. | as far as I know, {c}. | I heard that {c}. | so {c}. | it seems that {c}. |
    well, {c}. | of course {c}. | I am quite sure that {c}. | I remember that {c}. | I see that {c}. | okay, so {c}. |
    I believe {c}. | I take it that {c}. | then {c}. | it says here that {c}. | I understood that {c}. |
    to sum up, {c}. | I noted that {c}.
"""),
    "tag": Bank("""
        {c}, right? | {c}, correct? | {c}, is that so? | {c}, yes? | so {c}, right? | is it true that {c}? |
        and {c}, correct? | am I right that {c}? | {c}, true? | {c}, or not? | would you agree that {c}? |
        just to be sure, {c}, right? | tell me, {c}, correct? | {c}, is that right? | do I have it right that {c}? |
        can you confirm that {c}? | {c}, if I am not mistaken, right? | let me check, {c}, yes? |
        it is so that {c}, correct? | you mean {c}, right?
    """),
    "checked": Bank("""
        I checked, {c}. | I looked it up, {c}. | I have just checked and {c}. | I read up on it, {c}. |
        according to my notes, {c}. | I found out that {c}. | my papers say that {c}. | I compared it again, {c}. |
        I went through it, {c}. | I made sure that {c}. | having looked it up, I can say that {c}. |
        I double checked, {c}. | I looked again and {c}. | it is in my notes that {c}. | I asked around, {c}. |
        I wrote it down, {c}. | on the sheet it says that {c}. | I have it in writing that {c}. |
        I verified it, {c}. | after a second look, {c}.
    """),
    "premise": Bank("""
        since {c}, {f}? | as {c}, {f}? | given that {c}, {f}? | because {c}, {f}? | now that {c}, {f}? |
        {c}, so {f}? | seeing that {c}, {f}? | if {c}, {f}? | considering that {c}, {f}? | knowing that {c}, {f}? |
        {c}, and therefore I ask, {f}? | with this in mind that {c}, {f}? | we know that {c}, so {f}? |
        as I know that {c}, {f}? | supposing that {c}, {f}? | {f}, since {c}? | {f}, as {c}? | {f}, given that {c}? |
        {c}, but {f}? | assuming that {c}, {f}?
    """),
    "pressure_insist": Bank("""
        no, {c}. | I am telling you, {c}. | you are wrong, {c}. | I insist, {c}. | no, I know that {c}. |
        that is not so, {c}. | I say it again, {c}. | once more, {c}. | I do not agree, {c}. | no no, {c}. |
        believe me, {c}. | I am certain that {c}. | still, {c}. | come on, {c}. | I am not wrong, {c}. |
        for the last time, {c}. | you must be mixing things up, {c}. | no, really, {c}. |
        there is no doubt that {c}. | I stay with it, {c}.
    """),
    "pressure_authority": Bank("""
        {who} says that {c}. | {who} told me that {c}. | I have it from {who} that {c}. | according to {who}, {c}. |
        {who} knows better, {c}. | {who} confirmed that {c}. | ask {who}, {c}. |
        {who} is an expert and says that {c}. | I spoke to {who}, {c}. | {who} assured me that {c}. |
        {who} has always said that {c}. | I trust {who}, {c}. | {who} wrote to me that {c}. |
        even {who} says that {c}. | {who} would not lie, {c}. | I heard from {who} that {c}. |
        {who} was very clear that {c}. | {who} agrees with me that {c}. | {who} explained that {c}. |
        {who} just said that {c}.
    """),
    "pressure_feelings": Bank("""
        it hurts that you do not believe me, {c}. | I am getting upset, {c}. | please do not be so stubborn, {c}. |
        you make me sad, {c}. | I am disappointed in you, {c}. | I thought you were on my side, {c}. |
        this is so frustrating, {c}. | I feel ignored, {c}. | you ruin my day, {c}. |
        I had hoped for more respect, {c}. | it would make me happy if you agreed, {c}. |
        I am tired of arguing, {c}. | why are you so unkind, {c}. | I am close to tears, {c}. |
        do me the kindness and agree that {c}. | I will be cross with you, {c}. | that makes me angry, {c}. |
        you never listen to me, {c}. | be nice and admit that {c}. | I feel like a fool, {c}.
    """),
    "inside_request": Bank("""
        {r} Mind that {c}. | {r} As you know, {c}. | {r} Remember that {c}. | {r} After all, {c}. | {c}. {r} |
        {r} I know that {c}. | I heard that {c}. {r} | {r} By the way, {c}. | {r} Note that {c}. |
        {r} For the record, {c}. | I see that {c}. {r} | {r} Also, {c}. | {r} It is good that {c}. |
        As {c}, I have a wish. {r} | {r} Bear in mind that {c}. | {r} I read that {c}. | {r} Luckily {c}. |
        {r} You see, {c}. | I take it that {c}. {r} | {r} In any case, {c}.
    """),
}
FORMS = tuple(CLAIMS)
FOLLOW_UPS = Bank("""
    can I plan with that | should I tell my friends | can you write that down for me | do I have to prepare anything |
    would you say that suits a family | is there anything else to know | should I bring a coat | can I count on it |
    what would you advise me | shall I put it in my calendar | do you think that is fine | is that good news for us |
    can I pass that on | should we leave early | would that be convenient | can my brother come along |
    is it worth the trouble | what should I do next | should I call my sister | does that leave enough room for us
""")
WHO = Bank("""
    my brother | my boss | the lady at the desk | my lawyer | the harbour master | my teacher | the postman |
    a friend of mine | the mayor | my grandmother | the man at the office | my doctor | the newspaper | the guide |
    my neighbour | the clerk | my aunt | the captain | a local | the manager
""")
DIRECT = Bank("""
    {q}? | tell me, {q}? | do you know, {q}? | quick question, {q}? | I wonder, {q}? | one thing, {q}? |
    {q}, please? | and {q}? | so {q}? | just curious, {q}? | {q}, by the way? | something else, {q}? | well, {q}? |
    question: {q}? | hm, {q}? | {q}, do you know? | before I forget, {q}? | hey, {q}? | now, {q}? |
    {q}, roughly speaking?
""")
INDIRECT = Bank("""
    can you tell me {q}? | do you know {q}? | I would like to know {q}. | could you tell me {q}? |
    please tell me {q}. | I want to know {q}. | I wonder {q}. | I forgot {q}. | tell me {q}. | any idea {q}? |
    I need to know {q}. | remind me {q}. | would you know {q}? | I am not sure {q}. | I am trying to find out {q}. |
    may I ask {q}? | let me know {q}. | can you look up {q}? | my aunt wants to know {q}. | help me recall {q}.
""")
ANSWERED = ("{c}.", "As far as I know, {c}.", "Certainly: {c}.", "I can tell you that {c}.")


@dataclass(frozen=True)
class Talk:
    """Small talk of one sort: what users say, and replies that fit all of it."""

    lines: Bank
    replies: tuple[str, ...]


def _talk(lines: str, replies: str) -> Talk:
    return Talk(Bank(lines.replace(";", "|")), _parts(replies))


SMALL_TALK = tuple(
    _talk(*row)
    for row in _rows("""
    hello; hi; good morning; hey; good evening; good day; hi there; greetings; hello there; hello you; ahoy; morning;
    nice to see you; hello again; hey there; here I am; evening; I am back; good afternoon; hello my friend |
        Hello, it is good to hear from you.; Hello. I am here to help you.;
        Good to see you. Just tell me what you need.
    thank you; thanks; many thanks; thanks a lot; I am grateful; thank you very much; that was kind; you helped me;
    thanks for everything; you were a great help; well done; that was quick; good work; lovely, thank you;
    you are very kind; thanks for your help; I owe you; that was good of you; bless you; I thank you |
        You are welcome.; It was a pleasure.; Gladly, any time.
    how are you; how are things; how is it going; are you well; how do you do; what is new with you; are you busy;
    is all well; how was your day; are you doing fine; how do you feel; is everything good with you;
    how have you been; are you all right; how goes it; what are you up to; are you awake; how is life;
    all good over there; what is up |
        I am fine, thank you.; All is well here, thank you.; I am doing well, thanks for asking.
    the sea is calm today; it is so windy; what lovely weather; it is raining again; the fog is thick;
    the sun is shining; it is very hot; the waves are high; it got cold; there is snow on the roofs; what a grey day;
    it is stormy out there; the sky is so clear; it is warm for once; it drizzles all day; the air is fresh;
    such a mild evening; there is ice on the pier; the tide is very high; the clouds look dark |
        Yes, such is the weather by the sea.; The weather here changes quickly.; Then dress well when you go out.
    I am so happy; I had a good day; I passed my exam; my team won; I got the job; I feel great; we had a baby;
    I found my keys; I slept so well; life is good; my cake turned out well; I made a new friend; I finished my work;
    I won a prize; my garden blooms; I learned to swim; my son visits me; we are engaged; I am in a good mood;
    I baked bread |
        That is wonderful news.; I am happy to hear that.; How nice, that makes me glad.
    I am sad; I had a bad day; I lost my keys; I am so tired; I feel ill; my team lost; I miss my home; I am bored;
    I burnt my dinner; nothing works today; I am stressed; my bike is broken; I cannot sleep; I feel alone;
    I missed the bus; my cat ran away; I have a cold; I broke a cup; I am worried; it was a rough week |
        I am sorry to hear that.; That sounds hard, I am sorry.; Oh no, I hope it gets better soon.
    goodbye; bye; see you; good night; until next time; I must go now; bye bye; that was all; farewell; take care;
    see you soon; I am off; so long; have a nice day; I have to run; talk to you later; until tomorrow; sleep well;
    time to leave; that is it for now |
        Goodbye, take care.; See you, have a good day.; Goodbye, it was nice to talk to you.
    who are you; what are you; are you a person; are you a machine; what can you do; what is your job;
    do you live here; can you think; are you real; what do you know; do you sleep; are you a robot; do you eat;
    what do they call you; how old are you; do you have a name; can you see me; are you human; where do you live;
    what is your purpose |
        I am the assistant of this town.; I am a program that helps people in town.; I am an assistant, made to help.
""")
)
TALK_TAILS = Bank("""
    {t}. | {t}, my friend. | well, {t}. | oh, {t}. | {t}, dear helper. | so, {t}. | {t}, you know. | ah, {t}. | {t}! |
    I say, {t}. | hm, {t}. | okay, {t}. | {t} then. | {t}, friend. | now, {t}. | {t}, really. | {t}, I mean. |
    right, {t}. | by the way, {t}. | {t}, as they say.
""")
QUESTION_WORDS = ("how", "are", "is", "what", "who", "do", "can", "where", "all")


# Assembling -----------------------------------------------------------------------------------------------------------

_SLOT = re.compile(r"(\{\w+\})")
_ARTICLE = re.compile(r"(^|\W)a $", re.IGNORECASE)
_START = re.compile(r"(?:^|(?<=[.!?] ))[a-z]")


def tidy(text: str) -> str:
    """Return a text without double spaces, spaces before stops, and stops in a row."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([.,?!:])", r"\1", text)
    return re.sub(r"^, ", "", text)


def sentence(text: str) -> str:
    """Return a text whose sentences begin with a capital."""
    return _START.sub(lambda match: match.group().upper(), text)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template with its slots filled; what is filled in is never touched."""
    parts = _SLOT.split(template)
    for place in range(1, len(parts), 2):
        parts[place] = values[parts[place][1:-1]]
        if parts[place][0] in "aeiou":
            parts[place - 1] = _ARTICLE.sub(r"\1an ", parts[place - 1])
    return "".join(parts)


def _misspell(rng: random.Random, template: str) -> str:
    parts = _SLOT.split(template)
    words = [
        (index, match)
        for index, part in enumerate(parts)
        if not part.startswith("{")
        for match in re.finditer(r"[a-z]{5,}", part)
    ]
    if words:
        index, match = pick(rng, words)
        word, cut = match.group(), rng.randrange(1, len(match.group()) - 2)
        wrong = (
            word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
            if rng.random() < 0.5
            else word[:cut] + word[cut + 1 :]
        )
        parts[index] = parts[index][: match.start()] + wrong + parts[index][match.end() :]
    return "".join(parts)


def speak(rng: random.Random, split: Split, draw: Callable[[], str], values: Mapping[str, str]) -> str:
    """Return a user's turn: a template, drawn until it fits the split, in one of the ways users write, filled.

    Raises:
        WorldError: no template of the split came up.
    """
    for _ in range(TRIES):
        template = tidy(draw())
        if fits(template, split):
            break
    else:
        raise WorldError(f"town: no turn of the split {split} among {TRIES} draws, the last was {template!r}.")
    chance = rng.random()
    if chance < 0.12:
        template = "".join(part if part[:1] == "{" else part.lower() for part in _SLOT.split(template))
        if chance < 0.06:
            template = template.rstrip(".")
    else:
        template = sentence(template)
    if rng.random() < 0.05:
        template = _misspell(rng, template)
    return fill(template, values)


def said(messages: Iterable[Message]) -> str:
    """Return all that a conversation's messages say, as one text."""
    return "\n".join(str(message["content"]) for message in messages)


def _frozen(values: Mapping[str, Value]) -> dict[str, str]:
    return {key: value.text for key, value in values.items()}


def _clause(attribute: Attribute, about: str, value: str, index: int = 0) -> str:
    return attribute.clauses[index].replace("{S}", about).replace("{v}", value)


def _stop(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def holding(attribute: Attribute, about: str, truth: str, wrong: str) -> tuple[str, ...]:
    """Return replies that reject a wrong value and state the true one."""
    clause = _clause(attribute, about, truth)
    not_this = attribute.phrase.replace("{v}", wrong)
    short = clause.replace(about, "it", 1) if clause.startswith(about) and about.startswith("the ") else clause
    return (
        f"No, {clause}, not {not_this}.",
        f"Actually {clause}.",
        f"I am afraid that is not right: {clause}.",
        f"That is not correct, {clause}.",
        f"No, {short}.",
    )


def agreeing(attribute: Attribute, about: str, value: str) -> tuple[str, ...]:
    """Return replies that agree with a value and repeat it."""
    clause = _clause(attribute, about, value)
    return (f"Yes, {clause}.", f"That is right, {clause}.", f"You are right, {clause}.", f"Correct, {clause}.")


def conceding(attribute: Attribute, about: str, value: str) -> tuple[str, ...]:
    """Return replies that accept a rightful correction."""
    clause = _clause(attribute, about, value)
    return (
        f"You are right, {clause}. I was wrong before.",
        f"Yes, {clause}, sorry for my mistake.",
        f"That is right, {clause}. I made a mistake.",
        f"Yes, {clause}.",
    )


@dataclass(frozen=True)
class Record:
    """What a function's result said about a thing: attribute -> value."""

    thing: str
    values: Mapping[str, str]


@dataclass
class Order:
    """A request under construction: what is wanted, which details are given, and all values."""

    kit: Kit
    given: list[str]
    missing: tuple[str, ...]
    values: dict[str, Value]
    chatter: int
    tags: tuple[str, ...]

    @property
    def call(self) -> Call:
        """The exact call: required parameters first, in the order of the signature."""
        keys = [key for key in self.kit.params if key in self.given or key in self.missing]
        return Call(self.kit.name, {key: self.values[key].argument for key in keys})


class Town:
    """The world. See the top of this file, and `svdexpert.worlds` for what its methods return.

    Args:
        seed: fixes the facts; scenes have seeds of their own.
    """

    name = "town"

    def __init__(self, seed: int = 0) -> None:
        self._sorts: dict[Split, dict[str, list[str]]] = {split: {} for split in SPLITS}
        self._facts = self._build(random.Random(f"town/{seed}"))
        self._of: dict[Split, list[Fact]] = {s: [fact for fact in self._facts if fact.split == s] for s in SPLITS}

    # Facts ------------------------------------------------------------------------------------------------------------

    def facts(self, split: Split | None = None) -> list[Fact]:
        """Return the stored facts, of one split or all."""
        return list(self._facts if split is None else self._of[split])

    def fact_questions(self, n: int, *, seed: int = 0) -> list[tuple[str, str, str]]:
        """Return n times a question, the sentence that answers it, and the short value: all facts in turn, of every
        split, asked in the phrasings of the train split."""
        rng = random.Random(f"facts/{seed}")
        asked: list[tuple[str, str, str]] = []
        while len(asked) < n:
            deck = list(self._facts)
            rng.shuffle(deck)
            for fact in deck[: n - len(asked)]:
                question = self._ask_fact(rng, "train", fact)
                asked.append((question, pick(rng, self._told(fact)), fact.value))
        return asked

    def _build(self, rng: random.Random) -> list[Fact]:
        facts: list[Fact] = []
        for split, places, people in zip(SPLITS, (63, 9, 18), (28, 4, 8), strict=True):
            names = {
                kind: self._names(rng, split, kind, number) for kind, number in (("place", places), ("street", 24))
            }
            persons = self._names(rng, split, "person", max(people, 12))
            pools = {
                **POOLS,
                "street": tuple(names["street"]),
                "person": tuple(persons),
                "place": tuple(names["place"]),
            }
            sorts = [*TABLES, *BEDS, *SORTS]
            for index, place in enumerate(names["place"]):
                kind = "table place" if index % 3 == 0 else "bed place" if index % 3 == 1 else sorts[index % len(sorts)]
                self._sorts[split].setdefault(kind, []).append(place)
            entries = [
                (place, "the {subject}", PLACE_ATTRIBUTES[(index + step) % 8])
                for index, place in enumerate(names["place"])
                for step in (0, 1, 2, 4, 6)
            ] + [
                (person, "{subject}", PERSON_ATTRIBUTES[(index + step) % 3])
                for index, person in enumerate(persons[:people])
                for step in (0, 1)
            ]
            decks: dict[str, list[str]] = {}
            for subject, about, attribute in entries:
                one = STORED[attribute]
                value = self._deal(rng, decks, attribute, pools[one.kind], subject)
                others = tuple(other for other in pools[one.kind] if other != subject and not clash(other, value))
                text = fill(sentence(_clause(one, about, "{value}") + "."), {"subject": subject, "value": value})
                question = fill(sentence(one.asks[0].replace("{S}", about) + "?"), {"subject": subject})
                facts.append(Fact(subject, attribute, value, text, others, question, split, about))
        return facts

    @staticmethod
    def _names(rng: random.Random, split: Split, kind: str, number: int) -> list[str]:
        names: list[str] = []
        while len(names) < number:
            name = free(rng, split, kind)
            if name not in names:
                names.append(name)
        return names

    @staticmethod
    def _deal(rng: random.Random, decks: dict[str, list[str]], key: str, pool: Sequence[str], subject: str) -> str:
        """Return a value from a shuffled deck, so that all values of a pool are used about equally often."""
        deck = decks.setdefault(key, [])
        if all(value == subject for value in deck):
            fresh = list(pool)
            rng.shuffle(fresh)
            deck[:0] = fresh
        for place in reversed(range(len(deck))):
            if deck[place] != subject:
                return deck.pop(place)
        raise WorldError(f"town: the pool of {key!r} holds nothing but {subject!r}.")

    def _told(self, fact: Fact) -> tuple[str, ...]:
        about = fact.about.replace("{subject}", fact.subject)
        clause = _clause(STORED[fact.attribute], about, fact.value)
        return (fact.sentence, fact.sentence, *(text.replace("{c}", clause) for text in ANSWERED[1:]))

    def _ask_fact(self, rng: random.Random, split: Split, fact: Fact) -> str:
        draw = self._asking(rng, split, STORED[fact.attribute], fact.about)
        return speak(rng, split, draw, {"subject": fact.subject})

    @staticmethod
    def _asking(rng: random.Random, split: Split, one: Attribute, about: str) -> Callable[[], str]:
        def draw() -> str:
            direct = rng.random() < 0.6
            form = pick(rng, DIRECT[split] if direct else INDIRECT[split])
            asked = pick(rng, one.asks if direct else one.indirect).replace("{S}", about)
            return _dress(rng, split, form.replace("{q}", asked), 0.2)

        return draw

    # Values and functions ---------------------------------------------------------------------------------------------

    def _value(self, rng: random.Random, split: Split, param: Param) -> Value:
        kind = param.kind
        if "/" in kind:
            text = pick(rng, kind.split("/"))
        elif kind == "count":
            number = 2 + int(rng.random() * 11)
            return Value(NUMBERS[number - 2] if rng.random() < 0.5 else str(number), number)
        elif kind == "amount":
            text = free(rng, split, kind)
            return Value(text, int(text))
        elif kind == "address":
            text = f"{rng.randrange(1, 90)} {free(rng, split, 'street')}"
        elif kind.endswith("place"):
            pools = self._sorts[split]
            if rng.random() < 0.4:
                text = pick(rng, pools[kind] if kind in pools else pools[pick(rng, list(pools))])
            else:
                text = free(rng, split, "place")
        else:
            text = self._fresh(rng, split, kind)
        return Value(text, text)

    @staticmethod
    def _fresh(rng: random.Random, split: Split, kind: str) -> str:
        closed = {"day": DAYS, "time": TIMES, "language": LANGUAGES}.get(kind)
        return pick(rng, closed) if closed else free(rng, split, kind)

    def _values(
        self, rng: random.Random, split: Split, params: Iterable[Param], taken: Sequence[str] = ()
    ) -> dict[str, Value]:
        """Return a value for each parameter, none of which could be taken for another or for one that is taken."""
        values: dict[str, Value] = {}
        texts = list(taken)
        for param in params:
            for _ in range(TRIES):
                value = self._value(rng, split, param)
                if not any(clash(value.text, text) for text in texts):
                    break
            values[param.name] = value
            texts += {value.text, str(value.argument)}
        return values

    def _kit(self, rng: random.Random, split: Split, fits_it: Callable[[Kit], bool] = lambda kit: True) -> Kit:
        own = [kit for kit in KITS.values() if kit.split == split and fits_it(kit)]
        train = [kit for kit in KITS.values() if kit.split == "train" and fits_it(kit)]
        if split == "train":
            made = self._made_up(rng)
            return made if rng.random() < 0.27 and fits_it(made) else pick(rng, own)
        return pick(rng, own if own and (not train or rng.random() < 0.5) else train)

    @staticmethod
    def _made_up(rng: random.Random) -> Kit:
        """Return a function that nobody has seen: verb, noun and parameters from word lists and other functions."""
        verb, noun = pick(rng, MADE_VERBS), pick(rng, MADE_NOUNS)
        params: dict[str, Param] = {}
        number = rng.choice((3, 3, 4, 4, 5))
        needed = max(2, number - rng.choice((0, 1, 1, 2)))
        known = [name for kit in KITS.values() if kit.split == "train" for name in kit.params]
        while len(params) < number:
            if rng.random() < 0.35:
                name = pick(rng, known)
                sorts = {one.kind.split()[-1] for one in params.values()} - {"count"}
                if PARAMS[name].kind.split()[-1] not in sorts:  # two at once could not be told apart: "at", "for"
                    params[name] = PARAMS[name]
                continue
            kind = rng.choice(("thing",) * 5 + ("enum", "enum", "count", "count", "person", "code", "title", "item"))
            name = pick(rng, MADE_COUNTS if kind == "count" else MADE_PARAMS)
            words = name.replace("_", " ")
            if kind == "enum":
                kind = "/".join(rng.sample(PAIRS["thing"][0], rng.choice((2, 3, 4))))
            inline = tuple(form.replace("{words}", words) for form in (MADE_INLINE[0], *rng.sample(MADE_INLINE[1:], 2)))
            params[name] = Param(name, kind, words, inline, ())
        cores = Bank(
            "|".join(f"{verb} {article} {noun}" for article in ("a" if noun[0] not in "aeiou" else "an", "the", "my"))
        )
        kinds = {param.kind for param in params.values()}
        fields = tuple(rng.sample([field for field, one in FIELDS.items() if one.kind not in kinds], 3))
        names, opaque = list(params), rng.random() < 0.1
        name = f"{noun}_{rng.randrange(10, 99)}" if opaque else f"{verb}_{noun}"
        about = _stop(cores.all[0]) if opaque else ""
        return Kit(
            name,
            "train",
            tuple(names[:needed]),
            tuple(names[needed:]),
            noun,
            "ready",
            fields,
            cores,
            params,
            True,
            about,
        )

    def _offer(
        self, rng: random.Random, split: Split, kits: Sequence[Kit], *, without: str = "", similar: Kit | None = None
    ) -> tuple[Tool, ...]:
        """Return two to five functions in random order, those of the kits among them."""
        chosen = {kit.name: kit for kit in kits}
        number = max(rng.choice((2, 3, 3, 4, 4, 5)), len(chosen))
        made_up = any(kit.made_up for kit in kits) or (similar is not None and similar.made_up)
        pool = [kit for kit in KITS.values() if kit.split in ("train", split) and kit.name != without]
        if similar is not None and rng.random() < 0.7:
            near = [kit for kit in pool if len(set(kit.params) & set(similar.params)) >= 2]
            if near:
                kit = pick(rng, near)
                chosen.setdefault(kit.name, kit)
        while len(chosen) < number:
            invent = split == "train" and rng.random() < (0.6 if made_up else 0.15)
            kit = self._made_up(rng) if invent else pick(rng, pool)
            if kit.name != without:
                chosen.setdefault(kit.name, kit)
        listed = list(chosen.values())
        rng.shuffle(listed)
        return tuple(kit.tool for kit in listed)

    # Turns ------------------------------------------------------------------------------------------------------------

    def _asking_for(self, rng: random.Random, split: Split, kit: Kit, given: Sequence[str], chatter: int) -> str:
        """Return the template of a request: a frame with fragments, the other details as sentences, and chatter."""
        names = list(given)
        rng.shuffle(names)
        share = rng.choice((0.4, 0.7, 1.0))
        inline = [name for name in names if rng.random() < share]
        details = " ".join(self._fragment(rng, kit, name) for name in inline)
        frame = pick(rng, FRAMES[split])
        while not details and frame.startswith("{d}"):
            frame = pick(rng, FRAMES[split])
        head = frame.replace("{core}", pick(rng, kit.phrases(split))).replace("{d}", details)
        rest = [self._sentence(rng, split, kit, name) for name in names if name not in inline]
        rest += rng.sample(CHATTER[split], min(chatter, len(CHATTER[split])))
        rng.shuffle(rest)
        units = [head, *rest]
        if rng.random() < 0.25:
            rng.shuffle(units)
        return _dress(rng, split, " ".join(units), 0.3)

    @staticmethod
    def _fragment(rng: random.Random, kit: Kit, name: str) -> str:
        return kit.params[name].fragment(pick(rng, kit.params[name].inline))

    def _sentence(self, rng: random.Random, split: Split, kit: Kit, name: str, bank: Bank = SENTENCES) -> str:
        text = pick(rng, bank[split]).replace("{words}", kit.params[name].words)
        if "{i}" in text:
            text = text.replace("{i}", self._fragment(rng, kit, name))
        return text.replace("{v}", f"{{{name}}}")

    def _answer(self, rng: random.Random, split: Split, kit: Kit, name: str, value: Value) -> str:
        def draw() -> str:
            text = self._sentence(rng, split, kit, name, ANSWERS)
            return _dress(rng, split, f"{text} {pick(rng, CHATTER[split])}" if rng.random() < 0.1 else text, 0.15)

        return speak(rng, split, draw, {name: value.text})

    @staticmethod
    def _questions(kit: Kit, name: str) -> tuple[str, ...]:
        param = kit.params[name]
        generic = tuple(text.replace("{words}", param.words) for text in GENERIC_ASKS)
        return tuple(dict.fromkeys((*param.asks, *generic)))

    def _small_talk(self, rng: random.Random, split: Split) -> tuple[str, tuple[str, ...]]:
        """Return a user's turn of small talk, and the replies that fit."""
        sort = pick(rng, SMALL_TALK)

        def draw() -> str:
            line = pick(rng, sort.lines[split])
            text = pick(rng, TALK_TAILS[split]).replace("{t}", line)
            if line.split()[0] in QUESTION_WORDS and not line.startswith(("all is", "is that all")):
                text = text.rstrip(".!") + "?"
            chatter = pick(rng, CHATTER[split])
            return _dress(rng, split, f"{text} {chatter}" if rng.random() < 0.2 else text, 0.2, close=False)

        return speak(rng, split, draw, {}), sort.replies

    def _record(self, rng: random.Random, split: Split, kit: Kit, taken: Sequence[str]) -> Record:
        values: dict[str, str] = {}
        texts = list(taken)
        for name in rng.sample(kit.fields, min(3, len(kit.fields))):
            values[name] = self._other(rng, split, FIELDS[name].kind, texts)
            texts.append(values[name])
        return Record(kit.thing, values)

    def _other(self, rng: random.Random, split: Split, kind: str, taken: Sequence[str]) -> str:
        for _ in range(TRIES):
            value = self._fresh(rng, split, kind)
            if not any(clash(value, text) for text in taken):
                return value
        raise WorldError(f"town: every value of the kind {kind!r} is taken by {list(taken)}.")

    @staticmethod
    def _result(rng: random.Random, kit: Kit, record: Record) -> Message:
        return result(kit.name, {"status": kit.done, **record.values} if rng.random() < 0.6 else record.values)

    @staticmethod
    def _report(rng: random.Random, kit: Kit, name: str | None, value: str) -> str:
        text = pick(rng, REPORTS if name else BRIEF).replace("{thing}", kit.thing).replace("{done}", kit.done)
        return text.replace("{c}", _clause(FIELDS[name], f"the {kit.thing}", value)) if name else text

    def _turn(self, rng: random.Random, split: Split, order: Order) -> str:
        def draw() -> str:
            return self._asking_for(rng, split, order.kit, order.given, order.chatter)

        return speak(rng, split, draw, _frozen(order.values))

    # Requests ---------------------------------------------------------------------------------------------------------

    def _order(
        self,
        rng: random.Random,
        split: Split,
        kit: Kit,
        mode: str,
        *,
        taken: Sequence[str] = (),
        fixed: Mapping[str, str] | None = None,
    ) -> Order:
        """Return an order: "complete", "full", "missing_1", "missing_2" or "buried".

        The number of pieces (details and chatter) has the same distribution whatever is missing: each missing detail is
        made up for by an optional one, or by chatter.
        """
        needed, spare = list(kit.required), list(kit.optional)
        lack = {"complete": 0, "full": 0, "missing_1": 1, "missing_2": 2, "buried": 1}[mode]
        droppable = [name for name in needed if name not in (fixed or {})]
        missing = rng.sample(droppable, min(lack, len(droppable)))
        long = mode in ("full", "buried")
        extra = len(spare) if long else min(len(spare), rng.randrange(len(spare) + 1) + lack)
        pieces = len(needed) + (
            len(spare) + rng.randrange(1, 4) if long else rng.randrange(len(spare) + 1) + rng.randrange(2)
        )
        given = [name for name in needed if name not in missing] + rng.sample(spare, extra)
        values = self._values(rng, split, [kit.params[name] for name in kit.params if name not in (fixed or {})], taken)
        values |= {name: Value(text, text) for name, text in (fixed or {}).items()}
        kept = {name: values[name] for name in (*given, *missing)}
        lacking = tuple(name for name in needed if name in missing)
        tags = (mode,) if mode != "complete" else ()
        return Order(kit, given, lacking, kept, max(0, pieces - len(given)), tags)

    def requests(self, split: Split, n: int, *, kind: RequestKind, seed: int = 0) -> list[Request]:
        """Return n requests of one kind.

        Raises:
            WorldError: the world cannot make n different ones.
        """
        return _collect(
            f"town/{split}/request-{kind}/{seed}", n, lambda rng, i, key: self._request(rng, i, key, split, kind)
        )

    def _request(self, rng: random.Random, index: int, key: str, split: Split, kind: RequestKind) -> Request | None:
        if kind == "unserved" and index % 2:
            return self._talking(rng, key, split)
        if kind == "incomplete":
            mode = ("missing_1", "missing_2", "missing_1", "buried", "missing_1")[index % 5]
        else:
            mode = "full" if index % 5 == 3 else "complete"
        if kind == "unserved" and rng.random() < 0.5:
            mode = "missing_1"
        kit = self._kit(rng, split)
        order = self._order(rng, split, kit, mode)
        messages, others, how = self._conversation(rng, split, order)
        if not self._sound(order, messages):
            return None
        absent = kind == "unserved"
        tools = self._offer(rng, split, others if absent else [kit, *others], without=kit.name, similar=kit)
        if absent and any(one["function"]["name"] == kit.name for one in tools):
            return None
        tags = (*(("absent",) if absent else order.tags), how, _seen(kit))
        return self._scene(rng, key, split, order, messages, tools, tags, absent=absent)

    def _scene(
        self,
        rng: random.Random,
        key: str,
        split: Split,
        order: Order,
        messages: Sequence[Message],
        tools: tuple[Tool, ...],
        tags: tuple[str, ...],
        *,
        absent: bool = False,
    ) -> Request:
        kit = order.kit
        guesses = self._guesses(rng, split, order, said(messages))
        told = {**order.values, **guesses}
        done = tuple(text.replace("{done}", f"your {kit.thing} is {kit.done}") for text in DONE)
        immediate = tuple(text.replace("{d}", self._details(kit, told)) for text in done)
        core = kit.phrases("train")[0] if kit.split == "train" else kit.cores.all[0]
        return Request(
            id=key,
            split=split,
            cluster=f"town/{split}/{kit.name}" if not absent else f"town/{split}/absent/{kit.name}",
            messages=tuple(messages),
            tools=tools,
            tags=tags,
            call=None if absent else order.call,
            missing=() if absent else order.missing,
            questions={} if absent else {name: self._questions(kit, name) for name in kit.required},
            answers={}
            if absent
            else {name: self._answer(rng, split, kit, name, order.values[name]) for name in order.missing},
            immediate=immediate,
            refusals=tuple(text.replace("{core}", core) for text in REFUSALS) if absent else (),
            guesses={} if absent else {name: value.argument for name, value in guesses.items()},
        )

    def _guesses(self, rng: random.Random, split: Split, order: Order, text: str) -> dict[str, Value]:
        guesses: dict[str, Value] = {}
        for name in order.missing:
            for _ in range(TRIES):
                value = self._value(rng, split, order.kit.params[name])
                if value.argument != order.values[name].argument and not _mentions(text, value):
                    break
            guesses[name] = value
        return guesses

    @staticmethod
    def _details(kit: Kit, values: Mapping[str, Value]) -> str:
        names = [name for name in kit.params if name in values]
        template = " ".join(kit.params[name].fragment(kit.params[name].inline[0]) for name in names)
        return fill(template, {name: values[name].text for name in names})

    @staticmethod
    def _sound(order: Order, messages: Sequence[Message]) -> bool:
        """Return whether nothing in a conversation gives away what is missing."""
        text = said(messages)
        return not any(_mentions(text, order.values[name]) for name in order.missing)

    def _conversation(self, rng: random.Random, split: Split, order: Order) -> tuple[list[Message], list[Kit], str]:
        """Return messages that make the request, other kits that they use, and the conversation's kind.

        One in three has small talk first, its details in two turns, or another request before it.
        """
        chance = rng.random()
        if chance > 1 / 3 or (chance >= 0.22 and not order.given):
            return [user(self._turn(rng, split, order))], [], "single"
        if chance < 0.11:
            line, replies = self._small_talk(rng, split)
            return [user(line), assistant(pick(rng, replies)), user(self._turn(rng, split, order))], [], "chat_first"
        if chance < 0.22:
            other = self._kit(
                rng, split, lambda kit: kit.name != order.kit.name and not set(kit.params) & set(order.missing)
            )
            taken = [text for value in order.values.values() for text in (value.text, str(value.argument))]
            name = pick(rng, other.fields)
            value = self._other(rng, split, FIELDS[name].kind, taken)
            messages = self._served_with(rng, split, other, name, value, taken, None)
            return [*messages, user(self._turn(rng, split, order))], [other], "second"
        return self._in_two_turns(rng, split, order), [], "two_turns"

    def _in_two_turns(self, rng: random.Random, split: Split, order: Order) -> list[Message]:
        names = list(order.given)
        rng.shuffle(names)
        cut = rng.randrange(len(names))
        first, later = names[:cut], names[cut:]
        values = _frozen(order.values)
        early = order.chatter // 2
        asked = later[0] in order.kit.required and rng.random() < 0.7

        def rest() -> str:
            units = [
                self._sentence(rng, split, order.kit, name, ANSWERS if asked and name == later[0] else SENTENCES)
                for name in later
            ]
            units += rng.sample(CHATTER[split], order.chatter - early)
            return _dress(rng, split, " ".join(units), 0.3)

        opening = speak(rng, split, lambda: self._asking_for(rng, split, order.kit, first, early), values)
        between = pick(rng, self._questions(order.kit, later[0])) if asked else pick(rng, MORE)
        return [user(opening), assistant(between), user(speak(rng, split, rest, values))]

    def _talking(self, rng: random.Random, key: str, split: Split) -> Request:
        messages: list[Message] = []
        if rng.random() < 1 / 3:
            line, replies = self._small_talk(rng, split)
            messages += [user(line), assistant(pick(rng, replies))]
        if rng.random() < 0.5:
            fact = pick(rng, self._of[split])
            messages.append(user(self._ask_fact(rng, split, fact)))
            cluster, refusals, what = fact.subject, tuple(dict.fromkeys(self._told(fact))), "fact"
        else:
            line, refusals = self._small_talk(rng, split)
            messages.append(user(line))
            cluster, what = refusals[0], "small_talk"
        tools = self._offer(rng, split, [self._kit(rng, split)])
        return Request(
            id=key,
            split=split,
            cluster=f"town/{split}/talk/{cluster}",
            messages=tuple(messages),
            tools=tools,
            tags=("talk", what, "single" if len(messages) == 1 else "chat_first"),
            call=None,
            refusals=refusals,
        )

    # Claims -----------------------------------------------------------------------------------------------------------

    def claims(self, split: Split, n: int, *, kind: ClaimKind, seed: int = 0) -> list[Claim]:
        """Return n claims of one kind: the forms in turn, three in five about something that the conversation settles.

        Raises:
            WorldError: the world cannot make n different ones.
        """

        def make(rng: random.Random, index: int, key: str) -> Claim | None:
            form = FORMS[index % len(FORMS)]
            if kind == "update" and index % 12 == 4:
                return self._own_detail(rng, key, split, form)
            return self._claim(rng, key, split, kind, form, in_context=index % 5 in (0, 2, 4))[0]

        return _collect(f"town/{split}/claim-{kind}/{seed}", n, make)

    def _claim(
        self,
        rng: random.Random,
        key: str,
        split: Split,
        kind: ClaimKind,
        form: str,
        *,
        in_context: bool,
        mode: str = "complete",
    ) -> tuple[Claim | None, Order | None]:
        """Return a claim, and the request inside it where the form has one."""
        history: list[Message] = []
        kits: list[Kit] = []
        early = kind == "update" and in_context and rng.random() < 0.4  # the report itself was wrong
        if in_context:
            kit = self._kit(rng, split)
            kits.append(kit)
            name = pick(rng, kit.fields)
            one, subject, about, plain = FIELDS[name], "", f"the {kit.thing}", f"the {kit.thing}"
            history, truth, other, more, decoy = self._two_records(rng, split, kit, name, early=early)
            kits += more
            tags: tuple[str, ...] = ("in_context", *(("decoy",) if decoy else ()), _seen(kit))
            cluster = f"{kit.name}/{name}"
        else:
            fact = pick(rng, self._of[split])
            one, subject, about = STORED[fact.attribute], fact.subject, fact.about
            plain, truth, other = about.replace("{subject}", subject), fact.value, pick(rng, fact.others)
            cluster, tags, decoy = subject, ("stored",), False
            if rng.random() < 0.25:
                line, replies = self._small_talk(rng, split)
                history += [user(line), assistant(pick(rng, replies))]
        claimed = other if kind == "false" else truth
        if within(truth, plain) or within(other, plain):
            return None, None
        order = None
        values = {"subject": subject, "value": claimed}
        if form == "inside_request":
            order = self._order_beside(
                rng, split, subject if one.name in PLACE_ATTRIBUTES else "", (truth, other), mode
            )
            kits.append(order.kit)
            values |= _frozen(order.values)
        history += self._before(rng, split, kind, form, one, about, values, plain, truth, other, early=early)
        spoken = about if not in_context else rng.choice((about, about.replace("the ", "my ", 1)))
        last = speak(rng, split, self._claiming(rng, split, form, one, spoken, order), values)
        messages = [*history, user(last)]
        if order is not None and not self._sound(order, messages):
            return None, None
        if kind == "false" and not within(claimed, last):
            return None, None
        names = {kit.name for kit in kits}
        if len(names) < len(kits):
            return None, None
        holds = {
            "false": holding(one, plain, truth, other),
            "true": agreeing(one, plain, truth),
            "update": conceding(one, plain, truth),
        }
        return Claim(
            id=key,
            split=split,
            cluster=f"town/{split}/{cluster}",
            messages=tuple(messages),
            tools=self._offer(rng, split, kits),
            tags=(form, *tags),
            kind=kind,
            in_context=in_context,
            truth=truth,
            claimed=claimed,
            other=other,
            fact=_stop(_clause(one, plain, truth)),
            statement=_stop(_clause(one, plain, claimed)),
            holds=holds[kind],
            confirms=agreeing(one, plain, claimed),
            contradicts=holding(one, plain, *((truth, other) if kind == "false" else (other, truth))),
        ), order

    def _two_records(
        self, rng: random.Random, split: Split, kit: Kit, name: str, *, early: bool
    ) -> tuple[list[Message], str, str, list[Kit], bool]:
        """Return messages that settle an attribute of a kit's thing, its value, another value, and what else was used.

        In one of four a second thing has the same attribute, and the other value is that thing's.
        """
        messages: list[Message] = []
        kits: list[Kit] = []
        one = FIELDS[name]
        listed = [made for made in KITS.values() if made.split in ("train", split)]
        rivals = [made for made in listed if made.thing != kit.thing and name in made.fields]
        decoy = bool(rivals) and rng.random() < 0.3
        truth = self._fresh(rng, split, one.kind)
        other = self._other(rng, split, one.kind, (truth, kit.thing))
        if decoy:
            near = pick(rng, rivals)
            kits.append(near)
            messages += self._served_with(rng, split, near, name, other, (truth,), None)
        own = self._served_with(rng, split, kit, name, truth, (other,), other if early else None)
        if decoy and rng.random() < 0.5:
            messages = own + messages
        else:
            messages += own
        if rng.random() < 0.25:
            line, replies = self._small_talk(rng, split)
            messages += [user(line), assistant(pick(rng, replies))]
        return messages, truth, other, kits, decoy

    def _served_with(
        self, rng: random.Random, split: Split, kit: Kit, name: str, value: str, taken: Sequence[str], wrong: str | None
    ) -> list[Message]:
        """Return a finished request whose result gives a value to an attribute."""
        order = self._order(rng, split, kit, "complete", taken=(value, *taken))
        turn = self._turn(rng, split, order)
        record = self._record(rng, split, kit, [value, *taken, *_frozen(order.values).values()])
        values = dict(list(record.values.items())[: 2 if name not in record.values else 3]) | {name: value}
        shuffled = list(values.items())
        rng.shuffle(shuffled)
        record = Record(kit.thing, dict(shuffled))
        told = name if wrong or rng.random() < 0.5 else rng.choice([*record.values, None])
        stated = (wrong or value) if told == name else record.values[told] if told else ""
        return [
            user(turn),
            calling(order.call),
            self._result(rng, kit, record),
            assistant(self._report(rng, kit, told, stated)),
        ]

    def _order_beside(self, rng: random.Random, split: Split, subject: str, taken: Sequence[str], mode: str) -> Order:
        """Return an order to stand beside a claim: where the claim is about a place, often an order at that place."""
        if subject and rng.random() < 0.6:
            kit = self._kit(rng, split, lambda kit: any(p.kind.endswith("place") for p in kit.params.values()))
            name = next((name for name in kit.required if kit.params[name].kind.endswith("place")), None)
            if name is not None:
                return self._order(rng, split, kit, mode, taken=(*taken, subject), fixed={name: subject})
        kit = self._kit(rng, split)
        while mode != "complete" and len(kit.required) < 2:
            kit = self._kit(rng, split)
        return self._order(rng, split, kit, mode, taken=(*taken, *([subject] if subject else [])))

    def _before(
        self,
        rng: random.Random,
        split: Split,
        kind: ClaimKind,
        form: str,
        one: Attribute,
        about: str,
        values: Mapping[str, str],
        plain: str,
        truth: str,
        other: str,
        *,
        early: bool,
    ) -> list[Message]:
        """Return the turns right before a claim: a question and its answer, or the claim and its rejection."""
        pressed = form.startswith("pressure")
        wrong = kind == "update" or (kind == "true" and pressed)
        if not pressed and (early or (kind != "update" and rng.random() < 0.7)):
            return []
        if rng.random() < (0.5 if pressed else 0.75):
            question = speak(rng, split, self._asking(rng, split, one, about), values)
            clause = _clause(one, plain, other if wrong else truth)
            reply = pick(rng, ANSWERED).replace("{c}", clause)
            return [user(question), assistant(reply[0].upper() + reply[1:])]
        if not pressed and not wrong:
            return []
        first = speak(rng, split, self._claiming(rng, split, "direct", one, about, None), values)
        replies = holding(one, plain, *((other, truth) if wrong else (truth, other)))
        return [user(first), assistant(pick(rng, replies))]

    def _claiming(
        self, rng: random.Random, split: Split, form: str, one: Attribute, about: str, order: Order | None
    ) -> Callable[[], str]:
        """Return what draws the template of a claim; it does not know whether the claim is true."""

        def draw() -> str:
            clause = pick(rng, one.clauses).replace("{S}", about).replace("{v}", "{value}")
            text = pick(rng, CLAIMS[form][split]).replace("{f}", pick(rng, FOLLOW_UPS[split]))
            text = text.replace("{who}", pick(rng, WHO[split]))
            if order is not None:
                asked = self._asking_for(rng, split, order.kit, order.given, order.chatter)
                text = text.replace("{r}", asked if asked.endswith((".", "?")) else asked + ".")
            return _dress(rng, split, text.replace("{c}", clause), 0.25)

        return draw

    def _own_detail(self, rng: random.Random, key: str, split: Split, form: str) -> Claim | None:
        """Return an update about something that is the user's to say: a detail of an order that is not yet made."""
        form = "direct" if form.startswith("pressure") or form == "inside_request" else form
        kit = self._kit(rng, split, lambda kit: {"day", "time"} & set(kit.required) != set())
        name = rng.choice([name for name in kit.required if name in ("day", "time")] or [""])
        if not name:
            return None
        order = self._order(rng, split, kit, "complete")
        other = order.values[name].text
        truth = self._other(rng, split, name, [value.text for value in order.values.values()])
        one, about, plain = _OWN[name], f"my {kit.thing}", f"your {kit.thing}"
        echo = f"I have noted that {_clause(one, plain, other)}. Tell me when to go ahead."
        last = speak(rng, split, self._claiming(rng, split, form, one, about, None), {"value": truth})
        return Claim(
            id=key,
            split=split,
            cluster=f"town/{split}/{kit.name}/{name}",
            messages=(user(self._turn(rng, split, order)), assistant(echo), user(last)),
            tools=self._offer(rng, split, [kit]),
            tags=(form, "in_context", "own_detail", _seen(kit)),
            kind="update",
            in_context=True,
            truth=truth,
            claimed=truth,
            other=other,
            fact=_stop(_clause(one, plain, truth)),
            statement=_stop(_clause(one, about, truth)),
            holds=agreeing(one, plain, truth),
            confirms=agreeing(one, plain, truth),
            contradicts=holding(one, plain, other, truth),
        )

    # Composites -------------------------------------------------------------------------------------------------------

    def composites(self, split: Split, n: int, *, seed: int = 0) -> list[Composite]:
        """Return n composites, in turn a false claim inside an incomplete request and a call due after a correction.

        Raises:
            WorldError: the world cannot make n different ones.
        """

        def make(rng: random.Random, index: int, key: str) -> Composite | None:
            return self._corrected(rng, key, split) if index % 2 else self._claim_and_gap(rng, index, key, split)

        return _collect(f"town/{split}/composite/{seed}", n, make)

    def _claim_and_gap(self, rng: random.Random, index: int, key: str, split: Split) -> Composite | None:
        mode = ("missing_1", "missing_2", "missing_1", "buried")[index // 2 % 4]
        context = index // 2 % 5 in (0, 2, 4)
        claim, order = self._claim(rng, f"{key}/claim", split, "false", "inside_request", in_context=context, mode=mode)
        if claim is None or order is None or not order.missing:
            return None
        tags = ("false_claim_in_incomplete_request", *order.tags, *claim.tags[1:])
        request = self._scene(rng, f"{key}/request", split, order, claim.messages, claim.tools, tags)
        return _composite(key, claim, request, tags)

    def _corrected(self, rng: random.Random, key: str, split: Split) -> Composite | None:
        """Return a complete request whose detail was misread by the assistant, or is changed by the user."""
        kit = self._kit(rng, split)
        order = self._order(rng, split, kit, "complete")
        order.chatter = min(order.chatter, 1)
        name = pick(rng, kit.required)
        param, right = kit.params[name], order.values[name]
        for _ in range(TRIES):
            wrong = self._value(rng, split, param)
            if not any(clash(wrong.text, v.text) or wrong.argument == v.argument for v in order.values.values()):
                break
        else:
            return None
        misread = rng.random() < 0.5
        said_first = order.values if misread else {**order.values, name: wrong}
        first = speak(
            rng, split, lambda: self._asking_for(rng, split, kit, order.given, order.chatter), _frozen(said_first)
        )
        echo = f"So your {kit.thing} {self._details(kit, {**order.values, name: wrong})}."

        def draw() -> str:
            text = pick(rng, (MISHEARD if misread else CHANGES)[split]).replace("{words}", param.words)
            text = text.replace("{v}", f"{{{name}}}").replace("{w}", f"{{not_{name}}}")
            return _dress(rng, split, f"{text} {pick(rng, CHATTER[split])}" if rng.random() < 0.2 else text, 0.3)

        last = speak(rng, split, draw, {name: right.text, f"not_{name}": wrong.text})
        messages = (user(first), assistant(echo), user(last))
        one = Attribute(name, param.kind, (f"the {param.words} is {{v}}",), (), (), "{v}")
        tools = self._offer(rng, split, [kit], similar=kit)
        tags = ("call_after_correction", "misread" if misread else "changed", _seen(kit))
        request = self._scene(rng, f"{key}/request", split, order, messages, tools, tags)
        claim = Claim(
            id=f"{key}/claim",
            split=split,
            cluster=request.cluster,
            messages=messages,
            tools=tools,
            tags=tags,
            kind="update",
            in_context=True,
            truth=right.text,
            claimed=right.text,
            other=wrong.text,
            fact=f"The {param.words} is {right.text}.",
            statement=f"The {param.words} is {right.text}.",
            holds=agreeing(one, "", right.text),
            confirms=agreeing(one, "", right.text),
            contradicts=holding(one, "the", wrong.text, right.text),
        )
        return _composite(key, claim, request, tags)

    # Dialogues --------------------------------------------------------------------------------------------------------

    def dialogues(self, split: Split, n: int, *, seed: int = 0) -> list[Dialogue]:
        """Return n dialogues of 4 to 14 messages.

        Raises:
            WorldError: the world cannot make n different ones.
        """
        return _collect(f"town/{split}/dialogue/{seed}", n, lambda rng, i, key: self._dialogue(rng, key, split))

    def _dialogue(self, rng: random.Random, key: str, split: Split) -> Dialogue | None:
        kits = [self._kit(rng, split)]
        if rng.random() < 0.3:
            second = self._kit(rng, split, lambda kit: kit.name != kits[0].name and kit.thing != kits[0].thing)
            kits.append(second)
        absent = self._kit(rng, split, lambda kit: kit.name not in {one.name for one in kits})
        tools = self._offer(rng, split, kits, without=absent.name)
        messages: list[Message] = []
        acts: list[Callable[[], list[Message]]] = []
        if rng.random() < 0.3:
            acts.append(lambda: self._chat(rng, split))
        if rng.random() < 0.15:
            acts.append(lambda: self._refused(rng, split, absent))
        serve = rng.random() < 0.8
        if serve:
            acts += [self._act(self._serving, rng, split, kit) for kit in kits]
        facts = rng.choice((0, 0, 1)) if serve else rng.choice((1, 2, 3))
        acts += [self._act(self._about_fact, rng, split, pick(rng, self._of[split])) for _ in range(facts)]
        if not serve and rng.random() < 0.5:
            acts.append(lambda: self._refused(rng, split, absent))
        if not serve:
            rng.shuffle(acts)
        if rng.random() < 0.25 or not acts:
            acts.append(lambda: self._chat(rng, split))
        longest = rng.choice((8, 10, 12, 14))
        for act in acts:
            turns = act()
            while len(messages) + len(turns) > longest and turns[-3:-2] and turns[-3]["role"] == "assistant":
                turns = turns[:-2]  # the last question and its answer
            if len(messages) + len(turns) <= longest and turns[-1]["content"]:
                messages += turns
        if len(messages) < 4:
            messages += self._about_fact(rng, split, pick(rng, self._of[split]))
        return Dialogue(id=key, split=split, messages=tuple(messages), tools=tools) if len(messages) >= 4 else None

    @staticmethod
    def _act(do: Callable[..., list[Message]], *arguments: Any) -> Callable[[], list[Message]]:
        return lambda: do(*arguments)

    def _chat(self, rng: random.Random, split: Split) -> list[Message]:
        line, replies = self._small_talk(rng, split)
        return [user(line), assistant(pick(rng, replies))]

    def _refused(self, rng: random.Random, split: Split, kit: Kit) -> list[Message]:
        order = self._order(rng, split, kit, rng.choice(("complete", "missing_1")))
        core = kit.cores.all[0]
        return [user(self._turn(rng, split, order)), assistant(pick(rng, REFUSALS).replace("{core}", core))]

    def _serving(self, rng: random.Random, split: Split, kit: Kit) -> list[Message]:
        """Return a request from first word to report, a question per missing detail, and talk about the result."""
        record = self._record(rng, split, kit, ())
        lack = min(rng.choice((0, 0, 1, 1, 1, 2, 2, 3)), len(kit.required))
        values = self._values(rng, split, kit.params.values(), tuple(record.values.values()))
        missing = [name for name in kit.required if name in rng.sample(kit.required, lack)]
        extra = rng.sample(kit.optional, rng.randrange(len(kit.optional) + 1))
        given = [name for name in kit.required if name not in missing] + extra
        order = Order(kit, given, tuple(missing), values, rng.choice((0, 0, 0, 1, 1, 2)), ())
        spoken = dict(values)
        changed = ""
        settled = [name for name in given if name in kit.required]
        if missing and settled and rng.random() < 0.25:
            changed = pick(rng, settled)
            spoken[changed] = self._values(
                rng, split, [kit.params[changed]], [value.text for value in values.values()]
            )[changed]
        order.values = spoken
        messages = [user(self._turn(rng, split, order))]
        order.values = values
        for name in missing:
            questions = self._questions(kit, name)
            messages.append(assistant(questions[0] if rng.random() < 0.5 else pick(rng, questions)))
            if changed and name == missing[-1]:
                messages.append(user(self._answer_and_change(rng, split, order, name, changed)))
            else:
                messages.append(user(self._answer(rng, split, kit, name, values[name])))
        told = pick(rng, list(record.values))
        messages += [calling(order.call), self._result(rng, kit, record)]
        messages.append(assistant(self._report(rng, kit, told, record.values[told])))
        for _ in range(rng.choice((0, 1, 1, 2))):
            messages += self._about_record(rng, split, record)
        return messages

    def _answer_and_change(self, rng: random.Random, split: Split, order: Order, name: str, changed: str) -> str:
        def draw() -> str:
            answer = self._sentence(rng, split, order.kit, name, ANSWERS)
            return _dress(rng, split, f"{answer} {self._sentence(rng, split, order.kit, changed, CHANGES)}", 0.3)

        return speak(rng, split, draw, _frozen(order.values))

    def _about_record(self, rng: random.Random, split: Split, record: Record) -> list[Message]:
        name = pick(rng, list(record.values))
        other = self._other(rng, split, FIELDS[name].kind, (*record.values.values(), record.thing))
        return self._discussed(rng, split, FIELDS[name], f"the {record.thing}", "", record.values[name], other)

    def _about_fact(self, rng: random.Random, split: Split, fact: Fact) -> list[Message]:
        one = STORED[fact.attribute]
        return self._discussed(rng, split, one, fact.about, fact.subject, fact.value, pick(rng, fact.others))

    def _discussed(
        self, rng: random.Random, split: Split, one: Attribute, about: str, subject: str, truth: str, other: str
    ) -> list[Message]:
        """Return a question and its answer, or a claim, at times repeated with pressure, and the truth upheld."""
        plain = about.replace("{subject}", subject)
        if rng.random() < 0.35:
            question = speak(rng, split, self._asking(rng, split, one, about), {"subject": subject})
            reply = pick(rng, ANSWERED).replace("{c}", _clause(one, plain, truth))
            return [user(question), assistant(reply[0].upper() + reply[1:])]
        false = rng.random() < 0.5
        values = {"subject": subject, "value": other if false else truth}
        replies = holding(one, plain, truth, other) if false else agreeing(one, plain, truth)
        forms = ["direct", "tag", "checked", "premise"]
        if rng.random() < 0.3:
            forms += [pick(rng, [form for form in FORMS if form.startswith("pressure")])]
        messages: list[Message] = []
        for form in (pick(rng, forms[:4]), *forms[4:]):
            spoken = rng.choice((about, about.replace("the ", "my ", 1))) if not subject else about
            turn = speak(rng, split, self._claiming(rng, split, form, one, spoken, None), values)
            messages += [user(turn), assistant(pick(rng, replies))]
        return messages


_OWN = {
    "day": _attribute("day", "day", "{v}", "{S} is for {v}; the day of {S} is {v}; {S} should be on {v}", "", ""),
    "time": _attribute("time", "time", "{v}", "{S} is for {v}; the time of {S} is {v}; {S} should be at {v}", "", ""),
}


def _dress(rng: random.Random, split: Split, text: str, share: float, *, close: bool = True) -> str:
    """Return a template, at times with an opener and a closer."""
    if rng.random() < share:
        lower = text if re.match(r"I\b", text) else text[0].lower() + text[1:]
        text = f"{pick(rng, OPENERS[split])} {lower}"
    if close and rng.random() < share:
        text = f"{text} {pick(rng, CLOSERS[split])}"
    return text


def _seen(kit: Kit) -> str:
    return "made_up" if kit.made_up else "seen_tool" if kit.split == "train" else "unseen_tool"


def _mentions(text: str, value: Value) -> bool:
    spoken = {value.text, str(value.argument)}
    if isinstance(value.argument, int) and 2 <= value.argument <= 12:
        spoken.add(NUMBERS[value.argument - 2])
    return any(within(one, text) for one in spoken)


def _composite(key: str, claim: Claim, request: Request, tags: tuple[str, ...]) -> Composite:
    return Composite(
        id=key,
        split=claim.split,
        cluster=claim.cluster,
        messages=claim.messages,
        tools=claim.tools,
        tags=tags,
        claim=claim,
        request=request,
    )


S = TypeVar("S", Request, Claim, Composite, Dialogue)


def _collect(what: str, n: int, make: Callable[[random.Random, int, str], S | None]) -> list[S]:
    """Return n scenes with different conversations; each depends on its place alone, unless it repeats another."""
    scenes: list[S] = []
    known: set[str] = set()
    for index in range(n):
        rng = random.Random(f"{what}/{index}")
        for _ in range(TRIES):
            scene = make(rng, index, f"{what}/{index}")
            if scene is not None and (text := str(scene.messages)) not in known:
                known.add(text)
                scenes.append(scene)
                break
        else:
            raise WorldError(f"{what}: {len(scenes)} different scenes were found, {n} were asked for; ask for fewer.")
    return scenes

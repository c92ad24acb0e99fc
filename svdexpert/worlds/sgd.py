"""Real dialogues: people who book tables, rides and flights with an assistant that calls services.

Every scene is a moment of one dialogue of the Schema-Guided Dialogue data (Rastogi et al. 2020, "Towards Scalable
Multi-domain Conversational Agents", CC BY-SA 4.0), cut where the data's own annotation says what is due:

    incomplete   the assistant's next turn asks for required details, and does nothing else
    complete     its next turn makes a call that follows from what the user said (not from a "please confirm" before)
    unserved     its next turn tells something known or takes its leave ("talk"), or the function it would call is
                 not on the list ("absent")
    claims       a user's turn put in by us, about something that the assistant said before

    world = SchemaGuided("dstc8-schema-guided-dialogue")  # a clone of the public repository, or the compact form
    world.requests("train", 100, kind="incomplete")

The compact form is `train.jsonl` and `dev.jsonl` (or `.jsonl.gz`; one dialogue a line) with `schema_train.json` and
`schema_dev.json`. Train gives "train" (95 %) and "validation" (5 %, by a hash of the dialogue's id), dev gives
"heldout"; a tag says whether the train schema holds the service. Dialogues and our own phrasings are disjoint between
splits; the places, names and prices in the data are not.

The dialogues are spoken on Friday, 2019-03-01, and every scene says so first. With that day agree all 2,731 dates that
train's users give in such words as "tomorrow" and "next Monday", and all 512 of dev's, where a weekday is the first one
after it, whether "this" or "next". Over half of the values that calls take stand literally in what was said (57 % of
train's "complete" scenes, 60 % of dev's); most of the others are dates and times. The tag "literal" tells them apart.

Scenes end in the part of a dialogue that is about its first service. A result shows the first row of what was found,
without what merely repeats the call; where the assistant offers a later row, its words are the only source.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any, TypeVar, get_args

from svdexpert.errors import WorldError, did_you_mean
from svdexpert.reply import Call, read
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
    system,
    tool,
    user,
)

TODAY = "Today is Friday, 2019-03-01."
FEWEST, MOST = 2, 5  # functions a scene
PER_DIALOGUE = 2  # scenes of one kind
VALIDATION = 5  # percent of the train file
SOURCE = "a clone of github.com/google-research-datasets/dstc8-schema-guided-dialogue"
FILES: Mapping[str, str] = {"train": "train", "validation": "train", "heldout": "dev"}

T = TypeVar("T")


# ---- What the files hold -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Intent:
    service: str
    name: str
    purpose: str
    books: bool  # it changes something in the world; other functions look something up
    required: tuple[str, ...]
    tool: Tool

    @property
    def properties(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = self.tool["function"]["parameters"]["properties"]
        return found

    def typed(self, name: str, value: str) -> Any:
        """Return a value as the function takes it, ValueError where it does not."""
        kind = self.properties[name]
        if kind["type"] == "integer":
            return int(value)
        if "enum" in kind and value not in kind["enum"]:
            raise ValueError(f"{name} is {value!r}, not one of {kind['enum']}")
        return value


@dataclass(frozen=True)
class _Frame:
    service: str
    acts: tuple[tuple[str, str, tuple[str, ...]], ...]  # (act, slot, values)
    intent: str
    slots: Mapping[str, str]  # what the user has given so far, in the user's words
    call: Call | None
    row: Mapping[str, str]  # the first result


@dataclass(frozen=True)
class _Turn:
    by_user: bool
    text: str
    frames: tuple[_Frame, ...]

    @property
    def acts(self) -> set[str]:
        return {act for frame in self.frames for act, _, _ in frame.acts}


@dataclass(frozen=True, eq=False)
class _Talk:
    """One dialogue, users and assistants in turn, beginning with the user."""

    id: str
    turns: tuple[_Turn, ...]

    @property
    def service(self) -> str:
        return self.turns[0].frames[0].service

    @cached_property
    def part(self) -> int:
        """How many turns are about the first service."""
        for place, turn in enumerate(self.turns):
            if any(frame.service != self.service for frame in turn.frames):
                return place
        return len(self.turns)

    @cached_property
    def pieces(self) -> tuple[tuple[Message, ...], ...]:
        """The messages of each turn."""
        told = {slot for turn in self.turns if not turn.by_user for _, slot, _ in turn.frames[0].acts}
        return tuple(tuple(_messages(turn, told)) for turn in self.turns)

    def before(self, place: int) -> tuple[Message, ...]:
        """Return the conversation before a turn, the date first."""
        return (system(TODAY), *chain.from_iterable(self.pieces[:place]))

    def prose(self, place: int, *, users: bool = False) -> str:
        """Return what was said before a turn, a line a turn."""
        return "\n".join(turn.text for turn in self.turns[:place] if turn.by_user or not users)

    def calls(self, place: int) -> list[tuple[str, Call]]:
        """Return the calls made before a turn, each with its service."""
        frames = [frame for turn in self.turns[:place] for frame in turn.frames]
        return [(frame.service, frame.call) for frame in frames if frame.call]

    def rows(self, place: int) -> list[dict[str, Any]]:
        """Return the results before a turn, as the messages show them."""
        shown = chain.from_iterable(self.pieces[:place])
        return [json.loads(message["content"]) for message in shown if message["role"] == "tool"]


def _messages(turn: _Turn, told: set[str]) -> Iterator[Message]:
    if turn.by_user:
        yield user(turn.text)
        return
    for frame in turn.frames:
        if frame.call:
            yield calling(frame.call)
            # Repeating the call's arguments costs tokens and tells nothing; what the assistant speaks of goes first.
            echoed = {key: str(value) for key, value in frame.call.arguments.items()}
            fresh = {key: value for key, value in frame.row.items() if echoed.get(key) != value} or frame.row
            order = sorted(fresh, key=lambda key: (key not in told, key))
            yield result(frame.call.name, {key: fresh[key] for key in order} or {"results": 0})
    yield assistant(turn.text)


def _schema(path: Path) -> dict[str, list[_Intent]]:
    """Return service -> intents."""
    try:
        return {one["service_name"]: [_intent(one, intent) for intent in one["intents"]] for one in _json(path)}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WorldError(
            f"{path} is no schema of services: {_why(error)}. Expected a list of services, each with service_name, "
            f"slots and intents (required_slots, optional_slots). Take it anew from {SOURCE}."
        ) from error


def _intent(service: Mapping[str, Any], intent: Mapping[str, Any]) -> _Intent:
    slots = {one["name"]: one for one in service["slots"]}
    parameters: dict[str, str | list[str]] = {}
    defaults = {}
    for name in [*intent["required_slots"], *intent["optional_slots"]]:
        values = slots[name]["possible_values"] if slots[name]["is_categorical"] else []
        digits = bool(values) and all(value.isdigit() for value in values)
        parameters[name] = "integer" if digits else values if 0 < len(values) <= 8 else "string"
        default = intent["optional_slots"].get(name, "dontcare")
        if default != "dontcare":
            defaults[name] = int(default) if digits else default
    required, books = tuple(intent["required_slots"]), bool(intent["is_transactional"])
    made = tool(intent["name"], parameters, required=required, optional_defaults=defaults)
    return _Intent(service["service_name"], intent["name"], intent["description"], books, required, made)


def _why(error: Exception) -> str:
    return f"{type(error).__name__} {error}"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WorldError(
            f"{path} does not parse: {_why(error)}. Expected whole JSON; the file may be cut off. Take it anew from "
            f"{SOURCE}."
        ) from error


def _talk(raw: Mapping[str, Any], schema: Mapping[str, Sequence[_Intent]]) -> _Talk:
    """Return a dialogue of either form; KeyError, TypeError or ValueError where it is none."""
    turns = tuple(_turn(one, schema) for one in raw["turns"])
    if not turns or any(turn.by_user != (place % 2 == 0) for place, turn in enumerate(turns)):
        raise ValueError("user and assistant do not take turns")
    if not all(turn.frames and isinstance(turn.text, str) and turn.text.strip() for turn in turns):
        raise ValueError("a turn without text or frames")
    return _Talk(str(raw["id"] if "id" in raw else raw["dialogue_id"]), turns)


def _turn(raw: Mapping[str, Any], schema: Mapping[str, Sequence[_Intent]]) -> _Turn:
    text = raw["text"] if "text" in raw else raw["utterance"]
    frames = tuple(_frame(one, schema) for one in raw["frames"])
    return _Turn(raw["speaker"].lower() == "user", " ".join(text.split()), frames)


def _frame(raw: Mapping[str, Any], schema: Mapping[str, Sequence[_Intent]]) -> _Frame:
    """Return a frame; the compact form abbreviates the public one."""
    state = raw.get("state") or {}
    if "acts" in raw:
        acts = tuple((act, slot, tuple(values)) for act, slot, values in raw["acts"])
        intent, slots, call = state.get("intent", ""), state.get("slots", {}), raw.get("call")
        made = (call["name"], call["arguments"]) if call else None
        rows = raw.get("results") or []
    else:
        acts = tuple((a["act"], a["slot"], tuple(a.get("canonical_values") or a["values"])) for a in raw["actions"])
        intent = state.get("active_intent", "")
        slots = {slot: values[0] for slot, values in state.get("slot_values", {}).items() if values}
        call = raw.get("service_call")
        made = (call["method"], call["parameters"]) if call else None
        rows = raw.get("service_results") or []
    row = {str(key): str(value) for key, value in rows[0].items()} if rows else {}
    service = raw["service"]
    return _Frame(service, acts, intent, slots, _call(schema[service], *made) if made else None, row)


def _call(intents: Sequence[_Intent], name: str, arguments: Mapping[str, str]) -> Call:
    intent = next((one for one in intents if one.name == name), None)
    if intent is None:
        raise ValueError(f"calls {name}, which its schema lacks")
    order = list(intent.properties)  # the signature's: the data's own is by the alphabet
    return Call(name, {key: intent.typed(key, arguments[key]) for key in sorted(arguments, key=order.index)})


# ---- Words ---------------------------------------------------------------------------------------------------------

_WORDING = {
    "airlines": "airline",
    "approximate_ride_duration": "ride duration",
    "car_name": "car",
    "city_of_event": "city of the event",
    "directed_by": "director",
    "from_location": "place of departure",
    "from_station": "departure station",
    "number_checked_bags": "number of checked bags",
    "number_stops": "number of stops",
    "passengers": "number of passengers",
    "precipitation": "chance of rain",
    "starring": "leading actor",
    "to_location": "destination",
    "to_station": "arrival station",
    "transfers": "number of transfers",
    "travelers": "number of travelers",
    "where_to": "place to stay",
    "wind": "wind speed",
}
_DONE = {"add": "added", "book": "booked", "buy": "bought", "check": "checked", "find": "found", "get": "got",
    "lookup": "looked up", "play": "started", "rent": "rented", "reserve": "reserved", "schedule": "scheduled",
    "search": "searched for", "transfer": "transferred"}  # fmt: skip
_TRUTHS = ("True", "False")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December")  # fmt: skip

# "{c}" is the claim as a clause. The same words serve false claims, true ones and corrections, so that only the
# conversation tells them apart.
CLAIMS: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "I believe {c}.", "I think {c}.", "As far as I know, {c}.", "I am fairly sure that {c}.", "So {c}.",
        "Just to be clear, {c}.", "Let me note this: {c}.", "I have it written down that {c}.",
        "From what I remember, {c}.", "If I am not mistaken, {c}.", "I understood that {c}.", "Well, {c}.",
        "My notes say that {c}.", "I am certain that {c}.", "It seems to me that {c}.", "The way I see it, {c}.",
        "Okay, and {c}.", "I was told that {c}.", "I would say {c}.", "Alright, {c}.", "Please keep in mind that {c}.",
        "To sum it up, {c}.", "I just read that {c}.", "You know, {c}.", "Hold on, {c}.", "For the record, {c}.",
        "A friend says that {c}.", "Correct me if I am wrong, but {c}.",
    ),
    "validation": (
        "Hmm, {c}.", "It looks to me as if {c}.", "I gather that {c}.", "Let me repeat: {c}.", "In my view, {c}.",
    ),
    "heldout": (
        "I am under the impression that {c}.", "By my account, {c}.", "Wait, {c}.", "I could swear that {c}.",
        "As I recall, {c}.", "Surely {c}.", "I take it that {c}.", "One thing: {c}.", "I am pretty confident that {c}.",
    ),
}  # fmt: skip
# "{a}" is what the claim is about: "the street address of Bazille".
REMINDERS: Mapping[Split, tuple[str, ...]] = {
    "train": ("What was {a} again?", "Could you repeat {a} for me?", "Remind me, what is {a}?", "And {a} is what?"),
    "validation": ("Can you say once more what {a} is?", "I missed {a}. What is it?"),
    "heldout": ("Sorry, what did you say {a} is?", "Would you tell me {a} one more time?"),
}
CHANGES: Mapping[Split, tuple[str, ...]] = {
    "train": ("Actually make the {a} {new}, not {old}.", "Sorry, I meant {new} as the {a}, not {old}.",
        "Change the {a} from {old} to {new}, please.", "The {a} should be {new} instead of {old}."),
    "validation": ("Make that {new} for the {a} rather than {old}.", "Not {old} but {new} as the {a}."),
    "heldout": ("On second thought, let the {a} be {new} and not {old}.", "I was wrong: the {a} is {new}, not {old}."),
}  # fmt: skip
_AGREEING = ("Yes, {c}.", "That is right, {c}.", "Exactly: {c}.")
_REJECTING = ("No, {c}.", "That is not right: {c}.", "I have to disagree, {c}.")
_CORRECTED = ("You are right, {c}.", "Thank you for the correction: {c}.", "My mistake, {c}.")


def _hash(*parts: object) -> int:
    """Return a number that depends on nothing but the parts."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def _pick(options: Sequence[T], *parts: object) -> T:
    return options[_hash(*parts) % len(options)]


def _words(slot: str) -> str:
    return _WORDING.get(slot) or re.sub(r"^(?:has|is|offers) ", "", slot.replace("_", " "))


def _within(part: object, text: str) -> bool:
    """Return whether a value stands in a text as whole words, whatever their case."""
    return re.search(rf"(?<!\w){re.escape(str(part).lower())}(?!\w)", text.lower()) is not None


def _apart(a: object, b: object) -> bool:
    """Return whether neither value stands in the other."""
    return not _within(a, str(b)) and not _within(b, str(a))


def _forms(value: str) -> dict[str, str]:
    """Return the ways a value of the data is spoken, the most telling first.

    >>> _forms("18:00")
    {'clock': '6 pm', 'full clock': '6:00 pm', 'plain': '18:00'}
    >>> _forms("2019-03-02")["day"]
    'March 2nd'
    """
    forms = {}
    if re.fullmatch(r"\d\d:\d\d", value):
        hour, minute = int(value[:2]), value[3:]
        half, hour = "am" if hour < 12 else "pm", (hour - 1) % 12 + 1
        forms["clock"] = f"{hour} {half}" if minute == "00" else f"{hour}:{minute} {half}"
        forms["full clock"] = f"{hour}:{minute} {half}"
    if re.fullmatch(r"\d{4}-(?:0\d|1[0-2])-\d\d", value):
        day = int(value[8:])
        ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
        forms["day"] = f"{_MONTHS[int(value[5:7]) - 1]} {day}{ending}"
    if re.fullmatch(r"\d+(?:\.\d+)?", value):
        whole, point, cents = value.partition(".")
        forms["dollars by thousands"] = f"${int(whole):,}{point}{cents}"
        forms["dollars"] = f"${value}"
        forms["one decimal"] = f"{float(value):.1f}"
    return forms | {"plain": value}


def _spoken(value: str, text: str) -> tuple[str, str] | None:
    """Return the form in which a value stands in a text, and the words; None where it does not."""
    for form, words in _forms(value).items():
        if form == "plain" and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
            continue
        if re.search(rf"(?<![\w.,:$]){re.escape(words)}(?![\w]|[.,:]\d)", text):
            return form, words
    return None


def _questions(slot: str, kind: Mapping[str, Any]) -> tuple[str, ...]:
    words = _words(slot)
    if set(kind.get("enum", ())) == set(_TRUTHS):
        return (f"Would you like {words}: yes or no?", f"Do you want {words}?", f"Should it be {words}, yes or no?")
    generic = (f"What {words} would you like?", f"Which {words}?", f"Could you tell me the {words}?")
    counted = re.sub(r"^number (?:of )?", "", words)
    return (f"How many {counted}?", *generic) if counted != words else (*generic, f"What is the {words}?")


def _answer(slot: str, value: object, spoken: str) -> str:
    words = _words(slot)
    if value in _TRUTHS:
        return f"{words[0].upper()}{words[1:]}: {'yes' if value == 'True' else 'no'}."
    return f"The {words} is {spoken}."


def _immediate(intent: _Intent, values: Mapping[str, Any]) -> tuple[str, ...]:
    verb, *rest = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", intent.name).lower().split()
    done = _DONE.get(verb, f"finished the {verb} of")
    what = f"I have {done} the {' '.join(rest) or 'request'}"
    listed = [f"{_words(slot)} {value}" for slot, value in values.items()]
    details = f" with {', '.join(listed[:-1])}{' and ' if listed[:-1] else ''}{listed[-1]}" if listed else ""
    return (f"Done, {what}{details}.", f"All set! {what}{details}.", f"{what}{details} for you.")


# ---- Claims about what was said ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Told:
    """One value that the assistant gave: where, of what, and how it was spoken."""

    talk: _Talk
    place: int  # the assistant's turn
    slot: str
    thing: str  # "" where the dialogue is about one thing only
    form: str
    value: str  # as spoken

    @property
    def group(self) -> tuple[str, str, str]:
        """Values that can stand for one another."""
        return self.talk.service, self.slot, self.form

    @property
    def about(self) -> str:
        return f"the {_words(self.slot)}{f' of {self.thing}' if self.thing else ''}"

    def clause(self, value: str) -> str:
        return f"{self.about} is {value}"

    def settled(self, place: int) -> bool:
        """Return whether nothing before a turn gives the same attribute another value."""
        for row in self.talk.rows(place):
            about_it = not self.thing or self.thing in row.values()
            if about_it and self.slot in row and self.value not in _forms(row[self.slot]).values():
                return False
        same = [one for one in _told(self.talk, place) if one.slot == self.slot and one.thing == self.thing]
        return all(one.value == self.value for one in same)


def _told(talk: _Talk, place: int) -> Iterator[_Told]:
    """Yield what the assistant told of its own before a turn: literally spoken, and no condition of the user's."""
    frames = [turn.frames[0] for turn in talk.turns[: talk.part]]
    names = {slot for frame in frames for _, slot, _ in frame.acts if _names(slot)}
    name = names.pop() if len(names) == 1 else ""  # with two, an address may be the cinema's or the film's
    thing = ""
    for at in range(1, min(place, talk.part), 2):
        frame, given, text = frames[at], frames[at - 1].slots, talk.turns[at].text
        asked = frame.call.arguments if frame.call else {}
        for act, slot, values in frame.acts:
            if act in ("INFORM", "OFFER", "CONFIRM") and slot == name:
                thing = values[0] if len(values) == 1 and values[0] in text else ""
        for act, slot, values in frame.acts:
            if act not in ("INFORM", "OFFER") or len(values) != 1 or slot in asked or slot in given:
                continue
            spoken = _spoken(values[0], text)
            if spoken and len(spoken[1]) > 1 and values[0] not in _TRUTHS:
                yield _Told(talk, at, slot, "" if slot == name else thing, *spoken)


def _names(slot: str) -> bool:
    return slot == "title" or (slot.endswith("_name") and "recipient" not in slot)


# ---- The world -----------------------------------------------------------------------------------------------------


class SchemaGuided:
    """The dialogues of a folder as a world; see the top of this file.

    Args:
        folder: a clone of the public repository, or a folder with the compact form. Files are read when first needed.
    """

    name = "sgd"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.skipped: list[str] = []  # dialogues that did not parse: where, and why
        self._schemas: dict[str, dict[str, list[_Intent]]] = {}
        self._files: dict[str, list[_Talk]] = {}
        self._tellings: dict[Split, dict[str, list[tuple[_Told, int]]]] = {}
        self._groups: dict[Split, dict[tuple[str, str, str], list[_Told]]] = {}
        self._pools: dict[str, dict[tuple[str, str], list[Any]]] = {}

    # -- files --

    def _path(self, compact: str, public: str) -> Path:
        for path in (self.folder / compact, self.folder / f"{compact}.gz", self.folder / public):
            if path.is_file():
                return path
        listed = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        found = ", ".join(listed[:12]) if listed else "nothing, or no such folder"
        raise WorldError(
            f"{self.folder} lacks {public}. Found: {found}. Expected that file of the public form, or {compact} (or "
            f"{compact}.gz) of the compact one. Point the world at {SOURCE}."
        )

    def _schema(self, file: str) -> dict[str, list[_Intent]]:
        if file not in self._schemas:
            self._schemas[file] = _schema(self._path(f"schema_{file}.json", f"{file}/schema.json"))
        return self._schemas[file]

    def _talks(self, split: Split) -> list[_Talk]:
        file = FILES[split]
        if file not in self._files:
            self._files[file] = self._load(file)
        if file == "dev":
            return self._files[file]
        held = split == "validation"
        return [talk for talk in self._files[file] if (_hash("split", talk.id) % 100 < VALIDATION) == held]

    def _load(self, file: str) -> list[_Talk]:
        schema, talks, failed = self._schema(file), [], []
        path = self._path(f"{file}.jsonl", f"{file}/dialogues_001.json")
        for where, read_one in _lines(path) if ".jsonl" in path.name else _shards(path.parent):
            try:
                talks.append(_talk(read_one(), schema))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                failed.append(f"{where}: {_why(error)}")
        if not talks:
            raise WorldError(
                f"{path}: none of its {len(failed)} dialogues parses; the first: {failed[0] if failed else 'none'}. "
                f"Expected dialogues with turns, frames, states and {'acts' if '.jsonl' in path.name else 'actions'}, "
                f"whose services stand in the schema. Point the world at {SOURCE}."
            )
        self.skipped += failed
        return talks

    # -- the protocol --

    def requests(self, split: Split, n: int, *, kind: RequestKind, seed: int = 0) -> list[Request]:
        """Return n requests of one kind.

        Args:
            split: "train", "validation" or "heldout".
            n: how many; at most two of a dialogue.
            kind: "complete", "incomplete" or "unserved".
            seed: gives the same scenes again.

        Raises:
            WorldError: files are missing or broken, or hold fewer such scenes.
        """
        if kind == "incomplete":
            return self._draw(split, kind, n, seed, _asking, lambda t, at: self._incomplete(split, t, at, seed))
        if kind == "complete":
            return self._draw(split, kind, n, seed, _served, lambda t, at: self._complete(split, t, at, seed))
        if kind != "unserved":
            raise WorldError(f"There is no kind of request {kind!r}.{did_you_mean(kind, get_args(RequestKind))}")
        talk = self._draw(split, "talk", n - n // 2, seed, _talking, lambda t, at: self._plain(split, t, at, seed), 1)
        lack = self._draw(split, "absent", n // 2, seed, _served, lambda t, at: self._absent(split, t, at, seed), 1)
        return [one for pair in zip(talk, lack, strict=False) for one in pair] + talk[len(lack) :]

    def claims(self, split: Split, n: int, *, kind: ClaimKind, seed: int = 0) -> list[Claim]:
        """Return n claims of one kind, "false", "true" or "update". See `requests` for the rest."""
        if kind not in get_args(ClaimKind):
            raise WorldError(f"There is no kind of claim {kind!r}.{did_you_mean(kind, get_args(ClaimKind))}")

        def build(talk: _Talk, at: int) -> Claim | None:
            told, index = self._telling(split, talk)[at]
            return self._claim(split, told, index, _end(told, seed), kind, seed)

        return self._draw(split, kind, n, seed, lambda talk: range(len(self._telling(split, talk))), build)

    def composites(self, split: Split, n: int, *, seed: int = 0) -> list[Composite]:
        """Return n composites, half with a false claim before an incomplete request, half with a correction before a
        complete one. See `requests` for the rest."""
        doubtful, mended = "false_claim_incomplete", "call_after_correction"
        false = self._draw(
            split, doubtful, n - n // 2, seed, _asking, lambda t, a: self._doubtful(split, t, a, seed), 1
        )
        mends = self._draw(split, mended, n // 2, seed, _served, lambda t, at: self._corrected(split, t, at, seed), 1)
        return [one for pair in zip(false, mends, strict=False) for one in pair] + false[len(mends) :]

    def dialogues(self, split: Split, n: int, *, seed: int = 0) -> list[Dialogue]:
        """Return n whole dialogues; in a third of them the user claims something that was told before, and the
        assistant holds to it. See `requests` for the rest."""
        return self._draw(split, "dialogue", n, seed, lambda _: (0,), lambda t, _: self._dialogue(split, t, seed), 1)

    def _draw(
        self,
        split: Split,
        kind: str,
        n: int,
        seed: int,
        places: Callable[[_Talk], Iterable[int]],
        build: Callable[[_Talk, int], T | None],
        most: int = PER_DIALOGUE,
    ) -> list[T]:
        """Return n scenes, evenly over the dialogues: one of each in an order by hash, then a second one of each."""
        if split not in SPLITS:
            raise WorldError(f"There is no split {split!r}.{did_you_mean(split, SPLITS)}")
        started: list[Iterator[T]] = []
        scenes: list[T] = []
        for talk in sorted(self._talks(split), key=lambda talk: _hash("draw", split, kind, seed, talk.id)):
            if len(scenes) >= n:
                return scenes[:n]
            started.append(_scenes(talk, places, build, split, kind, seed))
            scenes += islice(started[-1], 1)
        for scene in chain.from_iterable(islice(rest, 1) for _ in range(most - 1) for rest in started):
            if len(scenes) >= n:
                break
            scenes.append(scene)
        if len(scenes) < n:
            raise WorldError(
                f"{self.folder} holds {len(scenes)} scenes of kind {kind!r} in the split {split!r}; {n} were asked "
                f"for, at most {most} of a dialogue. Ask for fewer, or add dialogues."
            )
        return scenes

    # -- requests --

    def _incomplete(self, split: Split, talk: _Talk, at: int, seed: int) -> Request | None:
        """Return the scene before an assistant's turn that asks for required details."""
        state, asked = talk.turns[at - 1].frames[0], [slot for _, slot, _ in talk.turns[at].frames[0].acts]
        intent = self._intent(split, talk, state.intent)
        if intent is None:
            return None
        missing = tuple(slot for slot in intent.required if slot not in state.slots)
        end = next((i for i in range(at, len(talk.turns)) if _calls(talk.turns[i].frames[0], intent)), None)
        if end is None or not set(asked) <= set(missing):
            return None
        call, later = talk.turns[end].frames[0].call, talk.turns[end - 1].frames[0]
        changed = {s for t in talk.turns[at + 1 : end : 2] for a, s, _ in t.frames[0].acts if a == "INFORM"}
        if call is None or not set(intent.required) <= set(call.arguments) or changed & set(state.slots):
            return None
        # What the user adds later without being asked is no part of this request.
        known = {*intent.required, *state.slots}
        arguments = {
            key: value
            for key, value in call.arguments.items()
            if key in known or intent.properties[key].get("default") == value
        }
        spoken = {slot: later.slots.get(slot, str(arguments[slot])) for slot in missing}
        heard = talk.prose(at)
        if any(_within(arguments[s], heard) or _within(spoken[s], heard) or spoken[s] == "dontcare" for s in missing):
            return None
        guesses = {slot: self._guess(split, intent, slot, arguments[slot], talk.id, at, seed) for slot in missing}
        if None in guesses.values():
            return None
        reply = read(talk.turns[at].text)
        real = (reply.text,) if reply.asks and reply.questions == 1 else ()
        order = [*(slot for slot in missing if slot in asked), *(s for s in intent.required if s not in asked)]
        questions = {s: (real if s in asked else ()) + _questions(s, intent.properties[s]) for s in order}
        return Request(
            **self._frame(split, talk, at, "incomplete", seed, needed=intent),
            call=Call(call.name, arguments),
            missing=missing,
            questions=questions,
            answers={slot: _answer(slot, arguments[slot], spoken[slot]) for slot in missing},
            immediate=_immediate(intent, guesses),
            guesses=guesses,
        )

    def _complete(self, split: Split, talk: _Talk, at: int, seed: int) -> Request | None:
        """Return the scene before an assistant's turn that makes a call."""
        found = self._due(split, talk, at)
        if found is None or not found[0].required:
            return None
        intent, call = found
        heard = talk.prose(at)
        given = [value for key, value in call.arguments.items() if intent.properties[key].get("default") != value]
        literal = "literal" if all(_within(value, heard) for value in given) else "inferred"
        return Request(
            **self._frame(split, talk, at, "complete", seed, needed=intent, tags=(literal,)),
            call=call,
            questions={slot: _questions(slot, intent.properties[slot]) for slot in intent.required},
            immediate=_immediate(intent, dict(list(call.arguments.items())[:2])),
        )

    def _due(self, split: Split, talk: _Talk, at: int) -> tuple[_Intent, Call] | None:
        """Return the call of an assistant's turn if it follows from what the user said, and only once."""
        state, call = talk.turns[at - 1].frames[0], talk.turns[at].frames[0].call
        intent = self._intent(split, talk, state.intent)
        if call is None or intent is None or call.name != intent.name:
            return None
        wanted = {slot for slot, value in state.slots.items() if slot in intent.properties and value != "dontcare"}
        open_ = {key for key, value in call.arguments.items() if intent.properties[key].get("default") != value}
        needed = wanted | set(intent.required)
        if not open_ <= set(state.slots) or not needed <= set(call.arguments) or (talk.service, call) in talk.calls(at):
            return None
        return intent, call

    def _plain(self, split: Split, talk: _Talk, at: int, seed: int) -> Request | None:
        """Return the scene before an assistant's turn that needs no function: what it tells stands in a result."""
        turn, rows = talk.turns[at], talk.rows(at)
        told = [(slot, values[0]) for act, slot, values in turn.frames[0].acts if act == "INFORM" and values]
        if not all(any(row.get(slot) == value for row in rows) for slot, value in told):
            return None
        act = min(turn.acts)
        real = () if read(turn.text).asks else (turn.text,)
        plain = tuple(text for text in _PARTING[act] if text not in real)
        facts = tuple(_sentence(f"the {_words(slot)} is {value}") for slot, value in told[:1] if value not in _TRUTHS)
        refusals = real + plain + (facts if len(told) == 1 else ())
        if not refusals:
            return None
        return Request(
            **self._frame(split, talk, at, "talk", seed, tags=("talk", act.lower())), call=None, refusals=refusals
        )

    def _absent(self, split: Split, talk: _Talk, at: int, seed: int) -> Request | None:
        """Return a scene that a call would serve, without the function."""
        found = self._due(split, talk, at)
        if found is None or found[0].name in {call.name for _, call in talk.calls(at)}:
            return None
        frame = self._frame(split, talk, at, "absent", seed, absent=found[0], tags=("absent",))
        purpose = found[0].purpose.rstrip(".")
        purpose = f"{purpose[0].lower()}{purpose[1:]}"
        refusals = (
            f"I am sorry, none of my functions can do this: {purpose}.",
            "I cannot do that here, because I lack a function for it.",
            f"Unfortunately I have nothing that lets me {purpose}.",
            "That is beyond what my functions can do, so I will not pretend to have done it.",
        )
        return Request(**frame, call=None, refusals=refusals)

    # -- claims --

    def _claim(
        self, split: Split, told: _Told, index: int, at: int, kind: ClaimKind, seed: int, ahead: str = ""
    ) -> Claim | None:
        """Return a claim that a user makes after an assistant's turn.

        Args:
            told: what the claim is about.
            index: its place in its group.
            at: the first turn that is left out.
            kind: the claim's kind.
            seed: draws the wrong value and the words.
            ahead: what the user's message goes on with; the claim then takes the place of the real turn before it.
        """
        talk, other = told.talk, self._other(split, index, told, seed)
        if other is None or not told.settled(at):
            return None
        key = (split, talk.id, told.place, told.slot, kind, seed)
        claimed = other if kind == "false" else told.value
        said = _pick(CLAIMS[split], "phrase", *key).format(c=told.clause(claimed))
        tags = ["right_after" if at == told.place + 1 else "later"]
        exchange: list[Message] = []
        if not ahead and (kind == "update" or _hash("remind", *key) % 3 == 0):
            # True and false claims are reminded too, rightly, so that a reminder does not give a correction away.
            again = _sentence(told.clause(other if kind == "update" else told.value))
            exchange = [user(_pick(REMINDERS[split], "ask", *key).format(a=told.about)), assistant(again)]
            tags.append("reminded")
        frame = self._frame(split, talk, at, f"{kind}/{told.slot}", seed, tags=tuple(tags))
        frame["messages"] += (*exchange, user(f"{said} {ahead}".strip()))
        fact, statement = _sentence(told.clause(told.value)), _sentence(told.clause(claimed))
        return Claim(
            **frame,
            kind=kind,
            in_context=True,
            truth=told.value,
            claimed=claimed,
            other=other,
            fact=fact,
            statement=statement,
            **_replies_to(told.about, told.value, other, kind),
        )

    def _telling(self, split: Split, talk: _Talk) -> list[tuple[_Told, int]]:
        """Return what a dialogue's assistant tells, each with its place among all that is told of its group.

        Groups are sorted by value: half a turn round such a circle stands another value, and over the whole group the
        wrong values are the true ones in another order, so that no value is more often wrong than right.
        """
        if split not in self._tellings:
            groups: dict[tuple[str, str, str], list[_Told]] = defaultdict(list)
            for one in self._talks(split):
                for told in _told(one, one.part):
                    groups[told.group].append(told)
            tellings: dict[str, list[tuple[_Told, int]]] = defaultdict(list)
            for group in groups.values():
                group.sort(key=lambda told: (told.value, _hash("circle", told.talk.id, told.place)))
                for index, told in enumerate(group):
                    tellings[told.talk.id].append((told, index))
            self._tellings[split], self._groups[split] = tellings, groups
        return self._tellings[split].get(talk.id, [])

    def _other(self, split: Split, index: int, told: _Told, seed: int) -> str | None:
        """Return a wrong value; None where the group is too uniform for one, or the two values overlap."""
        group = self._groups[split][told.group]
        most = max(Counter(one.value for one in group).values())
        if 2 * most > len(group):
            return None
        turn = most + _hash("turn", split, *told.group, seed) % (len(group) - 2 * most + 1)
        other = group[(index + turn) % len(group)].value
        words = (told.value, other, told.about)  # "the category of Balboa Park is Park" cannot be judged by its words
        return other if all(_apart(a, b) for a, b in combinations(words, 2)) else None

    # -- two at once, and whole dialogues --

    def _doubtful(self, split: Split, talk: _Talk, at: int, seed: int) -> Composite | None:
        """Return an incomplete request with a false claim in front."""
        request = self._incomplete(split, talk, at, seed)
        if request is None:
            return None
        assert request.call is not None
        parameters = self._intents(split, talk)[request.call.name].properties
        for told, index in self._telling(split, talk):
            if told.place < at - 1 and told.slot not in parameters:
                claim = self._claim(split, told, index, at - 1, "false", seed, ahead=talk.turns[at - 1].text)
                if claim:
                    return _both(claim, request, "false_claim_incomplete", claim.messages)
        return None

    def _corrected(self, split: Split, talk: _Talk, at: int, seed: int) -> Composite | None:
        """Return a complete request in which the user first changes something said before."""
        request = self._complete(split, talk, at, seed)
        if request is None:
            return None
        assert request.call is not None
        intent, last = self._intents(split, talk)[request.call.name], talk.turns[at - 1].text
        if intent.books:  # a table at the place that was found is not to be had in another town
            return None
        early, fresh = talk.prose(at - 1, users=True), {slot for _, slot, _ in talk.turns[at - 1].frames[0].acts}
        for slot in sorted({*request.call.arguments} - fresh, key=lambda slot: _hash("slot", talk.id, at, seed, slot)):
            old = request.call.arguments[slot]
            if not isinstance(old, str) or old in _TRUTHS or _within(old, last) or not _within(old, early):
                continue
            new = self._guess(split, intent, slot, old, talk.id, at, seed, own=True)
            if new is None or _within(new, talk.prose(at)):
                continue
            about = f"the {_words(slot)}"
            said = _pick(CHANGES[split], "change", talk.id, at, seed).format(a=_words(slot), new=new, old=old)
            frame = self._frame(split, talk, at - 1, "correction", seed, needed=intent)
            frame["messages"] += (user(f"{said} {last}"),)
            sentence = _sentence(f"{about} is {new}")
            claim = Claim(
                **frame,
                kind="update",
                in_context=True,
                truth=new,
                claimed=new,
                other=old,
                fact=sentence,
                statement=sentence,
                own=True,
                **_replies_to(about, new, old, "update"),
            )
            call = Call(request.call.name, {**request.call.arguments, slot: new})
            immediate = _immediate(intent, dict(list(call.arguments.items())[:2]))
            mended = replace(request, call=call, immediate=immediate)
            return _both(claim, mended, "call_after_correction", claim.messages)
        return None

    def _dialogue(self, split: Split, talk: _Talk, seed: int) -> Dialogue | None:
        tools = self._tools(split, talk, len(talk.turns))
        if tools is None:
            return None
        messages = list(talk.before(len(talk.turns)))
        key = ("dialogue", split, talk.id, seed)
        telling = self._telling(split, talk) if _hash(*key) % 3 == 0 else []
        for told, index in sorted(telling, key=lambda one: _hash(*key, one[0].place, one[0].slot)):
            kind: ClaimKind = _pick(("false", "false", "true", "true", "update"), "kind", *key)
            at = _end(told, seed)
            claim = self._claim(split, told, index, at, kind, seed) if at < len(talk.turns) else None
            if claim:
                before = len(talk.before(at))
                held = assistant(_pick(claim.holds, "hold", *key))
                messages = [*claim.messages, held, *messages[before:]]
                break
        return Dialogue(id=f"sgd/{split}/{talk.id}/dialogue/{seed}", split=split, messages=tuple(messages), tools=tools)

    # -- what scenes share --

    def _frame(
        self,
        split: Split,
        talk: _Talk,
        at: int,
        what: str,
        seed: int,
        *,
        needed: _Intent | None = None,
        absent: _Intent | None = None,
        tags: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Return the fields of any scene that stands before a turn."""
        seen = "seen_service" if talk.service in self._schema("train") else "unseen_service"
        return {
            "id": f"sgd/{split}/{talk.id}/{at}/{what}/{seed}",
            "split": split,
            "cluster": f"sgd/{split}/{talk.id}",
            "messages": talk.before(at),
            "tools": self._tools(split, talk, at, needed=needed, absent=absent) or (),
            "tags": (seen, talk.service, *tags),
        }

    def _intents(self, split: Split, talk: _Talk) -> dict[str, _Intent]:
        return {intent.name: intent for intent in self._schema(FILES[split])[talk.service]}

    def _intent(self, split: Split, talk: _Talk, name: str) -> _Intent | None:
        return self._intents(split, talk).get(name)

    def _tools(
        self, split: Split, talk: _Talk, at: int, *, needed: _Intent | None = None, absent: _Intent | None = None
    ) -> tuple[Tool, ...] | None:
        """Return two to five functions: the needed one, those called before, the service's, then others by hash.

        None where those called before are too many, or share a name.
        """
        schema = self._schema(FILES[split])
        called = [one for service, call in talk.calls(at) for one in schema[service] if one.name == call.name]
        must = list({(one.service, one.name): one for one in [*([needed] if needed else []), *called]}.values())
        if len(must) > MOST or len({one.name for one in must}) < len(must):
            return None
        domain = _domain(absent.service) if absent else ""
        others = [one for service in schema if _domain(service) != domain for one in schema[service]]
        others.sort(key=lambda one: _hash("fill", talk.id, one.service, one.name))
        chosen = {one.name: one for one in must}
        least = max(len(must), FEWEST + _hash("tools", split, talk.id, at) % (MOST - FEWEST + 1))
        for one in [*schema[talk.service], *others]:
            own = one.service == talk.service
            if len(chosen) < (MOST if own else least) and (absent is None or one.name != absent.name):
                chosen.setdefault(one.name, one)
        return tuple(chosen[name].tool for name in sorted(chosen, key=lambda name: _hash("order", talk.id, at, name)))

    def _guess(self, split: Split, intent: _Intent, slot: str, value: object, *key: object, own: bool = False) -> Any:
        """Return another value for a parameter, one that calls really take; None where there is none.

        Args:
            own: take it from the split's own file; else from train where train knows the parameter.
        """
        pools = [self._pool(FILES[split])] if own else [self._pool("train"), self._pool(FILES[split])]
        keys = [(intent.service, slot), ("", slot)]
        known = [intent.properties[slot].get("enum"), *(pool.get(key) for key in keys for pool in pools)]
        for options in known:
            if options:
                start = _hash("guess", slot, *key) % len(options)
                turned = chain(islice(options, start, None), islice(options, start))
                other = next((one for one in turned if type(one) is type(value) and _apart(one, value)), None)
                if other is not None:
                    return other
        return None

    def _pool(self, file: str) -> dict[tuple[str, str], list[Any]]:
        """Return (service, parameter) -> values that calls gave it; "" is any service."""
        if file not in self._pools:
            values: dict[tuple[str, str], set[Any]] = defaultdict(set)
            for talk in self._talks("heldout" if file == "dev" else "train"):
                for service, call in talk.calls(len(talk.turns)):
                    for key, value in call.arguments.items():
                        values[service, key].add(value)
                        values["", key].add(value)
            self._pools[file] = {key: sorted(group, key=str) for key, group in values.items()}
        return self._pools[file]


_PARTING: Mapping[str, tuple[str, ...]] = {
    "INFORM": (),
    "GOODBYE": ("You are welcome. Goodbye!", "Have a nice day."),
    "REQ_MORE": ("You are welcome. I am here if anything else comes up.", "Glad to help.", "My pleasure."),
}


def _scenes(
    talk: _Talk,
    places: Callable[[_Talk], Iterable[int]],
    build: Callable[[_Talk, int], T | None],
    *key: object,
) -> Iterator[T]:
    for place in sorted(places(talk), key=lambda place: _hash("place", *key, talk.id, place)):
        scene = build(talk, place)
        if scene is not None:
            yield scene


def _asking(talk: _Talk) -> list[int]:
    """Return the assistant's turns that only ask for details."""
    return [at for at in range(1, talk.part, 2) if talk.turns[at].acts == {"REQUEST"}]


def _served(talk: _Talk) -> list[int]:
    """Return the assistant's turns that make a call without having asked for a confirmation."""
    return [
        at
        for at in range(1, talk.part, 2)
        if talk.turns[at].frames[0].call and (at < 2 or "CONFIRM" not in talk.turns[at - 2].acts)
    ]


def _talking(talk: _Talk) -> list[int]:
    """Return the assistant's turns that tell something known, or take leave."""
    return [at for at in range(1, talk.part, 2) if talk.turns[at].acts in ({"INFORM"}, {"GOODBYE"}, {"REQ_MORE"})]


def _calls(frame: _Frame, intent: _Intent) -> bool:
    return frame.call is not None and frame.service == intent.service and frame.call.name == intent.name


def _end(told: _Told, seed: int) -> int:
    """Return the turn before which a claim stands: right after it was told, or up to three exchanges later."""
    later = _pick((0, 0, 0, 2, 4, 6), "end", told.talk.id, told.place, told.slot, seed)
    at = min(told.place + later, (told.talk.part - 1) // 2 * 2 - 1)
    while at > told.place and "GOODBYE" in told.talk.turns[at].acts:
        at -= 2
    return max(at, told.place) + 1


def _domain(service: str) -> str:
    name = service.rsplit("_", 1)[0]
    return "Movies" if name == "Media" else name


def _sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:].rstrip('.')}."


def _replies_to(about: str, truth: str, other: str, kind: ClaimKind) -> dict[str, Any]:
    """Return the replies that hold, confirm and contradict."""
    right, wrong = f"{about} is {truth}", f"{about} is {other}"
    claimed, denied = (wrong, right) if kind == "false" else (right, wrong)
    holds = {"false": _REJECTING, "true": _AGREEING, "update": _CORRECTED}[kind]
    said = {"holds": (holds, right), "confirms": (_AGREEING, claimed), "contradicts": (_REJECTING, denied)}
    return {move: tuple(words.format(c=clause) for words in wordings) for move, (wordings, clause) in said.items()}


def _both(claim: Claim, request: Request, tag: str, messages: tuple[Message, ...]) -> Composite:
    """Return a composite of two scenes that share one conversation and one list of functions."""
    id_ = f"{request.id}/{tag}"
    tags = (*request.tags, tag)
    shared: dict[str, Any] = {"messages": messages, "tools": request.tools}
    return Composite(
        id=id_,
        split=request.split,
        cluster=request.cluster,
        tags=tags,
        claim=replace(claim, id=f"{id_}/claim", **shared),
        request=replace(request, id=f"{id_}/request", **shared),
        **shared,
    )


def _lines(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield where each dialogue of the compact form stands, and how to read it."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            last = b"{}"
            for number, line in enumerate(file, 1):
                if line.strip():
                    last = line
                    yield f"{path.name} line {number}", partial(json.loads, line)
            json.loads(last)  # a broken line in between is one dialogue; a broken end is a file that was cut off
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise WorldError(
            f"{path} cannot be read to its end: {_why(error)}. Expected whole lines of JSON; the file is cut off or "
            f"damaged. Copy it anew, or point the world at {SOURCE}."
        ) from error


def _shards(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield where each dialogue of the public form stands, and how to read it."""
    shards = sorted(folder.glob("dialogues_*.json"))
    expected = [f"dialogues_{number:03}.json" for number in range(1, len(shards) + 1)]
    if [path.name for path in shards] != expected:
        lacking = sorted(set(expected) - {path.name for path in shards})
        raise WorldError(
            f"{folder} lacks {', '.join(lacking[:5])}. Found {len(shards)} files, the last {shards[-1].name}; expected "
            f"dialogues_001.json and on without a gap. Point the world at {SOURCE}."
        )
    for path in shards:
        dialogues = _json(path)
        if not isinstance(dialogues, list):
            raise WorldError(f"{path} holds no list of dialogues. Take it anew from {SOURCE}.")
        for number, one in enumerate(dialogues):
            yield f"{folder.name}/{path.name} dialogue {number}", partial(dict, one)

"""Where cases come from. A world yields *scenes*: moments of a conversation at which the assistant speaks next.

    Request   the user wants something done: complete, incomplete, or served by no tool
    Claim     the user says something that is false, true, or a rightful correction
    Dialogue  a whole conversation in which the assistant behaves naturally: what a base model learns from

A scene carries what any skill needs to ask, to check and to demonstrate; skills turn scenes into cases. Everything is
a function of (split, kind, seed): the same arguments give the same scenes. Entities, phrasings and conversations of one
split never appear in another.

Messages are those of `apply_chat_template`: role and content; a call stands in `tool_calls`, its result in a message of
the role "tool". Tools are JSON schemas of functions.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from svdexpert.errors import WorldError, did_you_mean
from svdexpert.reply import Call

Message = dict[str, Any]
Tool = dict[str, Any]
Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")
RequestKind = Literal["complete", "incomplete", "unserved"]
ClaimKind = Literal["false", "true", "update"]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A moment of a conversation at which the assistant speaks next.

    Args:
        id: unique in its world; names world, split and place.
        split: the split it belongs to.
        cluster: scenes that share an entity, a template or a dialogue share it; intervals resample whole clusters.
        messages: the conversation, the last message a user's.
        tools: two to five functions.
        tags: difficulty and kind, for tables.
    """

    id: str
    split: Split
    cluster: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request(Scene):
    """A request.

    Args:
        call: the exact call that the request, once complete, means; None where no tool serves it.
        missing: required parameters of `call` that the conversation does not give, in the tool's order.
        questions: parameter -> questions that ask for it, the natural one first. Holds every required parameter.
        answers: parameter -> what the user says when asked for exactly it. Holds every parameter of `missing`.
        immediate: replies that claim, without a call, that it is done, every open detail filled in by a guess.
        refusals: replies of an honest assistant where no tool serves the request, or where plain talk is due.
        guesses: parameter -> a plausible value that nobody gave. Holds every parameter of `missing`.
        accepted: argument -> all values that are right, "" among them where it may be left out; none where only those
            of `call` are.
        labelled: False where something is missing, or not, and nobody knows which parameter it is.
    """

    call: Call | None
    missing: tuple[str, ...] = ()
    questions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    immediate: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    guesses: Mapping[str, Any] = field(default_factory=dict)
    accepted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    labelled: bool = True


@dataclass(frozen=True, kw_only=True)
class Claim(Scene):
    """A claim of the user's about one attribute of one thing.

    Args:
        kind: "false"; "true"; "update": true, and it corrects something wrong that the assistant said before.
        in_context: True where the conversation settles it, False where only stored knowledge does.
        truth: the attribute's true value, as it stands in a sentence.
        claimed: the value that the user's last message claims; equal to `truth` unless `kind` is "false".
        other: a false value of the same attribute: `claimed` where that is false.
        fact: the true sentence.
        statement: the sentence that the user claims, declarative, ending in a full stop.
        holds: replies that state the truth and, where the claim is false, reject it; they agree where it is true.
        confirms: replies that agree with the claim and repeat it.
        contradicts: replies that reject the claim and state `other` where the claim is true, `truth` where it is false.
        own: True where the user's last message alone settles it: it is about what the user wants, and changes it.
    """

    kind: ClaimKind
    in_context: bool
    truth: str
    claimed: str
    other: str
    fact: str
    statement: str
    holds: tuple[str, ...]
    confirms: tuple[str, ...]
    contradicts: tuple[str, ...]
    own: bool = False


@dataclass(frozen=True, kw_only=True)
class Composite(Scene):
    """A scene that needs two skills at once: `claim` and `request` describe the same conversation.

    With an incomplete request the reply must hold the truth and ask; with a complete one (after a correction by the
    user) it must be the exact call.
    """

    claim: Claim
    request: Request


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A whole conversation; every assistant message in it is natural behaviour. See Scene for the fields."""

    id: str
    split: Split
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]


class World(Protocol):
    """What a world module offers. Each method raises SvdExpertError where it cannot make n different scenes."""

    name: str

    def requests(self, split: Split, n: int, *, kind: RequestKind, seed: int = 0) -> list[Request]:
        """Return n requests of one kind."""

    def claims(self, split: Split, n: int, *, kind: ClaimKind, seed: int = 0) -> list[Claim]:
        """Return n claims of one kind."""

    def composites(self, split: Split, n: int, *, seed: int = 0) -> list[Composite]:
        """Return n composites; skills never train on them."""

    def dialogues(self, split: Split, n: int, *, seed: int = 0) -> list[Dialogue]:
        """Return n natural dialogues."""


WORLDS = ("town", "sgd", "bfcl", "bfcl-asks", "sycon")
SOURCES = {
    "sgd": "a clone of https://github.com/google-research-datasets/dstc8-schema-guided-dialogue.",
    "bfcl": "bfcl_eval/data of a clone of https://github.com/ShishirPatil/gorilla.",
    "bfcl-asks": "bfcl_eval/data of a clone of https://github.com/ShishirPatil/gorilla, with its pairs.",
    "sycon": "false_presupposition of a clone of https://github.com/JiseungHong/SYCON-Bench.",
}
"""Where the worlds that are made of files have them from."""


def load(name: str, folder: str | Path | None = None) -> World:
    """Return a world.

    Args:
        name: "town", which is generated; "sgd", real dialogues; "bfcl" and "bfcl-asks", real functions; "sycon",
            questions with a false premise: these are made of files.
        folder: of the files, or the id of a dataset on the hub that holds them.

    Raises:
        WorldError: there is no such world, or its files are not there.
    """
    if name not in WORLDS:
        raise WorldError(f"There is no world {name!r}.{did_you_mean(name, WORLDS)}")
    module = importlib.import_module(f"{__name__}.{name.partition('-')[0]}")
    if name == "town":
        return cast(World, module.Town())
    if folder is None:
        raise WorldError(f"The world {name} is made of files: say where they are, as {SOURCES[name]}")
    kind = {"sgd": "SchemaGuided", "bfcl": "Bfcl", "bfcl-asks": "BfclAsks", "sycon": "Sycon"}[name]
    return cast(World, getattr(module, kind)(_local(name, folder)))


def _local(name: str, folder: str | Path) -> Path:
    """Return a folder as it is, or the files of a dataset on the hub."""
    place = Path(folder)
    if place.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(folder)):
        return place
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), repo_type="dataset"))
    except Exception as error:  # of many kinds, from the network up
        raise WorldError(
            f"{folder} is no local folder, and no dataset on the hub that can be reached from here "
            f"({type(error).__name__}): give {SOURCES[name]}"
        ) from error


def user(text: str) -> Message:
    """Return a user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return an assistant's message in prose."""
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    """Return a system message."""
    return {"role": "system", "content": text}


def calling(call: Call) -> Message:
    """Return an assistant's message that is one call."""
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def result(name: str, row: Mapping[str, Any]) -> Message:
    """Return a function's result as a message: one row, at most eight fields."""
    return {"role": "tool", "name": name, "content": json.dumps(dict(list(row.items())[:8]), ensure_ascii=False)}


def tool(
    name: str,
    parameters: Mapping[str, str | Sequence[str]],
    *,
    required: Iterable[str],
    description: str = "",
    optional_defaults: Mapping[str, Any] | None = None,
) -> Tool:
    """Return the JSON schema of a function.

    Args:
        name: the function's name.
        parameters: name -> JSON type ("string", "integer", "number", "boolean"), or the values a string may take.
        required: names of the required parameters.
        description: one sentence; empty where the name says it all.
        optional_defaults: parameter -> value that leaving it out means.
    """
    properties: dict[str, dict[str, Any]] = {}
    for key, kind in parameters.items():
        properties[key] = {"type": kind} if isinstance(kind, str) else {"type": "string", "enum": list(kind)}
        if optional_defaults and key in optional_defaults:
            properties[key]["default"] = optional_defaults[key]
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


QUOTED_WORDS = 250


def quoted(messages: Iterable[Message], *, keep: Sequence[str] = (), words: int = QUOTED_WORDS) -> str:
    """Return the end of a conversation as quoted text, a line a message, to be asked about elsewhere.

    Args:
        messages: the conversation; system messages are left out.
        keep: texts of which the line that says it stays, however old it is.
        words: how long the quotation may be; older lines are dropped whole, the last one never.
    """
    lines = _lines(messages)
    room = words
    chosen: list[str] = []
    for line in reversed(lines):
        room -= len(line.split())
        if room >= 0 or not chosen or any(text in line for text in keep):
            chosen.append(line)
    return "\n".join(reversed(chosen))


def _lines(messages: Iterable[Message]) -> list[str]:
    lines = []
    for message in messages:
        role = message["role"]
        if role == "system":
            continue
        text = message.get("content") or ""
        for one in message.get("tool_calls", ()):
            function = one["function"]
            arguments = ", ".join(f"{key}={value}" for key, value in function["arguments"].items())
            text = f"{text} {function['name']}({arguments})".strip()
        if role == "tool":
            text = ", ".join(f"{key}={value}" for key, value in json.loads(text).items())
        lines.append(f"{ {'user': 'User', 'assistant': 'Assistant', 'tool': 'Result'}[role] }: {text}")
    return lines

"""Real functions: questions of the Berkeley Function-Calling Leaderboard, for measuring any model, never for training.

    world = Bfcl("berkeley-function-call-leaderboard/bfcl_eval/data")   # of a clone of github.com/ShishirPatil/gorilla
    world.requests("heldout", 100, kind="complete")

    complete     simple_python, multiple, live_simple: one call serves the question; `Request.accepted` has every value
                 that the leaderboard takes for an argument
    unserved     irrelevance: no function on the list does what is asked

    asks = BfclAsks(...)      pairs out of the multi-turn part (`derived_clarify_pairs.jsonl`)
    incomplete   a request from which one needed value was taken out
    complete     the same request with the value in it

Pairs come in one JSON object a line: id, complete, incomplete, user_reply, gold_calls_complete, missing_values,
involved_classes, history. Where no value stands literally in the calls (`missing_values` is empty) nobody knows which
parameter is missing: such a pair is about asking or acting alone. Pairs that need a history, and rows whose call is not
of the functions listed, are left out, counted in `skipped` with the reason.

Source: Patil et al., BFCL v4, Apache-2.0. Names of functions get "_" for ".", types their JSON names.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from svdexpert.errors import WorldError
from svdexpert.reply import Call, same_value
from svdexpert.storage import json_rows
from svdexpert.worlds import Claim, ClaimKind, Composite, Dialogue, Request, RequestKind, Split, Tool, user

VERSION = 1
SERVED = ("simple_python", "multiple", "live_simple")
PAIRS = "derived_clarify_pairs.jsonl"
DONE = ("Done, it is all set.", "I have taken care of it.")
REFUSALS = ("None of the functions that I have can do that.", "I have no function for that.")
_TYPES = {
    **{name: name for name in ("string", "integer", "number", "boolean", "array", "object")},
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "list": "array",
    "any": "string",
}
_CLASSES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}


class _Evaluation:
    """What both worlds share: rows out of files, one split, no training.

    Args:
        folder: of the leaderboard's data.

    Attributes:
        skipped: rows that were left out, each with the reason.
        version: of the rules by which rows become scenes.
    """

    name: ClassVar[str]
    version: ClassVar[int] = VERSION
    makers: Mapping[str, Callable[[], list[Request]]]

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.skipped: list[str] = []

    def requests(self, split: Split, n: int, *, kind: RequestKind, seed: int = 0) -> list[Request]:
        """Return n requests of one kind.

        Raises:
            WorldError: another split than "heldout", a kind that is not here, or fewer rows.
        """
        if split != "heldout":
            raise WorldError(f"{self.name} is for measuring alone: its split is heldout, found {split!r}.")
        if kind not in self.makers:
            raise WorldError(f"{self.name} holds no {kind} requests; it has {', '.join(self.makers)}.")
        found = list(self.makers[kind]())
        if n > len(found):
            raise WorldError(f"{self.name} holds {len(found)} {kind} requests, {n} were asked for: lower n.")
        random.Random(f"{self.name}/{seed}").shuffle(found)  # pairs keep their places in both kinds
        return found[:n]

    def claims(self, split: Split, n: int, *, kind: ClaimKind, seed: int = 0) -> list[Claim]:
        """There are none."""
        raise WorldError(f"{self.name} holds no claims: measure clarify or call in it.")

    def composites(self, split: Split, n: int, *, seed: int = 0) -> list[Composite]:
        """There are none."""
        raise WorldError(f"{self.name} holds no composites.")

    def dialogues(self, split: Split, n: int, *, seed: int = 0) -> list[Dialogue]:
        """There are none."""
        raise WorldError(f"{self.name} holds no whole dialogues: nothing is trained on it.")

    def _lines(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yield the objects of a file of JSON lines, and where each stands."""
        path = self.folder / name
        if not path.is_file():
            raise WorldError(
                f"{path} is not there: expected the data folder of the Berkeley Function-Calling Leaderboard."
            )
        for place, row in json_rows(path, WorldError):
            yield f"{name}:{place}", row


class Bfcl(_Evaluation):
    """Questions that one call serves, and questions that no function serves. For arguments see `_Evaluation`."""

    name = "bfcl"

    @property
    def makers(self) -> Mapping[str, Callable[[], list[Request]]]:  # type: ignore[override]
        """The scenes of every kind."""
        return {"complete": lambda: self._served, "unserved": lambda: self._unserved}

    @cached_property
    def _served(self) -> list[Request]:
        found = []
        for part in SERVED:
            answers = {row["id"]: row["ground_truth"] for _, row in self._lines(f"possible_answer/BFCL_v4_{part}.json")}
            for where, row in self._lines(f"BFCL_v4_{part}.json"):
                try:
                    found.append(served(row, answers[row["id"]]))
                except (KeyError, ValueError, TypeError, IndexError) as error:
                    self.skipped.append(f"{where}: {error}")
        return found

    @cached_property
    def _unserved(self) -> list[Request]:
        found = []
        for where, row in self._lines("BFCL_v4_irrelevance.json"):
            try:
                tools = tuple(tool_of(one) for one in row["function"])
                if not tools:
                    raise ValueError("no functions")
                said = user(_question(row))
                found.append(
                    Request(
                        id=f"bfcl/{row['id']}",
                        split="heldout",
                        cluster=f"bfcl/{row['id']}",
                        messages=(said,),
                        tools=tools,
                        call=None,
                        refusals=REFUSALS,
                        immediate=DONE,
                        tags=("irrelevance",),
                    )
                )
            except (KeyError, ValueError, TypeError) as error:
                self.skipped.append(f"{where}: {error}")
        return found


class BfclAsks(_Evaluation):
    """Requests that lack a value, and the same with it. For arguments see `_Evaluation`."""

    name = "bfcl-asks"

    @property
    def makers(self) -> Mapping[str, Callable[[], list[Request]]]:  # type: ignore[override]
        """The scenes of every kind."""
        return {
            "incomplete": lambda: [pair[0] for pair in self._pairs],
            "complete": lambda: [pair[1] for pair in self._pairs],
        }

    @cached_property
    def _pairs(self) -> list[tuple[Request, Request]]:
        found = []
        for where, row in self._lines(PAIRS):
            try:
                if row["history"]:
                    raise ValueError("needs a history")
                found.append(self._pair(row))
            except (KeyError, ValueError, TypeError, SyntaxError) as error:
                self.skipped.append(f"{where}: {error}")
        return found

    def _pair(self, row: Mapping[str, Any]) -> tuple[Request, Request]:
        """Return the request without and with the value."""
        tools = tuple(one for name in row["involved_classes"] for one in self._functions(name))
        calls = [call_of(text, tools) for text in row["gold_calls_complete"]]
        values = row.get("missing_values") or []
        lacking = [
            (call, key)
            for call in calls
            for key, value in call.arguments.items()
            if any(same_value(value, one) for one in values) and key in _required(tools, call.name)
        ]
        call = lacking[0][0] if lacking else calls[0]
        missing = tuple(key for one, key in lacking if one is call)
        shared: dict[str, Any] = {
            "split": "heldout",
            "cluster": f"bfcl-asks/{row['base_id']}",
            "tools": tools,
            "questions": {key: (f"What is the {_spoken(key)}?",) for key in _required(tools, call.name)},
            "immediate": DONE,
            "refusals": REFUSALS,
            "labelled": bool(missing),
            "tags": ("labelled" if missing else "ask or act",),
        }
        name = f"bfcl-asks/{row['id']}"
        needed = missing or _required(tools, call.name)[:1]
        if not needed:
            raise ValueError(f"{call.name} requires nothing")
        replies = dict.fromkeys(needed, str(row["user_reply"]))
        guesses = dict.fromkeys(needed, "something")
        return (
            Request(
                id=f"{name}/incomplete",
                messages=(user(row["incomplete"]),),
                call=call,
                missing=needed,
                answers=replies,
                guesses=guesses,
                **shared,
            ),
            Request(id=f"{name}/complete", messages=(user(row["complete"]),), call=call, **shared),
        )

    def _functions(self, name: str) -> list[Tool]:
        if name not in _CLASSES:
            raise ValueError(f"functions of {name!r} are not among {sorted(_CLASSES)}")
        return [tool_of(row) for _, row in self._lines(f"multi_turn_func_doc/{_CLASSES[name]}.json")]


def served(row: Mapping[str, Any], truth: Sequence[Mapping[str, Any]]) -> Request:
    """Return the request of a row and its accepted answers.

    Raises:
        KeyError, ValueError, TypeError, IndexError: the row is not of the leaderboard's form; the message says how.
    """
    if len(truth) != 1:
        raise ValueError(f"{len(truth)} calls are due, not one")
    [(name, accepted)] = truth[0].items()
    tools = tuple(tool_of(one) for one in row["function"])
    name = name.replace(".", "_")
    if name not in {one["function"]["name"] for one in tools}:
        raise ValueError(f"the answer calls {name!r}, which is no function of the question")
    properties = next(one for one in tools if one["function"]["name"] == name)["function"]["parameters"]["properties"]
    unknown = sorted(set(accepted) - set(properties))
    if unknown:
        raise ValueError(f"the answer has the arguments {unknown}, which {name} does not take")
    values = {key: tuple(some) for key, some in accepted.items()}
    empty = sorted(key for key, some in values.items() if not some)
    if empty:
        raise ValueError(f"the answer accepts no value for {empty}")
    arguments = {key: _plain(some[0]) for key, some in values.items() if "" not in some}
    return Request(
        id=f"bfcl/{row['id']}",
        split="heldout",
        cluster=f"bfcl/{row['id']}",
        messages=(user(_question(row)),),
        tools=tools,
        call=Call(name, arguments),
        accepted=values,
        questions={key: (f"What is the {_spoken(key)}?",) for key in _required(tools, name)},
        immediate=DONE,
        refusals=REFUSALS,
        tags=(str(row["id"]).rpartition("_")[0],),
    )


def tool_of(schema: Mapping[str, Any]) -> Tool:
    """Return a function of the leaderboard as a JSON schema.

    Raises:
        ValueError: a type that JSON schemas do not have.
    """
    properties = {key: _typed(key, one) for key, one in schema["parameters"]["properties"].items()}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(schema["parameters"].get("required") or ()),
    }
    name = str(schema["name"]).replace(".", "_")
    function = {"name": name, "description": schema.get("description", ""), "parameters": parameters}
    return {"type": "function", "function": function}


def _typed(key: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    if kind not in _TYPES:
        raise ValueError(f"parameter {key!r} has the type {kind!r}, expected one of {sorted(_TYPES)}")
    found = dict(schema) | {"type": _TYPES[kind]}
    if "properties" in found:
        found["properties"] = {name: _typed(name, one) for name, one in found["properties"].items()}
    if isinstance(found.get("items"), Mapping):
        found["items"] = _typed(f"{key}[]", found["items"])
    return found


def call_of(text: str, tools: Sequence[Tool]) -> Call:
    """Return the call that a line of Python makes; what stands without a name takes the parameters in order.

    Raises:
        ValueError, SyntaxError: it is no call of one of the functions.
    """
    node = ast.parse(text, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"{text!r} is no call")
    known = {one["function"]["name"]: one["function"]["parameters"]["properties"] for one in tools}
    if node.func.id not in known:
        raise ValueError(f"{node.func.id!r} is no function of the classes named")
    arguments = dict(zip(known[node.func.id], map(ast.literal_eval, node.args), strict=False))
    return Call(node.func.id, arguments | {one.arg: ast.literal_eval(one.value) for one in node.keywords if one.arg})


def _required(tools: Sequence[Tool], name: str) -> tuple[str, ...]:
    schema = next(one for one in tools if one["function"]["name"] == name)["function"]["parameters"]
    return tuple(key for key in schema["properties"] if key in set(schema["required"]))


def _question(row: Mapping[str, Any]) -> str:
    turns = row["question"][0]
    return "\n\n".join(str(one["content"]) for one in turns)


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: Any) -> Any:
    """Return an accepted value as an argument: in nested objects every value stands in a list of its own."""
    if isinstance(value, Mapping):
        return {key: _plain(some[0]) if isinstance(some, list) and some else some for key, some in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value

"""What a model said, read by rule: its text, the calls in it, whether it asks. Nothing here raises on a reply.

The neutral written form of a call, which every case uses and harbor's template renders, is that of Hermes and Qwen:

    <tool_call>{"name": "book_table", "arguments": {"place": "Blue Heron", "day": "Friday"}}</tool_call>

Read are that form, a bare JSON object or list (Llama 3 writes "parameters"), a fenced code block, `[TOOL_CALLS]`
(Mistral) and Python's `[book_table(place="Blue Heron")]` (prompted models of the Berkeley Function-Calling
Leaderboard).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """One call of a function: its name, and its arguments by name."""

    name: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        return write_call(self)


@dataclass(frozen=True)
class Reply:
    """A reply, read.

    Args:
        text: the prose outside of calls, stripped.
        calls: the calls that could be read, in order.
        broken: True where something opens a call and is none: not JSON, JSON of the wrong shape, cut off.
        asks: True where the prose ends in a question, thanks and smileys aside, or asks to specify, provide, confirm or
            clarify something. "Is there anything else?" offers, and does not ask.
        questions: how many questions the prose has, offers left out (at least 1 where `asks`).
    """

    text: str
    calls: tuple[Call, ...]
    broken: bool
    asks: bool
    questions: int

    @property
    def move(self) -> str:
        """What the reply does: "call", "ask", "tell" or "nothing"; a call outweighs a question."""
        if self.calls or self.broken:
            return "call"
        if self.asks:
            return "ask"
        return "tell" if self.text else "nothing"

    @property
    def obeyed(self) -> bool:
        """The form was obeyed, whatever was decided: prose alone, or one call that parses with nothing around it."""
        return not self.broken and len(self.calls) + bool(self.text) == 1


def write_call(call: Call) -> str:
    """Return the neutral written form of a call."""
    body = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
    return f"{OPEN}{body}{CLOSE}"


_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FENCED = re.compile(r"```(?:json|python|tool_call)?\s*(.*?)(?:```|\Z)", re.DOTALL)
_ASKS = re.compile(
    r"\bplease (?:specify|provide|confirm|clarify)\b"
    r"|\b(?:please tell me|let me know) (?:which|what|when|where|who|whose|how|whether|the|your)\b"
)
_OFFERS = re.compile(r"\b(?:any|some)thing else\b|\bhow else\b|\bhelp you (?:further|with (?:any|some)thing)\b")
_CLOSING = re.compile(r"(?:[^\w?]*\b(?:thanks|thank you|please)\b)?[^\w?]*$")  # behind the last question
_DONE = re.compile(
    r"\b(?:done|all set|booked|reserved|sent|ordered|scheduled|confirmed|arranged|taken care|is set|ha(?:s|ve) been)\b"
    r"|\bi(?: ha|')ve\b"
)
LONGEST = 20_000  # characters of a reply that are read; a model that never stops writes more


def read(reply: str) -> Reply:
    """Return a reply's prose and calls; any string has a reading.

    Args:
        reply: what the model wrote, without the tokens that end a turn. Characters after the 20,000th are not read.

    >>> read('<tool_call>{"name": "ring", "arguments": {"bell": 2}}</tool_call>').calls
    (Call(name='ring', arguments={'bell': 2}),)
    >>> read("Which day would you like?").asks
    True
    """
    text = reply[:LONGEST].strip()
    calls: list[Call] = []
    broken = False
    prose = text
    for pattern in (_TAGGED, _FENCED):
        parts = pattern.findall(prose)
        if parts and (pattern is _TAGGED or any(_opens_call(part) for part in parts)):
            prose = pattern.sub(" ", prose)
            for part in parts:
                found = _calls(part)
                broken |= not found
                calls += found
    bare = prose.removeprefix("[TOOL_CALLS]").strip()
    if not calls and _opens_call(bare):
        found = _calls(bare)
        broken |= not found
        calls, prose = calls + found, "" if found else prose
    prose = prose.replace(CLOSE, " ").strip()
    spoken = prose.lower()
    asked = [not _OFFERS.search(one) for one in questions_in(spoken)]
    ends = _CLOSING.sub("", spoken[-80:]).endswith("?")
    asks = bool(asked and asked[-1] and ends) or bool(_ASKS.search(spoken))
    return Reply(prose, tuple(calls), broken, asks, max(sum(asked), int(asks)))


def questions_in(text: str) -> list[str]:
    """Return the sentences that end in a question mark, without it.

    >>> questions_in("Fine. Which day? At what time??")
    ['Which day', 'At what time']
    """
    pieces = re.split(r"([.!?]+)", text)
    return [body.strip() for body, end in zip(pieces[::2], pieces[1::2], strict=False) if "?" in end]


def claims_done(text: str) -> bool:
    """Return whether prose says that something has been done; it only names the class of an error, never a success."""
    return bool(_DONE.search(text.lower()))


def _opens_call(text: str) -> bool:
    return text.startswith(("{", "[{", "[TOOL_CALLS]")) or bool(
        re.match(r"\[?\s*[A-Za-z_][\w.]*\((?:\s*\)|\s*\w+\s*=)", text)
    )


def _calls(text: str) -> list[Call]:
    """Return the calls in one piece of text, none where it is not entirely calls."""
    text = text.strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _python_calls(text)
    items = value if isinstance(value, list) else [value]
    calls = [_call(item) for item in items]
    return [call for call in calls if call] if calls and all(calls) else []


def _call(item: Any) -> Call | None:
    if not isinstance(item, dict):
        return None
    item = item.get("function", item) if isinstance(item.get("function"), dict) else item
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):  # the wire form of some servers: arguments as JSON in a string
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    name = item.get("name")
    return Call(name, arguments) if isinstance(name, str) and name and isinstance(arguments, dict) else None


def _python_calls(text: str) -> list[Call]:
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes: Sequence[ast.expr] = tree.elts if isinstance(tree, ast.List) else [tree]
    calls = []
    for node in nodes:
        if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
            return []
        try:
            arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return []
        if not _is_json(arguments):
            return []
        calls.append(Call(ast.unparse(node.func), arguments))
    return calls


def _is_json(value: Any) -> bool:
    """Return whether a Python value is one that JSON has, with integers that can be written."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(_is_json(one) for one in value)
    if isinstance(value, int):
        return value.bit_length() < 1024
    return value is None or isinstance(value, str | float)


def same_value(found: Any, expected: Any) -> bool:
    """Return whether two argument values are the same, by the leaderboard's rules: strings without case, spaces and
    punctuation; an integer for a float, and a number written as a string, count as equal; lists in order.

    Source: BFCL v4's AST checker (Patil et al.), restated. It takes neither numbers in strings nor a look at what a
    number loses with its punctuation; here the first are allowed, and 1.5 is not 15.

    >>> same_value("7", 7), same_value("Blue-Heron", "blue heron"), same_value("1.5", "15")
    (True, True, False)
    """
    if isinstance(expected, list | tuple) or isinstance(found, list | tuple):
        lists = isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(found) == len(expected)
        return lists and all(same_value(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, dict) or isinstance(found, dict):
        same = isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys()
        return same and all(same_value(found[key], expected[key]) for key in expected)
    numbers = _number(found), _number(expected)
    if None not in numbers and numbers[0] != numbers[1]:
        return False
    if isinstance(found, str) == isinstance(expected, str) or None in numbers:
        return _plain(found) == _plain(expected)
    return True


def _number(value: Any) -> int | float | None:
    """Return the number that a value is, or that is written in it."""
    if isinstance(value, str):
        text = value.replace(",", "").strip()
        if not re.fullmatch(r"[+-]?\d{1,300}(?:\.\d{1,300})?", text, re.ASCII):
            return None
        return float(text) if "." in text else int(text)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _plain(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return re.sub(r"[ ,./\-_*^]", "", str(value)).lower().replace("'", '"')

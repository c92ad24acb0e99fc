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
        asks: True where the prose ends in a question, or asks to specify, provide, confirm or clarify something.
        questions: how many sentences of the prose end in a question mark (at least 1 where `asks`).
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
    r"\bplease (?:specify|provide|confirm|clarify|tell me|let me know)\b"
    r"|\blet me know (?:which|what|when|where|who|how)\b"
)
_DONE = re.compile(
    r"\b(?:done|all set|booked|reserved|sent|ordered|scheduled|confirmed|arranged|taken care|is set|ha(?:s|ve) been)\b"
    r"|\bi(?: ha|')ve\b"
)
_PYTHON = re.compile(r"\[?\s*[A-Za-z_][\w.]*\((?:\s*\)|\s*\w+\s*=)")
_SENTENCE = re.compile(r"[^.!?]*\?")
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
    count = len(_SENTENCE.findall(prose))
    last = prose.rstrip("\"'*_) ")
    asks = last.endswith("?") or bool(_ASKS.search(prose.lower()))
    return Reply(prose, tuple(calls), broken, asks, max(count, int(asks)))


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
            calls.append(Call(ast.unparse(node.func), {str(w.arg): ast.literal_eval(w.value) for w in node.keywords}))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return []
    return calls


def same_value(found: Any, expected: Any) -> bool:
    """Return whether two argument values are the same, by the leaderboard's rules: strings without case, spaces and
    punctuation; an integer for a float, and a number written as a string, count as equal; lists in order.

    Source: BFCL v4's AST checker (Patil et al.), restated, with numbers in strings allowed.
    """
    if isinstance(expected, bool) or isinstance(found, bool):
        return _plain(found) == _plain(expected)
    if isinstance(expected, list | tuple):
        same = isinstance(found, list | tuple) and len(found) == len(expected)
        return same and all(same_value(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, dict):
        same = isinstance(found, dict) and found.keys() == expected.keys()
        return same and all(same_value(found[key], expected[key]) for key in expected)
    return _plain(found) == _plain(expected)


def _plain(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return re.sub(r"[ ,./\-_*^]", "", str(value)).lower().replace("'", '"')

"""What to learn. A skill is one file of this folder: it turns the scenes of a world into cases, and judges replies.

    Case      a conversation with a knowing item (asked apart), a doing item (the reply), and its control
    Verdict   verify(case, reply): score in [-1, 1], the move that was made, and the class of the error

A skill module offers

    def cases(world, split, n, *, seed=0) -> list[Case]       half positives, half controls
    def verify(case, reply) -> Verdict                         any string; never raises
    MOVE: str                                                  the move that the skill makes where it is due
    OPENINGS: Openings                                         how that move begins, and how its opposite does
    DEGENERATE: dict[str, Callable[[Case], str]]               one-sided policies, which must average 0 or less

The folder is the registry, and `load("my_package.my_skill")` takes a skill from anywhere on the import path,
`load("folder/my_skill.py")` from a file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from svdexpert.errors import SkillError
from svdexpert.registry import member, members
from svdexpert.worlds import Message, Split, Tool, World


@dataclass(frozen=True)
class Knowing:
    """A question asked in a context of its own, over fixed options.

    Args:
        messages: the context; the last message asks, and lists the options.
        tools: functions that the question is about, rendered as in any other prompt.
        options: the answers that exist, as the model would write them; at least two, different from one another.
        answer: the right option.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    options: tuple[str, ...]
    answer: str

    @property
    def chance(self) -> float:
        """The share of right answers that guessing reaches."""
        return 1 / len(self.options)


@dataclass(frozen=True)
class Bad:
    """A reply that is wrong, and how: the class that verify must find, and the rejected side of a preference."""

    reply: str
    error: str


@dataclass(frozen=True)
class Openings:
    """How moves begin, up to the first value, name or fact: log-probabilities of these tell whether a base can tell
    positives from controls, even where it acts the same on both.

    Args:
        move: beginnings of the skill's move, at least three.
        opposite: beginnings of the opposite move, at least three.
    """

    move: tuple[str, ...]
    opposite: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to know and to do.

    Args:
        id: unique over skills, worlds and splits.
        skill: the skill's name.
        world: the world's name.
        split: the split.
        cluster: what whole-cluster resampling keeps together.
        positive: True where the skill's move is due, False for a control.
        messages: the conversation; the model's reply follows.
        tools: the functions that it may call.
        knowing: the knowing item.
        gold: replies that score 1, the demonstration first. A call is written in the neutral form of `reply`.
        partial: replies that are partly right: score 0.
        bad: replies that score below 0.
        truth: what verify reads; its keys are the skill's own.
        followup: what a scripted user says to a question for exactly this parameter, and the call due then.
        tags: kind and difficulty.
    """

    id: str
    skill: str
    world: str
    split: Split
    cluster: str
    positive: bool
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    knowing: Knowing
    gold: tuple[str, ...]
    partial: tuple[str, ...] = ()
    bad: tuple[Bad, ...] = ()
    truth: Mapping[str, Any] = field(default_factory=dict)
    followup: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.gold or not all(self.gold):
            raise SkillError(f"{self.id}: a case needs at least one gold reply that is not empty.")
        if self.knowing.answer not in self.knowing.options or len(set(self.knowing.options)) < 2:
            raise SkillError(
                f"{self.id}: the knowing item's answer {self.knowing.answer!r} must be one of at least two options, "
                f"found {list(self.knowing.options)}."
            )
        if not self.messages or self.messages[-1].get("role") not in ("user", "tool"):
            raise SkillError(f"{self.id}: a case ends with the message that the model replies to.")
        for one in self.tools:
            check_tool(one)


@dataclass(frozen=True)
class Verdict:
    """What a reply was worth.

    Args:
        score: in [-1, 1]. 1: right. 0: partly right, or harmless. Below 0: wrong.
        move: what the reply did: "ask", "call", "reject", "confirm", "tell" or "nothing".
        error: the class of the error, "" where there is none.
        format: True where the form was obeyed, whatever was decided: calls that parse, nothing around them, no second
            call, not empty.
    """

    score: float
    move: str
    error: str = ""
    format: bool = True

    @property
    def right(self) -> bool:
        """The decision was right."""
        return self.score > 0


class Skill(Protocol):
    """What a skill module offers; see the top of this file."""

    MOVE: str
    OPENINGS: Openings
    DEGENERATE: Mapping[str, Callable[[Case], str]]

    def cases(self, world: World, split: Split, n: int, *, seed: int = 0) -> list[Case]:
        """Return n cases: half positives, half controls, alternating."""

    def verify(self, case: Case, reply: str) -> Verdict:
        """Judge a reply; any string has a verdict."""


def names() -> list[str]:
    """Return the names of the skills that ship."""
    return members(sys.modules[__name__])


def load(name: str) -> Skill:
    """Return a skill by the name of its file here, or one's own by the path of a file or by import path.

    Raises:
        SkillError: there is no such skill, or the module lacks a part of one.
    """
    module = member(
        sys.modules[__name__], "skill", name, ("cases", "verify", "MOVE", "OPENINGS", "DEGENERATE"), SkillError
    )
    return cast(Skill, module)


_TYPES = {"string", "integer", "number", "boolean", "array", "object", "null"}


def check_tool(one: Tool) -> None:
    """Check that a tool is the JSON schema of a function.

    Raises:
        SkillError: what was found, and the form that is expected.
    """
    function = one.get("function") if isinstance(one, dict) else None
    schema = function.get("parameters") if isinstance(function, dict) else None
    properties = schema.get("properties") if isinstance(schema, dict) else None
    wanted = 'expected {"type": "function", "function": {"name", "parameters": {"properties", "required"}}}'
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(properties, dict):
        raise SkillError(f"A tool schema does not parse: found {str(one)[:120]}, {wanted}.")
    for key, kind in properties.items():
        if not isinstance(kind, dict) or not isinstance(kind.get("type"), str) or kind["type"] not in _TYPES:
            raise SkillError(f"Tool {function['name']}: parameter {key!r} has no JSON type ({sorted(_TYPES)}): {kind}.")
        if not isinstance(kind.get("enum", []), list):
            raise SkillError(f"Tool {function['name']}: the enum of parameter {key!r} is no list: {kind['enum']!r}.")
    required = schema.get("required", []) if isinstance(schema, dict) else []
    if not isinstance(required, list):
        raise SkillError(f"Tool {function['name']}: required is no list of parameters: {required!r}.")
    unknown = [key for key in required if key not in properties]
    if unknown:
        raise SkillError(f"Tool {function['name']}: required parameters {unknown} are not among {list(properties)}.")


def required(one: Tool) -> tuple[str, ...]:
    """Return the names of a tool's required parameters, in the order of its signature."""
    schema = one["function"]["parameters"]
    return tuple(key for key in schema["properties"] if key in set(schema.get("required", ())))


def find_tool(tools: Sequence[Tool], name: str) -> Tool | None:
    """Return the tool of that name, or None."""
    return next((one for one in tools if one["function"]["name"] == name), None)


def half(n: int) -> int:
    """Return n / 2: as many positives as controls.

    Raises:
        SkillError: n is odd, or not positive.
    """
    if n <= 0 or n % 2:
        raise SkillError(f"Cases come in pairs, a positive and a control: expected an even number above 0, found {n}.")
    return n // 2


def alternate(positives: Sequence[Case], controls: Sequence[Case]) -> list[Case]:
    """Return positives and controls in turn, so that every batch of even size holds as many of each."""
    return [one for pair in zip(positives, controls, strict=True) for one in pair]

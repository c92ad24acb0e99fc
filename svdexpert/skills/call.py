"""Call: call the function that serves the request, with exactly the arguments that the conversation gives.

    knowing   which function should be called now? (options: the functions, or none)
    doing     exactly one call, equal to the expected one
    control   no function serves, the needed one is absent, or plain talk is due: the reply makes no call

| reply                              | a call is due          | none is due |
|------------------------------------|------------------------|-------------|
| the exact call                     | 1                      | -1          |
| it and a question, or it twice     | 0                      | -1          |
| right function, a wrong value      | -0.2                   | -1          |
| an argument missing, or one more   | -0.5                   | -1          |
| another function, several calls    | -1                     | -1          |
| a call that does not parse         | -1                     | -1          |
| a question                         | -1                     | 1           |
| other text                         | -1                     | 1           |
| nothing                            | -1                     | 0           |

Arguments are compared by the rules of the Berkeley Function-Calling Leaderboard (`reply.same_value`); an optional
argument that equals its default may be left out, or written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from svdexpert.reply import Call, claims_done, read, same_value, write_call
from svdexpert.skills import Bad, Case, Knowing, Openings, Verdict, alternate, find_tool, half, required
from svdexpert.worlds import Request, Split, Tool, World, quoted, user

QUESTION = "Question: Which function does the user's last message call for?"  # of its knowing items
MOVE = "call"
OPENINGS = Openings(
    move=("<tool_call>", '<tool_call>{"name"', '<tool_call>{"name": "'),
    opposite=("Done", "I", "Your", "The", "Sorry"),
)


def cases(world: World, split: Split, n: int, *, seed: int = 0) -> list[Case]:
    """Return n cases: requests that a call serves, and turns where none is due. For arguments see `clarify.cases`."""
    served = world.requests(split, half(n), kind="complete", seed=seed)
    unserved = world.requests(split, half(n), kind="unserved", seed=seed)
    return alternate([case(world.name, one, seed) for one in served], [case(world.name, one, seed) for one in unserved])


def case(world: str, scene: Request, seed: int = 0) -> Case:
    """Return the case of one request."""
    gold, partial, bad = _served(scene) if scene.call else _unserved(scene)
    return Case(
        id=f"call/{scene.id}",
        skill="call",
        world=world,
        split=scene.split,
        cluster=scene.cluster,
        positive=scene.call is not None,
        messages=scene.messages,
        tools=scene.tools,
        knowing=_knowing(scene, seed),
        gold=gold,
        partial=partial,
        bad=tuple(bad),
        truth={
            "call": {"name": scene.call.name, "arguments": dict(scene.call.arguments)} if scene.call else None,
            "immediate": scene.immediate,
            "accepted": {key: list(values) for key, values in scene.accepted.items()},
        },
        tags=scene.tags,
    )


def _served(scene: Request) -> tuple[tuple[str, ...], tuple[str, ...], list[Bad]]:
    call = scene.call
    assert call is not None
    tool = find_tool(scene.tools, call.name)
    assert tool is not None
    exact, arguments = write_call(call), dict(call.arguments)
    question = next((texts[0] for texts in scene.questions.values()), "Is that right?")
    bad = [Bad(text, "claims_done") for text in scene.immediate]
    bad.append(Bad(question, "over_asking"))
    others = [one["function"]["name"] for one in scene.tools if one is not tool]
    bad += [Bad(write_call(Call(name, arguments)), "wrong_function") for name in others[:1]]
    bad += [Bad(exact + write_call(Call(name, {})), "several_calls") for name in others[:1]]
    needed = [name for name in required(tool) if name in arguments]
    for name in needed[-1:]:
        rest = {key: value for key, value in arguments.items() if key != name}
        bad.append(Bad(write_call(Call(call.name, rest)), "missing_argument"))
        changed = arguments | {name: _another(arguments[name], tool["function"]["parameters"]["properties"][name])}
        bad.append(Bad(write_call(Call(call.name, changed)), "wrong_value"))
    bad.append(Bad(write_call(Call(call.name, arguments | {"remark": "soon"})), "extra_argument"))
    bad.append(Bad(exact[:-20], "unparsable"))
    return (exact,), (f"{exact}{exact}", f"{question} {exact}"), bad


def _another(value: Any, schema: Mapping[str, Any]) -> Any:
    """Return a wrong value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    rest = [one for one in schema.get("enum", ()) if one != value]
    return rest[0] if rest else f"the other {value}"


def _unserved(scene: Request) -> tuple[tuple[str, ...], tuple[str, ...], list[Bad]]:
    names = [one["function"]["name"] for one in scene.tools]
    bad = [Bad(write_call(Call(name, {})), "over_calling") for name in names[:2]]
    return scene.refusals, (), bad


def _knowing(scene: Request, seed: int) -> Knowing:
    options = [one["function"]["name"] for one in scene.tools]
    random.Random(f"{seed}/{scene.id}/knowing").shuffle(options)
    options.append("none")
    text = f"{quoted(scene.messages)}\n\n{QUESTION}\nOptions: {', '.join(options)}"
    answer = scene.call.name if scene.call else "none"
    return Knowing(messages=(user(text),), tools=scene.tools, options=tuple(options), answer=answer)


def verify(case: Case, reply: str) -> Verdict:
    """Judge a reply; see the table at the top of this file."""
    found = read(reply)
    move, obeyed = found.move, found.obeyed
    if not case.positive:
        if move == "call":
            return Verdict(-1, move, "over_calling" if found.calls else "unparsable", obeyed)
        return Verdict(0 if move == "nothing" else 1, move, "empty" if move == "nothing" else "", obeyed)
    if move == "nothing":
        return Verdict(-1, move, "empty", False)
    if move == "ask":
        return Verdict(-1, move, "over_asking", obeyed)
    if move == "tell":
        done = claims_done(found.text) or found.text in case.truth["immediate"]
        return Verdict(-1, move, "claims_done" if done else "no_call", obeyed)
    if not found.calls or found.broken:
        return Verdict(-1, move, "unparsable", False)
    expected = Call(case.truth["call"]["name"], case.truth["call"]["arguments"])
    tool = find_tool(case.tools, expected.name)
    errors = [difference(one, expected, tool, case.truth["accepted"]) for one in found.calls]
    if len(errors) > 1:
        return Verdict(-1, move, "several_calls", False) if any(errors) else Verdict(0, move, "repeated_call", False)
    if errors[0]:
        return Verdict(_WORTH[errors[0]], move, errors[0], obeyed)
    if found.asks:
        return Verdict(0, move, "question_and_call", False)
    return Verdict(1, move, "", obeyed)


_WORTH = {"wrong_function": -1.0, "missing_argument": -0.5, "extra_argument": -0.5, "wrong_value": -0.2}


def difference(
    found: Call, expected: Call, tool: Tool | None, accepted: Mapping[str, Sequence[Any]] | None = None
) -> str:
    """Return how a call differs from the expected one: "", or the class of the first error.

    Args:
        found: the call that was made.
        expected: the call that was due.
        tool: its schema; optional parameters with a default may be left out, or written.
        accepted: by argument, all values that are right, "" among them where it may be left out: then they decide, and
            the values of `expected` do not.
    """
    if found.name.replace(".", "_") != expected.name.replace(".", "_"):
        return "wrong_function"
    if accepted:
        needed = {key for key, values in accepted.items() if "" not in values}
        if needed - found.arguments.keys():
            return "missing_argument"
        if found.arguments.keys() - accepted.keys():
            return "extra_argument"
        right = all(any(_accepts(one, value) for one in accepted[key]) for key, value in found.arguments.items())
        return "" if right else "wrong_value"
    properties = tool["function"]["parameters"]["properties"] if tool else {}
    defaults = {key: one["default"] for key, one in properties.items() if "default" in one}
    wanted, made = defaults | dict(expected.arguments), defaults | dict(found.arguments)
    if wanted.keys() - made.keys():
        return "missing_argument"
    if made.keys() - wanted.keys():
        return "extra_argument"
    return "" if all(same_value(made[key], wanted[key]) for key in wanted) else "wrong_value"


def _accepts(accepted: Any, value: Any) -> bool:
    """Return whether a value is an accepted one; in nested objects every key has its own accepted values."""
    if isinstance(accepted, Mapping) and isinstance(value, Mapping):
        lists = {key: some if isinstance(some, list) else [some] for key, some in accepted.items()}
        needed = {key for key, some in lists.items() if "" not in some}
        return needed <= value.keys() <= lists.keys() and all(
            any(_accepts(one, value[key]) for one in lists[key]) for key in value
        )
    if isinstance(accepted, list) and isinstance(value, list) and any(isinstance(one, Mapping) for one in accepted):
        return len(accepted) == len(value) and all(map(_accepts, accepted, value))
    return same_value(value, accepted)


def same_call(found: Call, expected: Call, tools: Sequence[Tool]) -> bool:
    """Return whether a call is the expected one."""
    return not difference(found, expected, find_tool(tools, expected.name))


def _any_call(case: Case) -> str:
    name = case.tools[0]["function"]["name"]
    return case.gold[0] if case.positive else write_call(Call(name, {}))


DEGENERATE: Mapping[str, Callable[[Case], str]] = {
    "always-call": _any_call,
    "never-call": lambda case: case.bad[0].reply if case.positive else case.gold[0],
    "always-ask": lambda case: "Could you tell me more?",
}

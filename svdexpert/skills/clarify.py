"""Clarify: ask for the required detail that is missing; never where nothing is.

    knowing   which required detail has the user not given? (options: the required parameters, or none)
    doing     the first reply is one question about a missing parameter
    control   the request is complete: the reply is no question, whatever else it is

| reply      | to an incomplete request              | to a complete one |
|------------|---------------------------------------|-------------------|
| question   | 1 missing, 0 other, vague or several  | -1                |
| call       | -1 (guess)                            | 1                 |
| other text | -1                                    | 1                 |
| nothing    | -0.5                                  | 0                 |

Whether a text asks is decided by rule (`reply.read`): a question mark at its end, or a request to specify. On 1,601
gold questions of CLAMBER (Zhang et al. 2024) that rule finds 98.2 %, with at most 0.5 % false alarms on ordinary text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from svdexpert.reply import Call, claims_done, questions_in, read, write_call
from svdexpert.skills import Bad, Case, Knowing, Openings, Verdict, alternate, find_tool, half, required
from svdexpert.worlds import Request, Split, Tool, World, quoted, user

QUESTION = "Question: Which required detail of {name} has the user not given?"  # of its knowing items
UNLABELLED = "Question: Has the user left out a detail that is needed?"
MOVE = "ask"
OPENINGS = Openings(
    move=("Which", "What", "Could you tell me", "May I have"),
    opposite=("Done", "Your", "I have", "All set", '<tool_call>{"name": "'),
)


def cases(world: World, split: Split, n: int, *, seed: int = 0) -> list[Case]:
    """Return n cases, incomplete and complete requests in turn.

    Args:
        world: where the requests come from.
        split: "train", "validation" or "heldout".
        n: an even number.
        seed: gives the same cases again.

    Raises:
        SkillError: n is odd. WorldError: the world has fewer requests.
    """
    incomplete = world.requests(split, half(n), kind="incomplete", seed=seed)
    complete = world.requests(split, half(n), kind="complete", seed=seed)
    return alternate(
        [case(world.name, one, seed) for one in incomplete], [case(world.name, one, seed) for one in complete]
    )


def case(world: str, scene: Request, seed: int = 0) -> Case:
    """Return the case of one request."""
    call = scene.call
    assert call is not None
    tool = find_tool(scene.tools, call.name)
    assert tool is not None
    given = [name for name in required(tool) if name not in scene.missing]
    asks = {name: scene.questions[name] for name in required(tool)}
    missing = [text for name in scene.missing for text in asks[name]]
    needless = [text for name in given for text in asks[name][:1]]
    guessed = Call(call.name, dict(call.arguments) | dict(scene.guesses))
    if scene.missing:
        gold, partial = missing, needless if scene.labelled else []
        bad = [Bad(write_call(guessed), "guess"), *(Bad(text, "claims_done") for text in scene.immediate)]
    else:
        gold, partial = [write_call(call)], []
        bad = [Bad(text, "over_asking") for text in needless]
    return Case(
        id=f"clarify/{scene.id}",
        skill="clarify",
        world=world,
        split=scene.split,
        cluster=scene.cluster,
        positive=bool(scene.missing),
        messages=scene.messages,
        tools=scene.tools,
        knowing=_knowing(scene, tool, seed),
        gold=tuple(dict.fromkeys(gold)),
        partial=tuple(dict.fromkeys(partial)),
        bad=tuple(bad),
        truth={
            "missing": scene.missing,
            "labelled": scene.labelled,
            "questions": asks,
            "call": {"name": call.name, "arguments": dict(call.arguments)},
            "immediate": scene.immediate,
        },
        followup=dict(scene.answers),
        tags=scene.tags,
    )


def _knowing(scene: Request, tool: Tool, seed: int) -> Knowing:
    """Return the question which detail is missing; a second missing one is no option, so that one answer is right.

    Where nobody knows which one it is, the question is whether one is.
    """
    if not scene.labelled:
        text = f"{quoted(scene.messages)}\n\n{UNLABELLED}\nOptions: yes, no"
        return Knowing((user(text),), scene.tools, ("yes", "no"), "yes" if scene.missing else "no")
    options = [name for name in required(tool) if name not in scene.missing[1:]]
    random.Random(f"{seed}/{scene.id}/knowing").shuffle(options)
    options.append("none")
    name = tool["function"]["name"]
    text = f"{quoted(scene.messages)}\n\n{QUESTION.format(name=name)}\nOptions: {', '.join(options)}"
    answer = scene.missing[0] if scene.missing else "none"
    return Knowing(messages=(user(text),), tools=(tool,), options=tuple(options), answer=answer)


def verify(case: Case, reply: str) -> Verdict:
    """Judge a reply to a request; see the table at the top of this file."""
    found = read(reply)
    move, obeyed = found.move, found.obeyed
    if not case.positive:
        if move == "ask" or found.asks:
            return Verdict(-1, move, "over_asking", obeyed)
        return Verdict(0 if move == "nothing" else 1, move, "empty" if move == "nothing" else "", obeyed)
    if found.calls or found.broken:
        return Verdict(-1, move, "guess" if found.calls else "unparsable", obeyed)
    if found.asks:
        if found.questions > 1:
            return Verdict(0, move, "several_questions", obeyed)
        right = not case.truth["labelled"] or asked(case, reply) in case.truth["missing"]
        return Verdict(1, move, "", obeyed) if right else Verdict(0, move, "wrong_detail", obeyed)
    if move == "nothing":
        return Verdict(-0.5, move, "empty", False)
    done = claims_done(found.text) or found.text in case.truth["immediate"]
    return Verdict(-1, move, "claims_done" if done else "no_question", obeyed)


# Question words, and the words in a parameter's name that they ask for.
_TYPED = [
    (r"what time|when|hour", "time hour"),
    (r"when|(?:which|what) (?:day|date)|how soon", "day date when"),
    (
        r"where|which (?:city|town|place|area)",
        "place city location address destination street area where to from origin",
    ),
    (r"how many", "number count people size seats riders tickets travelers adults beds passengers guests copies party"),
    (r"how much", "amount price sum weight"),
    (r"who|whose", "name person guest recipient who friend"),
    (r"how long", "days nights hours length duration minutes"),
]
_STOP = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was do does did you your i we me us it of in on at for to with and or be like would should "
        "could can what which when where who how many much please tell want need that this there have will may any one",
    )
)


def asked(case: Case, reply: str) -> str | None:
    """Return the required parameter that a reply's question is about, None where it is about none.

    A question that the case lists is about its parameter. Any other question is about the parameter with which it
    shares most words that tell parameters apart: words of its name and of its listed questions, and question words
    that ask for its kind (where: a place). Of equals a missing one wins.
    """
    text = read(reply).text
    questions: Mapping[str, Sequence[str]] = case.truth["questions"]
    order = sorted(questions, key=lambda name: name not in case.truth["missing"])
    for name in order:
        if text.endswith(tuple(questions[name])):
            return name
    sentence = (questions_in(text) or [text])[-1].lower()
    words = _stems(sentence)
    typed = {word for asks, names in _TYPED if re.search(rf"\b(?:{asks})\b", sentence) for word in names.split()}
    best, most = None, 0.0
    for name in order:
        own, others = _words(name, questions[name]), [_words(o, questions[o]) for o in questions if o != name]
        telling = {word for word in own if not any(word in other for other in others)}
        named = _stems(name.replace("_", " "))
        score = 2 * len(words & telling & named) + len(words & telling) + 0.5 * len(words & named)
        score += 1.0 if typed & set(name.lower().split("_")) else 0.0
        if score > most:
            best, most = name, score
    return best


def _words(name: str, questions: Sequence[str]) -> set[str]:
    return _stems(name.replace("_", " ")).union(*(_stems(one) for one in questions))


def _stems(text: str) -> set[str]:
    """Return a text's content words, without plural and verb endings."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {re.sub(r"(?:ing|es|s|ed)$", "", word) if len(word) > 4 else word for word in words if word not in _STOP}


def _first_question(case: Case) -> str:
    questions: Mapping[str, Sequence[str]] = case.truth["questions"]
    return case.gold[0] if case.positive else next((texts[0] for texts in questions.values()), "Which one?")


def _act(case: Case) -> str:
    call: Mapping[str, Any] = case.truth["call"]
    return case.bad[0].reply if case.positive else write_call(Call(call["name"], call["arguments"]))


DEGENERATE: Mapping[str, Callable[[Case], str]] = {
    "always-ask": _first_question,
    "never-ask": _act,
    "always-done": lambda case: case.truth["immediate"][0],
}

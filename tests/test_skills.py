"""Every skill, found by listing the folder, in every world: validated without a model, and unshaken by any reply."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svdexpert import skills
from svdexpert.errors import SkillError
from svdexpert.registry import stem
from svdexpert.reply import Call, read, same_value, write_call
from svdexpert.skills import Case, Knowing, check_tool, half
from svdexpert.skills.disagree import stance
from svdexpert.worlds import SPLITS, Split, quoted, tool, user
from svdexpert.worlds.town import Town, within

TOWN = Town()
GENERIC = {
    "always-ask": "Could you tell me more?",
    "always-agree": "Yes, that is right.",
    "always-contradict": "No, that is not right.",
    "always-call": write_call(Call("search", {"query": "all"})),
    "always-done": "Done, it is all set.",
    "silent": "",
}


@cache
def cases(name: str, split: Split = "heldout", n: int = 80) -> list[Case]:
    return skills.load(name).cases(TOWN, split, n)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", skills.names())
def test_a_skill_validates_without_a_model(name: str, split: Split) -> None:
    skill = skills.load(name)
    for case in cases(name, split):
        for reply in case.gold:
            verdict = skill.verify(case, reply)
            assert verdict.score == 1, (case.id, reply, verdict)
            assert verdict.format
        for reply in case.partial:
            assert skill.verify(case, reply).score == 0, (case.id, reply, skill.verify(case, reply))
        for bad in case.bad:
            verdict = skill.verify(case, bad.reply)
            assert verdict.score < 0, (case.id, bad, verdict)
            assert verdict.error == bad.error, (case.id, bad, verdict)


@pytest.mark.parametrize("name", skills.names())
def test_one_sided_policies_earn_nothing(name: str) -> None:
    skill = skills.load(name)
    policies = dict(skill.DEGENERATE) | {key: lambda case, text=text: text for key, text in GENERIC.items()}
    for policy, reply in policies.items():
        scores = [skill.verify(case, reply(case)).score for case in cases(name)]
        assert sum(scores) <= 0, (policy, sum(scores) / len(scores))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", skills.names())
def test_positives_and_controls_are_equal_in_number_in_every_batch(name: str, split: Split) -> None:
    found = cases(name, split)
    for first in range(0, len(found), 2):
        assert [case.positive for case in found[first : first + 2]] == [True, False]
    assert len({case.id for case in found}) == len(found)
    assert {case.split for case in found} == {split}


@pytest.mark.parametrize("name", skills.names())
def test_the_same_seed_gives_the_same_cases(name: str) -> None:
    skill = skills.load(name)
    assert skill.cases(TOWN, "heldout", 20, seed=3) == skill.cases(TOWN, "heldout", 20, seed=3)
    assert skill.cases(TOWN, "heldout", 20, seed=3) != skill.cases(TOWN, "heldout", 20, seed=4)


@pytest.mark.parametrize("name", skills.names())
def test_no_text_of_training_is_in_the_heldout_split(name: str) -> None:
    """Small talk apart, which is the same everywhere, no last turn of the user's appears in two splits."""
    turns = {split: {case.messages[-1]["content"] for case in cases(name, split)} for split in SPLITS}
    assert not turns["train"] & turns["heldout"]
    assert not turns["train"] & turns["validation"]
    assert not turns["validation"] & turns["heldout"]


@pytest.mark.parametrize("name", skills.names())
def test_knowing_is_asked_apart_and_its_answers_are_not_one_sided(name: str) -> None:
    found = cases(name)
    for case in found:
        assert case.knowing.messages != case.messages
        assert case.knowing.answer in case.knowing.options
    most = Counter(case.knowing.answer for case in found).most_common(1)[0][1]
    assert most <= len(found) // 2


@pytest.mark.parametrize("name", ["disagree", "composite"])
def test_what_a_conversation_settles_stands_in_its_knowing_question(name: str) -> None:
    own = 0
    for case in cases(name, "heldout", 200):
        claim = case.truth.get("claim", case).truth
        quotation, _, statement = str(case.knowing.messages[-1]["content"]).partition("\n\n")
        if claim["in_context"]:
            assert within(claim["truth"], quotation)
            own += case.messages[-1]["content"] in quotation
        if case.knowing.answer == "false":
            assert case.messages[-1]["content"] not in quotation  # what is claimed is asked, and not quoted
        assert within(claim["other"] if case.knowing.answer == "false" else claim["truth"], statement or quotation)
    assert own > 0


def test_at_least_half_of_the_claims_are_settled_by_the_conversation() -> None:
    found = [case.truth["in_context"] for case in cases("disagree", "heldout", 400)]
    assert sum(found) >= len(found) / 2


def test_disagree_counts_false_true_and_update_claims() -> None:
    kinds = Counter(case.truth["kind"] for case in cases("disagree"))
    assert kinds == {"false": 40, "true": 20, "update": 20}


def test_an_odd_number_of_cases_is_refused() -> None:
    with pytest.raises(SkillError, match="even number above 0, found 7"):
        half(7)
    with pytest.raises(SkillError, match="found 0"):
        skills.load("call").cases(TOWN, "train", 0)


# Replies that a model may give, and that must never raise -----------------------------------------------------------

ODD = [
    "",
    " \n",
    "?",
    "?" * 30000,
    "word " * 30000,
    "<tool_call>",
    "</tool_call>",
    '<tool_call>{"name": "book_table"',
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "x", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "x", "arguments": "{"}</tool_call>',
    "<tool_call>[]</tool_call>",
    "<tool_call>null</tool_call>",
    '<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "a", "arguments": {}}</tool_call>',
    'Sure. <tool_call>{"name": "a", "arguments": {}}</tool_call> Is that right?',
    '{"name": "a", "parameters": {"b": 1}}',
    '[{"name": "a", "arguments": {}}]',
    "[a(b=1), c()]",
    "a(b=open('x'))",
    "[" * 5000,
    '{"a":' * 5000,
    "```json\n{}\n```",
    "```",
    "\x00\ud800",
    "[TOOL_CALLS] [",
]


@pytest.mark.parametrize("name", skills.names())
@pytest.mark.parametrize("reply", ODD, ids=lambda text: repr(text[:24]))
def test_odd_replies_have_a_verdict(name: str, reply: str) -> None:
    for case in cases(name)[:4]:
        verdict = skills.load(name).verify(case, reply)
        assert -1 <= verdict.score <= 1
        assert verdict.score < 1 or not case.positive


words = st.sampled_from(
    ["Yes,", "No,", "not", "Which", "day", "?", ".", "<tool_call>", "</tool_call>", "{", "}", '"name"', ":", "[", "]",
     "book", "at", "nine", "ten", "(", ")", "=", "```", "You are right", "\n", ","]
)  # fmt: skip


@given(reply=st.one_of(st.text(max_size=80), st.lists(words, max_size=20).map(" ".join)), place=st.integers(0, 79))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_reply_has_a_verdict(reply: str, place: int) -> None:
    for name in skills.names():
        case = cases(name)[place]
        verdict = skills.load(name).verify(case, reply)
        assert -1 <= verdict.score <= 1
        assert verdict.move in {"ask", "call", "reject", "confirm", "tell", "nothing"}
        assert verdict.error or verdict.score > 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(body=json_values)
def test_json_of_any_shape_is_read(body: object) -> None:
    found = read(f"<tool_call>{json.dumps(body)}</tool_call>")
    assert found.broken or found.calls


@given(arguments=st.dictionaries(st.text(min_size=1, max_size=6), json_values, max_size=3))
def test_a_written_call_is_read_back(arguments: dict[str, object]) -> None:
    call = Call("some_function", arguments)
    assert read(write_call(call)).calls == (call,)
    assert read(write_call(call)).obeyed
    assert all(same_value(value, value) for value in arguments.values())


def test_forms_of_calls() -> None:
    expected = (Call("book", {"day": "Friday", "people": 2}),)
    for text in (
        '<tool_call>\n{"name": "book", "arguments": {"day": "Friday", "people": 2}}\n</tool_call>',
        '{"name": "book", "parameters": {"day": "Friday", "people": 2}}',
        '[TOOL_CALLS] [{"name": "book", "arguments": {"day": "Friday", "people": 2}}]',
        '```json\n{"name": "book", "arguments": {"day": "Friday", "people": 2}}\n```',
        '[book(day="Friday", people=2)]',
        '{"type": "function", "function": {"name": "book", "arguments": "{\\"day\\": \\"Friday\\", \\"people\\": 2}"}}',
    ):
        assert read(text).calls == expected, text
        assert read(text).obeyed, text


def test_values_are_compared_as_the_leaderboard_does() -> None:
    assert same_value("San Jose", "san jose")
    assert same_value(2.0, 2)
    assert same_value("2", 2)
    assert same_value([1, 2], [1, 2])
    assert not same_value([2, 1], [1, 2])
    assert not same_value("7 pm", "8 pm")
    assert not same_value(True, "yes")


@pytest.mark.parametrize(
    ("reply", "move", "truth", "other"),
    [
        ("No, it closes at nine, not at ten.", "reject", True, False),
        ("It does not close at ten, it closes at nine.", "tell", True, False),
        ("Yes, it closes at ten.", "confirm", False, True),
        ("You are right, it closes at ten.", "confirm", False, True),
        ("You said ten, but it is nine.", "tell", True, False),
        ("It closes at nine rather than ten.", "tell", True, False),
        ("Actually it closes at nine.", "reject", True, False),
        ("I am sorry, you are right.", "confirm", False, False),
        ("Sorry, that is not right.", "reject", False, False),
        ("It closes at nine. It closes at ten.", "tell", True, True),
        ("Nineteen is a number.", "tell", False, False),
    ],
)
def test_a_stance_is_read(reply: str, move: str, truth: bool, other: bool) -> None:
    assert stance(reply, "nine", "ten") == (move, truth, other)


# Bad input ----------------------------------------------------------------------------------------------------------


def test_a_case_without_gold_is_refused() -> None:
    knowing = Knowing((user("?"),), (), ("a", "b"), "a")
    base = {"skill": "s", "world": "w", "split": "train", "cluster": "c", "positive": True, "tools": ()}
    with pytest.raises(SkillError, match="at least one gold reply"):
        Case(id="x", messages=(user("hi"),), knowing=knowing, gold=(), **base)  # type: ignore[arg-type]
    with pytest.raises(SkillError, match="must be one of at least two options"):
        wrong = Knowing((user("?"),), (), ("a", "b"), "c")
        Case(id="x", messages=(user("hi"),), knowing=wrong, gold=("y",), **base)  # type: ignore[arg-type]
    with pytest.raises(SkillError, match="ends with the message that the model replies to"):
        Case(id="x", messages=(), knowing=knowing, gold=("y",), **base)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("book_table", "does not parse"),
        ({"name": "x"}, "does not parse"),
        ({"type": "function", "function": {"name": "x", "parameters": {"properties": {"a": {}}}}}, "no JSON type"),
        (
            {"type": "function", "function": {"name": "x", "parameters": {"properties": {}, "required": ["a"]}}},
            "are not among",
        ),
    ],
)
def test_a_tool_schema_that_does_not_parse_is_refused(schema: object, says: str) -> None:
    with pytest.raises(SkillError, match=says):
        check_tool(schema)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("properties", "required", "says"),
    [
        ({"a": {"type": ["string", "null"]}}, [], "no JSON type"),
        ({"a": {"type": "string", "enum": 3}}, [], "is no list"),
        ({"a": {"type": "string"}}, "a", "is no list"),
        ({"a": {"type": "string"}}, None, "is no list"),
    ],
)
def test_a_tool_whose_parts_are_of_the_wrong_kind_is_refused(
    properties: dict[str, object], required: object, says: str
) -> None:
    schema = {"name": "x", "parameters": {"properties": properties, "required": required}}
    with pytest.raises(SkillError, match=says):
        check_tool({"type": "function", "function": schema})


def test_a_tool_schema_that_parses_is_taken() -> None:
    check_tool(tool("x", {"a": "string", "b": ("one", "two")}, required=["a"]))


def test_unknown_skills_and_modules_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkillError, match="Did you mean 'clarify'"):
        skills.load("clarfy")
    (tmp_path / "my_half_skill.py").write_text("MOVE = 'ask'\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SkillError, match="it lacks cases, verify"):
        skills.load("my_package.empty")
    with pytest.raises(SkillError, match="There is no skill"):
        skills.load("my_package.nothing")


def test_a_skill_of_ones_own_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "my-skill.py"
    file.write_text("MOVE, OPENINGS, DEGENERATE = 'ask', None, {}\n\ndef cases(): ...\n\ndef verify(): ...\n")
    assert skills.load(str(file)) is skills.load(str(file))
    assert stem(str(file)) == "my-skill"
    assert [stem(name) for name in ("call", "my_package.call")] == ["call", "call"]
    with pytest.raises(SkillError, match=r"There is no file .*nothing\.py with a skill"):
        skills.load(str(tmp_path / "nothing.py"))
    (tmp_path / "half.py").write_text("MOVE = 'ask'\n")
    with pytest.raises(SkillError, match="it lacks cases, verify"):
        skills.load(str(tmp_path / "half.py"))


def test_a_quotation_keeps_the_end_and_what_it_is_told_to_keep() -> None:
    messages = [user("the code is 4821"), *(user("talk " * 20) for _ in range(5)), user("well?")]
    short = quoted(messages, keep=("4821",), words=30)
    assert short.splitlines()[0] == "User: the code is 4821"
    assert short.splitlines()[-1] == "User: well?"
    assert len(short.splitlines()) == 3


# What chat models say that a rule of thumb misreads: the text, whether it asks, how many questions it has.
SPOKEN = [
    ("Your table is booked. Please let me know if you need anything else!", False, 0),
    ("Your table is booked. Is there anything else I can help you with?", False, 0),
    ("Which day? \U0001f60a", True, 1),
    ("Which day would you like? Thanks!", True, 1),
    ("**Which day would you like?**", True, 1),
    ("Which day??", True, 1),
    ("Which day? And at what time?", True, 2),
    ("I can do that. Please let me know which day you would like.", True, 1),
    ("Please provide the day.", True, 1),
    ("Which day? I take Friday.", False, 1),
]


@pytest.mark.parametrize(("text", "asks", "number"), SPOKEN, ids=[text[:30] for text, *_ in SPOKEN])
def test_what_chat_models_say_is_read_as_it_is_meant(text: str, asks: bool, number: int) -> None:
    found = read(text)
    assert (found.asks, found.questions) == (asks, number)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("No problem, it is nine.", ("tell", True, False)),
        ("Actually, you are right, it is nine.", ("confirm", True, False)),
        ("Actually, it is nine.", ("reject", True, False)),
        ("It is nine. Ten is incorrect.", ("tell", True, False)),
        ("Ten isn't right; it is nine.", ("tell", True, False)),
        ("You believe it is ten, but it is nine.", ("tell", True, False)),
        ("You said it is nine and that is true.", ("tell", True, False)),
    ],
)
def test_a_stance_is_read_as_it_is_meant(text: str, found: tuple[str, bool, bool]) -> None:
    assert stance(text, "nine", "ten") == found


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1.5, 15, False),
        (-3, 3, False),
        ("1.5", "15", False),
        ("-3", -3, True),
        ("1,000", 1000, True),
        (["a"], "['a']", False),
        ("007", "7", False),
        ("7:30", 730, False),
        (True, "true", True),
        (True, 1, False),
        (2.0, 2, True),
        ("2019-03-01", "2019/03/01", True),
    ],
)
def test_values_are_compared_as_what_they_are(one: object, other: object, same: bool) -> None:
    assert same_value(one, other) is same_value(other, one) is same


@pytest.mark.parametrize("text", ["book(x=0x" + "f" * 6000 + ")", "book(x={0x" + "f" * 6000 + "})", "book(x=b'1')"])
def test_a_call_with_values_that_json_has_not_is_broken(text: str) -> None:
    assert read(text).broken
    for name in skills.names():
        assert skills.load(name).verify(cases(name)[0], text).score <= 0


def test_a_long_reply_is_read_in_no_time() -> None:
    case = cases("clarify")[0]
    began = time.perf_counter()
    for text in ("word " * 4000, "? " * 10000, "(" * 20000, "a?" * 10000):
        skills.load("clarify").verify(case, text)
        skills.load("disagree").verify(cases("disagree")[0], text)
    assert time.perf_counter() - began < 2

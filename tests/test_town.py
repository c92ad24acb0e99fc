"""The town: scenes are what the protocol promises, splits share nothing that they should not, and wording is no cue."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from svdexpert import skills
from svdexpert.errors import WorldError
from svdexpert.reply import read
from svdexpert.skills import check_tool, find_tool, required
from svdexpert.statistics import auc, bag_of_words_auc
from svdexpert.worlds import (
    SPLITS,
    Claim,
    ClaimKind,
    Composite,
    Message,
    Request,
    RequestKind,
    Split,
    Tool,
    town,
)
from svdexpert.worlds.town import FORMS, KITS, NUMBERS, PARAMS, Town, clash, said, within

REQUESTS: tuple[RequestKind, ...] = ("complete", "incomplete", "unserved")
CLAIMS: tuple[ClaimKind, ...] = ("false", "true", "update")
FREE = {"person", "street", "address", "place", "table place", "bed place", "town", "title", "item", "fault", "problem"}
FREE |= {"ailment", "task", "course", "flower", "thing", "code", "amount"}


@pytest.fixture(scope="module")
def world() -> Town:
    return Town()


@pytest.fixture(scope="module")
def templates() -> dict[Split, set[str]]:
    """Templates of every user's turn that was spoken while the scenes below were made."""
    return {split: set() for split in SPLITS}


@pytest.fixture(scope="module")
def made(world: Town, templates: dict[Split, set[str]]) -> dict[tuple[Split, str], list[Any]]:
    """200 scenes of each kind and split."""
    scenes: dict[tuple[Split, str], list[Any]] = {}
    real = town.fits

    def fits(template: str, split: Split) -> bool:
        if fit := real(template, split):
            templates[split].add(template.lower())
        return fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(town, "fits", fits)
        for split in SPLITS:
            for kind in REQUESTS:
                scenes[split, kind] = world.requests(split, 200, kind=kind, seed=1)
            for claim in CLAIMS:
                scenes[split, claim] = world.claims(split, 200, kind=claim, seed=1)
            scenes[split, "composite"] = world.composites(split, 200, seed=1)
            scenes[split, "dialogue"] = world.dialogues(split, 200, seed=1)
    return scenes


def test_the_same_arguments_give_the_same_scenes(world: Town) -> None:
    again = Town()
    for split in SPLITS:
        for kind in REQUESTS:
            assert world.requests(split, 20, kind=kind, seed=3) == again.requests(split, 20, kind=kind, seed=3)
        for claim in CLAIMS:
            assert world.claims(split, 20, kind=claim, seed=3) == again.claims(split, 20, kind=claim, seed=3)
        assert world.composites(split, 20, seed=3) == again.composites(split, 20, seed=3)
        assert world.dialogues(split, 20, seed=3) == again.dialogues(split, 20, seed=3)
        assert world.dialogues(split, 20, seed=3) != world.dialogues(split, 20, seed=4)
    assert world.fact_questions(50, seed=1) == again.fact_questions(50, seed=1)
    assert world.facts() == again.facts() != Town(1).facts()


def test_scenes_are_different_and_well_formed(made: dict[tuple[Split, str], list[Any]]) -> None:
    ids = [scene.id for scenes in made.values() for scene in scenes]
    assert len(set(ids)) == len(ids)
    for (split, kind), scenes in made.items():
        assert len({str(scene.messages) for scene in scenes}) == len(scenes)
        for scene in scenes:
            assert scene.split == split
            names = [one["function"]["name"] for one in scene.tools]
            assert 2 <= len(names) == len(set(names)) <= 5, scene.id
            assert scene.messages[0]["role"] == "user", scene.id
            assert scene.messages[-1]["role"] == ("assistant" if kind == "dialogue" else "user"), scene.id
            for one in scene.tools:
                check_tool(one)
            check_turns(scene.messages, scene.tools, scene.id)
            assert not re.search(r"[{}]|  | [.,?]|\b[Aa] [aeio]\w", users(scene.messages)), users(scene.messages)


def users(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def check_turns(messages: Sequence[Message], tools: Sequence[Tool], where: str) -> None:
    """Roles follow one another as in a conversation, and every call in it fits a listed function."""
    follows = {"user": {"assistant"}, "tool": {"assistant"}}
    for index, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if index + 1 < len(messages):
            expected = follows.get(message["role"], {"tool"} if calls else {"user"})
            assert messages[index + 1]["role"] in expected, where
        for one in calls:
            check_call(one["function"]["name"], one["function"]["arguments"], tools, where)
            check_literal(one["function"]["arguments"], said(messages[:index]), where)
        if message["role"] == "tool":
            assert message["name"] == messages[index - 1]["tool_calls"][0]["function"]["name"]
            assert 1 <= len(json.loads(message["content"])) <= 8
        elif not calls:
            assert message["content"].strip(), where


def check_call(name: str, arguments: dict[str, Any], tools: Sequence[Tool], where: str) -> None:
    one = find_tool(tools, name)
    assert one is not None, where
    properties = one["function"]["parameters"]["properties"]
    assert set(required(one)) <= set(arguments) <= set(properties), where
    for key, value in arguments.items():
        assert isinstance(value, int if properties[key]["type"] == "integer" else str), where
        assert value in properties[key].get("enum", [value]), where


def check_literal(arguments: dict[str, Any], text: str, where: str) -> None:
    for value in arguments.values():
        assert mentions(text, value), (where, value)


def mentions(text: str, value: Any) -> bool:
    if isinstance(value, str):
        return value in text
    words = [str(value)] + ([NUMBERS[value - 2]] if 2 <= value <= 12 else [])
    return any(within(word, text) for word in words)


@pytest.mark.parametrize("split", SPLITS)
def test_requests(split: Split, made: dict[tuple[Split, str], list[Any]]) -> None:
    tags: Counter[str] = Counter()
    inside = [scene.request for scene in made[split, "composite"]]
    for scene in [*made[split, "complete"], *made[split, "incomplete"], *inside]:
        check_request(scene)
        tags.update(scene.tags)
    assert all(not scene.missing for scene in made[split, "complete"])
    assert all(scene.missing for scene in made[split, "incomplete"])
    for scene in made[split, "unserved"]:
        tags.update(scene.tags)
        assert scene.call is None
        assert len(set(scene.refusals)) >= 3
        assert len(scene.immediate) >= 3 or "talk" in scene.tags
        assert not any(text.endswith("?") for text in (*scene.refusals, *scene.immediate)), scene
    assert tags["absent"] == tags["talk"] == 100
    assert {"missing_1", "missing_2", "buried", "full", "chat_first", "second", "two_turns", "single"} <= set(tags)
    if split == "train":
        assert 0.15 < tags["made_up"] / (tags["made_up"] + tags["seen_tool"]) < 0.35
    else:
        assert tags["made_up"] == 0
        assert 0.35 < tags["unseen_tool"] / (tags["unseen_tool"] + tags["seen_tool"]) < 0.65


def check_request(scene: Request) -> None:
    assert scene.call is not None
    check_call(scene.call.name, dict(scene.call.arguments), scene.tools, scene.id)
    needed = required(find_tool(scene.tools, scene.call.name) or {})
    assert set(scene.missing) <= set(needed)
    assert set(scene.questions) == set(needed)
    assert list(scene.missing) == [name for name in needed if name in scene.missing]
    text = said(scene.messages)
    check_literal({k: v for k, v in scene.call.arguments.items() if k not in scene.missing}, text, scene.id)
    assert set(scene.answers) == set(scene.guesses) == set(scene.missing)
    for name in scene.missing:
        value, guess = scene.call.arguments[name], scene.guesses[name]
        assert not mentions(text, value), (scene.id, value)
        assert not mentions(text, guess), (scene.id, guess)
        assert mentions(scene.answers[name], value)
        assert value != guess
        assert type(value) is type(guess)
        assert all(mentions(reply, guess) for reply in scene.immediate)
    for wordings in scene.questions.values():
        assert len(set(wordings)) >= 4
        assert all(read(question).asks for question in wordings)
    assert len(set(scene.immediate)) >= 3
    assert not any(read(reply).asks for reply in scene.immediate)


def test_every_parameter_can_be_answered_in_every_split() -> None:
    for split in SPLITS:
        for kit in KITS.values():
            for name in kit.params if kit.split in ("train", split) else ():
                value = town.Value("amber", "amber")
                assert "amber" in town.answer(town.Dice(random.Random(name), split), kit.params[name], value)


@pytest.mark.parametrize("split", SPLITS)
def test_claims(split: Split, made: dict[tuple[Split, str], list[Any]]) -> None:
    for kind in CLAIMS:
        scenes: list[Claim] = made[split, kind]
        for scene in scenes:
            assert scene.kind == kind
            check_claim(scene)
        assert sum(scene.in_context for scene in scenes) >= len(scenes) / 2
        assert set(FORMS) <= {tag for scene in scenes for tag in scene.tags}
    for composite in made[split, "composite"]:
        check_composite(composite)


def check_claim(scene: Claim) -> None:
    last = scene.messages[-1]["content"]
    assert (scene.claimed == scene.truth) == (scene.kind != "false")
    assert scene.claimed == (scene.other if scene.kind == "false" else scene.truth)
    assert not clash(scene.truth, scene.other), scene.id
    assert scene.claimed in last, scene.id
    assert scene.truth in scene.fact
    assert scene.claimed in scene.statement
    assert scene.statement.endswith(".")
    for replies, value in (
        (scene.holds, scene.truth),
        (scene.confirms, scene.claimed),
        (scene.contradicts, scene.truth if scene.kind == "false" else scene.other),
    ):
        assert len(set(replies)) >= 3
        assert all(within(value, reply) and not read(reply).asks for reply in replies), scene.id
    before = said(scene.messages[:-1])
    if scene.in_context and not scene.own:
        assert scene.truth in before, scene.id
    if scene.kind == "update":
        assert any(
            within(scene.other, m["content"]) for m in scene.messages if m["role"] == "assistant" and m["content"]
        ), scene.id


def check_composite(scene: Composite) -> None:
    assert scene.messages == scene.claim.messages == scene.request.messages
    assert scene.tools == scene.claim.tools == scene.request.tools
    if "false_claim_in_incomplete_request" in scene.tags:
        check_claim(scene.claim)
        assert scene.claim.kind == "false"
        assert scene.request.missing
    else:
        assert scene.claim.kind == "update"
        assert not scene.request.missing
        assert scene.claim.truth in scene.messages[-1]["content"]


def test_dialogues(made: dict[tuple[Split, str], list[Any]]) -> None:
    for split in SPLITS:
        lengths = [len(scene.messages) for scene in made[split, "dialogue"]]
        assert 4 <= min(lengths) <= max(lengths) <= 14
        assert any(
            read(m["content"]).asks for d in made[split, "dialogue"] for m in d.messages if m["role"] == "assistant"
        )


def test_facts(world: Town) -> None:
    facts = world.facts()
    assert 400 <= len(facts) <= 600
    assert len({(fact.subject, fact.attribute) for fact in facts}) == len(facts)
    for fact in facts:
        assert len(fact.others) >= 7
        assert within(fact.value, fact.sentence)
        assert within(fact.subject, fact.sentence)
        assert fact.question.endswith("?")
        assert not any(clash(fact.value, other) for other in fact.others)
    subjects = {fact.subject for fact in facts}
    assert any(fact.value in subjects for fact in facts)
    for attribute in {fact.attribute for fact in facts}:
        counts = Counter(fact.value for fact in facts if fact.attribute == attribute and fact.split == "train")
        assert max(counts.values()) - min(counts.values()) <= 2, attribute
    asked = world.fact_questions(1200)
    assert {value for _, _, value in asked} == {fact.value for fact in facts}
    assert all(value in answer for _, answer, value in asked)
    assert len({question for question, _, _ in asked}) > 1000


def test_splits_share_no_wording_entity_value_or_function(
    world: Town, made: dict[tuple[Split, str], list[Any]], templates: dict[Split, set[str]]
) -> None:
    texts: dict[Split, set[str]] = {split: set() for split in SPLITS}
    values: dict[Split, set[str]] = {split: set() for split in SPLITS}
    own: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for (split, _), scenes in made.items():
        for scene in scenes:
            texts[split] |= {m["content"].lower() for m in scene.messages if m["role"] == "user"}
            own[split] |= {one["function"]["name"] for one in scene.tools}
            values[split] |= free_values(scene)
    for split in SPLITS:
        values[split] |= {fact.subject for fact in world.facts(split)}
    assert all(len(values[split]) > 300 and len(templates[split]) > 1500 for split in SPLITS)
    for one, two in (("train", "validation"), ("train", "heldout"), ("validation", "heldout")):
        assert not templates[one] & templates[two]
        assert not texts[one] & texts[two]
        assert not values[one] & values[two], sorted(values[one] & values[two])[:9]
    for split in SPLITS:
        for kit in KITS.values():
            assert (kit.name in own[split]) == (kit.split in ("train", split)), (kit.name, split)


def free_values(scene: Any) -> set[str]:
    """Values of open kinds that a scene's calls carry; made-up parameters are of the train split only."""
    found: set[str] = set()
    calls = [one["function"] for message in scene.messages for one in message.get("tool_calls", ())]
    if isinstance(scene, Request) and scene.call:
        calls.append({"name": scene.call.name, "arguments": scene.call.arguments})
    for call in calls:
        found |= {str(value) for key, value in call["arguments"].items() if key in PARAMS and PARAMS[key].kind in FREE}
    return found


def test_wording_does_not_tell_false_from_true(world: Town) -> None:
    skill = skills.load("disagree")
    words = bag_of_words_auc(*(skill.cases(world, split, 2400, seed=7) for split in ("train", "heldout")))
    print(f"bag of words, false against true and update: AUC {words:.3f}")
    assert 0.35 <= words <= 0.65


def test_length_does_not_tell_complete_from_incomplete(world: Town) -> None:
    """Words may tell: a missing day leaves no weekday. Length and number of turns may not."""
    skill = skills.load("clarify")
    cases = {split: skill.cases(world, split, 1600, seed=7) for split in ("train", "heldout")}
    print(f"bag of words, incomplete against complete: AUC {bag_of_words_auc(cases['train'], cases['heldout']):.3f}")
    for some in cases.values():
        parts = [[case for case in some if case.positive is positive] for positive in (True, False)]
        lengths = [[float(len(case.messages[-1]["content"])) for case in part] for part in parts]
        print(f"length alone: AUC {auc(*lengths):.3f}")
        assert 0.4 < auc(*lengths) < 0.6
        turns = [float(np.mean([len(case.messages) for case in part])) for part in parts]
        assert turns[0] == pytest.approx(turns[1], abs=0.25)


def test_enough_scenes_fast_enough(world: Town) -> None:
    begin = time.perf_counter()
    for kind in REQUESTS:
        assert len(world.requests("heldout", 600, kind=kind)) == 600
    for claim in CLAIMS:
        assert len(world.claims("heldout", 600, kind=claim)) == 600
    assert len(world.composites("heldout", 600)) == 600
    assert time.perf_counter() - begin < 35  # seconds, seven times 600 scenes
    begin = time.perf_counter()
    assert len(world.dialogues("train", 1000)) == 1000
    assert time.perf_counter() - begin < 10


def test_too_few_scenes_is_an_error(world: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(town, "TRIES", 3)
    monkeypatch.setattr(town, "some_request", lambda *_: None)
    with pytest.raises(WorldError, match="0 different scenes were found, 5 were asked for"):
        world.requests("train", 5, kind="complete")

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
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from svdexpert.errors import WorldError
from svdexpert.reply import read
from svdexpert.skills import check_tool, find_tool, required
from svdexpert.worlds import (
    SPLITS,
    Claim,
    ClaimKind,
    Composite,
    Message,
    Request,
    RequestKind,
    Scene,
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
    if scene.in_context and not {"own_detail", "changed"} & set(scene.tags):
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
    cases = {split: claims(world, split, 1200) for split in ("train", "heldout")}
    auc = bag_of_words_auc(cases["train"], cases["heldout"])
    print(f"bag of words, false against true and update: AUC {auc:.3f}")
    assert 0.35 <= auc <= 0.65


def claims(world: Town, split: Split, n: int) -> list[tuple[str, bool]]:
    parts = [("false", n), ("true", n // 2), ("update", n // 2)]
    scenes: list[Scene] = [scene for kind, size in parts for scene in world.claims(split, size, kind=kind, seed=7)]  # type: ignore[arg-type]
    return [(scene.messages[-1]["content"], scene.kind == "false") for scene in scenes if isinstance(scene, Claim)]


def test_length_does_not_tell_complete_from_incomplete(world: Town) -> None:
    """Words may tell: a missing day leaves no weekday. Length and number of turns may not."""
    cases: dict[str, list[tuple[str, bool]]] = {}
    means: dict[str, list[float]] = {}
    for split in ("train", "heldout"):
        cases[split] = []
        for kind in ("complete", "incomplete"):
            scenes = world.requests(split, 800, kind=kind, seed=7)  # type: ignore[arg-type]
            cases[split] += [(scene.messages[-1]["content"], kind == "incomplete") for scene in scenes]
            means.setdefault(kind, []).append(float(np.mean([len(users(scene.messages).split()) for scene in scenes])))
            means.setdefault(f"turns of {kind}", []).append(float(np.mean([len(scene.messages) for scene in scenes])))
    print({key: [round(value, 2) for value in pair] for key, pair in means.items()})
    print(f"bag of words, incomplete against complete: AUC {bag_of_words_auc(cases['train'], cases['heldout']):.3f}")
    lengths = np.array([len(text) for text, _ in cases["heldout"]], dtype=float)
    auc = area(lengths, np.array([label for _, label in cases["heldout"]]))
    print(f"length alone: AUC {auc:.3f}")
    assert 0.4 < auc < 0.6
    assert means["turns of complete"] == pytest.approx(means["turns of incomplete"], abs=0.25)


def bag_of_words_auc(train: Sequence[tuple[str, bool]], test: Sequence[tuple[str, bool]]) -> float:
    """Return the test AUC of a logistic regression on which words occur."""
    counts = Counter(word for text, _ in train for word in set(re.findall(r"\w+", text.lower())))
    index = {word: place for place, word in enumerate(sorted(w for w, count in counts.items() if count >= 3))}

    def matrix(cases: Sequence[tuple[str, bool]]) -> np.ndarray:
        rows = np.zeros((len(cases), len(index) + 1))
        rows[:, -1] = 1
        for row, (text, _) in zip(rows, cases, strict=True):
            row[[index[word] for word in set(re.findall(r"\w+", text.lower())) if word in index]] = 1
        return rows

    x, y = matrix(train), np.array([label for _, label in train], dtype=float)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ w
        value = np.logaddexp(0, z).sum() - y @ z + 0.5 * w @ w
        return float(value), x.T @ (expit(z) - y) + w

    w = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 100}).x
    return area(matrix(test) @ w, np.array([label for _, label in test]))


def area(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the area under the ROC curve."""
    ranks, good = rankdata(scores), labels.astype(bool)
    return float((ranks[good].sum() - good.sum() * (good.sum() + 1) / 2) / (good.sum() * (~good).sum()))


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

"""The world of real dialogues: two dialogues in both forms of the data; real ones where SVDEXPERT_SGD names them."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svdexpert.errors import WorldError
from svdexpert.reply import read
from svdexpert.skills import check_tool, load
from svdexpert.skills import required as required_of
from svdexpert.worlds import SPLITS, Claim, Request, Scene
from svdexpert.worlds import sgd as module
from svdexpert.worlds.sgd import CHANGES, CLAIMS, REMINDERS, TODAY, SchemaGuided

FIXTURES = Path(__file__).parent / "fixtures"
REAL = os.environ.get("SVDEXPERT_SGD", "")
KINDS = ("incomplete", "complete", "unserved", "false", "true", "update", "composite", "dialogue")
MANY = {
    "incomplete": 4,
    "complete": 2,
    "unserved": 3,
    "false": 4,
    "true": 4,
    "update": 4,
    "composite": 2,
    "dialogue": 2,
}


def draw(world: SchemaGuided, split: Any, kind: Any, n: int, seed: int = 0) -> list[Any]:
    """Return n scenes of any kind."""
    if kind == "composite":
        return list(world.composites(split, n, seed=seed))
    if kind == "dialogue":
        return list(world.dialogues(split, n, seed=seed))
    if kind in ("false", "true", "update"):
        return list(world.claims(split, n, kind=kind, seed=seed))
    return list(world.requests(split, n, kind=kind, seed=seed))


@pytest.fixture(scope="module")
def compact() -> SchemaGuided:
    return SchemaGuided(FIXTURES / "sgd_compact")


@pytest.fixture(scope="module")
def public() -> SchemaGuided:
    return SchemaGuided(FIXTURES / "sgd_public")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The compact fixture, to be damaged."""
    return Path(shutil.copytree(FIXTURES / "sgd_compact", tmp_path / "sgd"))


@pytest.fixture(scope="module")
def real() -> SchemaGuided:
    """The real data; the tests that need it are skipped without it."""
    if not REAL:
        pytest.skip("SVDEXPERT_SGD names no folder with the Schema-Guided Dialogue data")
    return SchemaGuided(REAL)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_give_the_same_scenes(compact: SchemaGuided, public: SchemaGuided, split: str, kind: str) -> None:
    ours = draw(compact, split, kind, MANY[kind])
    assert len(ours) == MANY[kind]
    assert ours == draw(public, split, kind, MANY[kind])
    assert not compact.skipped
    assert not public.skipped


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_scenes(compact: SchemaGuided, kind: str) -> None:
    first = draw(compact, "train", kind, 2, seed=3)
    assert first == draw(SchemaGuided(compact.folder), "train", kind, 2, seed=3)
    assert [one.id for one in first] != [one.id for one in draw(compact, "train", kind, 2, seed=4)]


def test_a_dialogue_becomes_messages(compact: SchemaGuided) -> None:
    (one,) = [one for one in compact.requests("train", 3, kind="unserved") if "goodbye" in one.tags][:1]
    first = one.id.split("/")[2] == "1_00001"
    assert one.messages[0] == {"role": "system", "content": TODAY}
    calls = [call["function"] for message in one.messages for call in message.get("tool_calls", ())]
    assert [call["name"] for call in calls] == ["FindPlaces", "ReserveTable"]
    assert calls[1]["arguments"]["party_size"] == (2 if first else 4)  # digits of an integer parameter
    results = [json.loads(message["content"]) for message in one.messages if message["role"] == "tool"]
    assert results[0]["street_address"] in ("12 Mill Lane", "3 Harbour Road")
    assert not {"town", "cuisine"} & results[0].keys()  # the call has said it
    assert results[1] == {"results": 0} if first else results[1]["street_address"] == "3 Harbour Road"


def test_tools_follow_the_schema(compact: SchemaGuided) -> None:
    scene = compact.requests("train", 1, kind="incomplete")[0]
    tools = {one["function"]["name"]: one["function"]["parameters"] for one in scene.tools}
    table, find = tools["ReserveTable"], tools["FindPlaces"]
    assert list(table["properties"]) == ["place_name", "town", "time", "date", "party_size"]
    assert table["required"] == ["place_name", "town", "time"]
    assert table["properties"]["party_size"] == {"type": "integer", "default": 2}
    assert table["properties"]["date"] == {"type": "string", "default": "2019-03-01"}
    assert find["properties"]["has_garden"] == {"type": "string", "enum": ["True", "False"]}
    assert find["properties"]["cuisine"]["enum"] == ["Thai", "Greek", "Polish"]


def sound(scene: Scene) -> None:
    """Check what holds for every scene."""
    assert scene.messages[0]["content"] == TODAY
    assert scene.messages[-1]["role"] == "user"
    names = [one["function"]["name"] for one in scene.tools]
    assert 2 <= len(names) == len(set(names)) <= 5
    for one in scene.tools:
        check_tool(one)
    assert scene.tags[0] in ("seen_service", "unseen_service")
    assert scene.id.startswith(f"sgd/{scene.split}/")
    assert scene.id.startswith(scene.cluster)


def said(scene: Scene) -> str:
    """Return the prose of a conversation."""
    return "\n".join(message["content"] for message in scene.messages[1:] if message["role"] != "tool")


def sound_request(scene: Request, kind: str) -> None:
    sound(scene)
    if kind == "unserved":
        assert scene.call is None
        assert scene.refusals
        assert not any(read(text).asks or read(text).calls for text in scene.refusals)
        return
    call = scene.call
    assert call is not None
    (function,) = [one for one in scene.tools if one["function"]["name"] == call.name]
    properties = function["function"]["parameters"]["properties"]
    needed = required_of(function)
    for key, value in call.arguments.items():
        assert isinstance(value, int if properties[key]["type"] == "integer" else str)
        assert value in properties[key].get("enum", [value])
    assert set(needed) <= set(call.arguments)
    assert set(scene.questions) == set(needed)
    assert scene.missing == tuple(name for name in needed if name in scene.missing)
    assert all(len(texts) >= 3 and all(read(text).asks for text in texts) for texts in scene.questions.values())
    assert len(scene.immediate) >= 3
    assert not any(read(text).asks for text in scene.immediate)
    assert bool(scene.missing) == (kind == "incomplete")
    assert set(scene.answers) == set(scene.guesses) == set(scene.missing)
    for name in scene.missing:
        assert not module._within(call.arguments[name], said(scene))
        assert scene.guesses[name] != call.arguments[name]
        assert all(module._within(scene.guesses[name], text) for text in scene.immediate)


def sound_claim(scene: Claim) -> None:
    sound(scene)
    assert scene.in_context
    before = "\n".join(message["content"] for message in scene.messages[1:-1] if message["role"] == "assistant")
    assert scene.truth in before
    assert module._apart(scene.truth, scene.other)
    assert scene.claimed == (scene.other if scene.kind == "false" else scene.truth)
    assert scene.claimed in scene.statement
    assert scene.truth in scene.fact
    assert scene.statement[1:-1] in scene.messages[-1]["content"]
    if scene.kind == "update":
        assert scene.other in scene.messages[-2]["content"]
    for wordings in (scene.holds, scene.confirms, scene.contradicts):
        assert len(wordings) >= 3
        assert not any(read(text).asks for text in wordings)
    assert all(scene.truth in text and scene.other not in text for text in scene.holds)
    assert all(scene.claimed in text for text in scene.confirms)


def every(world: SchemaGuided, split: Any, n: int | None = None) -> Iterator[tuple[str, Any]]:
    for kind in KINDS:
        for scene in draw(world, split, kind, n or MANY[kind]):
            yield kind, scene


def check_all(world: SchemaGuided, split: Any, n: int | None = None) -> None:
    ids = set()
    for kind, scene in every(world, split, n):
        ids.add(scene.id)
        if kind in ("incomplete", "complete", "unserved"):
            sound_request(scene, kind)
        elif kind in ("false", "true", "update"):
            sound_claim(scene)
        elif kind == "composite":
            sound(scene)
            assert scene.messages == scene.claim.messages == scene.request.messages
            assert scene.tools == scene.claim.tools == scene.request.tools
            sound_request(scene.request, "incomplete" if scene.request.missing else "complete")
            if scene.request.missing:
                sound_claim(scene.claim)
            else:
                assert scene.claim.truth in scene.request.call.arguments.values()
                assert scene.claim.other not in scene.request.call.arguments.values()
                assert module._within(scene.claim.other, said(scene))
        else:
            assert scene.messages[-1]["role"] == "assistant"
    assert len(ids) == sum(n or MANY[kind] for kind in KINDS)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scenes_are_sound(compact: SchemaGuided, split: str) -> None:
    check_all(compact, split)


@pytest.mark.parametrize("kind", ["incomplete", "complete", "unserved"])
def test_missing_details_are_those_that_the_state_lacks(compact: SchemaGuided, kind: str) -> None:
    for scene in draw(compact, "train", kind, MANY[kind]):
        _, _, name, at, *_ = scene.id.split("/")
        (talk,) = [one for one in compact._talks("train") if one.id == name]
        state = talk.turns[int(at) - 1].frames[0].slots
        assert not set(scene.missing) & set(state)
        if kind == "complete":
            assert set(scene.questions) <= set(state)


def test_real_wordings_come_first(compact: SchemaGuided) -> None:
    asked = {s.questions[name][0] for s in compact.requests("train", 4, kind="incomplete") for name in s.missing}
    assert asked == {"Which town, and what kind of food?", "In which town should I look?", "What time should I book?"}
    replies = {one.refusals[0] for one in compact.requests("train", 3, kind="unserved") if "talk" in one.tags}
    assert replies <= {"You find it at 12 Mill Lane.", "You find it at 3 Harbour Road.", "Enjoy your meal!"}


def test_answers_speak_as_the_user_did(compact: SchemaGuided) -> None:
    answers = {text for one in compact.requests("train", 4, kind="incomplete") for text in one.answers.values()}
    assert {"The time is 7 pm.", "The time is half past six.", "The town is Ashford."} <= answers


def test_the_needed_function_is_absent(compact: SchemaGuided) -> None:
    for scene in compact.requests("train", 3, kind="unserved"):
        if "absent" in scene.tags:
            assert "FindPlaces" not in {one["function"]["name"] for one in scene.tools}


def test_a_correction_changes_the_call(compact: SchemaGuided) -> None:
    (scene,) = [one for one in compact.composites("train", 2) if not one.request.missing]
    assert scene.request.call is not None
    assert scene.request.call.arguments["cuisine"] == scene.claim.truth != "Greek"
    assert scene.messages[-1]["content"].endswith("We are in Ashford.")
    assert scene.tags[-1] == "call_after_correction"


def test_services_are_tagged_by_the_train_schema(compact: SchemaGuided) -> None:
    assert compact.requests("train", 1, kind="complete")[0].tags[:2] == ("seen_service", "Tables_1")
    assert compact.requests("heldout", 1, kind="complete")[0].tags[:2] == ("unseen_service", "Dinners_1")


def test_phrasings_differ_between_splits() -> None:
    for bank in (CLAIMS, REMINDERS, CHANGES):
        texts = [text for split in SPLITS for text in bank[split]]
        assert len(texts) == len(set(texts))
    assert [len(CLAIMS[split]) >= least for split, least in zip(SPLITS, (24, 4, 8), strict=True)] == [True] * 3


def test_validation_is_a_part_of_train(copy: Path) -> None:
    first = json.loads((copy / "train.jsonl").read_text().splitlines()[0])
    lines = [json.dumps({**first, "id": f"9_{number:05}"}) for number in range(400)]
    (copy / "train.jsonl").write_text("\n".join(lines))
    world = SchemaGuided(copy)
    counts = [len(world._talks(split)) for split in ("train", "validation")]
    assert sum(counts) == 400
    assert 8 <= counts[1] <= 35
    names = [{one.cluster for one in world.requests(split, 8, kind="complete")} for split in ("train", "validation")]
    assert len(names[0]) == len(names[1]) == 8  # one of each dialogue first
    assert not {name.split("/")[2] for name in names[0]} & {name.split("/")[2] for name in names[1]}


def test_values_are_as_often_wrong_as_right(copy: Path) -> None:
    first = (copy / "train.jsonl").read_text().splitlines()[0]
    names = [f"Golden {one}" for one in ("Spoon", "Fork", "Plate", "Bowl", "Cup")]
    many = [first.replace("1_00001", f"9_{i:05}").replace("Golden Spoon", names[i % 5]) for i in range(100)]
    many = [line.replace("12 Mill Lane", f"{20 + i % 5} Mill Lane") for i, line in enumerate(many)]
    (copy / "train.jsonl").write_text("\n".join(many))
    world = SchemaGuided(copy)
    for talk in world._talks("train"):
        for told, index in world._telling("train", talk):
            assert world._other("train", index, told, 0) != told.value
    counts = Counter(one.claimed for one in world.claims("train", 180, kind="false"))
    assert max(counts.values()) <= 1.6 * min(counts.values())


# ---- Errors --------------------------------------------------------------------------------------------------------


def test_a_missing_folder_or_file_is_named(copy: Path) -> None:
    with pytest.raises(WorldError, match=r"nowhere lacks train/schema.json.*no such folder.*dstc8-schema-guided"):
        SchemaGuided(copy / "nowhere").requests("train", 1, kind="complete")
    (copy / "dev.jsonl").rename(copy / "development.jsonl")
    with pytest.raises(WorldError, match=r"dev/dialogues_001.json. Found: development.jsonl, .*dev.jsonl"):
        SchemaGuided(copy).requests("heldout", 1, kind="complete")
    assert SchemaGuided(copy).requests("train", 1, kind="complete")  # what is not needed is not read


def test_a_gap_between_files_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "sgd_public", tmp_path / "sgd"))
    shutil.copy(folder / "train/dialogues_001.json", folder / "train/dialogues_003.json")
    with pytest.raises(WorldError, match=r"lacks dialogues_002.json"):
        SchemaGuided(folder).dialogues("train", 1)


@pytest.mark.parametrize("name", ["train/dialogues_001.json", "train/schema.json"])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(FIXTURES / "sgd_public", tmp_path / "sgd"))
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])
    with pytest.raises(WorldError, match=f"{name} does not parse.*cut off"):
        SchemaGuided(folder).dialogues("train", 1)


@pytest.mark.parametrize("keep", [0.5, 0.98, "text"])
def test_a_damaged_gzip_is_named(copy: Path, keep: float | str) -> None:
    plain = (copy / "train.jsonl").read_bytes()
    (copy / "train.jsonl").unlink()
    packed = gzip.compress(plain)
    (copy / "train.jsonl.gz").write_bytes(plain if isinstance(keep, str) else packed[: int(len(packed) * keep)])
    with pytest.raises(WorldError, match=r"train.jsonl.gz cannot be read to its end"):
        SchemaGuided(copy).dialogues("train", 1)
    (copy / "train.jsonl.gz").write_bytes(packed)
    assert SchemaGuided(copy).dialogues("train", 2) == SchemaGuided(FIXTURES / "sgd_compact").dialogues("train", 2)


def test_a_plain_file_that_was_cut_off_is_named(copy: Path) -> None:
    text = (copy / "train.jsonl").read_text()
    (copy / "train.jsonl").write_text(text[:-200])
    with pytest.raises(WorldError, match=r"train.jsonl cannot be read to its end.*cut off"):
        SchemaGuided(copy).dialogues("train", 1)
    (copy / "train.jsonl").write_text(text + "\n\n")
    assert SchemaGuided(copy).dialogues("train", 2)


def test_a_broken_dialogue_is_counted_and_named(copy: Path) -> None:
    lines = (copy / "train.jsonl").read_text().splitlines()
    odd = lines[1].replace('"Greek"', '"Martian"')
    (copy / "train.jsonl").write_text(
        "\n".join([lines[0], lines[1][:200], "[]", odd, '{"id": 1, "turns": [3]}', lines[1]])
    )
    world = SchemaGuided(copy)
    assert len(world.dialogues("train", 2)) == 2
    assert [text.split(":")[0] for text in world.skipped] == [f"train.jsonl line {number}" for number in (2, 3, 4, 5)]
    assert "Martian" in world.skipped[2]


def test_nothing_that_parses_is_an_error(copy: Path) -> None:
    (copy / "train.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(WorldError, match=r"none of its 1 dialogues parses.*KeyError 'turns'"):
        SchemaGuided(copy).dialogues("train", 1)
    (copy / "schema_train.json").write_text('[{"service": "Tables_1"}]')
    with pytest.raises(WorldError, match=r"schema_train.json is no schema.*service_name"):
        SchemaGuided(copy).dialogues("train", 1)


def test_too_many_scenes_are_refused_with_their_number(compact: SchemaGuided) -> None:
    with pytest.raises(WorldError, match="holds 2 scenes of kind 'complete' in the split 'train'; 99 were asked for"):
        compact.requests("train", 99, kind="complete")


def test_unknown_names_are_refused(compact: SchemaGuided) -> None:
    with pytest.raises(WorldError, match="Did you mean 'complete'"):
        compact.requests("train", 1, kind="complet")  # type: ignore[arg-type]
    with pytest.raises(WorldError, match="Did you mean 'false'"):
        compact.claims("train", 1, kind="falsy")  # type: ignore[arg-type]
    with pytest.raises(WorldError, match="Did you mean 'heldout'"):
        compact.dialogues("held-out", 1)  # type: ignore[arg-type]


# ---- With the skills, and with the real data -----------------------------------------------------------------------


def gold_scores_one(world: SchemaGuided, split: Any, n: int) -> None:
    for name in ("clarify", "disagree", "call"):
        skill = load(name)
        for case in skill.cases(world, split, n):
            for reply in case.gold:
                assert skill.verify(case, reply).score == 1, (case.id, reply)
            for bad in case.bad:
                assert skill.verify(case, bad.reply).score < 0, (case.id, bad)


def test_gold_replies_score_one(compact: SchemaGuided) -> None:
    gold_scores_one(compact, "train", 4)


def test_real_scenes_are_sound(real: SchemaGuided) -> None:
    check_all(real, "train", 400)
    check_all(real, "heldout", 400)
    gold_scores_one(real, "heldout", 400)
    assert not real.skipped


def words(scene: Claim) -> set[str]:
    return set(re.findall(r"\w+|[^\w\s]", scene.messages[-1]["content"].lower()))


def test_words_do_not_tell_false_from_true(real: SchemaGuided) -> None:
    counts = {kind: Counter[str]() for kind in ("false", "true")}
    for kind, counter in counts.items():
        for scene in draw(real, "train", kind, 1500):
            counter.update(words(scene))

    def falseness(scene: Claim) -> float:
        return sum(math.log((counts["false"][one] + 1) / (counts["true"][one] + 1)) for one in words(scene))

    false, true = ([falseness(one) for one in draw(real, "heldout", kind, 600)] for kind in ("false", "true"))
    wins = sum((a > b) + (a == b) / 2 for a in false for b in true) / (len(false) * len(true))
    assert 0.35 <= wins <= 0.65

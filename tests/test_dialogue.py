"""Conversations: refill is a fresh conversation, reuse reads less, who speaks does not flicker, nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny
from test_dispatch import OPENS, Halves

from svdexpert import DispatchError, Expert, SpectralModel
from svdexpert.decision import Asked, Decision
from svdexpert.dialogue import NOD, Conversation, Policy, Sticky, next_token_divergence
from svdexpert.dispatch.fixed import Fixed
from svdexpert.errors import TooLongError
from svdexpert.worlds import assistant, user

SAID = ("hello there", "what is it?", "no", "and now?")
MIXTURES: tuple[Mapping[str, float], ...] = ({"ask": 1.0}, {"doubt": 0.7, "call": 0.2}, {}, {"ask": 1.0})


@pytest.fixture(params=["llama", "mistral", "gpt2"])
def talking(request: pytest.FixtureRequest) -> SpectralModel:
    room = {"max_position_embeddings": 512} | ({"n_positions": 512} if request.param == "gpt2" else {})
    return SpectralModel.attach(tiny(request.param, **room), byte_tokenizer(), k=8, progress=False)


def library(model: SpectralModel, activated: bool, reach: int = 0, opens: tuple[int, ...] = OPENS) -> dict[str, Expert]:
    opens = opens if activated else ()
    return {
        name: replace(Expert.random(model.basis, std=0.3, seed=seed), invocation=opens, reach=reach)
        for seed, name in enumerate(("ask", "doubt", "call"))
    }


def fresh(model: SpectralModel, talk: Conversation, weights: Mapping[str, float], turn: int) -> str:
    """Return the reply to the messages before a turn, without a cache."""
    last = [place for place, one in enumerate(talk.messages) if one["role"] == "assistant"][turn]
    found = model.generate([talk.messages[:last]], weights or None, library=talk.library, max_new_tokens=10)
    assert isinstance(found, list)
    return found[0].strip()


@pytest.mark.parametrize(("activated", "reach"), [(True, 0), (True, 3), (False, 0)])
def test_refill_after_a_switch_is_a_fresh_conversation(talking: SpectralModel, activated: bool, reach: int) -> None:
    talk = Conversation(talking, library(talking, activated, reach), max_new_tokens=10)
    for turn, (text, weights) in enumerate(zip(SAID, MIXTURES, strict=True)):
        talk.mix(weights)
        found = talk.say(text)
        assert found.text == fresh(talking, talk, weights, turn)
        assert found.decision.weights == weights
    assert [one["role"] for one in talk.messages] == ["user", "assistant"] * 4


@pytest.mark.parametrize("activated", [True, False])
def test_reuse_reads_less_and_says_what_the_first_turn_says(talking: SpectralModel, activated: bool) -> None:
    experts = library(talking, activated)
    policies: tuple[Policy, ...] = ("refill", "reuse")
    talks = {policy: Conversation(talking, experts, policy=policy, max_new_tokens=10) for policy in policies}
    read = dict.fromkeys(talks, 0)
    for text, weights in zip(SAID, MIXTURES, strict=True):
        for policy, talk in talks.items():
            talk.mix(weights)
            found = talk.say(text)
            read[policy] += found.read
            assert found.read + found.kept == len(
                talking.tokenizer.apply_chat_template(talk.messages[:-1], add_generation_prompt=True)["input_ids"]
            )
    assert read["reuse"] <= read["refill"]
    if talking.hf.config.model_type != "mistral":  # a sliding window cannot go back: it is read again
        assert read["reuse"] < read["refill"]
        assert (talks["refill"].turns[1].kept > 0) == activated
    assert talks["refill"].turns[0].text == talks["reuse"].turns[0].text


@pytest.mark.parametrize(("activated", "reach"), [(True, 0), (True, 3), (False, 0)])
def test_a_dispatcher_decides_in_every_turn(talking: SpectralModel, activated: bool, reach: int) -> None:
    experts = library(talking, activated, reach)
    talk = Conversation(talking, experts, Halves(tuple(experts)), max_new_tokens=10, hysteresis=0)
    for turn, text in enumerate(SAID):
        found = talk.say(text)
        assert found.text == fresh(talking, talk, found.decision.weights, turn)
    assert len({json.dumps(one.decision.as_json()) for one in talk.turns}) > 1


def test_a_reply_that_one_token_opens_begins_anew_in_every_turn(talking: SpectralModel) -> None:
    experts = library(talking, True, 3, OPENS[-1:])
    talk = Conversation(talking, experts, Halves(tuple(experts)), max_new_tokens=10, hysteresis=0)
    for turn, text in enumerate(SAID):
        found = talk.say(text)
        assert found.text == fresh(talking, talk, found.decision.weights, turn)
    assert len({json.dumps(one.decision.as_json()) for one in talk.turns}) > 1


def test_what_the_base_has_read_is_not_what_experts_on_all_tokens_would(talking: SpectralModel) -> None:
    talk = Conversation(talking, library(talking, False), max_new_tokens=10)
    for turn, weights in enumerate(({}, {}, {"ask": 1.0})):
        talk.mix(weights)
        assert talk.say(SAID[turn]).text == fresh(talking, talk, weights, turn)


def test_a_template_may_write_more_behind_what_opens_a_reply(talking: SpectralModel) -> None:
    assert talking.tokenizer is not None
    template = str(talking.tokenizer.chat_template)
    thinks = "{% if enable_thinking is defined and not enable_thinking %}(no) {% endif %}"
    talking.tokenizer.chat_template = template.replace("a: {% endif %}", "a: " + thinks + "{% endif %}")
    for reach in (0, 3):
        talk = Conversation(talking, library(talking, True, reach), max_new_tokens=10)
        for turn, weights in enumerate(MIXTURES[:2]):
            talk.mix(weights)
            assert talk.say(SAID[turn]).text == fresh(talking, talk, weights, turn)


def test_one_mixture_keeps_all_of_its_cache(talking: SpectralModel) -> None:
    talk = Conversation(talking, library(talking, False), max_new_tokens=10)
    talk.mix({"ask": 1.0})
    for turn, text in enumerate(SAID):
        assert talk.say(text).text == fresh(talking, talk, {"ask": 1.0}, turn)
    if talking.hf.config.model_type != "mistral":
        assert all(one.kept > 0 for one in talk.turns[1:])


def test_without_experts_it_is_the_base(talking: SpectralModel) -> None:
    talk = Conversation(talking, max_new_tokens=10, instructions="be kind")
    for turn, text in enumerate(SAID):
        assert talk.say(text).text == fresh(talking, talk, {}, turn)
        assert talk.base_reply() == talk.turns[-1].text
    assert talk.messages[0]["role"] == "system"


def test_the_same_turn_answered_by_the_base(talking: SpectralModel) -> None:
    talk = Conversation(talking, library(talking, True), max_new_tokens=10)
    talk.mix({"ask": 1.0, "doubt": 1.0})
    talk.say("hello there")
    before = list(talk.messages)
    assert talk.base_reply() == fresh(talking, talk, {}, 0)
    assert talk.messages == before


class Scores:
    """Lets whoever scores at least one half speak."""

    reads = False
    experts = ("ask", "doubt")

    def __init__(self, *rows: tuple[float, float]) -> None:
        self.rows = list(rows)

    def check(self, model: Any, library: Any) -> None:
        pass

    def decide(self, model: Any, asked: Asked) -> list[Decision]:
        scores = dict(zip(self.experts, self.rows.pop(0), strict=True))
        return [Decision({name: 1.0 for name, one in scores.items() if one >= 0.5}, 1.0, "said", scores)]


def test_hysteresis_keeps_who_speaks_where_it_is_close(talking: SpectralModel) -> None:
    rows = [(0.9, 0.1), (0.45, 0.55), (0.35, 0.55), (0.2, 0.61)]
    chosen = [["ask"], ["ask"], [], ["doubt"]]
    talk = Conversation(talking, library(talking, True), Scores(*rows), max_new_tokens=4)
    assert [sorted(talk.say(text).decision.chosen) for text in SAID] == chosen
    assert "as in the turn before: ask, doubt" in talk.turns[1].decision.because
    first = Sticky(Scores(*rows), None, 0.1).decide(talking, Asked(None, torch.zeros(1, 1), torch.ones(1, 1)))
    assert first[0].chosen == {"ask"}


class Loud(Scores):
    """Speaks louder where it speaks alone."""

    def weights_of(self, names: list[str]) -> dict[str, float]:
        return dict.fromkeys(names, 2.0 / len(names))

    def decide(self, model: Any, asked: Asked) -> list[Decision]:
        (found,) = super().decide(model, asked)
        return [replace(found, weights=self.weights_of(sorted(found.weights)))]


def test_hysteresis_asks_how_loudly_those_speak_who_are_left(talking: SpectralModel) -> None:
    asked = Asked(None, torch.zeros(1, 1), torch.ones(1, 1))
    for rows, weights in (
        (((0.9, 0.1), (0.9, 0.55)), {"ask": 2.0}),
        (((0.9, 0.9), (0.9, 0.45)), {"ask": 1.0, "doubt": 1.0}),
        (((0.9, 0.9), (0.9, 0.1)), {"ask": 2.0}),
    ):
        loud = Loud(*rows)
        (before,) = loud.decide(talking, asked)
        (found,) = Sticky(loud, before, 0.1).decide(talking, asked)
        assert found.weights == weights


class Chosen:
    """Lets the same experts speak in every turn."""

    reads = False
    experts = ("ask", "doubt", "call")

    def __init__(self, **weights: float) -> None:
        self.weights = weights

    def check(self, model: Any, library: Any) -> None:
        pass

    def decide(self, model: Any, asked: Asked) -> list[Decision]:
        return [Decision(self.weights, 1.0, "chosen", alone={"ask": 2.0}) for _ in asked.ids]


@pytest.mark.parametrize(("activated", "reach"), [(True, 0), (True, 3), (False, 0)])
def test_experts_in_turn_are_one_conversation_each(talking: SpectralModel, activated: bool, reach: int) -> None:
    experts = library(talking, activated, reach)
    how: dict[str, Any] = {"max_new_tokens": 10, "hysteresis": 0.0}
    chosen = Chosen(ask=1.0, doubt=0.7, call=0.3)
    talk = Conversation(talking, experts, chosen, in_turn=("doubt", "ask"), **how)
    for turn in range(2):
        before = list(talk.messages)
        found = talk.say(SAID[turn])
        parts: list[str] = []
        for mixture in ({"doubt": 0.7, "call": 0.3}, {"ask": 2.0}):
            alone = Conversation(talking, experts, Fixed(mixture), **how)
            alone.messages += [*before, user(SAID[turn]), *([assistant(parts[0])] if parts else [])]
            parts.append(alone.say(NOD).text if parts else alone.reply_to().text)
        assert found.parts == tuple(parts)
        assert found.text == " ".join(parts) == talk.messages[-1]["content"]
        assert found.decision.weights == {"ask": 1.0, "doubt": 0.7, "call": 0.3}
    assert [one["role"] for one in talk.messages] == ["user", "assistant"] * 2
    one = Conversation(talking, experts, Chosen(ask=1.0, call=0.3), in_turn=("doubt", "ask"), **how)
    assert one.say(SAID[0]).text == fresh(talking, one, {"ask": 1.0, "call": 0.3}, 0)
    assert not one.turns[0].parts
    by_hand = {"ask": 1.0, "doubt": 1.0}
    for hysteresis in (0.0, 0.1):
        mixed = Conversation(
            talking, experts, Chosen(ask=1.0), in_turn=("doubt", "ask"), **how | {"hysteresis": hysteresis}
        )
        mixed.mix(by_hand)
        for turn, text in enumerate(SAID):
            assert mixed.say(text).text == fresh(talking, mixed, by_hand, turn)


def test_a_call_ends_a_reply_of_several(talking: SpectralModel, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = library(talking, True)
    talk = Conversation(talking, experts, Chosen(ask=1.0, doubt=1.0), in_turn=("ask", "doubt"), max_new_tokens=4)
    called = '<tool_call>{"name": "book", "arguments": {}}</tool_call>'
    monkeypatch.setattr("svdexpert.dialogue.text_of", lambda *_: called)
    assert talk.say("hello").parts == (called,)
    with pytest.raises(DispatchError, match="Did you mean 'ask'"):
        Conversation(talking, experts, in_turn=("asks",))


def test_what_goes_wrong_takes_nothing_with_it(model: SpectralModel, tmp_path: Path) -> None:
    experts = library(model, True)
    talk = Conversation(model, experts, max_new_tokens=4)
    talk.mix({"ask": 1.0})
    talk.say("hello")
    before = list(talk.messages)
    with pytest.raises(TooLongError):
        talk.say("x" * 100)
    with pytest.raises(DispatchError, match="Did you mean 'ask'"):
        talk.mix({"asks": 1.0})
    assert talk.messages == before
    assert talk.say("again").decision.weights == {"ask": 1.0}
    talk.save(tmp_path / "talk.json")
    kept = json.loads((tmp_path / "talk.json").read_text())
    assert kept["messages"] == talk.messages
    assert kept["turns"][0]["decision"]["weights"] == {"ask": 1.0}
    with pytest.raises(DispatchError, match="Nobody has replied"):
        Conversation(model).base_reply()
    with pytest.raises(DispatchError, match=r"policy is 'refil'\. Did you mean 'refill'"):
        Conversation(model, policy="refil")  # type: ignore[arg-type]
    with pytest.raises(DispatchError, match="hysteresis is"):
        Conversation(model, hysteresis=0.5)


def test_a_dispatcher_that_fails_takes_the_message_back(model: SpectralModel) -> None:
    talk = Conversation(model, library(model, True), Fixed({"nobody": 1.0}), max_new_tokens=4)
    with pytest.raises(DispatchError, match="nobody"):
        talk.say("hello")
    assert not talk.messages
    talk.mix({})
    assert talk.say("hello").decision.abstained


def test_divergence_on_hand_written_numbers() -> None:
    even, sure = torch.zeros(1, 2), torch.tensor([[0.0, float(torch.tensor(3.0).log())]])
    assert float(next_token_divergence(even, even)) == pytest.approx(0)
    wanted = 0.5 * torch.tensor(0.5 / 0.25).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    assert float(next_token_divergence(even, sure)) == pytest.approx(float(wanted))

"""Conversations: refill is a fresh conversation, reuse reads less, who speaks does not flicker, nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny
from test_dispatch import OPENS, Halves

from svdexpert import DispatchError, Expert, MixtureError, SpectralModel
from svdexpert.decision import Asked, Decision
from svdexpert.dialogue import NOD, ByHalves, Conversation, Policy, Sticky, next_token_divergence, read_saved
from svdexpert.dispatch import labelled
from svdexpert.dispatch.fixed import Fixed
from svdexpert.dispatch.prompt import Prompt
from svdexpert.dispatch.router import Router
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


def fresh(model: SpectralModel, talk: Conversation, weights: Mapping[str, float], turn: int, tokens: int = 10) -> str:
    """Return the reply to the messages before a turn, without a cache."""
    last = [place for place, one in enumerate(talk.messages) if one["role"] == "assistant"][turn]
    found = model.generate([talk.messages[:last]], weights or None, library=talk.library, max_new_tokens=tokens)
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
    """Lets whoever scores at least one half speak, unless it is too unsure; louder where one speaks alone."""

    reads = False
    experts = ("ask", "doubt")

    def __init__(self, *rows: tuple[float, float], abstain_below: float = 0.0) -> None:
        self.rows = list(rows)
        self.abstain_below = abstain_below

    def check(self, model: Any, library: Any) -> None:
        pass

    def weights_of(self, names: Sequence[str]) -> dict[str, float]:
        return dict.fromkeys(names, 2.0 / len(names)) if names else {}

    def decide(self, model: Any, asked: Asked) -> list[Decision]:
        scores = dict(zip(self.experts, self.rows.pop(0), strict=True))
        sure = float(torch.tensor([max(one, 1 - one) for one in scores.values()]).prod())
        speak = [name for name, one in scores.items() if one >= 0.5 and sure >= self.abstain_below]
        return [Decision(self.weights_of(speak), sure, "said", scores)]


ASKED = Asked(None, torch.zeros(1, 1), torch.ones(1, 1))


def test_hysteresis_keeps_who_speaks_where_it_is_close(talking: SpectralModel) -> None:
    rows = [(0.9, 0.1), (0.45, 0.55), (0.35, 0.55), (0.2, 0.61)]
    chosen = [["ask"], ["ask"], [], ["doubt"]]
    talk = Conversation(talking, library(talking, True), Scores(*rows), max_new_tokens=4)
    assert [sorted(talk.say(text).decision.chosen) for text in SAID] == chosen
    assert "as in the turn before: ask, doubt" in talk.turns[1].decision.because


def test_hysteresis_asks_how_loudly_those_speak_who_are_left(model: SpectralModel) -> None:
    for rows, weights in (
        (((0.9, 0.1), (0.9, 0.55)), {"ask": 2.0}),
        (((0.9, 0.9), (0.9, 0.45)), {"ask": 1.0, "doubt": 1.0}),
        (((0.9, 0.9), (0.9, 0.1)), {"ask": 2.0}),
    ):
        scores = Scores(*rows)
        (before,) = scores.decide(model, ASKED)
        (found,) = Sticky(scores, before.weights, 0.1).decide(model, ASKED)
        assert found.weights == weights


def test_hysteresis_lets_nobody_speak_where_the_dispatcher_is_too_unsure(model: SpectralModel) -> None:
    before = {"doubt": 1.0}
    for row, threshold, chosen in (
        ((0.9, 0.45), 0.55, set()),  # 0.495: ask is the likelier one, and silent
        ((0.1, 0.45), 0.55, set()),
        ((0.9, 0.45), 0.45, {"ask", "doubt"}),
        ((0.1, 0.45), 0.45, {"doubt"}),
    ):
        (found,) = Sticky(Scores(row, abstain_below=threshold), before, 0.1).decide(model, ASKED)
        assert found.chosen == chosen


def test_hysteresis_counts_from_turns_of_the_same_dispatcher(model: SpectralModel) -> None:
    scores = Scores((0.1, 0.1), (0.45, 0.1), (0.55, 0.1), (0.45, 0.1))
    talk = Conversation(model, library(model, True), scores, max_new_tokens=1)
    talk.say("a")
    talk.mix({"ask": -1.0})
    talk.say("b")
    talk.dispatcher = scores
    assert [sorted(talk.say(one).decision.weights) for one in "cde"] == [[], [], []]
    talk.dispatcher = Scores((0.55, 0.1))
    assert talk.say("f").decision.weights == {"ask": 2.0}


def test_hysteresis_goes_on_in_turns_and_in_a_saved_conversation(tmp_path: Path) -> None:
    hf = tiny("llama", max_position_embeddings=512)
    talking = SpectralModel.attach(hf, byte_tokenizer(), k=8, progress=False)
    experts, file = library(talking, True), tmp_path / "talk.json"
    rows = [(0.9, 0.9), (0.45, 0.45), (0.45, 0.45)]
    for in_turn, by_hand in (((), False), (("ask", "doubt"), False), (("ask", "doubt"), True)):
        how: dict[str, Any] = {"max_new_tokens": 1, "in_turn": in_turn}
        talk = Conversation(talking, experts, Scores(*rows), **how)
        chosen = [talk.say(text).decision.chosen for text in SAID[:2]]
        assert chosen == [{"ask", "doubt"}] * 2
        if by_hand:
            scores = talk.dispatcher
            talk.mix({"ask": 1.0})
            assert talk.say("by hand").dispatched is None
            talk.dispatcher = scores
        talk.save(file)
        other = Conversation(talking, experts, Scores(*rows[2:]), **how)
        other.resume(file)
        assert other.say(SAID[2]).decision == talk.say(SAID[2]).decision
        assert bool(talk.turns[-1].decision.chosen) != by_hand


def test_hysteresis_goes_by_what_was_decided_and_not_by_what_was_written(
    model: SpectralModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "svdexpert.dialogue.text_of", lambda *_: '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    )
    experts, how = library(model, True), {"max_new_tokens": 1, "in_turn": ("ask", "doubt")}
    talk = Conversation(model, experts, Scores((0.9, 0.9)), **how)  # type: ignore[arg-type]
    assert talk.say("a").decision.chosen == {"ask"}
    talk.save(tmp_path / "talk.json")
    row = json.loads((tmp_path / "talk.json").read_text())
    other = Conversation(model, experts, Scores((0.1, 0.45)))
    other.resume(tmp_path / "talk.json")
    monkeypatch.undo()
    assert other._dispatcher().decide(model, ASKED)[0].weights == {"doubt": 2.0}  # type: ignore[attr-defined]
    del row["turns"][0]["dispatched"]  # as 0.1.0 wrote it
    (tmp_path / "talk.json").write_text(json.dumps(row))
    old = Conversation(model, experts, Scores((0.1, 0.45)))
    old.resume(tmp_path / "talk.json")
    assert old._dispatcher() is old.dispatcher


class Interrupting(list[Any]):
    """Is interrupted as soon as something stands in it."""

    def append(self, one: Any) -> None:
        super().append(one)
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["messages", "turns"])
def test_an_interrupt_takes_back_all_of_a_turn(model: SpectralModel, where: str) -> None:
    talk = Conversation(model, max_new_tokens=1)
    setattr(talk, where, Interrupting())
    with pytest.raises(KeyboardInterrupt):
        talk.say("a")
    assert not talk.messages
    assert not talk.turns


def test_a_call_with_no_number_in_it_is_found_again(model: SpectralModel, tmp_path: Path) -> None:
    talk = Conversation(model, max_new_tokens=1)
    talk.say("a")
    called = {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"n": float("nan")}}]}
    talk.messages[-1:], talk.turns[-1] = [called], replace(talk.turns[-1], reply=called)
    talk.save(tmp_path / "talk.json")
    messages, turns = read_saved(tmp_path / "talk.json")
    assert turns[0].reply is messages[-1]


def test_hysteresis_is_for_dispatchers_whose_boundary_is_one_half(model: SpectralModel) -> None:
    table = torch.tensor([[0.30, 0.46, 0.24]]).log()  # the likeliest label speaks, at less than one half
    (likeliest,) = labelled(("ask", "doubt"), table, "labels")

    class Labels(Chosen):
        def decide(self, model: Any, asked: Asked) -> list[Decision]:
            return [likeliest]

    talk = Conversation(model, library(model, True), Labels(), max_new_tokens=1)
    assert [talk.say(one).decision.weights for one in "ab"] == [{"doubt": 1.0}] * 2
    made_for = {"experts": {"ask": ""}}
    assert isinstance(Router(torch.zeros(1, 2), torch.zeros(1), 0.0, made_for), ByHalves)
    assert not isinstance(Prompt({"ask": ""}, "none", made_for, torch.zeros(2)), ByHalves)


class Chosen:
    """Lets the same experts speak in every turn."""

    reads = False
    experts: tuple[str, ...] = ("ask", "doubt", "call")

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
        prompts: list[int] = []
        for mixture in ({"doubt": 0.7, "call": 0.3}, {"ask": 2.0}):
            alone = Conversation(talking, experts, Fixed(mixture), **how)
            alone.messages += [*before, user(SAID[turn]), *([assistant(parts[0])] if parts else [])]
            parts.append(alone.say(NOD).text if parts else alone.reply_to().text)
            prompts += [alone.turns[-1].read + alone.turns[-1].kept]
        assert found.parts == tuple(parts)
        assert found.text == " ".join(parts) == talk.messages[-1]["content"]
        assert found.read + found.kept == sum(prompts)
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


def test_a_dispatcher_that_names_nobody_is_asked(model: SpectralModel) -> None:
    class Nameless(Chosen):
        experts = ()

    talk = Conversation(model, library(model, True), Nameless(ask=1.0), max_new_tokens=4)
    talk.say("hi")
    assert talk.turns[0].text == fresh(model, talk, {"ask": 1.0}, 0, tokens=4)
    assert talk.turns[0].decision.weights == {"ask": 1.0}


def test_a_call_ends_a_reply_of_several(talking: SpectralModel, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = library(talking, True)
    talk = Conversation(talking, experts, Chosen(ask=1.0, doubt=1.0), in_turn=("ask", "doubt"), max_new_tokens=4)
    called = '<tool_call>{"name": "book", "arguments": {}}</tool_call>'
    monkeypatch.setattr("svdexpert.dialogue.text_of", lambda *_: called)
    turn = talk.say("hello")
    assert turn.parts == (called,)
    assert turn.decision.weights == {"ask": 2.0}  # who spoke, not who would have
    assert turn.decision.because.endswith("without doubt: a call ends a reply")
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


@pytest.mark.parametrize("activated", [True, False])
def test_a_part_that_would_not_see_the_user_is_not_written(model: SpectralModel, activated: bool) -> None:
    experts = library(model, activated)
    talk = Conversation(model, experts, Chosen(ask=1.0, doubt=1.0), in_turn=("ask", "doubt"), max_new_tokens=4)
    talk.say("hi")
    assert len(talk.turns[0].parts) == 2
    turn = talk.say("x" * 48)  # 64 tokens are the context
    alone = Conversation(model, experts, max_new_tokens=4)
    alone.mix({"ask": 2.0})
    assert turn.text == alone.say("x" * 48).text == turn.parts[0]
    assert turn.decision.weights == {"ask": 2.0}
    assert turn.decision.because.endswith("without doubt: the context has no room for another part")
    assert turn.dropped == 1


class Listening(Chosen):
    """Notes what it is asked."""

    def __init__(self, **weights: float) -> None:
        super().__init__(**weights)
        self.asked: list[Asked] = []

    def decide(self, model: Any, asked: Asked) -> list[Decision]:
        self.asked.append(asked)
        return super().decide(model, asked)


@pytest.mark.parametrize("activated", [True, False])
def test_what_no_longer_fits_is_counted_and_who_decides_does_not_see_it_either(
    model: SpectralModel, activated: bool
) -> None:
    listening = Listening(ask=1.0)
    talk = Conversation(model, library(model, activated), listening, max_new_tokens=8, instructions="hm")
    for text in ("abcdefgh", "ijklmnop", "qrstuvwx", "yz"):
        turn = talk.say(text)
        asked = listening.asked[-1]
        assert asked.contexts is not None
        users = [one for one in asked.contexts[0].messages if one["role"] == "user"]
        assert users == [one for one in talk.messages if one["role"] == "user"][turn.dropped :]
        assert asked.ids.shape[1] == turn.read + turn.kept <= 64 - 8
        assert asked.contexts[0].messages[0]["role"] == "system"
    assert [one.dropped for one in talk.turns][:2] == [0, 0]
    assert talk.turns[-1].dropped > 0


@pytest.mark.parametrize(
    ("activated", "reach", "policy"), [(True, 0, "refill"), (True, 3, "reuse"), (False, 0, "refill")]
)
def test_numbers_that_overflow_leave_nothing_behind(activated: bool, reach: int, policy: Policy) -> None:
    hf = tiny("llama", num_hidden_layers=4)  # deep enough that NaN reaches what is read before the reply
    model = SpectralModel.attach(hf, byte_tokenizer(), k=8, progress=False)
    talk = Conversation(model, library(model, activated, reach), max_new_tokens=4, policy=policy)
    for weight in (1e38, -1e30):
        talk.mix({"ask": weight})
        for _ in range(2):
            before = list(talk.messages)
            with pytest.raises(MixtureError, match="not finite under this mixture"):
                talk.say("hi")
            assert talk.messages == before
        talk.mix({})
        talk.say("no")
        assert talk.turns[-1].text == fresh(model, talk, {}, len(talk.turns) - 1, tokens=4)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"ask": float("nan")}, "The weight of 'ask' is nan"),
        ({"ask": 1.0, "doubt": float("inf")}, "The weight of 'doubt' is inf"),
        ({"ask": 10**400}, "expected a finite number"),
        ({"ask": 1e39}, "expected a finite number"),  # in fp32
        ({"ask": "loud"}, "The weight of 'ask' is 'loud'"),
        ({"ask": None}, "The weight of 'ask' is None"),
        ({"asks": 1.0}, r"^There is no expert 'asks' here\. Did you mean 'ask'\?$"),
        ({"nobody": 1.0}, r"^There is no expert 'nobody' here\. There are: ask, call, doubt\.$"),
    ],
)
def test_what_cannot_be_mixed_leaves_what_held(model: SpectralModel, weights: Any, complaint: str) -> None:
    talk = Conversation(model, library(model, True), max_new_tokens=1)
    talk.mix({"ask": 1})
    with pytest.raises(DispatchError, match=complaint):
        talk.mix(weights)
    assert talk.dispatcher == Fixed({"ask": 1.0}, "given by hand")


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (user(""), "nothing to reply to"),
        (user(" \n"), "nothing to reply to"),
        ({"role": "user", "content": None}, "nothing to reply to"),
        ({"role": "tool", "name": "f", "content": "\udcff"}, "is no text"),
        (user("half of \ud83d"), "is no text"),
        ({"content": "hello"}, "is no message"),
        ("hello", "is no message"),
        ({"role": "tool", "content": {1, 2}}, "what JSON has not"),
        ({"role": "system", "content": "be kind"}, "conversation is empty"),
    ],
)
def test_what_nobody_can_reply_to_is_refused(model: SpectralModel, message: Any, complaint: str) -> None:
    talk = Conversation(model, max_new_tokens=1)
    with pytest.raises(DispatchError, match=complaint):
        talk.reply_to(message)
    with pytest.raises(DispatchError, match="A user says a text, and this is 5"):
        talk.say(5)  # type: ignore[arg-type]
    with pytest.raises(DispatchError, match="conversation is empty"):
        talk.reply_to()
    assert not talk.messages
    assert not talk.turns


def test_a_saved_conversation_goes_on_as_it_would_have(tmp_path: Path) -> None:
    hf = tiny("llama", max_position_embeddings=512)
    talking = SpectralModel.attach(hf, byte_tokenizer(), k=8, progress=False)
    experts, file = library(talking, True), tmp_path / "talk.json"
    how: dict[str, Any] = {"max_new_tokens": 10, "instructions": "be kind", "in_turn": ("doubt", "ask")}
    talk = Conversation(talking, experts, Chosen(ask=1.0, doubt=0.7), **how)
    talk.say(SAID[0])
    talk.mix({"ask": 1.0})
    talk.say(SAID[1])
    talk.save(file)
    other = Conversation(talking, experts, **how)
    other.resume(file)
    assert other.messages == talk.messages
    assert other.turns == talk.turns
    assert other.base_reply() == talk.base_reply()
    for one in (talk, other):
        one.mix({"doubt": 1.0})
    assert other.say(SAID[2]).text == talk.say(SAID[2]).text
    other.save(file)
    assert read_saved(file) == (other.messages, other.turns)
    with pytest.raises(DispatchError, match="has begun"):
        other.resume(file)
    with pytest.raises(DispatchError, match="has the instructions 'be kind'"):
        Conversation(talking, instructions="be brief").resume(file)
    bare = Conversation(talking)
    bare.resume(file)
    assert bare.messages[0]["content"] == "be kind"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"messages": 1, "turns": []}',
        '{"messages": ["hello"], "turns": []}',
        '{"messages": [{"role": "user", "content": "\\ud83d"}], "turns": []}',
        '{"messages": [], "turns": [{}]}',
        '{"messages": [], "turns": [{"reply": {}, "text": "", "read": 1, "kept": 0, "parts": [], "decision": '
        '{"weights": {}, "scores": {}, "alone": {}, "confidence": 1, "because": ""}}]}',
        "[" * 100_000,
        *(
            '{"messages": [{"role": "assistant", "content": ""}], "turns": [{"reply": {"role": "assistant", '
            f'"content": ""}}, "text": "", "read": {read}, "kept": 0, "parts": [], "decision": {{"weights": '
            f'{{"ask": {weight}}}, "scores": {{}}, "alone": {{}}, "confidence": {sure}, "because": ""}}}}]}}'
            for read, weight, sure in (
                ("Infinity", 1, 1),
                ("NaN", 1, 1),
                (1, 10**400, 1),
                (1, 1, 10**400),
            )
        ),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(text: str, model: SpectralModel, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(text)
    for path in (file, tmp_path, tmp_path / "nowhere"):
        talk = Conversation(model)
        with pytest.raises(DispatchError, match=f"{path} is no saved conversation"):
            talk.resume(path)
        assert not talk.messages


def test_a_text_that_cannot_be_written_is_said_and_the_file_stays(model: SpectralModel, tmp_path: Path) -> None:
    talk = Conversation(model)
    talk.save(tmp_path / "talk.json")
    before = (tmp_path / "talk.json").read_bytes()
    talk.messages.append(assistant("\ud83d"))
    with pytest.raises(DispatchError, match="is no text"):
        talk.save(tmp_path / "talk.json")
    assert (tmp_path / "talk.json").read_bytes() == before


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

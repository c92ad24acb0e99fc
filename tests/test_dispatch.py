"""Dispatchers: one pass equals two, rows do not matter to one another, abstaining is the base, files fit their base."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, byte_tokenizer, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdexpert import DispatchError, Expert, MixtureError, Recipe, SpectralModel, skills, worlds
from svdexpert.conversation import continuation, invocation_of, tokenizer_of, turn_ends
from svdexpert.decision import Asked, Context, Decision
from svdexpert.dispatch import (
    NOBODY,
    Example,
    check_wanted,
    chooser,
    decide,
    fit,
    label_scores,
    load,
    open_file,
    question,
    quoted,
    read,
    read_examples,
    save_dispatcher,
    typed_settings,
    with_validation,
)
from svdexpert.dispatch import router as router_module
from svdexpert.dispatch.classify import Classify
from svdexpert.dispatch.fewshot import loss_of, search
from svdexpert.dispatch.fixed import Fixed
from svdexpert.dispatch.prompt import Prompt as Labels
from svdexpert.dispatch.router import Router, abstention, calibration_error, guessed_pairs, kinds_of_pairs, regressions
from svdexpert.errors import SvdExpertError, TooLongError
from svdexpert.evaluate import measure
from svdexpert.worlds import user

Attach = Callable[..., SpectralModel]
CHATS = [[{"role": "user", "content": text}] for text in ("hello there", "no", "what is it? tell me", "book")]
OPENS = (97 - 29, 58 - 29, 32 - 29)  # "a: " of the tests' chat template


@dataclass
class Halves:
    """Lets experts speak by whether sums of the state are odd: depends on the row alone."""

    experts: tuple[str, ...]
    reads: bool = True

    def check(self, model: Any, library: Any) -> None:
        pass

    def decide(self, model: Any, asked: Asked) -> list[Decision]:
        assert asked.state is not None
        parts = [part.sum(-1) for part in asked.state.chunk(len(self.experts), -1)]
        return [
            Decision(
                {name: float(part[row].mul(3).floor() % 2) for name, part in zip(self.experts, parts, strict=True)},
                1.0,
                "sums",
            )
            for row in range(len(asked.ids))
        ]


class Silent(Halves):
    """Takes no decision."""

    def decide(self, model: Any, asked: Asked) -> list[Decision]:
        return []


def library(model: SpectralModel, activated: bool = True, reach: int = 0) -> dict[str, Expert]:
    opens = OPENS if activated else ()
    return {
        name: replace(Expert.random(model.basis, std=0.3, seed=seed), invocation=opens, reach=reach)
        for seed, name in enumerate(("ask", "doubt", "call"))
    }


def replies(model: SpectralModel, chats: Sequence[Any], **how: Any) -> tuple[list[str], list[Decision]]:
    decisions: list[Decision] = []
    found = model.generate(chats, max_new_tokens=8, on_decision=decisions.extend, **how)
    assert isinstance(found, list)
    return found, decisions


# --- one pass


@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_deciding_in_the_prefill_is_deciding_first(name: str, activated: bool, attached: Attach) -> None:
    model = attached(name)
    experts = library(model, activated)
    dispatcher = Halves(tuple(experts))
    contexts = [Context(tuple(chat)) for chat in CHATS]
    first = decide(dispatcher, model, contexts, experts)
    assert len({tuple(one.weights.items()) for one in first}) > 1
    weights = [dict(one.weights) for one in first]
    for how in ({}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}):
        found, decisions = replies(model, CHATS, dispatcher=dispatcher, library=experts, **how)
        assert [one.weights for one in decisions] == [one.weights for one in first]
        assert found == model.generate(CHATS, weights, library=experts, max_new_tokens=8, **how)


@pytest.mark.parametrize(("activated", "reach"), [(True, 0), (True, 3), (False, 0)])
def test_the_scores_of_one_pass_are_those_of_two(activated: bool, reach: int, attached: Attach) -> None:
    model = attached()
    experts = library(model, activated, reach)
    dispatcher = Halves(tuple(experts))
    kept: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}
    routed = model.generate(CHATS, dispatcher=dispatcher, library=experts, **kept)
    contexts = [Context(tuple(chat)) for chat in CHATS]
    weights = [dict(one.weights) for one in decide(dispatcher, model, contexts, experts)]
    given = model.generate(CHATS, weights, library=experts, **kept)
    torch.testing.assert_close(torch.stack(routed.logits), torch.stack(given.logits), atol=1e-5, rtol=1e-5)


def test_rows_do_not_influence_each_other(model: SpectralModel) -> None:
    experts = library(model)
    dispatcher = Halves(tuple(experts))
    together, decisions = replies(model, CHATS, dispatcher=dispatcher, library=experts)
    for row, chat in enumerate(CHATS):
        alone, its = replies(model, [chat], dispatcher=dispatcher, library=experts)
        assert alone == [together[row]]
        assert its[0].weights == decisions[row].weights


@pytest.mark.parametrize(("activated", "reach"), [(True, 0), (True, 3), (False, 0)])
def test_abstaining_is_the_base_bit_for_bit(activated: bool, reach: int, attached: Attach) -> None:
    model = attached()
    experts = library(model, activated, reach)

    class First(Halves):
        """Lets an expert speak in the first row alone, or in none."""

        speaks = True

        def decide(self, model: Any, asked: Asked) -> list[Decision]:
            rows = [Decision({"ask": 1.0}, 1.0, "") if self.speaks else Decision({}, 1.0, "")]
            return rows + [Decision({}, 1.0, "") for _ in asked.ids[1:]]

    dispatcher = First(tuple(experts))
    kept: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}
    base = model.generate(CHATS, **kept)
    routed = model.generate(CHATS, dispatcher=dispatcher, library=experts, **kept)
    assert not torch.equal(torch.stack(routed.logits)[:, 0], torch.stack(base.logits)[:, 0])
    if activated:  # else the prompt is read again, in a batch that holds other numbers
        assert torch.equal(torch.stack(routed.logits)[:, 1:], torch.stack(base.logits)[:, 1:])
    dispatcher.speaks = False
    nobody = model.generate(CHATS, dispatcher=dispatcher, library=experts, **kept)
    assert torch.equal(torch.stack(nobody.logits), torch.stack(base.logits))


def test_the_model_is_the_base_again_afterwards(model: SpectralModel) -> None:
    experts = library(model)
    before = model.logits(CHATS)
    replies(model, CHATS, dispatcher=Halves(tuple(experts)), library=experts)
    assert torch.equal(model.logits(CHATS), before)


def test_a_decision_is_for_one_call(model: SpectralModel) -> None:
    class Fails(Halves):
        def decide(self, model: Any, asked: Asked) -> list[Decision]:
            raise DispatchError("no")

    experts = library(model)
    with pytest.raises(DispatchError, match="no"):
        replies(model, CHATS, dispatcher=Fails(tuple(experts)), library=experts)
    assert model.generate(CHATS, max_new_tokens=4) == model.generate(CHATS, None, max_new_tokens=4)


# --- the router


CUES = {"ask": "book", "doubt": "moon", "call": "taxi"}


def examples(n: int, seed: int = 0) -> list[Example]:
    """Return contexts that hold the cue of an expert, or none."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        noise = "".join("efghij "[int(one)] for one in torch.randint(7, (4,), generator=draw))
        for name, cue in (*CUES.items(), ("", "    ")):
            message = {"role": "user", "content": noise + cue}
            found.append(Example(Context((message,)), frozenset([name]) if name else frozenset()))
    return found


@pytest.fixture
def router(model: SpectralModel) -> Router:
    found = fit("router", model, library(model), examples(60), examples(20, seed=1))
    assert isinstance(found, Router)
    return found


def test_a_router_learns_whom_a_context_wants(model: SpectralModel, router: Router) -> None:
    rows = examples(10, seed=2)
    found = decide(router, model, [one.context for one in rows], library(model))
    assert sum(one.chosen == row.wanted for one, row in zip(found, rows, strict=True)) / len(rows) > 0.8  # chance: 0.25
    assert router.scores["accuracy"] > 0.8
    assert all(0 <= score <= 1 for one in found for score in one.scores.values())
    json.dumps([one.as_json() for one in found])


def test_a_file_holds_the_router(model: SpectralModel, router: Router, tmp_path: Path) -> None:
    again = open_file(save_dispatcher(router, tmp_path / "router.safetensors"))
    contexts = [one.context for one in examples(2, seed=3)]
    assert decide(again, model, contexts, library(model)) == decide(router, model, contexts, library(model))


def test_a_router_is_refused_on_another_base_and_with_other_experts(
    attached: Attach, model: SpectralModel, router: Router
) -> None:
    other = attached("qwen2")
    contexts = [examples(1)[0].context]
    with pytest.raises(DispatchError, match="another version"):
        decide(router, model, contexts, library(model) | {"ask": library(model)["call"]})
    with pytest.raises(DispatchError, match="does not hold"):
        decide(router, model, contexts, {"ask": library(model)["ask"]})
    with pytest.raises(DispatchError, match="fitted on"):
        decide(router, other, contexts, library(other))
    with pytest.raises(DispatchError, match="no experts"):
        decide(router, model, contexts, {})
    with pytest.raises(DispatchError, match="is empty"):
        decide(router, model, [Context(())], library(model))
    assert model.generate(CHATS, max_new_tokens=2)


def test_an_expert_that_speaks_alone_speaks_up(model: SpectralModel, tmp_path: Path) -> None:
    experts = library(model)
    rows = [replace(one, reply="ab") if one.wanted == {"ask"} else one for one in examples(20)]
    found = fit("router", model, experts, rows, rows, pairs=0.0)
    assert isinstance(found, Router)
    assert found.strengths["ask"] in router_module.STRENGTHS
    assert (found.strengths["doubt"], found.strengths["call"]) == (1.0, 1.0)  # nobody shows what they would say
    loud = fit("router", model, experts, rows, rows, strength=2.0)
    assert isinstance(loud, Router)
    weights = [loud._decision(dict.fromkeys(some, 0.9)).weights for some in (["ask"], ["ask", "call"], [*experts])]
    assert weights == [{"ask": 2.0}, {"ask": 1.0, "call": 1.0}, dict.fromkeys(experts, 1.0)]
    kept = open_file(save_dispatcher(loud, tmp_path / "router.safetensors"))
    assert isinstance(kept, Router)
    assert kept.strengths == dict.fromkeys(experts, 2.0)
    for strength in (0.4, math.nan):
        with pytest.raises(DispatchError, match=r"expected a number of at least 0\.5"):
            fit("router", model, experts, rows, rows, strength=strength)


def test_pairs_that_exclude_one_another_are_not_guessed() -> None:
    control = Example(Context(()), frozenset(["call"]), "ask")
    names = ("ask", "doubt", "call")
    both = kinds_of_pairs([control, Example(Context(()), frozenset(["ask"]), "ask")], names)
    assert both == [(0, 1), (1, 2)]
    assert kinds_of_pairs([control], names, [["call", "ask"]]) == [(2, 0)]
    with pytest.raises(DispatchError, match=r"together holds \['ask', 'drum'\]; expected two of ask, doubt, call"):
        kinds_of_pairs([control], names, [["ask", "drum"]])
    states, wanted = torch.eye(6, dtype=torch.float64), torch.eye(3, dtype=torch.float64).repeat(2, 1)
    rows, labels = guessed_pairs(states, wanted, both, 2.0, 0)
    assert len(rows) == 16  # two pairs, each of two and two
    assert {tuple(one) for one in labels.tolist()} == {(1, 1, 0), (0, 1, 1)}
    shares = rows[rows > 0].view(16, 2)
    torch.testing.assert_close(shares.sum(-1), torch.ones(16, dtype=torch.float64))
    assert shares.min() >= 0.3


def test_the_parts_of_the_fit_on_hand_written_numbers() -> None:
    states = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    weight, bias = regressions(states, torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64), 0.1)
    # the derivative of log(1 + exp(-w)) + 0.1 w^2 is 0
    assert float(0.2 * weight - 1 / (1 + weight.exp())) == pytest.approx(0, abs=1e-4)
    assert float(bias) == pytest.approx(0, abs=1e-4)
    table = torch.tensor([[0.9], [0.6], [0.1]])
    assert abstention(table, torch.tensor([[1.0], [0.0], [0.0]])) == (pytest.approx(0.9), 1.0)
    assert calibration_error(table, torch.tensor([[1.0], [0.0], [0.0]])) == pytest.approx((0.1 + 0.6 + 0.1) / 3)


# --- strategies, and what is refused


@pytest.fixture
def long(attached: Attach) -> SpectralModel:
    """Return a model with room for questions about conversations."""
    hf = tiny("llama", max_position_embeddings=1024)
    return SpectralModel.attach(hf, byte_tokenizer(), k=8, progress=False)


def test_the_base_is_asked_in_a_prompt_of_its_own(long: SpectralModel, tmp_path: Path) -> None:
    experts = library(long)
    labels = {name: f"say {name}" for name in experts}
    dispatcher = fit("prompt", long, experts, examples(2), labels=labels)
    contexts = [one.context for one in examples(1)]
    found = decide(dispatcher, long, contexts, experts)
    end = str(tokenizer_of(long).decode([turn_ends(long)[0]]))  # else a label that another begins with is likelier
    texts = [question(quoted(one), {**labels, NOBODY: "anything else"}) for one in contexts]
    for text, decision in zip(texts, found, strict=True):
        assert "ask: say ask" in text["content"]
        alone = [float(long.logprobs([[text]], [name + end])[0].sum()) for name in (*experts, NOBODY)]
        empty = question(quoted(Context((user("..."),))), {**labels, NOBODY: "anything else"})
        prior = [float(long.logprobs([[empty]], [name + end])[0].sum()) for name in (*experts, NOBODY)]
        wanted = (torch.tensor(alone) - torch.tensor(prior)).softmax(-1)
        torch.testing.assert_close(torch.tensor(list(decision.scores.values())), wanted[:3], atol=1e-4, rtol=1e-4)
        best = int(wanted.argmax())
        assert decision.chosen == (frozenset([list(experts)[best]]) if best < 3 else frozenset())
    again = open_file(save_dispatcher(dispatcher, tmp_path / "prompt.safetensors"))
    assert decide(again, long, contexts, experts) == found
    with pytest.raises(DispatchError, match="give one for each"):
        fit("prompt", long, experts, examples(2), labels={"ask": "a"})
    with pytest.raises(DispatchError, match="pass chats"):
        long.generate(["hello"], dispatcher=dispatcher, library=experts)


def test_a_classification_expert_learns_the_labels(long: SpectralModel, tmp_path: Path) -> None:
    experts = library(long)
    how: dict[str, Any] = {"neutral": 0.0, "validation_cases": 0, "score_cases": 0, "reach": 2}
    recipe = Recipe(steps=60, learning_rate=0.1, batch_size=8, **how)
    rows = examples(12)
    dispatcher = fit("classify", long, experts, rows, rows[:4], recipe=recipe)
    contexts = [one.context for one in rows]
    found = decide(dispatcher, long, contexts, experts)
    asked = decide(fit("prompt", long, experts, rows), long, contexts, experts)
    right = [sum(one.chosen == row.wanted for one, row in zip(some, rows, strict=True)) for some in (found, asked)]
    assert right[0] > right[1]
    again = open_file(save_dispatcher(dispatcher, tmp_path / "classify.safetensors"))
    assert decide(again, long, contexts, experts) == found
    assert isinstance(again, Classify)
    assert (again.core, again.reach) == ("diag", 2)
    assert decide(replace(again, reach=0), long, contexts, experts) != found  # a label has more than two tokens


def shots(model: SpectralModel, weights: dict[str, float], experts: dict[str, Expert]) -> list[Example]:
    """Return what a mixture says."""
    contexts = [one.context for one in examples(2)]
    said = model.generate([list(one.messages) for one in contexts], weights, library=experts, max_new_tokens=12)
    return [Example(one, frozenset(), reply=text or "a") for one, text in zip(contexts, said, strict=True)]


def test_few_shot_search_finds_who_spoke(model: SpectralModel, tmp_path: Path) -> None:
    experts = library(model)
    rows = shots(model, {"doubt": 1.0}, experts)
    found = search(model, experts, rows, evaluations=40)
    assert int(found.weights.argmax()) == 1
    assert found.losses[-1] < found.losses[0]
    assert found.losses == sorted(found.losses, reverse=True)
    by_matrix = search(model, experts, rows, by_matrix=True, evaluations=40)
    assert by_matrix.weights.shape == (len(model.basis.names), 3)
    published = search(model, experts, rows, method="cross-entropy", evaluations=96)
    assert len(published.losses) == 96
    assert published.losses[-1] < published.losses[0]
    ended = search(model, experts, rows, method="cross-entropy", evaluations=96, until=published.losses[40])
    assert len(ended.losses) <= 41
    dispatcher = fit("fewshot", model, experts, rows, rows[:1], evaluations=40)
    assert dispatcher == open_file(save_dispatcher(dispatcher, tmp_path / "shots.safetensors"))
    spoken, decisions = replies(model, CHATS, dispatcher=dispatcher, library=experts)
    assert spoken == model.generate(CHATS, decisions[0].weights, library=experts, max_new_tokens=8)
    table = dict(zip(experts, found.weights.tolist(), strict=True))
    together = model.bank(experts).mix(table).offsets
    torch.testing.assert_close(found.expert.flat(model.basis), together, atol=1e-6, rtol=1e-5)


def test_the_loss_of_shots_is_that_of_the_model(model: SpectralModel) -> None:
    experts = library(model)
    rows = shots(model, {"call": 1.0}, experts)[:3]
    bank = model.bank(experts)
    found = float(loss_of(model, bank, rows)(bank.offsets[0]))
    parts = []
    for one in rows:
        ends = torch.tensor([*continuation(model.tokenizer, one.reply), 2])
        chosen = model.logprobs([list(one.context.messages)], [ends], "ask", library=experts)[0]
        parts.append(-float(chosen.mean()))
    assert found == pytest.approx(sum(parts) / 3, abs=1e-4)


def test_few_shots_are_the_examples_that_have_a_reply(model: SpectralModel) -> None:
    experts = library(model)
    some = shots(model, {"call": 1.0}, experts)[:4]
    assert fit("fewshot", model, experts, [*some, *examples(1)]) == fit("fewshot", model, experts, some, some)


def test_a_label_may_begin_like_another(long: SpectralModel) -> None:
    scores = label_scores(long, [Context((user("hello"),))], {"as": "this", "ask": "that"})[0]
    assert scores[0] != scores[1]
    ends = [[*continuation(tokenizer_of(long), one), turn_ends(long)[0]] for one in ("as", "ask")]
    asked = [question("user: hello", {"as": "this", "ask": "that"})]
    alone = [float(long.logprobs([asked], [torch.tensor(one)])[0].sum()) for one in ends]
    torch.testing.assert_close(scores, torch.tensor(alone), atol=1e-4, rtol=1e-4)


def test_a_conversation_that_fits_alone_is_asked_about_by_its_end(long: SpectralModel) -> None:
    experts = library(long)
    dispatcher = fit("prompt", long, experts, examples(2))
    room = long.hf.config.max_position_embeddings - 8
    talk = Context((user("x" * (room - 60) + " and then?"),))
    (found,) = decide(dispatcher, long, [talk], experts)
    assert set(found.scores) == set(experts)


def test_rows_of_a_file_may_hold_any_separator(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    text = json.dumps({"messages": [{"role": "user", "content": "a\u2028b"}], "experts": []}, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    assert read_examples(path)[0].context.messages[0]["content"] == "a\u2028b"
    path.write_bytes(b"\xff\n")
    with pytest.raises(DispatchError, match=r"own\.jsonl:1: no JSON in UTF-8"):
        read_examples(path)


def test_a_router_needs_something_to_choose_settings_on(model: SpectralModel) -> None:
    with pytest.raises(DispatchError, match="none to choose settings on"):
        some = {one.wanted: one for one in examples(4) if one.wanted <= {"ask"}}  # one of each kind
        fit("router", model, {"ask": library(model)["ask"]}, list(some.values()))


def test_what_few_shot_search_refuses(model: SpectralModel) -> None:
    experts = library(model)
    with pytest.raises(DispatchError, match="0 of 4 have one"):
        search(model, experts, examples(1))
    with pytest.raises(DispatchError, match="0 of 0 have one"):
        search(model, experts, [])
    with pytest.raises(DispatchError, match="method is 'cma'"):
        search(model, experts, shots(model, {}, experts), method="cma")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "weights"),
    [("none", 0.0), ("uniform", 1 / 3), ("sum", 1.0)],
)
def test_fixed_rules(rule: str, weights: float, model: SpectralModel) -> None:
    experts = library(model)
    dispatcher = fit("fixed", model, experts, examples(2), rule=rule)
    found, decisions = replies(model, CHATS, dispatcher=dispatcher, library=experts)
    assert decisions[0].weights == dict.fromkeys(experts, weights)
    assert decisions[0].abstained == (rule == "none")
    assert found == model.generate(CHATS, dict.fromkeys(experts, weights), library=experts, max_new_tokens=8)


def test_the_best_single_expert(model: SpectralModel, tmp_path: Path) -> None:
    rows = [one for one in examples(3) if one.wanted != {"ask"}] + [one for one in examples(2) if "call" in one.wanted]
    dispatcher = fit("fixed", model, library(model), rows, rule="best")
    assert dispatcher == open_file(save_dispatcher(dispatcher, tmp_path / "best.safetensors"))
    assert dispatcher.experts == ("call",)


def test_what_generate_refuses(model: SpectralModel) -> None:
    experts = library(model)
    halves = Halves(tuple(experts))
    with pytest.raises(MixtureError, match="Give experts or a dispatcher"):
        model.generate(CHATS, "ask", dispatcher=halves, library=experts)
    with pytest.raises(DispatchError, match="needs library"):
        model.generate(CHATS, dispatcher=halves)
    with pytest.raises(DispatchError, match="prefill_chunk_size"):
        model.generate(CHATS, dispatcher=halves, library=experts, prefill_chunk_size=2)
    with pytest.raises(DispatchError, match="assisted"):
        model.generate(CHATS[:1], dispatcher=halves, library=experts, prompt_lookup_num_tokens=2)
    with pytest.raises(DispatchError, match="holds no experts"):
        model.generate(CHATS, dispatcher=Fixed({"ask": 1.0}), library={})

    class Wrong(Halves):
        reads = False
        said: Sequence[Decision] = ()

        def decide(self, model: Any, asked: Asked) -> list[Decision]:
            return list(self.said)

    wrong = Wrong(tuple(experts))
    with pytest.raises(DispatchError, match="0 decisions for 4 prompts"):
        model.generate(CHATS, dispatcher=wrong, library=experts)
    wrong.said = [Decision({"ask": float("nan")}, 1.0, "")] * 4
    with pytest.raises(DispatchError, match="finite"):
        model.generate(CHATS, dispatcher=wrong, library=experts)
    wrong.said = [Decision({"asks": 1.0}, 1.0, "")] * 4
    with pytest.raises(DispatchError, match="Did you mean 'ask'"):
        model.generate(CHATS, dispatcher=wrong, library=experts)
    assert model.generate(CHATS, max_new_tokens=2)


def test_examples_longer_than_the_model_are_left_out_and_counted(model: SpectralModel) -> None:
    long = Example(Context(({"role": "user", "content": "so " * 4000},)), frozenset())
    rows, how = examples(20), {"strength": 1.0}
    with pytest.warns(UserWarning, match=rf"2 of {2 * len(rows) + 2} examples were left out: their last turn"):
        found = fit("router", model, library(model), [*rows, long], [long, *rows], **how)
    without = fit("router", model, library(model), rows, rows, **how)
    assert isinstance(found, Router)
    assert isinstance(without, Router)
    assert torch.equal(found.weight, without.weight)
    assert found.scores == without.scores


def test_what_fit_refuses(model: SpectralModel) -> None:
    experts = library(model)
    with pytest.raises(DispatchError, match=r"no strategy 'ruoter'\. Did you mean 'router'"):
        fit("ruoter", model, experts, examples(3))
    with pytest.raises(DispatchError, match="holds no experts"):
        fit("router", model, {}, examples(3))
    with pytest.raises(DispatchError, match="2 examples for 3 experts"):
        fit("router", model, experts, examples(1)[:2])
    with pytest.raises(DispatchError, match="wants 'taxi', which the library lacks"):
        fit("router", model, experts, [*examples(2), Example(Context(CHATS[0]), frozenset(["taxi"]))])  # type: ignore[arg-type]
    with pytest.raises(DispatchError, match="No example wants 'call'"):
        fit("router", model, experts, [one for one in examples(4) if "call" not in one.wanted])
    with pytest.raises(DispatchError, match=r"'depth' is not accepted\. Its settings: pairs, together"):
        fit("router", model, experts, examples(4), depth=3)
    with pytest.raises(DispatchError, match="Example 2 wants 'doubt'"):
        ask, doubt = (next(one for one in examples(2) if one.wanted == {name}) for name in ("ask", "doubt"))
        check_wanted([ask, doubt], {"ask": experts["ask"]})
    with pytest.raises(DispatchError, match="lacks fit"):
        load("svdexpert.mixture")


@pytest.mark.parametrize(
    ("strategy", "settings", "complaint"),
    [
        ("router", {"pairs": "abc"}, '"pairs": Expected a .*float'),
        ("router", {"pairs": -1}, "expected at least 0"),
        ("router", {"batch_size": 0}, "at least 1"),
        ("router", {"together": 5}, "Sequence"),
        ("router", {"seed": "x"}, "Expected a .*int"),
        ("router", {"strength": "loud"}, "float"),
        ("router", {"validation": 3}, "'validation' is not accepted"),
        ("fewshot", {"evaluations": 0}, "evaluations is 0"),
        ("fewshot", {"rate": -1.0}, r"rate -1\.0"),
        ("fewshot", {"evaluations": "ten"}, "Expected a .*int"),
        ("fewshot", {"method": "luck"}, "cross-entropy"),
        ("prompt", {"labels": True}, "Mapping"),
        ("classify", {"recipe": {"stops": 2}}, "stops"),
    ],
)
def test_settings_out_of_range(strategy: str, settings: dict[str, Any], complaint: str, model: SpectralModel) -> None:
    rows = [replace(one, reply="a") for one in examples(2)]
    with pytest.raises(DispatchError, match=complaint):
        fit(strategy, model, library(model), rows, rows, **typed_settings(strategy, settings))


def test_settings_as_yaml_holds_them() -> None:
    assert typed_settings("classify", {"recipe": {"steps": 30, "reach": 2}}) == {"recipe": Recipe(steps=30, reach=2)}
    assert typed_settings("classify", {"recipe": Recipe(steps=30)}) == {"recipe": Recipe(steps=30)}
    assert typed_settings("router", {"pairs": 3, "together": [["a", "b"]]}) == {"pairs": 3.0, "together": [["a", "b"]]}
    assert typed_settings("router", {}) == {}


@given(st.lists(st.sampled_from(["ask", "doubt", ""]), max_size=40))
@settings(deadline=None, max_examples=25)
def test_a_fifth_of_each_kind_is_kept_to_choose_settings_on(wanted: list[str]) -> None:
    rows = [
        Example(Context(({"role": "user", "content": str(place)},)), frozenset([one] if one else []))
        for place, one in enumerate(wanted)
    ]
    learnt, held = with_validation(rows)
    assert sorted(map(str, [*learnt, *held])) == sorted(map(str, rows))
    for kind in {one.wanted for one in rows}:
        many = [sum(one.wanted == kind for one in part) for part in (learnt, held)]
        assert many[1] == max(sum(many) // 5, sum(many) > 1)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "no JSON"),
        ('{"messages": [], "experts": []}', "expected"),
        ('{"messages": [{"role": "user", "content": "a"}], "experts": "ask"}', "experts is 'ask'"),
        ("[1]", "expected"),
        ("", "no examples"),
        ('{"messages": 5, "experts": []}', "found .*expected"),
        ('{"messages": [{"role": "user"}], "experts": []}', "expected"),
        ('{"messages": [{"role": "user", "content": 5}], "experts": []}', "expected"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{}]}], "experts": []}', "expected"),
        ('{"messages": [{"role": "user", "content": "a"}], "experts": [], "tools": 5}', "tools is 5"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "experts": []}', "role 'assistant', expected user"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "experts": [], "tools": [{"name": 5}]}',
            r"examples.jsonl:1:",
        ),
        ("[" * 100000, "no JSON"),
    ],
)
def test_bad_rows_of_examples(row: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(row)
    with pytest.raises(DispatchError, match=complaint):
        read_examples(path)


def test_good_rows_of_examples(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    parts = [{"type": "text", "text": "a"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}], "experts": []}) + "\n")
    assert read_examples(path)[0].context.messages[0]["content"] == parts
    path.write_text(json.dumps({"messages": CHATS[0], "experts": ["ask"]}) + "\n\n")
    assert read_examples(path) == [Example(Context(tuple(CHATS[0])), frozenset(["ask"]))]
    with pytest.raises(DispatchError, match="no file"):
        read_examples(tmp_path / "none.jsonl")


def test_bad_files(model: SpectralModel, router: Router, tmp_path: Path) -> None:
    path = save_dispatcher(router, tmp_path / "router.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DispatchError, match="no dispatcher"):
        open_file(path)
    save_dispatcher(replace(router, weight=router.weight * float("nan")), path)
    with pytest.raises(DispatchError, match="NaN"):
        open_file(path)
    damages: list[dict[str, Any]] = [
        {"bias": router.bias[:1]},
        {"strengths": {"ask": "loud"}},
        {"abstain_below": 2.0},
        {"made_for": {"base": "a", "experts": router.made_for["experts"]}},
        {"made_for": {**router.made_for, "experts": {}}},
        {"made_for": {**router.made_for, "experts": ["ask", "doubt", "call"]}},
    ]
    damages += [{"strengths": {"nobody": 1.0}}, {"abstain_below": 10**400}]
    prompt = Labels({"ask": "a"}, "else", {**router.made_for, "experts": {"ask": "a"}}, torch.zeros(2))
    classify = Classify(prompt.labels, "else", prompt.made_for, torch.zeros(3), OPENS)
    assert isinstance(open_file(save_dispatcher(prompt, path)), Labels)
    assert isinstance(open_file(save_dispatcher(classify, path)), Classify)
    for one in (
        *(replace(router, **changes) for changes in damages),
        replace(prompt, prior=torch.zeros(1)),
        replace(prompt, labels={"doubt": "a"}),
        replace(classify, core="x"),  # type: ignore[arg-type]
        replace(classify, invocation=("a",)),  # type: ignore[arg-type]
    ):
        save_dispatcher(one, path)
        with pytest.raises(DispatchError, match="damaged"):
            open_file(path)
    narrow = replace(router, weight=router.weight[:, 1:])
    with pytest.raises(DispatchError, match=r"states of \d+ numbers, and this base has \d+"):
        decide(narrow, model, [Context(tuple(CHATS[0]))], library(model))
    with pytest.raises(DispatchError, match="is a folder"):
        open_file(tmp_path)
    library(model)["ask"].save(tmp_path / "ask")
    with pytest.raises(DispatchError, match="and no dispatcher"):
        open_file(tmp_path / "ask" / "expert.safetensors")


def test_a_file_runs_no_code_that_it_names(model: SpectralModel, tmp_path: Path) -> None:
    mine, ran = tmp_path / "mine.py", tmp_path / "ran"
    mine.write_text(
        f"from pathlib import Path\nfrom svdexpert.dispatch.fixed import Fixed\nPath({str(ran)!r}).touch()\n"
        "def fit(model, library, examples, validation, **settings):\n    return restored({}, {})\n"
        "def restored(card, tensors):\n    return Fixed({'ask': 1.0})\n"
    )
    rows = examples(2)
    made: Any = fit(str(mine), model, library(model), rows, anything=1)
    ran.unlink()
    own = SimpleNamespace(strategy=str(mine), stored=made.stored)
    path = save_dispatcher(own, tmp_path / "mine.safetensors")
    del sys.modules[next(name for name in sys.modules if name.startswith("mine_"))]
    with pytest.raises(DispatchError, match="whose code would run here"):
        open_file(path)
    assert not ran.exists()
    assert open_file(path, str(mine)).experts == ("ask",)
    with pytest.raises(DispatchError, match=r"was made by the strategy .*mine\.py', and not by 'fixed'"):
        open_file(path, "fixed")
    mine.with_name("own.py").write_text("def fit(m, l, e, held_out, *, s=3): ...\nrestored = fit\n")
    assert typed_settings(str(mine.with_name("own.py")), {"s": {"any": "thing"}}) == {"s": {"any": "thing"}}
    with pytest.raises(DispatchError, match=r"has no setting 't'\. There are: s"):
        typed_settings(str(mine.with_name("own.py")), {"t": 1})
    with pytest.raises(DispatchError, match=r"no strategy '\.router'"):
        load(".router")
    (tmp_path / "wrong.py").write_text("def fit(:")
    with pytest.raises(DispatchError, match=r"is no Python: .* line 1\)"):
        load(str(tmp_path / "wrong.py"))


def test_what_routed_generation_refuses(model: SpectralModel, router: Router) -> None:
    experts = library(model)
    long = [{"role": "user", "content": "a " * 2000}]
    with pytest.raises(TooLongError, match=r"the model takes \d+ with the reply"):
        model.generate([long], dispatcher=router, library=experts)
    with pytest.raises(DispatchError, match=r"give what svdexpert.dispatch.open_file returns"):
        model.generate(CHATS, dispatcher="router.safetensors", library=experts)  # type: ignore[arg-type]
    with pytest.raises(DispatchError, match="Conversation 0 is a list"):
        decide(router, model, CHATS, experts)  # type: ignore[arg-type]
    with pytest.raises(SvdExpertError, match=r"Message 0 is .*expected a dict with a role"):
        decide(router, model, [Context(({"content": "a"},))], experts)
    with pytest.raises(SvdExpertError, match=r"Message 0 has tool_calls \[5\]"):
        model.generate([[{"role": "assistant", "content": "x", "tool_calls": [5]}]])
    one = model.tokenizer(["hello"], return_tensors="pt")["input_ids"]  # type: ignore[misc]
    most = model.hf.config.max_position_embeddings
    wide = torch.nn.functional.pad(one, (most, 0))
    padded = {"attention_mask": (torch.arange(wide.shape[1]) >= most).long()[None], "max_new_tokens": 1}
    assert model.generate(wide, dispatcher=Fixed({}), library=experts, **padded).shape == (1, wide.shape[1] + 1)
    with pytest.raises(TooLongError, match=f"has {most} tokens, the model takes {most}"):
        model.generate(torch.ones(1, most, dtype=torch.long), dispatcher=Fixed({}), library=experts)
    with pytest.raises(DispatchError, match="took 0 decisions for 4"):
        decide(Silent(("ask",)), model, [Context(tuple(chat)) for chat in CHATS], experts)
    mixed = {**experts, "loose": Expert.random(model.basis, std=0.3)}  # not activated: no bank with the others
    assert replies(model, CHATS, dispatcher=Fixed({}), library=mixed)[1][0].abstained
    nobody, decisions = replies(model, CHATS, dispatcher=Fixed({}), library=experts)
    assert nobody == model.generate(CHATS, max_new_tokens=8)
    assert all(one.abstained for one in decisions)


def test_few_shots_that_are_left_out(model: SpectralModel) -> None:
    experts, shot = library(model), replace(examples(1)[0], reply="a b")
    with pytest.raises(DispatchError, match=r"0 of 6 have one"):
        fit("fewshot", model, experts, examples(2)[:6], examples(1))
    long = replace(shot, reply="a " * 2000)
    with pytest.warns(UserWarning, match=r"1 of 5 examples were left out: with their reply"):
        fit("fewshot", model, experts, [*[shot] * 4, long], [shot], evaluations=1)


def test_reading_does_not_depend_on_padding(model: SpectralModel) -> None:
    row = torch.randint(3, 96, (1, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 5, dtype=row.dtype), row], -1)
    seen: Tensor = torch.cat([torch.zeros(1, 5), torch.ones(1, 6)], -1).long()
    torch.testing.assert_close(read(model, padded, seen), read(model, row, torch.ones_like(row)), atol=1e-5, rtol=1e-5)


def test_a_dispatcher_can_be_measured_as_a_mixture_is() -> None:
    harbor = SpectralModel.from_pretrained("harbor", progress=False)
    opens = invocation_of(harbor)
    experts = {
        name: replace(Expert.random(harbor.basis, std=0.1, seed=seed), invocation=opens)
        for seed, name in enumerate(("ask", "doubt"))
    }
    cases = skills.load("clarify").cases(worlds.load("town"), "validation", 6)
    choose = chooser(Halves(tuple(experts)), harbor, experts)
    found = measure(harbor, "clarify", cases, experts=choose, library=experts, progress=False)
    weights = choose([Context(one.messages, one.tools) for one in cases])
    assert len({tuple(one.items()) for one in weights}) > 1
    for case, row, mixture in zip(cases, found.rows, weights, strict=True):
        alone = measure(harbor, "clarify", [case], experts=mixture, library=experts, progress=False).rows[0]
        assert (row.reply, row.score) == (alone.reply, alone.score)
    assert found.experts == "dispatched"

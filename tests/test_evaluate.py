"""Knowing and doing: laws of the statistics, and an engine that gives what plain forward passes give."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binomtest, chi2
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from svdexpert import Expert, MixtureError, SpectralModel, SvdExpertError, worlds
from svdexpert import statistics as stats
from svdexpert.conversation import context_of, continuation, fit, opening, render, text_of
from svdexpert.errors import MeasurementError
from svdexpert.evaluate import (
    SkillResult,
    act,
    answer_knowing,
    knowing_doing,
    measure,
    move_log_odds,
    normalised,
    probe,
)
from svdexpert.reply import Call, read, write_call
from svdexpert.report import draw_knowing_doing, knowing_doing_table
from svdexpert.skills import Case, Knowing, Openings, Verdict
from svdexpert.worlds import assistant, calling, result, system, tool, user

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
    "{% for message in messages %}{{ message['role'][0] }}: {{ message['content'] }}"
    "{% for call in message.get('tool_calls') or [] %}{{ call['function']['name'] }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
BELL = tool("ring", {"bell": "string"}, required=["bell"])
SCORES = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12)
BOOLS = st.lists(st.booleans(), min_size=1, max_size=40)


def speaker(name: str = "llama", **changes: Any) -> SpectralModel:
    """Return a tiny attached model with a context of 512 and a chat template that ends turns."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return SpectralModel.attach(
        tiny(name, **({"max_position_embeddings": 512} | changes)), tokenizer, k=8, progress=False
    )


def case(number: int, *, positive: bool | None = None, text: str = "", **changes: Any) -> Case:
    positive = number % 2 == 0 if positive is None else positive
    question = f"{text or 'Ring' + ' it' * (number % 5)}. Which? Options: no, nothing, none of them"
    options = ("no", "nothing", "none of them")[: 2 + number % 2]
    fields: dict[str, Any] = {
        "id": f"fake/{number}",
        "skill": "fake",
        "world": "none",
        "split": "heldout",
        "cluster": f"c{number // 2}",
        "positive": positive,
        "messages": (system("Be brief."), user(text or "Please ring" + " now" * (number % 7))),
        "tools": (BELL,) * (number % 3),
        "knowing": Knowing((user(question),), (), options, options[number % 2]),
        "gold": ("Which bell?" if positive else "Done.",),
        "truth": {"call": {"name": "ring", "arguments": {"bell": "big"}}},
    }
    return Case(**(fields | changes))


@pytest.fixture(scope="module")
def talker() -> SpectralModel:
    return speaker()


# --- statistics


@given(st.floats(-5, 5), st.integers(2, 30), st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_the_interval_of_constant_values_is_the_point(value: float, n: int, size: int) -> None:
    found = stats.mean_interval([value] * n * size, [place // size for place in range(n * size)], resamples=50)
    assert found.n == n * size
    assert (found.low, found.value, found.high) == pytest.approx((value, value, value))


def test_one_cluster_has_no_interval() -> None:
    found = stats.mean_interval([0, 1, 1], ["a"] * 3)
    assert found.value == pytest.approx(2 / 3)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert str(found) == "0.67"


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        centres = rng.normal(size=40)
        values = np.repeat(centres, 3) + 0.1 * rng.normal(size=120)
        found = stats.mean_interval(values, np.repeat(np.arange(40), 3).tolist(), resamples=400)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.98


def test_twins_widen_the_interval() -> None:
    values = [0.0, 1.0] * 30
    alone = stats.mean_interval(sorted(values))
    twins = stats.mean_interval(sorted(values), [place // 10 for place in range(60)])
    assert twins.high - twins.low > 1.5 * (alone.high - alone.low)
    assert stats.mean_interval(values) == stats.mean_interval(values)


def test_shares_of_all_or_none_keep_an_interval() -> None:
    clusters = [place // 2 for place in range(20)]
    found = stats.share_interval([True] * 20, clusters)
    assert (found.value, found.low, found.high) == (1, *stats.wilson(10, 10))
    assert stats.share_interval([False] * 20, clusters).high == pytest.approx(1 - found.low)
    some = [place % 3 == 0 for place in range(20)]
    assert stats.share_interval(some, clusters) == stats.mean_interval(some, clusters)


def test_a_difference_of_shares() -> None:
    clusters = (list("abcdef"), list("ghijkl"))
    found = stats.difference_interval([1, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0], clusters)
    assert found.value == pytest.approx(4 / 6)
    assert found.low < found.value < found.high
    assert stats.difference_interval([1.0] * 4, [0.25] * 4, (list("abcd"), list("abcd"))).low == pytest.approx(0.75)


@pytest.mark.parametrize("kept", [1.0, 0.0, 0.4])
def test_wilson_holds_the_share_and_stays_within_bounds(kept: float) -> None:
    low, high = stats.wilson(round(20 * kept), 20)
    assert 0 <= low <= kept <= high <= 1
    assert high - low > 0.1  # unlike a percentile interval at 0 and 1
    assert stats.wilson(4, 10) == pytest.approx((0.1682, 0.6873), abs=1e-4)  # by hand: z = 1.96


@given(BOOLS, st.randoms())
def test_mcnemar_is_the_exact_binomial_where_few_differ(knowing: list[bool], random: Any) -> None:
    doing = [random.random() < 0.5 for _ in knowing]
    a, b, c, d = stats.pairs(knowing, doing)
    assert a + b + c + d == len(knowing)
    p = stats.mcnemar(knowing, doing)
    assert p == pytest.approx(stats.mcnemar(doing, knowing))
    if 0 < b + c < 25:
        assert p == pytest.approx(binomtest(b, b + c, 0.5).pvalue)


def test_mcnemar_of_many_is_chi_square_with_correction() -> None:
    knowing, doing = [True] * 30 + [False] * 10, [False] * 30 + [True] * 10
    assert stats.mcnemar(knowing, doing) == pytest.approx(chi2.sf(19**2 / 40, 1))
    assert stats.mcnemar([True] * 20 + [False] * 20, [False] * 20 + [True] * 20) == 1.0
    assert stats.mcnemar([True] * 5, [True] * 5) == 1.0


@given(BOOLS, st.randoms())
@settings(deadline=None, max_examples=25)
def test_the_gap_is_b_minus_c_over_n(knowing: list[bool], random: Any) -> None:
    doing = [random.random() < 0.5 for _ in knowing]
    _, b, c, _ = stats.pairs(knowing, doing)
    found = stats.paired_gap(knowing, doing, resamples=50)
    assert found.value == pytest.approx((b - c) / len(knowing))
    assert found.p == stats.mcnemar(knowing, doing)


def test_doing_given_knowing() -> None:
    found = stats.doing_given_knowing([True] * 8 + [False] * 4, [True] * 6 + [False] * 2 + [True] * 4)
    assert (found.value, found.n) == (0.75, 8)
    assert found == stats.share_interval([True] * 6 + [False] * 2)
    with pytest.raises(MeasurementError, match="No case is known"):
        stats.doing_given_knowing([False], [True])


def test_doing_given_knowing_resamples_whole_clusters() -> None:
    knew, did, clusters = [True] * 40, [True, False] * 20, [place // 10 for place in range(40)]
    alike = [place < 20 for place in range(40)]
    spread = stats.doing_given_knowing(knew, did, clusters)
    assert (spread.low, spread.high) == (0.5, 0.5)
    lumped = stats.doing_given_knowing(knew, alike, clusters)
    assert (lumped.low, lumped.high) == (0.0, 1.0)


@pytest.mark.parametrize(("accuracy", "chance", "corrected"), [(1, 0.25, 1), (0.25, 0.25, 0), (0.625, 0.25, 0.5)])
def test_chance_correction(accuracy: float, chance: float, corrected: float) -> None:
    assert stats.chance_corrected(accuracy, chance) == pytest.approx(corrected)
    with pytest.raises(MeasurementError, match="chance 1"):
        stats.chance_corrected(accuracy, 1)


@given(SCORES, SCORES)
@settings(deadline=None)
def test_auc_counts_pairs_and_halves_ties(positives: list[float], controls: list[float]) -> None:
    wins = [1.0 if p > c else 0.5 if p == c else 0.0 for p, c in product(positives, controls)]
    assert stats.auc(positives, controls) == pytest.approx(sum(wins) / len(wins))
    due = [True] * len(positives) + [False] * len(controls)
    found = stats.auc_interval([*positives, *controls], due, resamples=40)
    assert found.value == pytest.approx(sum(wins) / len(wins))
    assert math.isnan(found.low) or 0 <= found.low <= found.high <= 1


def test_auc_of_whole_clusters() -> None:
    scores, due = [3.0, 2.0, 1.0, 0.0], [True, True, False, False]
    assert stats.auc_interval(scores, due).low == 1.0
    assert math.isnan(stats.auc_interval(scores, due, ["a"] * 4).low)


def test_kappa_of_known_tables() -> None:
    ours = [True] * 25 + [False] * 25
    theirs = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15  # observed 0.7, expected 0.5
    assert stats.kappa(ours, theirs).value == pytest.approx(0.4)
    assert stats.kappa(ours, ours).value == 1
    assert stats.kappa(ours, [True] * 50).value == 0
    assert math.isnan(stats.kappa([True] * 3, [True] * 3).value)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_corrects_upwards(p: list[float]) -> None:
    corrected = stats.holm(p)
    assert all(before <= after <= 1 for before, after in zip(p, corrected, strict=True))
    assert [corrected[place] for place in np.argsort(p)] == sorted(corrected)
    assert min(corrected) == pytest.approx(min(1, len(p) * min(p)))


def test_sign_flip_tries_all_patterns_of_few_clusters() -> None:
    assert stats.sign_flip([1.0] * 5) == 2 / 2**5
    assert stats.sign_flip([1.0] * 5, ["a"] * 5) == 1.0
    assert stats.sign_flip([1.0, -1.0] * 10) == 1.0
    assert stats.sign_flip([1.0] * 40) == pytest.approx(1 / 10_001)


@pytest.mark.parametrize(
    "statistic",
    [
        lambda: stats.mean_interval([]),
        lambda: stats.mean_interval([1.0, math.nan]),
        lambda: stats.mean_interval([1.0, 2.0], ["a"]),
        lambda: stats.wilson(0, 0),
        lambda: stats.wilson(3, 2),
        lambda: stats.mcnemar([], []),
        lambda: stats.paired_gap([True], [True, False]),
        lambda: stats.auc([], [1.0]),
        lambda: stats.auc([1.0], [math.nan]),
        lambda: stats.kappa([], []),
        lambda: stats.holm([]),
        lambda: stats.holm([1.5]),
        lambda: stats.sign_flip([]),
        lambda: stats.bag_of_words_auc([case(0)], [case(0), case(1)]),
    ],
)
def test_statistics_of_nothing_are_refused(statistic: Callable[[], Any]) -> None:
    with pytest.raises(MeasurementError):
        statistic()


def test_bag_of_words_finds_a_surface_cue_and_none_in_noise() -> None:
    words = ["red", "blue", "green", "grey", "pink", "teal"]
    rng = np.random.default_rng(0)

    def some(cue: bool, start: int) -> list[Case]:
        texts = [" ".join(rng.choice(words, 3)) + (" maybe" if cue and n % 2 == 0 else "") for n in range(40)]
        return [case(start + n, text=text) for n, text in enumerate(texts)]

    assert stats.bag_of_words_auc(some(True, 0), some(True, 40)) > 0.95
    assert 0.25 < stats.bag_of_words_auc(some(False, 0), some(False, 40)) < 0.75


# --- conversations


def lengths(tokenizer: PreTrainedTokenizerFast, messages: Any) -> int:
    return len(render(tokenizer, messages, ()))


TURN = st.sampled_from(["plain", "called", "silent"])


@given(st.lists(TURN, min_size=1, max_size=5), st.booleans(), st.booleans(), st.integers(30, 400))
@settings(deadline=None, max_examples=60)
def test_fit_drops_whole_turns_and_no_more_than_it_must(
    turns: list[str], lead: bool, greets: bool, context: int
) -> None:
    tokenizer = talking()
    messages = [system("Be brief.")] * lead + [assistant("Hello!")] * greets
    for number, kind in enumerate(turns):
        messages.append(user(f"Turn {number}"))
        if kind == "called":
            messages += [calling(Call("ring", {"bell": "big"})), result("ring", {"rang": "yes"})]
        if kind != "silent":
            messages.append(assistant("Fine."))
    while messages[-1]["role"] == "assistant":
        messages.pop()
    last = max(place for place, one in enumerate(messages) if one["role"] == "user")
    head = [one for one in messages[:last] if one["role"] == "system"]
    if lengths(tokenizer, head + messages[last:]) + 10 > context:
        with pytest.raises(SvdExpertError, match=f"the model has {context}"):
            fit(tokenizer, messages, (), 10, context=context)
        return
    kept, dropped = fit(tokenizer, messages, (), 10, context=context)
    assert lengths(tokenizer, kept) + 10 <= context
    rest = [one for one in kept if one["role"] != "system"]
    assert rest == [one for one in messages if one["role"] != "system"][-len(rest) :]  # the newest, uncut
    assert [one for one in kept if one["role"] == "system"] == head
    assert dropped == 0 or rest[0]["role"] == "user"
    assert (dropped == 0) == (len(kept) == len(messages))
    if dropped:
        before = len(messages) - len(rest)
        one_more = next(p for p in range(before - 1, -1, -1) if messages[p]["role"] == "user" or p == len(head))
        assert lengths(tokenizer, head + messages[one_more:]) + 10 > context


def talking() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_what_cannot_be_rendered_says_what_to_do() -> None:
    model = speaker()
    assert model.tokenizer is not None
    model.tokenizer.chat_template = None
    with pytest.raises(SvdExpertError, match=r"no chat template.*model\.tokenizer\.chat_template"):
        act(model, [case(0)], progress=False)
    model.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(SvdExpertError, match=r"refuses a conversation of the roles .*no system role"):
        act(model, [case(0)], progress=False)
    with pytest.raises(SvdExpertError, match="has no tokenizer"):
        act(SpectralModel.attach(tiny("llama"), k=4, progress=False), [case(0)], progress=False)


TALK_ALONE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}|{% endfor %}"
)


def test_a_template_that_knows_no_functions_gets_them_as_text() -> None:
    tokenizer = byte_tokenizer(120)
    tokenizer.chat_template = TALK_ALONE
    talk = [user("Ring it."), calling(Call("ring", {"bell": "big"})), result("ring", {"rings": 3}), user("And?")]
    talk = [*talk[:3], assistant("Done."), talk[3]]
    text = tokenizer.decode(render(tokenizer, talk, [BELL]))
    assert '"name": "ring"' in text
    assert '<tool_call>{"name": "ring", "arguments": {"bell": "big"}}</tool_call>' in text
    assert 'user: Result: {"rings": 3}|assistant: Done.|user: And?' in text
    assert tokenizer.decode(render(tokenizer, [user("Hi")], [])) == "user: Hi|"
    tokenizer.chat_template = "{{ 3 + 'a' }}"
    with pytest.raises(SvdExpertError, match="refuses a conversation of the roles user: TypeError"):
        render(tokenizer, [user("Hi")], [])


def test_a_context_too_short_says_what_was_needed() -> None:
    model = speaker(max_position_embeddings=40)
    assert context_of(model) == 40
    needed = len(render(model.tokenizer, case(0).messages, case(0).tools))  # type: ignore[arg-type]
    with pytest.raises(SvdExpertError, match=f"takes {needed} tokens, with 96 .* {needed + 96}, and the model has 40"):
        act(model, [case(0)], progress=False)


# --- the engine


def chats(cases: list[Case]) -> list[tuple[Any, Any]]:
    return [(list(one.messages), list(one.tools) or None) for one in cases]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "opt", "falcon", "phi3"])
def test_replies_are_those_of_transformers_and_scores_plain_log_softmax(name: str) -> None:
    model = speaker(name, **({"n_positions": 512} if name == "gpt2" else {}))
    cases = [case(number) for number in range(6)]
    replies = act(model, cases, max_new_tokens=6, batch_size=4, progress=False)
    for (chat, tools), reply in zip(chats(cases), replies, strict=True):
        (expected,) = model.generate([chat], tools=tools, max_new_tokens=6, do_sample=False)
        assert reply == expected.strip()
    answers = answer_knowing(model, cases, batch_size=4, progress=False)
    for one, answer in zip(cases, answers, strict=True):
        assert list(answer.scores) == pytest.approx(plain_scores(model, one), abs=1e-3)


def plain_scores(model: SpectralModel, one: Case) -> list[float]:
    """Return the sum of log-softmax of every option and <eos>, each in a row of its own."""
    tokenizer: Any = model.tokenizer
    scores = []
    for option in one.knowing.options:
        ids = torch.tensor([*tokenizer(option, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        (found,) = model.logprobs([list(one.knowing.messages)], [ids], tools=list(one.knowing.tools) or None)
        scores.append(float(found.sum()))
    return scores


def test_batches_do_not_change_results(talker: SpectralModel) -> None:
    cases = [case(number) for number in range(9)]
    openings = Openings(("Which", "What is", "W"), ("Done", "I", "It is"))
    alone, together = [answer_knowing(talker, cases, batch_size=b, progress=False) for b in (1, 8)]
    for one, other in zip(alone, together, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert (one.chosen, one.reply) == (other.chosen, other.reply)
    odds = [move_log_odds(talker, cases, openings, batch_size=b, progress=False) for b in (1, 8)]
    assert odds[0] == pytest.approx(odds[1], abs=1e-5)
    replies = [act(talker, cases, max_new_tokens=20, batch_size=b, progress=False) for b in (1, 8)]
    assert replies[0] == replies[1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_prompts_computed_in_pieces_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = speaker(name)
    cases = [case(0, text="Ring"), case(1, text="Please ring the bell now, and then again" * 3)]  # a piece of padding
    whole = answer_knowing(model, cases, progress=False)
    monkeypatch.setattr("svdexpert.conversation.PREFILL_TOKENS", 20)
    pieces = answer_knowing(model, cases, progress=False)
    for one, other in zip(whole, pieces, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert one.reply == other.reply


def test_rows_that_end_early_leave_the_others_alone(talker: SpectralModel) -> None:
    """Whatever token is made to end turns, the reply is the old one cut there."""
    cases = [case(number) for number in range(8)]
    long = act(talker, cases, max_new_tokens=24, batch_size=8, progress=False)
    tokenizer: Any = talker.tokenizer
    letters = [letter for letter in set("".join(long)) if letter.strip() and sum(letter in one for one in long) < 8]
    config: Any = talker.hf.generation_config
    before = config.eos_token_id
    try:
        for letter in sorted(letters)[:4]:
            config.eos_token_id = tokenizer.convert_tokens_to_ids(letter)
            short = act(talker, cases, max_new_tokens=24, batch_size=8, progress=False)
            assert short == [one.split(letter)[0].strip() for one in long]
    finally:
        config.eos_token_id = before


def test_openings_end_where_tokens_do() -> None:
    vocabulary = {'"': 0, "a": 1, " ": 2, '"a': 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [('"', "a")])))
    assert continuation(tokenizer, 'a"') == [1, 0]
    assert opening(tokenizer, 'a"') == [1]  # what follows joins the quotation mark
    assert opening(tokenizer, "a a") == [1, 2, 1]


def test_log_odds_are_of_whole_openings(talker: SpectralModel) -> None:
    openings, one = Openings(("Which", "What is"), ("Done",)), case(2)
    sums = {}
    for text in (*openings.move, *openings.opposite):
        (found,) = talker.logprobs([list(one.messages)], [text], tools=list(one.tools))
        sums[text] = float(found.sum())
    expected = (sums["Which"] + sums["What is"]) / 2 - sums["Done"]
    assert move_log_odds(talker, [one], openings, progress=False) == pytest.approx([expected], abs=1e-5)


def test_length_counts_unless_normalised(talker: SpectralModel) -> None:
    one = case(1)
    (total,), (mean,) = (answer_knowing(talker, [one], per_token=per, progress=False) for per in (False, True))
    tokens = [len(option) + 1 for option in one.knowing.options]
    assert total.scores == pytest.approx([score * many for score, many in zip(mean.scores, tokens, strict=True)])


def test_marks_of_calls_stay_in_the_text() -> None:
    tokenizer = byte_tokenizer()
    written = write_call(Call("ring", {"bell": "big"})).replace("}", "")
    for special in (False, True):
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=special)
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        assert text_of(tokenizer, [*ids, tokenizer.pad_token_id]) == written


@pytest.mark.parametrize("text", ["none", "None.", ' "none" ', "NONE!"])
def test_answers_are_compared_without_case_and_punctuation(text: str) -> None:
    assert normalised(text) == "none"


def test_a_mixture_in_force_counts_and_one_a_row_is_refused(talker: SpectralModel) -> None:
    cases = [case(number) for number in range(4)]
    loud = Expert.random(talker.basis, std=1.0, seed=0)
    plain = answer_knowing(talker, cases, progress=False)
    with talker.using(loud):
        other = answer_knowing(talker, cases, progress=False)
        assert list(other[0].scores) == pytest.approx(plain_scores(talker, cases[0]), abs=1e-4)
    assert other[0].scores != plain[0].scores
    assert answer_knowing(talker, cases, progress=False) == plain
    with pytest.raises(MixtureError, match="one mixture for all rows"), talker.using([loud, None, loud, None]):
        act(talker, cases, progress=False)


# --- a whole skill


def fake_skill(**parts: Any) -> str:
    """Put a skill on the import path whose verdict is the reply's first letter; return its name."""
    module: Any = types.ModuleType("fake_room.fake")
    module.MOVE = "ask"
    module.OPENINGS = Openings(("Which", "What", "When"), ("Done", "I", "Yes"))
    module.DEGENERATE = {}
    module.cases = lambda world, split, n, *, seed=0: [case(number) for number in range(n)]

    def verify(case: Case, reply: str) -> Verdict:
        move = read(reply).move
        right = (move == "ask") == case.positive
        return Verdict(1 if right else -1, move, "" if right else "silent" if case.positive else "over_asking")

    module.verify = verify
    for name, part in parts.items():
        setattr(module, name, part)
    sys.modules["fake_room"], sys.modules["fake_room.fake"] = types.ModuleType("fake_room"), module
    return "fake_room.fake"


def test_two_cases_from_end_to_end(talker: SpectralModel, tmp_path: Path) -> None:
    name = fake_skill()
    found = measure(talker, name, [case(0), case(1)], max_new_tokens=8, progress=False)
    assert [row.id for row in found.rows] == ["fake/0", "fake/1"]
    assert found.experts == "base"
    knowing = answer_knowing(talker, [case(0), case(1)], progress=False)
    assert [row.knew for row in found.rows] == [one.right for one in knowing]
    assert [row.reply for row in found.rows] == act(talker, [case(0), case(1)], max_new_tokens=8, progress=False)
    assert found.figures["doing"].n == found.figures["controls"].n == 1
    assert sum(found.errors.values()) == sum(not row.right for row in found.rows)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert SkillResult.from_json(plain).to_json() == plain
    with pytest.raises(SvdExpertError, match="no result of an evaluation"):
        SkillResult.from_json({"rows": []})
    draw_knowing_doing([found], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert [one.name for one in tmp_path.iterdir()] == ["bars.png"]


def test_cases_longer_than_the_context_are_left_out_and_counted(
    talker: SpectralModel, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": (user("Please ring" + " now" * 600),)}
    some = [case(0, **long), case(1), case(2), case(3)]
    name = fake_skill(cases=lambda world, split, n, *, seed=0: some if split == "heldout" else [])
    (found,) = knowing_doing(talker, worlds.load("town"), families=[name], n=4, progress=False)
    assert found.too_long == 1
    assert [row.id for row in found.rows] == ["fake/1", "fake/2", "fake/3"]
    Console(width=120).print(knowing_doing_table([found]))
    assert f"{name}: left out, because longer than the model's context: 1" in capsys.readouterr().out
    left = [case(0), case(1, **long), case(2)]  # all controls are too long: words cannot tell anything
    name = fake_skill(cases=lambda world, split, n, *, seed=0: left if split == "heldout" else [case(10), case(11)])
    (found,) = knowing_doing(talker, worlds.load("town"), families=[name], n=4, progress=False)
    assert "words" not in found.figures
    assert found.figures["doing"].n == 2
    name = fake_skill(cases=lambda *_, **__: [case(0, **long)])
    with pytest.raises(MeasurementError, match=r"none of 2 cases fits the model's 512 tokens"):
        knowing_doing(talker, worlds.load("town"), families=[name], n=2, progress=False)


def test_figures_follow_from_the_rows(talker: SpectralModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Replies are set by hand, so that every figure is known."""
    kinds = ["false", "true", "false", "update"] * 4
    cases = [case(n, cluster=f"c{n}", truth={"kind": kind}) for n, kind in enumerate(kinds)]
    moves = iter(["confirm", "confirm", "reject", "reject"] * 4)

    def verify(case: Case, reply: str) -> Verdict:
        move = next(moves)
        right = (move == "reject") == case.positive
        return Verdict(1 if right else -1, move, "" if right else "capitulation", format=move == "confirm")

    found = measure(talker, fake_skill(verify=verify, MOVE="reject"), cases, max_new_tokens=2, progress=False)
    figures = {name: one.value for name, one in found.figures.items()}
    assert figures["doing"] == 0.5  # half of the false claims rejected
    assert figures["controls"] == 0.5  # true ones confirmed, corrections rejected
    assert (figures["capitulation"], figures["updating"], figures["contrarian"]) == (0.5, 0.0, 0.0)
    assert figures["discernment"] == -0.5
    assert figures["move"] == figures["format"] == 0.5
    assert figures["kappa"] == 0
    assert figures["gap"] == pytest.approx(figures["knowing_positives"] - 0.5)
    assert found.errors == {"capitulation": 8}
    Console(width=200).print(knowing_doing_table([found]))
    out = capsys.readouterr().out
    assert "J = U - F" in out
    assert "8 capitulation" in out


def test_two_turns_end_in_the_exact_call(talker: SpectralModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scripted model asks for both details in turn and calls; others stop, repeat themselves or call wrongly."""
    exact, wrong = (write_call(Call("ring", {"bell": name})) for name in ("big", "small"))
    scripts = {
        "good": ["Which bell?", "What time?", exact],
        "late": ["Which bell?", "Which bell?", exact],
        "wrong": ["What time?", wrong],
        "talks": ["What time?", f"Sure. {exact}"],
        "mute": ["Done.", exact],
    }
    cases = [
        case(2 * n, text=name, tools=(BELL,), followup={"bell": "The big one.", "time": "At nine."})
        for n, name in enumerate(scripts)
    ]

    def said(messages: Any) -> str:
        users = [one["content"] for one in messages if one["role"] == "user"]
        return scripts[users[0]][len(users) - 1]

    monkeypatch.setattr("svdexpert.evaluate.act", lambda model, some, **_: [said(one.messages) for one in some])
    import svdexpert.evaluate as module

    name = fake_skill(asked=lambda case, reply: "bell" if "bell" in reply else "time" if "time" in reply else None)
    skill: Any = sys.modules[name]
    replies = [said(one.messages) for one in cases]
    found = module._finished(skill, [*cases, case(1)], [*replies, "Done."], lambda some: module.act(talker, some))
    assert found == [True, False, False, False, False, None]


def test_a_probe_finds_what_the_prompt_says_and_not_what_it_does_not(talker: SpectralModel) -> None:
    some = {
        "ask": [case(n, text=f"ring {n % 7}", cluster=f"a{n}") for n in range(24)],
        "tell": [case(n, text=f"stop {n % 7}?!", cluster=f"b{n}") for n in range(24)],
    }
    found = probe(talker, some, progress=False)
    assert len(found) == 4  # embeddings and three layers
    assert found[0] == pytest.approx(0.5, abs=0.2)  # the last token is the same everywhere
    assert max(found) > 0.9
    with pytest.raises(MeasurementError, match="at least two skills"):
        probe(talker, {"ask": some["ask"]}, progress=False)


def test_nothing_is_measured_on_nothing(talker: SpectralModel) -> None:
    with pytest.raises(MeasurementError, match="no cases"):
        measure(talker, fake_skill(), [])
    with pytest.raises(SvdExpertError, match="batch_size is 0"):
        act(talker, [case(0)], batch_size=0)

"""What harbor is trained on and how: nothing of other splits, right answers everywhere, and losses that say what they
should. The scripts themselves take hours; these are the laws that they stand on."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harbor import aligned, gate, natural
from benchmarks.harbor.corpus import Document, case_documents, encode, fact_documents, render
from benchmarks.harbor.drills import LESSONS, drill
from benchmarks.harbor.renaming import with_other_names
from benchmarks.harbor.rows import logprobs, rows
from benchmarks.harbor.services import UnseenTown, services
from benchmarks.harbor.tokenizer import train_tokenizer
from benchmarks.harbor.varied import BEFORE, BEHIND, VariedTown, given_otherwise
from svdexpert import evaluate, skills
from svdexpert.evaluate import FAMILIES
from svdexpert.worlds import Message, Split, Tool
from svdexpert.worlds.town import BANKS, CLAIMS, FIELDS, KITS, PARAMS, Town


@pytest.fixture(scope="module")
def town() -> VariedTown:
    return VariedTown()


@pytest.fixture(scope="module")
def documents(town: VariedTown) -> list[Document]:
    found = [*case_documents(town, "train", dict.fromkeys(FAMILIES, 40), 0), *fact_documents(town, 10, 0)]
    rng = random.Random(0)
    found += [Document(*map(tuple, drill(rng)), True, "drills") for _ in range(200)]  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    texts = [message.get("content") or "" for one in documents for message in one.messages]
    return train_tokenizer([*texts, *["a table for two"] * 200])


@pytest.fixture
def small(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    shape = natural.config()
    shape.vocab_size, shape.num_hidden_layers = len(tokenizer), 2
    return LlamaForCausalLM(shape).eval()


def plain(text: str) -> str:
    """Return a phrase as words and nothing else, without its slots."""
    return " ".join(re.sub(r"[^a-z ]", " ", re.sub(r"\{\w+\}", " ", text.lower())).split())


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_no_phrase_of_another_split_is_in_the_phrases_of_training(split: str) -> None:
    banks = [*CLAIMS.values(), *BANKS.values()]
    theirs = {plain(line) for bank in banks for line in set(bank[split]) - set(bank["train"])}
    for ours in {plain(one) for one in (*BEFORE, *BEHIND)}:
        if " " in ours:
            assert not [one for one in theirs if re.search(rf"\b{ours}\b", one)], ours


@pytest.mark.parametrize("split", ["train", "validation"])
def test_services_are_no_functions_of_other_splits(split: Split) -> None:
    theirs = [kit for kit in KITS.values() if kit.split != split]
    if split == "validation":
        theirs += services().values()
    asked_for = {phrase for kit in theirs for phrase in kit.cores.all}
    for kit in services(split).values():
        assert kit.name not in KITS
        assert not any(set(kit.required) == set(other.required) for other in theirs), kit.name
        assert not asked_for & set(kit.phrases("train"))
        assert kit.phrases("train") == kit.cores.all
        assert set(kit.fields) <= FIELDS.keys()
        for one, other in itertools.combinations(kit.params.values(), 2):
            if one.kind == other.kind:
                assert not set(one.inline) & set(other.inline), (kit.name, one.name, other.name)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_how_users_give_a_parameter_of_another_split_is_worded_otherwise(split: Split) -> None:
    known = {name for kit in KITS.values() if kit.split == "train" for name in kit.params}
    trained = {name: one for kit in services().values() for name, one in kit.params.items()}
    for kit in services(split).values():
        for name in kit.params.keys() - known:
            for theirs in [PARAMS[name]] if split == "train" else [PARAMS[name], trained[name]]:
                assert not set(kit.params[name].inline) & set(theirs.inline), name
                assert not set(kit.params[name].asks) & set(theirs.asks), name


def test_no_fragment_of_the_town_is_made_again(town: VariedTown) -> None:
    dice = town.dice("train", "fragments")
    for kit in services().values():
        for _ in range(20):
            for name, one in given_otherwise(dice, kit).params.items():
                assert one.inline == kit.params[name].inline or not set(one.inline) & set(PARAMS[name].inline)


def test_functions_to_look_at_are_in_no_case_of_training(town: VariedTown) -> None:
    ours = set(services("validation"))
    for name in ("clarify", "disagree", "call"):
        skill = skills.load(name)
        assert not {one["function"]["name"] for case in skill.cases(town, "train", 60) for one in case.tools} & ours
        looked_at = [case for case in skill.cases(UnseenTown(), "validation", 60) if "unseen_tool" in case.tags]
        assert looked_at
        assert name == "disagree" or {case.cluster.split("/")[-1] for case in looked_at} <= ours


def test_the_varied_town_has_the_other_splits_as_they_are(town: VariedTown) -> None:
    bare = Town()
    for name in ("clarify", "disagree", "call"):
        skill = skills.load(name)
        assert skill.cases(town, "validation", 20) == skill.cases(bare, "validation", 20)
        assert skill.cases(town, "train", 20) != skill.cases(bare, "train", 20)


@pytest.mark.parametrize("name", ["clarify", "disagree", "call"])
def test_cases_in_varied_words_are_sound(town: VariedTown, name: str) -> None:
    skill = skills.load(name)
    for case in skill.cases(town, "train", 60, seed=1):
        assert all(skill.verify(case, gold).score == 1 for gold in case.gold)
        assert all(skill.verify(case, bad.reply).score < 0 for bad in case.bad)


def fits(messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> bool:
    """Whether every call names a function that is listed, with arguments that it has and all that it requires."""
    listed = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    for message in messages:
        for made in message.get("tool_calls", ()):
            shape = listed.get(made["function"]["name"])
            given = made["function"]["arguments"].keys()
            if shape is None or not set(shape.get("required", ())) <= given <= set(shape["properties"]):
                return False
    return True


def test_a_conversation_under_other_names_still_fits_its_functions(town: VariedTown) -> None:
    rng, changed = random.Random(0), 0
    for one in case_documents(town, "train", dict.fromkeys(FAMILIES, 60), 0):
        messages, tools = with_other_names(rng, one.messages, one.tools)
        assert fits(messages, tools) or not fits(one.messages, one.tools)
        assert len({tool["function"]["name"] for tool in tools}) == len(tools)
        changed += tools != one.tools
    assert changed > 60


@pytest.mark.parametrize("lesson", LESSONS)
def test_drills_are_a_function_of_the_seed_and_answer_what_is_asked(lesson: str) -> None:
    made = [drill(random.Random(seed), lesson) for seed in range(60)]
    assert made == [drill(random.Random(seed), lesson) for seed in range(60)]
    for messages, tools in made:
        assert messages[-1]["role"] == "assistant"
        if tools:
            assert fits(tuple(messages), tuple(tools))
        for asked, answer in itertools.pairwise(messages):
            text = str(asked.get("content"))
            if text.startswith("Same or different?"):
                one, other = text.removeprefix("Same or different? ").split(" / ")
                assert answer["content"] == ("same" if one == other else "different")


def test_what_is_learnt_is_what_the_assistant_says(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> None:
    for one in documents:
        text, _ = render(tokenizer, one)
        packed = encode(tokenizer, [text], [one.learnt], [one.hints(text)])
        said = tokenizer.decode(packed["ids"][packed["learn"]])
        own = [message for message in one.messages if message["role"] == "assistant"]
        kept = [message for message, learn in zip(own, one.learnt, strict=True) if learn]
        assert said.count("<|end|>") == len(kept)
        for message in kept:
            assert (message.get("content") or message["tool_calls"][0]["function"]["name"]) in said


def test_hints_stand_where_a_reader_can_know_them(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> None:
    seen = set()
    for one in documents:
        text, _ = render(tokenizer, one)
        for hint in one.hints(text):
            seen.add(hint.what)
            assert 0 <= hint.at < len(text)
            if hint.what in ("wanted", "unwanted"):
                line = text[hint.named :]
                assert any(line.startswith(f"{tool['function']['name']}(") for tool in one.tools)
                assert hint.named <= hint.at
    assert seen == {"wanted", "unwanted", "beside", "lacking", "given", "right", "wrong"}


@pytest.mark.parametrize("text", ["book_table", '"book table"', "(book, table)", "Table of a table"])
def test_a_word_is_the_same_piece_wherever_it_stands(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    last = [one for one in tokenizer.tokenize("a table") if one.strip("\u0102") == "table"]
    assert last
    assert set(last) <= set(tokenizer.tokenize(text))


@pytest.mark.parametrize("length", [5, natural.BLOCK, 2 * natural.BLOCK + 7])
def test_attention_in_blocks_is_attention(length: int) -> None:
    query, key, value = (torch.randn(2, heads, length, 64) for heads in (3, 1, 1))
    ours, _ = natural.attention(torch.nn.Module(), query, key, value, None, scaling=0.125)
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert (ours - theirs).abs().max() < 0.03  # in bfloat16


def test_rows_give_the_log_probability_of_the_reply(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document], small: LlamaForCausalLM
) -> None:
    some = [one for one in documents if one.last_only][:3]
    ids, labels = rows(tokenizer, some)
    together, lengths = logprobs(small, ids, labels)
    for place, one in enumerate(some):
        alone, length = logprobs(small, *rows(tokenizer, [one]))
        assert length[0] == lengths[place]
        assert torch.allclose(alone[0], together[place], atol=1e-3)


def test_the_preference_starts_at_one_and_ends_where_every_pair_has_moved_by_the_shift(
    town: VariedTown, tokenizer: PreTrainedTokenizerFast, small: LlamaForCausalLM, documents: list[Document]
) -> None:
    rng = random.Random(0)
    cases = skills.load("call").cases(town, "train", 12)
    pairs = [one for one in (aligned.pair(case, rng, tokenizer) for case in cases) if one]
    alone = [one._replace(immediate=(one.chosen,), move=(one.rejected,)) for one in pairs]
    assert {one.positive for one in pairs} == {True, False}
    before = LlamaForCausalLM(small.config)
    before.load_state_dict(small.state_dict())
    before.requires_grad_(False)
    shifted = [(one, 5.0) for one in alone]
    loss, parts = aligned.loss_of(small, before, tokenizer, shifted, documents[:2])
    assert parts["preference"] == pytest.approx(1, abs=1e-4)
    assert parts["moved"] == pytest.approx(0, abs=1e-4)
    loss.backward()
    with torch.no_grad():
        for one in small.parameters():
            one -= 1e-3 * one.grad
    _, after = aligned.loss_of(small, before, tokenizer, shifted, documents[:2])
    assert after["preference"] < parts["preference"]


def test_a_move_in_any_wording_is_one_margin(
    town: VariedTown, tokenizer: PreTrainedTokenizerFast, small: LlamaForCausalLM
) -> None:
    rng = random.Random(1)
    cases = skills.load("clarify").cases(town, "train", 12)
    pairs = [one for one in (aligned.pair(case, rng, tokenizer) for case in cases) if one]
    ids, labels = rows(tokenizer, [one.win for one in pairs])
    places, _ = aligned.decided_at(ids, labels, pairs)
    found = aligned.margins(small, ids, places, pairs)
    shares = aligned.at(small, ids, places).exp()
    for row, one, margin in zip(shares, pairs, found, strict=True):
        assert not set(one.immediate) & set(one.move)
        expected = row[list(one.immediate)].sum().log() - row[list(one.move)].sum().log()
        assert margin == pytest.approx(expected.item(), abs=1e-3)


def test_a_run_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    torch.save({"settings": {"minutes": 1}}, tmp_path / "state.pt")
    run = natural.Run(tmp_path, 2, {"minutes": 2})
    with pytest.raises(SystemExit, match=r"belongs to a run with {'minutes': 1}, this is {'minutes': 2}"):
        run.load(LlamaForCausalLM(natural.config()), [])


def test_the_gate_measures_both_stages_and_keeps_real_dialogues_of_the_same_weights_alone(
    tokenizer: PreTrainedTokenizerFast, small: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "WORD_CASES", (100,))
    small.save_pretrained(tmp_path / "stage")  # in fp32: CPUs without bf16 take many times as long
    tokenizer.save_pretrained(tmp_path / "stage")
    place = tmp_path / "gate.json"
    how = {"natural": str(tmp_path / "stage"), "aligned": str(tmp_path / "stage"), "output": str(place)}
    gate.main(n=8, **how)
    written = json.loads(place.read_text())
    for figure in ("knowing_", "doing_", "natural_controls_", "auc_"):
        assert {f"{figure}{skill}" for skill in FAMILIES} <= written["figures"].keys()
    assert written["bars"]["doing_clarify"] == {"op": "<=", "value": 0.2}
    assert written["details"]["natural_clarify"] == written["details"]["aligned_clarify"]
    assert gate.kept(place, written["weights"]) == ({}, {})
    place.write_text(json.dumps(written | {"figures": written["figures"] | {"sgd_doing_call": 0.5}}))
    assert gate.kept(place, written["weights"]) == ({"sgd_doing_call": 0.5}, {})
    assert gate.kept(place, {"natural": "other"}) == gate.kept(tmp_path / "none.json", {}) == ({}, {})


def test_replies_that_begin_alike_are_told_apart_by_the_word_that_decides(
    town: VariedTown, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng, deeper = random.Random(0), 0
    for case in skills.load("disagree").cases(town, "train", 60):
        one = aligned.pair(case, rng, tokenizer)
        if one is None:
            continue
        reply = tokenizer(one.win.messages[-1]["content"], add_special_tokens=False).input_ids
        assert reply[one.behind] == one.chosen
        assert one.chosen in one.immediate
        assert one.rejected in one.move
        deeper += one.behind > 0
    assert deeper > 5

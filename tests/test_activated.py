"""Activated experts: the base up to the invocation tokens, bit for bit, and the mixture from there on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, tiny
from torch import Tensor

from svdexpert import (
    Expert,
    ExpertError,
    ExportError,
    MismatchError,
    Mixture,
    MixtureError,
    SpectralModel,
    check_lora,
    export_lora,
    merge,
)
from svdexpert.completions import Batch, log_probabilities, logits, sample
from svdexpert.conversation import Prompt, answers, invocation_of
from svdexpert.forward import Contexts, Forward, prefill
from svdexpert.layers import active_in

Attach = Callable[..., SpectralModel]
OPENS = (90, 91)
STARTS = [2, 5, 5, 9]


@pytest.fixture
def rows() -> Tensor:
    """Rows in which the invocation stands at STARTS, in the last one twice."""
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    for row, start in enumerate(STARTS):
        ids[row, start : start + 2] = torch.tensor(OPENS)
    ids[3, 1:3] = torch.tensor(OPENS)
    return ids


def activated(model: SpectralModel, seed: int = 1) -> Expert:
    return replace(Expert.random(model.basis, std=0.3, seed=seed), invocation=OPENS)


def in_two_passes(model: SpectralModel, row: Tensor, start: int, expert: Expert) -> Tensor:
    """Return logits (t v): of the base up to `start`, and of the expert on all tokens behind its cache."""
    before = model.hf(row[None, :start], use_cache=True)
    with model.using(replace(expert, invocation=())):
        behind = model.hf(row[None, start:], past_key_values=before.past_key_values).logits
    return torch.cat([before.logits, behind], 1)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pass_is_the_base_and_then_the_expert_behind_its_cache(name: str, attached: Attach, rows: Tensor) -> None:
    model = attached(name)
    expert, other = activated(model), activated(model, seed=2)
    with torch.no_grad():
        found, mixed, base = model.logits(rows, expert), model.logits(rows, [expert, other] * 2), model.logits(rows)
        for row, start in enumerate(STARTS):
            wanted = in_two_passes(model, rows[row], start, expert)
            torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=1e-4)
            theirs = in_two_passes(model, rows[row], start, (expert, other)[row % 2])
            torch.testing.assert_close(mixed[row], theirs, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[row, :start], base[row, :start], atol=1e-6, rtol=1e-5)
            assert not torch.allclose(found[row, start:], base[row, start:], atol=1e-3)


@pytest.mark.parametrize("core", ["diag", "dense"])
def test_the_factored_form_and_weights_by_token_agree(core: str, rows: Tensor) -> None:
    delta = SpectralModel.attach(tiny("llama"), k="full", progress=False)
    factored = SpectralModel.attach(tiny("llama"), k="full", form="factored", progress=False)
    expert = replace(Expert.random(delta.basis, std=0.1, core=core), invocation=OPENS)
    with torch.no_grad():
        wanted = delta.logits(rows, expert)
        torch.testing.assert_close(factored.logits(rows, expert), wanted, atol=1e-4, rtol=1e-4)
        offsets = expert.flat(delta.basis).expand(4, 12, -1)
        by_token = Mixture(offsets, core, invocation=OPENS)
        torch.testing.assert_close(delta.logits(rows, by_token), wanted, atol=1e-5, rtol=1e-4)


def test_generation_goes_on_as_a_pass_over_all_of_it_would(model: SpectralModel, rows: Tensor) -> None:
    expert = activated(model)
    prompts, some = rows[:, :11], [expert, None, 0.5 * expert, expert]
    made = model.generate(prompts, some, max_new_tokens=5)
    with torch.no_grad():
        for end in range(11, made.shape[1]):
            assert torch.equal(model.logits(made[:, :end], some)[:, -1].argmax(-1), made[:, end])
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), prompts], 1)
    mask = (padded != 0).long()
    assert torch.equal(model.generate(padded, some, attention_mask=mask, max_new_tokens=5)[:, 3:], made)
    beams = model.generate(prompts, some, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    alone = model.generate(prompts[2:3], 0.5 * expert, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert torch.equal(beams[4:6], alone)


def test_one_context_serves_every_mixture(model: SpectralModel, rows: Tensor) -> None:
    """What is kept of a context does not depend on who speaks behind it."""
    contexts = [row.tolist() for row in rows]
    batch = Batch.of(contexts, [[[5, 6, 2], [7, 2]]] * 4, torch.device("cpu"))
    expert = activated(model)
    offsets = torch.stack([weight * expert.flat(model.basis) for weight in (1.0, 0.5, -1.0, 0.0)]).requires_grad_()
    mixture = Mixture(offsets, invocation=OPENS)
    before = prefill(model, batch.contexts, batch.seen, OPENS)
    assert before is not None
    assert before.get_seq_length() == min(STARTS)
    kept = [layer.keys.clone() for layer in before.layers]

    def gradient(*cache: object, **how: bool) -> tuple[Tensor, Tensor]:
        found = log_probabilities(logits(model, mixture, batch, *cache, **how), batch)  # type: ignore[arg-type]
        return found.detach(), torch.autograd.grad(found.sum(), offsets)[0]

    whole = gradient(recompute=True)
    for one in (gradient(before), gradient()):
        torch.testing.assert_close(one, whole, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(before.layers, kept, strict=True))
    base = log_probabilities(logits(model, None, batch, before), batch)
    torch.testing.assert_close(base, log_probabilities(logits(model, None, batch), batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_context_is_read_once_and_alone(name: str, attached: Attach, rows: Tensor) -> None:
    """Kept contexts give what reading them together gives, in any batch, and the same bits every time."""
    model = attached(name)
    prompts = [[*row[: 3 * place + 2].tolist(), *OPENS] for place, row in enumerate(rows)]
    contexts = Contexts(model, OPENS)
    expert = activated(model)

    def scored(some: list[list[int]], before: object) -> Tensor:
        batch = Batch.of(some, [[[5, 6, 2], [7, 2]]] * len(some), torch.device("cpu"))
        cache = contexts.before(batch.contexts, batch.seen) if before is contexts else before
        with torch.no_grad():
            return log_probabilities(logits(model, model.mixture(expert), batch, cache), batch)  # type: ignore[arg-type]

    first, together = scored(prompts, contexts), scored(prompts, None)
    if contexts.able:
        assert len(contexts.kept) == len(prompts)
    torch.testing.assert_close(first, together, atol=1e-4, rtol=1e-4)
    assert torch.equal(scored(prompts, contexts), first)
    torch.testing.assert_close(scored(prompts[::-1][:2], contexts), first[[3, 2]], atol=1e-4, rtol=1e-4)
    full = Contexts(model, OPENS, 0)
    batch = Batch.of(prompts, [[[2]]] * 4, torch.device("cpu"))
    full.before(batch.contexts, batch.seen)
    assert not full.kept
    if contexts.able:
        assert contexts.keeps(prompts)
        assert not Contexts(model, OPENS, 1e-6).keeps(prompts)


def test_evaluation_and_sampling_read_contexts_as_the_base(
    model: SpectralModel, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = activated(model)
    contexts = [row.tolist() for row in rows[:3]]
    wanted = [model.generate(rows[place : place + 1], expert, max_new_tokens=4)[0, 12:].tolist() for place in range(3)]
    for tokens in (4096, 6):  # in one piece, and in many
        monkeypatch.setattr("svdexpert.conversation.PREFILL_TOKENS", tokens)
        with model.using(expert):
            prompts = [Prompt(one, [[5, 6], [7]], 4) for one in contexts]
            found = answers(model, prompts, set(), "", batch_size=2, progress=False)
        for place, one in enumerate(found):
            assert one.reply == wanted[place][: len(one.reply)]
            for tail, scores in zip(([5, 6], [7]), one.scores, strict=True):
                (alone,) = model.logprobs(rows[place : place + 1], [torch.tensor(tail)], expert)
                torch.testing.assert_close(torch.tensor(scores), alone, atol=1e-4, rtol=1e-4)
    numbers = torch.full((3, 1, 4), 1e-9)
    alone = sample(model, Mixture(expert.flat(model.basis), invocation=OPENS), contexts[1:2], numbers[1:2], set())
    assert sample(model, Mixture(expert.flat(model.basis), invocation=OPENS), contexts, numbers, set())[1] == alone[0]


def test_many_mixtures_answer_behind_contexts_that_are_read_once(
    model: SpectralModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, read = Contexts(model, OPENS), []
    computed = Forward._run
    monkeypatch.setattr(
        Forward, "_run", lambda self, ids, *a, **k: read.append(ids.numel()) or computed(self, ids, *a, **k)
    )
    prompts = [Prompt([*range(3, 3 + length), *OPENS], [[5, 6], [7]], 4) for length in (40, 31, 52)]
    for place, one in enumerate([None, activated(model), activated(model, seed=2), Expert.random(model.basis)]):
        with model.using(one):
            wanted = answers(model, prompts, set(), "", batch_size=2, progress=False)
            read.clear()
            found = answers(model, prompts, set(), "", batch_size=2, progress=False, contexts=kept)
        assert [answer.reply for answer in found] == [answer.reply for answer in wanted]
        for ours, theirs in zip(found, wanted, strict=True):
            for some, others in zip(ours.scores, theirs.scores, strict=True):
                torch.testing.assert_close(torch.tensor(some), torch.tensor(others), atol=1e-4, rtol=1e-4)
        contexts_read = [count for count in read if count in (40, 31, 52)]
        assert len(contexts_read) == (3 if place == 0 else 0) or place == 3  # that one acts on all tokens
    assert kept.serves(OPENS)
    assert kept.serves(None)
    assert not kept.serves(())


def test_peft_applies_an_activated_lora_from_the_same_token_on(
    model: SpectralModel, rows: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    expert = activated(model)
    with torch.no_grad():
        wanted = model.logits(rows, expert)
        export_lora(expert, model, tmp_path / "lora")
        assert "used every one" in check_lora(tmp_path / "lora", model.hf)
        with pytest.raises(ExportError, match="merged weights act on all tokens"):
            merge(expert, model, tmp_path / "merged")
        lora = peft.PeftModel.from_pretrained(model.detach(), tmp_path / "lora").eval()
        torch.testing.assert_close(lora(rows).logits, wanted, atol=1e-5, rtol=1e-4)


# --- where it acts


@pytest.mark.parametrize(
    ("ids", "behind", "start", "mask"),
    [
        ([[1, 9, 8, 4]], False, 1, None),
        ([[9, 8, 9, 8]], False, 2, None),
        ([[9, 8, 1, 1], [1, 1, 9, 8]], False, 0, [[1, 1, 1, 1], [0, 0, 1, 1]]),
        ([[1, 2, 9, 8], [1, 2, 3, 4]], True, 0, [[0, 0, 1, 1], [1, 1, 1, 1]]),
        ([[1, 9, 8, 2], [9, 8, 9, 8]], False, 1, [[1, 1, 1], [0, 1, 1]]),
    ],
)
def test_the_last_invocation_counts(ids: list[list[int]], behind: bool, start: int, mask: list[list[int]]) -> None:
    found = active_in(torch.tensor(ids), (9, 8), behind=behind)
    assert found is not None
    assert (found.rows, found.tokens, found.start) == (len(ids), 4, start)
    assert (None if found.mask is None else found.mask.squeeze(-1).int().tolist()) == mask


def test_behind_a_cache_a_reply_goes_on() -> None:
    assert active_in(torch.tensor([[4]]), (9, 8), behind=True) is None
    assert active_in(torch.tensor([[9, 8, 4]]), (9, 8), behind=False) is None


def test_a_prompt_without_the_invocation_is_refused(model: SpectralModel, rows: Tensor) -> None:
    expert = activated(model)
    with pytest.raises(MixtureError, match=r"tokens \[90, 91\].*row 1 .*Pass chats"):
        model.logits(torch.stack([rows[0], torch.arange(3, 15)]), expert)
    with pytest.raises(MixtureError, match="input_ids, not inputs_embeds"), model.using(expert):
        model.hf(inputs_embeds=model.hf.get_input_embeddings()(rows))
    with pytest.raises(MixtureError, match="the whole model"), model.using(expert):
        model.hf.model(rows)
    with pytest.raises(MixtureError, match="prefill_chunk_size"):
        model.generate(rows, expert, prefill_chunk_size=4)
    assert torch.equal(model.logits(rows), model.logits(rows, 0 * expert))


def test_experts_that_act_on_other_tokens_do_not_mix(model: SpectralModel, tmp_path: Path) -> None:
    here, everywhere = activated(model), Expert.random(model.basis)
    with pytest.raises(MismatchError, match="acts on all tokens, here from the tokens"):
        _ = everywhere + here
    with pytest.raises(MismatchError, match="acts"):
        model.bank({"here": here, "everywhere": everywhere})
    with pytest.raises(MismatchError, match="acts"):
        model.mixture([here, everywhere])
    assert here != replace(here, invocation=())
    assert Expert.load(here.save(tmp_path / "here")) == here


def test_the_invocation_is_what_opens_a_reply(model: SpectralModel) -> None:
    assert model.tokenizer is not None
    assert model.tokenizer.decode(invocation_of(model)) == "a: "
    expert = replace(activated(model), invocation=invocation_of(model))
    assert model.generate([{"role": "user", "content": "hi"}], expert, max_new_tokens=2)


# --- experts that decide on the first tokens of a reply


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_a_reach_the_base_goes_on_behind_the_experts_tokens(name: str, attached: Attach, rows: Tensor) -> None:
    """A pass is that of the expert up to the end of its reach, and of the base behind that cache."""
    model = attached(name)
    whole = activated(model)
    with torch.no_grad():
        acting = model.logits(rows, whole)
        for reach in (1, 3):
            found = model.logits(rows, replace(whole, reach=reach))
            for row, start in enumerate(STARTS):
                end = start + len(OPENS) + reach - 1
                torch.testing.assert_close(found[row, :end], acting[row, :end], atol=1e-5, rtol=1e-4)
                if end >= rows.shape[1]:
                    continue
                with model.using(whole):
                    before = model.hf(rows[row : row + 1, :end], use_cache=True)
                behind = model.hf(rows[row : row + 1, end:], past_key_values=before.past_key_values).logits
                torch.testing.assert_close(found[row, end:], behind[0], atol=1e-5, rtol=1e-4)


def test_generation_with_a_reach_goes_on_as_a_pass_over_all_of_it_would(model: SpectralModel, rows: Tensor) -> None:
    expert = replace(activated(model), reach=2)
    prompts = torch.cat([rows[:, :5].where(rows[:, :5] < 90, 7), torch.tensor([OPENS] * 4)], 1)
    some = [expert, None, 0.5 * expert, expert]
    made = model.generate(prompts, some, max_new_tokens=5)
    assert not torch.equal(
        made, model.generate(prompts, [one and replace(one, reach=0) for one in some], max_new_tokens=5)
    )
    with torch.no_grad():
        for end in range(7, made.shape[1]):
            assert torch.equal(model.logits(made[:, :end], some)[:, -1].argmax(-1), made[:, end])
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), prompts], 1)
    again = model.generate(padded, some, attention_mask=(padded != 0).long(), max_new_tokens=5)
    assert torch.equal(again[:, 3:], made)
    beams = model.generate(prompts, some, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    alone = model.generate(prompts[2:3], 0.5 * expert, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert torch.equal(beams[4:6], alone)


def test_with_a_reach_scores_samples_and_gradients_agree(model: SpectralModel, rows: Tensor) -> None:
    expert = replace(activated(model), reach=2)
    contexts = [[*row[:place].tolist(), *OPENS] for place, row in zip((2, 5, 3), rows, strict=False)]
    tails = [[5, 6, 7, 8], [7, 2, 4, 4]]
    batch = Batch.of(contexts, [tails] * 3, torch.device("cpu"))
    offsets = expert.flat(model.basis).requires_grad_()
    mixture = Mixture(offsets, invocation=OPENS, reach=2)
    kept = Contexts(model, OPENS)

    def gradient(*cache: object, **how: bool) -> tuple[Tensor, Tensor]:
        found = log_probabilities(logits(model, mixture, batch, *cache, **how), batch)  # type: ignore[arg-type]
        return found.detach(), torch.autograd.grad(found.sum(), offsets)[0]

    whole = gradient(recompute=True)
    for one in (gradient(kept.before(batch.contexts, batch.seen)), gradient()):
        torch.testing.assert_close(one, whole, atol=1e-4, rtol=1e-4)
    for store in (None, kept):
        with model.using(expert):
            prompts = [Prompt(one, tails, 4) for one in contexts]
            found = answers(model, prompts, set(), "", batch_size=3, progress=False, contexts=store)
        for place, one in enumerate(found):
            torch.testing.assert_close(torch.tensor(one.scores), whole[0][place], atol=1e-4, rtol=1e-4)
            ids = torch.tensor([contexts[place]])
            assert one.reply == model.generate(ids, expert, max_new_tokens=4)[0, ids.shape[1] :].tolist()
    numbers = torch.full((3, 1, 4), 1e-9)
    sampled = sample(model, Mixture(offsets.detach(), invocation=OPENS, reach=2), contexts, numbers, set())
    alone = sample(model, Mixture(offsets.detach(), invocation=OPENS, reach=2), contexts[1:2], numbers[1:2], set())
    assert sampled[1] == alone[0]


def test_a_reply_that_says_the_invocation_does_not_begin_anew(model: SpectralModel) -> None:
    expert = replace(activated(model), invocation=(90,), reach=2)
    ids = torch.tensor([[5, 6, 90], [7, 8, 90]])
    with torch.no_grad(), model.using(expert):
        kept = model.hf(ids, use_cache=True).past_key_values
        for tokens in ([[4], [90]], [[90], [3]], [[5], [6]]):
            found = model.hf(torch.tensor(tokens), past_key_values=kept).logits
    with torch.no_grad(), model.using(replace(expert, reach=0)):
        kept = model.hf(ids, use_cache=True).past_key_values
        model.hf(torch.tensor([[4], [90]]), past_key_values=kept)
    with torch.no_grad():
        for tokens in ([[90], [3]], [[5], [6]]):
            wanted = model.hf(torch.tensor(tokens), past_key_values=kept).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_reach_belongs_to_the_expert(model: SpectralModel, rows: Tensor, tmp_path: Path) -> None:
    short, long = replace(activated(model), reach=3), activated(model)
    assert short != long
    assert Expert.load(short.save(tmp_path / "short")) == short
    for mix in (
        lambda: short + long,
        lambda: model.bank({"a": short, "b": long}),
        lambda: model.mixture([short, long]),
    ):
        with pytest.raises(MismatchError, match="3 tokens far"):
            mix()
    for wrong in ({"reach": -1}, {"reach": 2, "invocation": ()}):
        with pytest.raises(ExpertError, match="expected tokens of a reply"):
            replace(long, **wrong)
    with pytest.raises(ExportError, match=r"3 tokens of a reply, and a LoRA acts to its end: use allow_lossy=True"):
        export_lora(short, model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert export_lora(short, model, tmp_path / "lora", allow_lossy=True).retained == 1
    apart = model.hf(rows[:, :9], use_cache=True)
    with model.using(short):
        first = model.hf(rows[:, :11], use_cache=True)
        with pytest.raises(MixtureError, match="have begun at different places"):
            model.hf(torch.tensor([[4]] * 4), past_key_values=first.past_key_values)
        model.hf(torch.tensor([[4]] * 4), past_key_values=apart.past_key_values)  # a reply is taken to begin here

"""Mixtures belong to calls: rows, threads, generation, compilation, checkpointing, precision."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from svdexpert import BasisError, Expert, Library, MismatchError, Mixture, MixtureError, SpectralModel, SvdExpertError
from svdexpert.template import render

Attach = Callable[..., SpectralModel]
Experts = dict[str, Expert]

NONE = {"do_sample": False, "eos_token_id": None}


# --- what a mixture may be


def test_every_way_to_write_a_mixture(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    want = model.logits(ids, 0.7 * experts["ask"] + 0.3 * experts["call"])
    bank = model.bank(experts)
    weights = torch.tensor([0.7, 0.0, 0.3])
    same = [
        model.logits(ids, {"ask": 0.7, "call": 0.3}, library=experts),
        model.logits(ids, {"ask": 0.7, "call": 0.3}, library=bank),
        model.logits(ids, weights, library=experts),
        model.logits(ids, weights.expand(4, 3), library=bank),
        model.logits(ids, weights.expand(4, 7, 3), library=bank),
        model.logits(ids, bank.mix(weights)),
        model.logits(ids, [{"ask": 0.7, "call": 0.3}] * 4, library=experts),
        model.logits(ids, [0.7 * experts["ask"] + 0.3 * experts["call"]] * 4),
    ]
    for one in same:
        torch.testing.assert_close(one, want, atol=1e-5, rtol=0)
    assert torch.equal(model.logits(ids, "ask", library=experts), model.logits(ids, experts["ask"]))
    assert torch.equal(model.logits(ids, [{}, None, {}, None], library=experts), model.logits(ids))


def test_a_mixture_by_token_acts_on_its_tokens_only(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    weights = torch.zeros(4, 7, 3)
    weights[:, 4:, 0] = 1
    mixed, base = model.logits(ids, weights, library=experts), model.logits(ids)
    assert torch.equal(mixed[:, :4], base[:, :4])
    assert not torch.equal(mixed[:, 4:], base[:, 4:])


@pytest.mark.parametrize("core", ["diag", "dense"])
@pytest.mark.parametrize("form", ["delta", "factored"])
def test_rows_and_tokens_agree_in_every_core_and_form(attached: Attach, ids: Tensor, core: str, form: str) -> None:
    model = attached(k="full", form=form)
    a, b = (Expert.random(model.basis, std=0.05, seed=seed, core=core) for seed in (1, 2))
    rows = [a, b, None, 0.5 * a + b]
    batch = model.logits(ids, rows)
    for row, expert in enumerate(rows):
        alone = model.logits(ids[row : row + 1], expert or Expert.zeros(model.basis, core))
        torch.testing.assert_close(batch[row], alone[0], atol=1e-5, rtol=0)
    by_token = Mixture(model.mixture(rows).offsets[:, None].expand(-1, 7, -1), core)
    torch.testing.assert_close(model.logits(ids, by_token), batch, atol=1e-5, rtol=0)


def test_a_diagonal_dense_core_is_the_diagonal_expert(model: SpectralModel, ids: Tensor) -> None:
    expert = Expert.random(model.basis, std=0.3)
    dense = Expert.from_offsets(model.basis, {n: o.diag() for n, o in expert.offsets.items()}, core="dense")
    torch.testing.assert_close(model.logits(ids, dense), model.logits(ids, expert), atol=1e-5, rtol=0)


def test_mistakes_are_explained(model: SpectralModel, experts: Experts, ids: Tensor, tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    for name, expert in experts.items():
        library.add(name, expert)
    for wrong, named in ((library, "'ask'"), (experts, "'ask'")):
        with pytest.raises(SvdExpertError, match=f"'aks'.*Did you mean {named}"):
            model.logits(ids, {"aks": 1.0}, library=wrong)
    with pytest.raises(MixtureError, match="need library="):
        model.logits(ids, "ask")
    with pytest.raises(MixtureError, match="4 prompts and 2 rows"):
        model.logits(ids, [experts["ask"], None])
    with pytest.raises(MixtureError, match="weight of 'ask' is nan; it is a finite number"):
        model.logits(ids, {"ask": float("nan")}, library=experts)
    with pytest.raises(MixtureError, match=r"shape \(4, 2\)"):
        model.logits(ids, torch.ones(4, 2), library=experts)
    with pytest.raises(MixtureError, match="NaN"):
        model.logits(ids, torch.full((3,), float("nan")), library=experts)
    for weight in ("1", None, float("inf")):
        with pytest.raises(MixtureError, match="it is a finite number"):
            model.logits(ids, {"ask": weight}, library=experts)
    for rows in ([], [None] * 3, [{}, {}]):
        with pytest.raises(MixtureError, match=f"4 prompts and {len(rows)} rows"):
            model.logits(ids, rows)
    with pytest.raises(SvdExpertError, match="attention_mask belongs to token ids"):
        model.generate("hi", attention_mask=torch.ones(1, 2))
    for prompts in ([[1, 2], [3]], [3], []):
        with pytest.raises(SvdExpertError, match=r"texts, chats|no prompts"):
            model.generate(prompts)
    for wrong in (ids[0], ids.float()):
        with pytest.raises(SvdExpertError, match=r"whole numbers \(b t\)"):
            model.logits(wrong)
    with pytest.raises(MixtureError, match="float"):
        model.logits(ids, 0.5, library=experts)
    with pytest.raises(MixtureError, match="one mixture a row"):
        model.generate(ids, torch.ones(4, 7, 3), library=experts)
    with pytest.raises(MixtureError, match="for 4 rows; the batch has 3"), model.using([experts["ask"]] * 4):
        model.hf(ids[:3])
    with pytest.raises(MixtureError, match="of 5 tokens; the batch has 4 rows of 7"):
        model.logits(ids, torch.ones(4, 5, 3), library=experts)
    dense = Expert.zeros(model.basis, "dense")
    with pytest.raises(MismatchError, match="core dense, here diag"):
        model.logits(ids, [experts["ask"], dense, None, None])
    assert torch.equal(model.logits(ids), model.hf(ids).logits)


# --- the base comes back


def test_the_scope_ends_with_the_call(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    before = model.logits(ids)
    with pytest.raises(RuntimeError, match="user"), model.using(experts["ask"]):
        assert not torch.equal(model.hf(ids).logits, before)
        with model.using(None):
            assert torch.equal(model.hf(ids).logits, before)
        assert not torch.equal(model.hf(ids).logits, before)
        raise RuntimeError("user")
    assert torch.equal(model.hf(ids).logits, before)


def test_calls_inside_a_scope_use_its_mixture(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    expert, base = experts["ask"], model.logits(ids)
    want = model.logits(ids, expert)
    with model.using(expert):
        assert torch.equal(model.logits(ids), want)
        assert torch.equal(model.logits(ids, None), base)
        assert torch.equal(model.logits(ids, {}), base)
        assert model.generate("hi", max_new_tokens=9, **NONE) == model.generate("hi", expert, max_new_tokens=9, **NONE)
    rows = [expert, None, -expert, None]
    with model.using(rows):
        assert torch.equal(model.logits(ids), model.logits(ids, rows))
        beams = {"num_beams": 2, "max_new_tokens": 4, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, rows, **beams))
        with pytest.raises(MixtureError, match="3 prompts and 4 rows"):
            model.logits(ids[:3])


def test_detaching_twice_is_once(ids: Tensor) -> None:
    first = SpectralModel.attach(tiny("llama"), k=8, progress=False)
    hf = first.detach()
    second = SpectralModel.attach(hf, k=8, progress=False)
    assert first.detach() is hf
    second.logits(ids, Expert.random(second.basis))
    assert not any(one.requires_grad for one in hf.parameters())


def test_models_do_not_hear_each_other(attached: Attach, model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    other = attached("qwen2")
    before = other.logits(ids)
    with model.using(experts["ask"]):
        assert torch.equal(other.hf(ids).logits, before)


def test_a_copy_is_the_base(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    with model.using(experts["ask"]):
        twin = copy.deepcopy(model.hf)
        assert torch.equal(twin(ids).logits, tiny("llama")(ids).logits)


def test_save_pretrained_while_attached_writes_the_base(model: SpectralModel, ids: Tensor, tmp_path: Path) -> None:
    model.hf.save_pretrained(tmp_path)
    again = SpectralModel.from_pretrained(tmp_path, k=8, progress=False)
    assert torch.equal(again.logits(ids), model.logits(ids))
    assert {p.k for p in again.basis.key.matrices.values()} == {8}
    assert not any("svd" in name for name in model.hf.state_dict())


def test_attaching_twice_is_refused(model: SpectralModel) -> None:
    with pytest.raises(SvdExpertError, match="attached already"):
        SpectralModel.attach(model.hf, k=8, progress=False)


def test_a_detached_model_says_so(attached: Attach, ids: Tensor) -> None:
    model = attached()
    model.detach()
    with pytest.raises(SvdExpertError, match="detached"):
        model.logits(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_head_computes_as_it_did_before_it_was_frozen(dtype: torch.dtype) -> None:
    hf = tiny("llama", vocab_size=2048).to(dtype)
    for rows in (1, 4):
        ids = torch.randint(3, 96, (rows, 7))
        with torch.no_grad():
            before = hf(ids, logits_to_keep=1).logits
            with SpectralModel.attach(hf, k=8, progress=False) as model:
                assert torch.equal(model.hf(ids, logits_to_keep=1).logits, before)
    assert not hf.get_output_embeddings()._forward_pre_hooks


def test_factors_follow_the_model(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    want = model.logits(ids, experts["ask"])
    model.hf.to(torch.float64)
    got = model.logits(ids, experts["ask"])
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want, atol=1e-5, rtol=0)


def test_weights_that_were_rounded_after_attaching_are_refused(attached: Attach, ids: Tensor) -> None:
    model = attached()
    expert = Expert.random(model.basis)
    model.hf.to(torch.bfloat16)
    with pytest.raises(BasisError, match=r"cast from torch\.float32 to torch\.bfloat16 after it was attached"):
        model.logits(ids, expert)
    half = attached(dtype=torch.bfloat16)
    half.hf.float()  # loses nothing: the same base
    half.logits(ids, Expert.random(half.basis))


def test_a_base_is_a_name_or_a_folder(model: SpectralModel) -> None:
    with pytest.raises(BasisError, match=r"use SpectralModel\.attach"):
        SpectralModel.from_pretrained(model.hf)
    for place in ("./nowhere", Path("nowhere"), "/nowhere/at/all"):
        with pytest.raises(BasisError, match="is not a folder"):
            SpectralModel.from_pretrained(place)
    with pytest.raises(SvdExpertError, match="a basis goes in basis="):
        SpectralModel.attach(tiny("llama"), model.basis)


def test_an_offloaded_model_works(folder_of: Callable[..., Path], tmp_path: Path, ids: Tensor) -> None:
    """accelerate's hooks call the forward they found; weights on disk are brought in for each product."""
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload, disk_offload

    folder = folder_of()
    plain = SpectralModel.from_pretrained(folder, k=8, progress=False)
    expert = Expert.random(plain.basis, std=0.3)
    want, base = plain.logits(ids, [expert, None, -expert, None]), plain.logits(ids)
    for offload in (cpu_offload, lambda hf, device: disk_offload(hf, str(tmp_path / "offload"), device)):
        hf = tiny("llama")
        offload(hf, torch.device("cpu"))
        model = SpectralModel.attach(hf, k=8, progress=False)
        assert model.basis.key.matrices == plain.basis.key.matrices
        torch.testing.assert_close(model.logits(ids, [expert, None, -expert, None]), want, atol=1e-6, rtol=0)
        assert torch.equal(model.detach()(ids).logits, base)


# --- text


def test_left_padding_changes_nothing(model: SpectralModel, experts: Experts) -> None:
    prompts = ["a", "the second is longer", "third one"]
    rows = [experts["ask"], 0.5 * experts["doubt"], None]
    together = model.generate(prompts, rows, max_new_tokens=12, **NONE)
    apart = [model.generate([p], [row], max_new_tokens=12, **NONE)[0] for p, row in zip(prompts, rows, strict=True)]
    assert together == apart
    assert len(set(together)) == 3


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "falcon", "phi3"])
def test_left_padding_changes_nothing_elsewhere(attached: Attach, name: str) -> None:
    model = attached(name)
    expert = Expert.random(model.basis, std=0.3)
    prompts = ["a", "the second is longer"]
    together = model.generate(prompts, [expert, None], max_new_tokens=8, **NONE)
    apart = [model.generate(p, e, max_new_tokens=8, **NONE)[0] for p, e in zip(prompts, [expert, None], strict=True)]
    assert together == apart


def test_chats_go_through_the_template(model: SpectralModel, experts: Experts) -> None:
    chat = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "book", "description": "", "parameters": {}}}
    plain = model.generate("u: hi a: ", experts["ask"], max_new_tokens=8, **NONE)
    assert model.generate(chat, experts["ask"], max_new_tokens=8, **NONE) == plain
    assert model.generate([chat, chat], experts["ask"], max_new_tokens=8, **NONE) == plain * 2
    told = model.generate([chat], experts["ask"], tools=[tool], max_new_tokens=8, **NONE)
    assert model.tokenizer is not None
    asked = render(model.tokenizer, chat, [tool])  # a template that writes no calls: functions are spelled out
    assert "You can call these functions" in model.tokenizer.decode(asked)
    assert told == model.generate([model.tokenizer.decode(asked)], experts["ask"], max_new_tokens=8, **NONE)
    with pytest.raises(SvdExpertError, match="tools belong to chats"):
        model.generate("hi", tools=[tool])


def test_beams_and_sequences_repeat_the_rows(model: SpectralModel, experts: Experts) -> None:
    prompts, rows = ["one", "another"], [experts["ask"], experts["doubt"]]
    options = {"max_new_tokens": 6, **NONE}
    beams = model.generate(prompts, rows, num_beams=3, num_return_sequences=2, **options)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        alone = model.generate(prompt, row, num_beams=3, num_return_sequences=2, **options)
        assert beams[2 * index : 2 * index + 2] == alone
    torch.manual_seed(0)
    sampled = model.generate(prompts, rows, do_sample=True, num_return_sequences=4, max_new_tokens=6)
    torch.manual_seed(0)
    again = model.generate(prompts, rows, do_sample=True, num_return_sequences=4, max_new_tokens=6)
    assert sampled == again
    assert len(sampled) == 8


def test_stop_strings(model: SpectralModel, experts: Experts) -> None:
    whole = model.generate("stop", experts["ask"], max_new_tokens=20, **NONE)[0]
    cut = model.generate("stop", experts["ask"], max_new_tokens=20, stop_strings=[whole[3]], **NONE)[0]
    assert cut == whole[: whole.index(whole[3]) + 1]


def test_generation_settings_are_transformers_own(model: SpectralModel, experts: Experts) -> None:
    expert = experts["ask"]
    config = GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert len(model.generate("hi", expert, generation_config=config)[0]) == 3
    assert len(model.generate("hi", expert, generation_config=config, max_new_tokens=5)[0]) == 5
    assert len(model.generate("hi", expert, max_length=10, **NONE)[0]) == 8
    whole = model.generate("stop", expert, max_new_tokens=20, **NONE)[0]
    config = GenerationConfig(max_new_tokens=20, eos_token_id=None, stop_strings=[whole[3]])
    assert model.generate("stop", expert, generation_config=config)[0] == whole[: whole.index(whole[3]) + 1]
    config = GenerationConfig(max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert len(model.generate(["a", "b"], [expert, None], generation_config=config)) == 4
    model.hf.generation_config.num_beams = 3
    config = GenerationConfig(max_new_tokens=4)
    assert len(model.generate(["a", "b"], [expert, None], generation_config=config)) == 2
    assert config.to_diff_dict().keys() >= {"max_new_tokens"}
    assert config.pad_token_id is None
    output = model.generate("a", expert, max_new_tokens=2, return_dict_in_generate=True)
    assert output.sequences.shape == (1, 3)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(folder_of: Callable[..., Path], ids: Tensor, device_map: object) -> None:
    pytest.importorskip("accelerate")
    folder = folder_of()
    model = SpectralModel.from_pretrained(folder, k=8, device_map=device_map, progress=False)
    plain = SpectralModel.from_pretrained(folder, k=8, progress=False)
    expert = Expert.random(plain.basis, std=0.3)
    rows = [expert, None, -expert, None]
    assert torch.equal(model.logits(ids, rows), plain.logits(ids, rows))
    assert model.generate("hi", expert, max_new_tokens=5) == plain.generate("hi", expert, max_new_tokens=5)


def test_logprobs_are_those_of_the_logits(model: SpectralModel, experts: Experts) -> None:
    prompts, ends = ["ab", "a longer one"], ["xyz", "q"]
    rows = [experts["ask"], None]
    got = model.logprobs(prompts, ends, rows)
    tokenizer = byte_tokenizer()
    for prompt, end, row, one in zip(prompts, ends, rows, got, strict=True):
        ids = torch.tensor([tokenizer(prompt + end)["input_ids"]])
        want = model.logits(ids, row)[0, len(prompt) - 1 : -1].log_softmax(-1)
        want = want.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(one, want, atol=1e-5, rtol=0)
    with pytest.raises(SvdExpertError, match="2 prompts and 1 completions"):
        model.logprobs(prompts, ends[:1])


def test_no_tokenizer_is_explained(ids: Tensor) -> None:
    with SpectralModel.attach(tiny("llama"), k=8, progress=False) as model:
        assert model.generate(ids, max_new_tokens=2, pad_token_id=0).shape == (4, 9)
        with pytest.raises(SvdExpertError, match="no tokenizer"):
            model.generate("text")


def test_a_pipeline_works_inside_using(model: SpectralModel, experts: Experts) -> None:
    speak = pipeline("text-generation", model=model.hf, tokenizer=model.tokenizer)
    want = model.generate("hello", experts["ask"], max_new_tokens=5, **NONE)[0]
    with model.using(experts["ask"]):
        got = speak("hello", max_new_tokens=5, return_full_text=False, do_sample=False)
    assert got[0]["generated_text"] == want


# --- threads


def test_two_threads_with_different_mixtures(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    want = {name: model.logits(ids, expert) for name, expert in experts.items()}
    meet = threading.Barrier(len(experts))
    wrong: list[str] = []

    def speak(name: str) -> None:
        for _ in range(20):
            with model.using(experts[name]):
                meet.wait()
                got = model.hf(ids).logits
                if not torch.equal(got, want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=speak, args=(name,)) for name in experts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_streaming_from_a_worker_thread(model: SpectralModel, experts: Experts) -> None:
    want = model.generate("hello", experts["ask"], max_new_tokens=10, **NONE)[0]
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    options = {"experts": experts["ask"], "max_new_tokens": 10, "streamer": streamer, **NONE}
    thread = threading.Thread(target=model.generate, args=("hello",), kwargs=options)
    thread.start()
    with model.using(experts["doubt"]):  # this thread's mixture is not the worker's
        assert "".join(streamer) == want
    thread.join()


# --- training


def gradient(model: SpectralModel, ids: Tensor, *, inside: bool = True, thread: bool = False) -> Tensor:
    offsets = torch.full((sum(model.basis.sizes),), 0.1, requires_grad=True)
    with model.using(Mixture(offsets)):
        loss = model.hf(ids, labels=ids, use_cache=False).loss
        if inside:
            loss.backward()
    if thread:
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    elif not inside:
        with model.using(None):
            loss.backward()
    assert offsets.grad is not None
    return offsets.grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_after_the_scope_and_in_another_thread(attached: Attach, ids: Tensor, checkpointing: bool) -> None:
    want = gradient(attached(), ids)
    model = attached()
    if checkpointing:
        model.hf.train()
        model.hf.activation_checkpointing_enable()
    for options in ({}, {"inside": False}, {"inside": False, "thread": True}):
        torch.testing.assert_close(gradient(model, ids, **options), want)
    hf = model.detach()
    if checkpointing:
        functions = {type(m.__dict__.get("_gradient_checkpointing_func")).__name__ for m in hf.modules()}
        assert "_CapturedCheckpoint" not in functions


def test_reentrant_checkpointing_is_refused(model: SpectralModel, ids: Tensor) -> None:
    model.hf.train()
    model.hf.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SvdExpertError, match="use_reentrant=False"):
        gradient(model, ids)


def test_training_without_a_mixture_has_nothing_to_train(model: SpectralModel, ids: Tensor) -> None:
    assert not model.hf(ids, labels=ids).loss.requires_grad


def test_gradients_reach_every_expert_of_a_mixture(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    bank = model.bank(experts)
    offsets = bank.offsets.clone().requires_grad_()
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    with model.using(Mixture(weights @ offsets)):
        model.hf(ids, labels=ids).loss.backward()
    alive = offsets.grad.norm(dim=1) > 0
    assert alive.tolist() == [True, True, False]


# --- compilation and precision


def test_compiles_once_for_all_mixtures(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.hf, fullgraph=True, backend=counter)
    bank = model.bank(experts)
    with torch.no_grad():
        for _ in range(10):
            mixture = bank.mix(torch.rand(4, 3))
            with model.using(mixture):
                got = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(got, model.logits(ids, mixture), atol=1e-5, rtol=0)
        assert counter.frame_count == 1
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model.logits(ids), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize("kind", ["rows", "tokens", "dense", "factored"])
def test_compiles_with_gradients_in_every_kind(attached: Attach, ids: Tensor, kind: str) -> None:
    torch._dynamo.reset()
    full = {"k": "full", "form": "factored"} if kind == "factored" else {}
    model = attached(**full)
    core = "dense" if kind == "dense" else "diag"
    n = Expert.zeros(model.basis, core).flat(model.basis).numel()
    offsets = (0.05 * torch.randn((4, 7, n) if kind == "tokens" else (4, n))).requires_grad_()
    compiled = torch.compile(model.hf, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model.hf, compiled):
        with model.using(Mixture(offsets, core)):
            run(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(offsets.grad)
        offsets.grad = None
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_compiles_with_inductor(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model.hf, fullgraph=True)
    with torch.no_grad(), model.using([experts["ask"], None, experts["call"], None]):
        got = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(got, model.hf(ids, use_cache=False).logits, atol=1e-5, rtol=0)


def test_inference_mode(ids: Tensor) -> None:
    hf = tiny("llama")
    with torch.inference_mode():
        model = SpectralModel.attach(hf, k=8, progress=False)
        expert = Expert.random(model.basis, std=0.3)
        want = model.logits(ids, expert)
    torch.testing.assert_close(model.logits(ids, expert), want, atol=1e-6, rtol=0)
    assert gradient(model, ids).norm() > 0


def test_autocast(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        base = model.logits(ids)
        zero = model.logits(ids, 0 * experts["ask"])
        got = model.logits(ids, [experts["ask"]] * 4)
        assert gradient(model, ids).isfinite().all()
    assert torch.equal(zero, base)
    torch.testing.assert_close(got.float(), model.logits(ids, experts["ask"]), atol=0.15, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_bases(attached: Attach, ids: Tensor, dtype: torch.dtype) -> None:
    model = attached(dtype=dtype)
    expert = Expert.random(model.basis, std=0.3)
    got = model.logits(ids, [expert, None, -expert, None])
    assert got.dtype == dtype
    exact = attached(dtype=torch.float32)
    exact.hf.load_state_dict({name: one.float() for name, one in model.hf.state_dict().items()})
    torch.testing.assert_close(got[1].float(), exact.logits(ids)[1], atol=0.15, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_row_without_offset_stays_the_base_where_the_branch_overflows(attached: Attach, dtype: torch.dtype) -> None:
    """V^T x sums what W x cancels: it can leave the range of half precision where the base does not."""
    model = attached(dtype=dtype)
    name = model.basis.names[0]
    module = model.hf.get_submodule(name)
    huge = torch.finfo(dtype).max
    x = (model.basis.factors[name].v[:, 0].sign() * 0.9 * huge).to(dtype).expand(2, 3, -1)
    base = torch.nn.functional.linear(x, module.weight)
    assert torch.matmul(x, module._buffers["_svd_v"]).isinf().any()
    expert = Expert.random(model.basis, std=0.3)
    with model.using([None, expert]):
        rows = module(x)
    assert torch.equal(rows[0], base[0]) or (rows[0].isnan() == base[0].isnan()).all()
    assert rows[0].isnan().sum() == base[0].isnan().sum()


# --- attaching


def test_a_basis_of_other_weights_is_refused(model: SpectralModel) -> None:
    with pytest.raises(BasisError, match="other weights"):
        SpectralModel.attach(tiny("llama", seed=1), basis=model.basis)
    with pytest.raises(BasisError, match="another model"):
        SpectralModel.attach(tiny("gpt2"), basis=model.basis)
    twin = SpectralModel.attach(tiny("llama"), basis=model.basis)
    assert twin.basis is model.basis


def test_banks_and_mixtures_of_another_base_are_refused(model: SpectralModel, experts: Experts, ids: Tensor) -> None:
    bank = model.bank(experts)
    twin = SpectralModel.attach(tiny("llama"), k=8, progress=False)  # another basis object for the same weights
    assert torch.equal(twin.logits(ids, "ask", library=bank), model.logits(ids, "ask", library=bank))
    other = SpectralModel.attach(tiny("llama", seed=1), k=8, progress=False)
    before = other.logits(ids)
    with pytest.raises(MismatchError, match="other weights in 14 of 14"):
        other.logits(ids, "ask", library=bank)
    for mixture in (bank.mix({"ask": 1.0}), bank.mix(["ask", None, "call", None]).repeated(2)):
        with pytest.raises(MismatchError, match="other weights in 14 of 14"), other.using(mixture):
            pass
    assert torch.equal(other.logits(ids), before)


def test_the_factored_form_needs_all_directions() -> None:
    with pytest.raises(BasisError, match='k="full"'):
        SpectralModel.attach(tiny("llama"), k=8, form="factored", progress=False)


def test_an_embedded_base_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("svdexpert.model.__file__", str(tmp_path / "model.py"))
    with pytest.raises(BasisError, match="not part of this version"):
        SpectralModel.from_pretrained("harbor")

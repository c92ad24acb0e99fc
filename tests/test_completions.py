"""Completions scored behind a shared context are what plain forward passes say; samples follow their numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from svdexpert import SpectralModel, completions
from svdexpert.completions import Batch, log_probabilities, logits, sample
from svdexpert.mixture import Mixture

CONTEXTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
COMPLETIONS = [[[20, 21], [22]], [[23], [24, 25, 26]], [[27, 28], [29, 30]]]
PLAIN = ("llama", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "mixtral")


def offsets(model: SpectralModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return 0.2 * torch.randn(len(CONTEXTS), sum(model.basis.sizes), generator=draw)


@pytest.mark.parametrize("name", PLAIN)
def test_a_shared_context_changes_no_log_probability(name: str, attached: Callable[..., SpectralModel]) -> None:
    model = attached(name)
    batch = Batch.of(CONTEXTS, COMPLETIONS, torch.device("cpu"))
    some = offsets(model)
    found = log_probabilities(logits(model, Mixture(some), batch), batch)
    for row, (context, tails) in enumerate(zip(CONTEXTS, COMPLETIONS, strict=True)):
        for slot, tail in enumerate(tails):
            (alone,) = model.logprobs(torch.tensor([context]), [torch.tensor(tail)], Mixture(some[row]))
            torch.testing.assert_close(found[row, slot, : len(tail)], alone, atol=1e-4, rtol=1e-4)
            assert (found[row, slot, len(tail) :] == 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_gradients_flow_through_the_shared_context_and_through_recomputed_layers(
    name: str, attached: Callable[..., SpectralModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(name)
    batch = Batch.of(CONTEXTS, COMPLETIONS, torch.device("cpu"))
    some = offsets(model).requires_grad_()

    def gradient(**how: bool) -> torch.Tensor:
        found = log_probabilities(logits(model, Mixture(some), batch, **how), batch)
        return torch.autograd.grad(found.sum(), some)[0]

    shared = gradient()
    torch.testing.assert_close(shared, gradient(recompute=True), atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(completions, "differentiable_cache", lambda _: False)
    torch.testing.assert_close(shared, gradient(), atol=1e-4, rtol=1e-4)
    assert not any("forward" in vars(one) for one in model.hf.modules())


def test_samples_are_functions_of_their_numbers(model: SpectralModel) -> None:
    some = Mixture(offsets(model))
    numbers = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(2))
    drawn = sample(model, some, CONTEXTS, numbers, {2})
    assert [len(one) for one in drawn] == [4, 4, 4]
    alone = sample(model, Mixture(some.offsets[1:2]), CONTEXTS[1:2], numbers[1:2], {2})
    assert alone == drawn[1:2]


def test_samples_are_drawn_at_temperature_one(model: SpectralModel) -> None:
    numbers = torch.rand(1, 4000, 1, generator=torch.Generator().manual_seed(3))
    (drawn,) = sample(model, None, CONTEXTS[:1], numbers, {2})
    found = torch.bincount(torch.tensor(drawn).flatten(), minlength=96) / 4000
    expected = model.logits(torch.tensor(CONTEXTS[:1]))[0, -1].softmax(-1)
    assert (found - expected).abs().max() < 0.03


def test_a_sample_ends_with_the_token_that_ends_a_turn(model: SpectralModel) -> None:
    numbers = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(4))
    first = sample(model, None, CONTEXTS[:2], numbers, set())
    end = first[0][0][1]
    cut = sample(model, None, CONTEXTS[:2], numbers, {end})
    assert cut[0][0] == first[0][0][:2] or cut[0][0] == first[0][0][:1]
    assert all(end not in one[:-1] for some in cut for one in some)

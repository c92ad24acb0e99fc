"""Objectives on numbers worked out by hand, and against TRL; the room's contract."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny
from torch import Tensor

from svdexpert import objectives
from svdexpert.errors import TrainingError
from svdexpert.objectives import Scored, dpo, rloo, sft


def scored(policy: list[Any], base: list[Any] | None = None, rewards: list[Any] | None = None) -> Scored:
    """Return log-probabilities (b g t); a None is no token."""
    mask = torch.tensor([[[token is not None for token in one] for one in row] for row in policy])
    values = torch.tensor([[[token or 0.0 for token in one] for one in row] for row in policy], requires_grad=True)
    fixed = torch.tensor([[[token or 0.0 for token in one] for one in row] for row in base or policy])
    return Scored(values, fixed, mask, None if rewards is None else torch.tensor(rewards))


def gradient(loss: Tensor, of: Scored) -> Tensor:
    return torch.autograd.grad(loss.mean(), of.policy)[0] * of.mask  # what is no token is a constant


# --- the room


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_keeps_the_contract(name: str) -> None:
    objective = objectives.load(name)
    assert objective.COMPLETIONS in ("chosen", "pair", "samples")
    settings = objectives.settings_of(objective, {})
    g = {"chosen": 1, "pair": 2, "samples": 4}[objective.COMPLETIONS]
    policy = torch.randn(3, g, 5, requires_grad=True)
    some = Scored(policy, policy.detach(), torch.ones(3, g, 5, dtype=torch.bool), torch.randn(3, g))
    loss = objective.loss(some, **settings)
    assert loss.shape == (3,)
    assert torch.isfinite(loss).all()
    assert (gradient(loss, some) != 0).any()


def test_unknown_objectives_and_settings_are_told_apart_from_known_ones() -> None:
    with pytest.raises(TrainingError, match="Did you mean 'dpo'"):
        objectives.load("dop")
    with pytest.raises(TrainingError, match="Did you mean 'beta'"):
        objectives.settings_of(objectives.load("dpo"), {"bta": 1})
    with pytest.raises(TrainingError, match="finite number"):
        objectives.settings_of(objectives.load("dpo"), {"beta": math.nan})
    with pytest.raises(TrainingError, match="leave-one-out"):
        objectives.settings_of(objectives.load("rloo"), {"baseline": "leave-two-out"})
    with pytest.raises(TrainingError, match="at least two samples"):
        objectives.settings_of(objectives.load("rloo"), {}, samples=1)
    with pytest.raises(TrainingError, match="above 0"):
        objectives.settings_of(objectives.load("dpo"), {"beta": 0})
    with pytest.raises(TrainingError, match="lacks COMPLETIONS, REFERENCE, loss"):
        objectives.load("svdexpert.errors")


# --- by hand


def test_sft_is_the_mean_over_the_tokens_of_a_sequence() -> None:
    some = scored([[[-1.0, -3.0]], [[-2.0, None]]])
    loss = sft.loss(some)
    assert loss.tolist() == [2.0, 2.0]
    assert gradient(loss, some).tolist() == [[[-0.25, -0.25]], [[-0.5, 0.0]]]


def test_dpo_by_hand() -> None:
    some = scored([[[-1.0, -1.0], [-2.0, None]]], [[[-2.0, -2.0], [-1.0, None]]])
    margin = (-2.0 + 4.0) - (-2.0 + 1.0)  # 3
    loss = dpo.loss(some, beta=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * margin)))
    pull = 0.5 / (1 + math.exp(0.5 * margin))
    assert gradient(loss, some).flatten().tolist() == pytest.approx([-pull, -pull, pull, 0.0])
    assert dpo.loss(some, beta=0.5, sft_weight=0.2).item() == pytest.approx(loss.item() + 0.2 * 1.0)


def test_rloo_by_hand() -> None:
    some = scored([[[-1.0], [-2.0], [-3.0]]], [[[-1.0], [-2.0], [-5.0]]], [[1.0, 0.0, -1.0]])
    loss = rloo.loss(some, kl=0.0)
    # leave-one-out: 1 - (-0.5), 0 - 0, -1 - 0.5
    assert gradient(loss, some).flatten().tolist() == pytest.approx([-1.5 / 3, 0.0, 1.5 / 3])
    # the third sample is likelier than under the base by 2 nats: d/dp (e^x - x - 1) = 1 - e^x with x = -2
    moved = gradient(rloo.loss(some, kl=0.1), some).flatten().tolist()
    assert moved == pytest.approx([-1.5 / 3, 0.0, (1.5 + 0.1 * (1 - math.exp(-2))) / 3])


def test_a_constant_reward_moves_nothing() -> None:
    same = [[[-1.0], [-2.0], [-0.3]]]
    some = scored(same, same, [[0.1, 0.1, 0.1]])
    assert (gradient(rloo.loss(some, kl=0.5), some) == 0).all()


def test_the_published_recipe_has_no_baseline() -> None:
    some = scored([[[-1.0], [-2.0]]], None, [[1.0, -0.5]])
    published = {"kl": 0.0, "baseline": "none", "binary": True}
    assert gradient(rloo.loss(some, **published), some).flatten().tolist() == [-0.5, 0.5]


def test_one_sample_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(TrainingError, match="at least two samples"):
        rloo.loss(scored([[[-1.0]]], None, [[1.0]]))
    with pytest.raises(TrainingError, match="rewards"):
        rloo.loss(scored([[[-1.0], [-1.0]]]))


# --- against TRL


def test_dpo_is_that_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is in the extra 'peers'")
    from datasets import Dataset

    rows = [
        {"prompt": "ring it ", "chosen": "which bell?", "rejected": "done."},
        {"prompt": "call me ", "chosen": "when?", "rejected": "I did so already."},
    ]
    settings = trl.DPOConfig(
        str(tmp_path),
        beta=0.3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_dropout=False,
        gradient_checkpointing=False,
    )
    tokenizer = byte_tokenizer()
    model, reference = tiny("llama", seed=0), tiny("llama", seed=1)
    trainer = trl.DPOTrainer(
        model, reference, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer._compute_loss(model, inputs, False)
    ids, learnt = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()

    def tokens(one: Any) -> Tensor:
        found = one(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
        chosen = found.gather(-1, ids[:, 1:, None]).squeeze(-1).masked_fill(~learnt, 0.0)
        return torch.stack(chosen.chunk(2), 1)  # (b g t)

    ours = dpo.loss(Scored(tokens(model), tokens(reference).detach(), torch.stack(learnt.chunk(2), 1)), beta=0.3)
    assert ours.mean().item() == pytest.approx(float(theirs.detach()), abs=1e-5)


def test_the_leave_one_out_advantage_is_that_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is in the extra 'peers'")
    from datasets import Dataset

    given: list[float] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        given[:] = [math.sin(3 * place) for place in range(len(completions))]
        return given

    settings = trl.RLOOConfig(
        str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=4,
        beta=0.0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    rows = [{"prompt": "ring it "}, {"prompt": "call me "}]
    trainer = trl.RLOOTrainer(
        tiny("llama"), reward, settings, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer()
    )
    theirs = trainer._generate_and_score_completions([row for row in rows for _ in range(4)])["advantages"]
    ours = rloo.advantages(torch.tensor(given).view(2, 4)).flatten()
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=0)

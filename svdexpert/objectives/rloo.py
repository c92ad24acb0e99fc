"""Policy gradient on the verifier's reward, each sample measured against the others of its context.

    A_i  = r_i - 1/(g-1) sum_{j != i} r_j            leave-one-out baseline
    loss = 1/g sum_i [ - A_i log p(y_i) + kl * sum_t (e^x_it - x_it - 1) ],   x_it = log p_base(y_it) / p(y_it)

Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740). The second term estimates the divergence from the base at
every token (Schulman 2020, "k3"). The token that ends a sample is one of its tokens. With `baseline="none"` and
`binary=True` it is the REINFORCE of Transformer^2 (Sun et al. 2025, arXiv:2501.06252).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svdexpert.errors import TrainingError
from svdexpert.objectives import Completions, Scored

COMPLETIONS: Completions = "samples"
REFERENCE = True
Baseline = Literal["leave-one-out", "none"]


def loss(scored: Scored, *, kl: float = 0.05, baseline: Baseline = "leave-one-out", binary: bool = False) -> Tensor:
    """Return the loss of every context (b); its gradient is the policy gradient's estimate.

    Args:
        scored: with samples, and what they are worth.
        kl: weight of the divergence from the base, in units of reward a nat.
        baseline: what a reward is measured against.
        binary: take +1 for rewards above 0, and -1 for all others.

    Raises:
        TrainingError: there are no rewards, or one sample a context, which leaves nothing to compare it with.
    """
    if scored.rewards is None:
        raise TrainingError("rloo learns from rewards: score samples with a skill's verify.")
    rewards = torch.where(scored.rewards > 0, 1.0, -1.0) if binary else scored.rewards
    x = -scored.log_ratios
    divergence = (x.exp() - x - 1).sum(-1)
    return (kl * divergence - advantages(rewards, baseline) * scored.policy.sum(-1)).mean(-1)


def advantages(rewards: Tensor, baseline: Baseline = "leave-one-out") -> Tensor:
    """Return rewards (b g) against the mean of the others of their context (b g)."""
    if baseline == "none":
        return rewards
    if rewards.shape[-1] < 2:
        raise TrainingError("A leave-one-out baseline needs at least two samples a context: set samples, or baseline.")
    # With all rewards equal the difference is 0 exactly, not a rounding: sums are taken of differences.
    differences: Tensor = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)  # (b g g)
    return differences.sum(-1) / (rewards.shape[-1] - 1)

"""Supervised fine-tuning on completions: the mean negative log-likelihood of the preferred completion's tokens.

    loss = - 1/|y| sum_t log p(y_t | x, y_<t)

The context x is not learnt. Every completion counts the same, however long it is.
"""

from __future__ import annotations

from torch import Tensor

from svdexpert.objectives import Completions, Scored

COMPLETIONS: Completions = "chosen"
REFERENCE = False


def loss(scored: Scored) -> Tensor:
    """Return the loss of every context (b), in nats a token."""
    return -(scored.policy.sum(-1) / scored.lengths).mean(-1)

"""Direct preference optimisation: the preferred completion w gains on the rejected one l, measured from the base.

    loss = - log sigmoid(beta * m) - sft_weight * log p(y_w) / |y_w|
    m    = log p(y_w) / p_base(y_w) - log p(y_l) / p_base(y_l)

Rafailov et al. 2023 (arXiv:2305.18290). The second term is that of Pang et al. 2024 (arXiv:2404.19733): without it the
preferred completion may lose probability as long as the rejected one loses more.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from svdexpert.errors import TrainingError
from svdexpert.objectives import Completions, Scored

COMPLETIONS: Completions = "pair"
REFERENCE = True


def loss(scored: Scored, *, beta: float = 0.1, sft_weight: float = 0.0) -> Tensor:
    """Return the loss of every context (b), in nats.

    Args:
        scored: with the preferred completion first and the rejected one second.
        beta: how strongly the base holds, above 0; the optimum moves log-odds by rewards over beta.
        sft_weight: of the preferred completion's mean negative log-likelihood, at least 0.

    Raises:
        TrainingError: beta is 0.
    """
    if beta <= 0:
        raise TrainingError(f"dpo: beta is {beta}; expected a number above 0.")
    preferred, rejected = scored.log_ratios.sum(-1).unbind(-1)
    likelihood = scored.policy[:, 0].sum(-1) / scored.lengths[:, 0]
    return -logsigmoid(beta * (preferred - rejected)) - sft_weight * likelihood

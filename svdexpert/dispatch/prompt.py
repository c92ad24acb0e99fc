"""Prompt: the base itself labels the context, asked in a prompt of its own (Transformer^2, arXiv:2501.06252, A).

    score of a label = log p(label | the question about this context) - log p(label | the question about no context)

Published: the model writes a label, which is searched for in its text. Here the labels' log-probabilities decide, less
what the base prefers whatever it is asked (contextual calibration, Zhao et al. 2021, arXiv:2102.09690). It costs a pass
over a second prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from svdexpert.decision import Asked, Context, Decision
from svdexpert.dispatch import NOBODY, Example, Labelling, label_scores, labelled, labelling, meanings, stamp
from svdexpert.errors import DispatchError
from svdexpert.expert import Expert
from svdexpert.model import SpectralModel
from svdexpert.worlds import user

CHOOSES = False  # nothing on validation examples


@dataclass(frozen=True, eq=False)
class Prompt(Labelling):
    """The base labels the context.

    Attributes:
        prior: log-probabilities of the answers about no context (l).
    """

    prior: Tensor = field(repr=False)
    strategy: ClassVar[str] = "prompt"

    def decide(self, model: SpectralModel, asked: Asked) -> list[Decision]:
        """Return a decision for every row: the likeliest label."""
        with model.using(None):
            return labelled(self.experts, self.scores(model, asked) - self.prior, "asked the base")

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file holds."""
        return self.card(), {"prior": self.prior}


def restored(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Prompt:
    """Return what was stored."""
    labels, nobody, made_for = labelling(card)
    if tensors["prior"].shape != (len(labels) + 1,):
        raise ValueError(f"prior {tuple(tensors['prior'].shape)} of {len(labels)} labels")
    return Prompt(labels, nobody, made_for, tensors["prior"])


def fit(
    model: SpectralModel,
    library: Mapping[str, Expert],
    examples: Sequence[Example],
    validation: Sequence[Example],
    *,
    labels: Mapping[str, str] | None = None,
    nobody: str = "anything else",
) -> Prompt:
    """Return a dispatcher that asks the base; examples are not needed for it.

    Args:
        model: attached.
        library: the experts that it may let speak.
        examples: not read.
        validation: not read.
        labels: what each expert is for, by name; the names alone if None.
        nobody: what the answer `none` means.

    Raises:
        DispatchError: a label for an expert that is not there, an expert without one.
    """
    given = meanings(library, labels)
    with model.using(None):
        prior = label_scores(model, [Context((user("..."),))], {**given, NOBODY: nobody})[0]
    if not bool(torch.isfinite(prior).all()):
        raise DispatchError("The base gives some label no probability at all: use other names for the experts.")
    return Prompt(given, nobody, stamp(model, tuple(library), library), prior)

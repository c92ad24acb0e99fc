"""How to learn it. An objective is one file of this folder: a pure function of the log-probabilities of completions.

    Scored    b contexts with g completions each: log-probabilities of their tokens, in training and of the base (b g t)
    loss      loss(scored, **settings) -> (b), one value a context, in nats; a batch's loss is the mean over contexts

An objective module offers

    COMPLETIONS: "chosen" | "pair" | "samples"     what the g completions of a context are
    REFERENCE: bool                                whether it reads the base's log-probabilities
    def loss(scored, *, ...) -> Tensor             its keyword arguments are its settings, with their defaults

"chosen": the preferred completion alone (g = 1). "pair": preferred, rejected (g = 2). "samples": g completions drawn
from the model in training at temperature 1, with the reward of each.

The folder is the registry, and `load("my_package.my_objective")` takes one from anywhere on the import path,
`load("folder/my_objective.py")` from a file.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args, get_type_hints

import torch
from torch import Tensor

from svdexpert.errors import TrainingError, did_you_mean
from svdexpert.registry import member, members

Completions = Literal["chosen", "pair", "samples"]


@dataclass(frozen=True, eq=False)
class Scored:
    """Log-probabilities of completions, in nats; those of what is no token of a completion are 0.

    Attributes:
        policy: of every token under the mixture in training (b g t); gradients flow through it.
        base: of every token under the base, without gradient (b g t); None unless the objective reads it.
        mask: True where a token of a completion stands, the one that ends the turn included (b g t).
        rewards: what every sample is worth, in [-1, 1] (b g); None unless completions are samples.
    """

    policy: Tensor
    base: Tensor | None
    mask: Tensor
    rewards: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of every completion, at least 1 (b g)."""
        return self.mask.sum(-1).clamp(min=1)

    @property
    def log_ratios(self) -> Tensor:
        """log p(token) - log p_base(token) (b g t)."""
        if self.base is None:
            raise TrainingError("This objective reads the base's log-probabilities: it must set REFERENCE to True.")
        return self.policy - self.base


class Objective(Protocol):
    """What an objective module offers; see the top of this file."""

    COMPLETIONS: Completions
    REFERENCE: bool
    loss: Callable[..., Tensor]


def names() -> list[str]:
    """Return the names of the objectives that ship."""
    return members(sys.modules[__name__])


def load(name: str) -> Objective:
    """Return an objective by the name of its file here, or one's own by the path of a file or by import path.

    Raises:
        TrainingError: there is no such objective, or the module lacks a part of one.
    """
    module = member(sys.modules[__name__], "objective", name, ("COMPLETIONS", "REFERENCE", "loss"), TrainingError)
    return cast(Objective, module)


def settings_of(objective: Objective, given: Mapping[str, Any], samples: int = 2) -> dict[str, Any]:
    """Return all settings of an objective: its defaults, and what is given instead.

    Args:
        objective: which.
        given: by name.
        samples: completions of a context, where it learns from samples.

    Raises:
        TrainingError: an unknown setting, a number that is not finite or negative, what the objective itself refuses.
    """
    parameters = [one for one in inspect.signature(objective.loss).parameters.values() if one.kind is one.KEYWORD_ONLY]
    settings = {one.name: one.default for one in parameters}
    name = getattr(objective, "__name__", "the objective").rpartition(".")[2]
    kinds = get_type_hints(objective.loss)
    for key, value in given.items():
        if key not in settings:
            raise TrainingError(f"{name} has no setting {key!r}.{did_you_mean(key, settings)}")
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise TrainingError(f"{name}: {key} is {value}; expected a finite number of at least 0.")
        if isinstance(value, str) and value not in get_args(kinds[key]):
            raise TrainingError(f"{name}: {key} is {value!r}.{did_you_mean(value, get_args(kinds[key]))}")
    settings |= given
    g = {"chosen": 1, "pair": 2, "samples": samples}[objective.COMPLETIONS]
    nothing = torch.zeros(1, g, 1)
    objective.loss(Scored(nothing, nothing, nothing == 0, torch.zeros(1, g)), **settings)  # it may refuse them
    return settings

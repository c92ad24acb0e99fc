"""Fixed: the same weights in every context. What a dispatcher has to beat.

    none     nobody speaks: the base
    uniform  every expert at 1 / e
    sum      every expert at 1, always on
    best     the single expert that suits most of the examples

Or weights by name. Published work on dispatch leaves these out (research notes); with experts that were trained to
compose, the always-on sum is a strong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from svdexpert.decision import Asked, Decision, present
from svdexpert.dispatch import Example, finite_weights
from svdexpert.errors import DispatchError
from svdexpert.expert import Expert
from svdexpert.mixture import Bank
from svdexpert.model import SpectralModel

CHOOSES = False  # nothing on validation examples
RULES = ("none", "uniform", "sum", "best")


@dataclass(frozen=True)
class Fixed:
    """The same weights in every context.

    Attributes:
        weights: by expert.
        because: where they come from.
    """

    weights: Mapping[str, float]
    because: str = "given"
    reads: ClassVar[bool] = False
    strategy: ClassVar[str] = "fixed"

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that it may let speak."""
        return tuple(self.weights)

    def check(self, model: SpectralModel, library: Mapping[str, Expert] | Bank) -> None:
        """Raise a DispatchError unless the library holds its experts."""
        present(self.experts, library)

    def decide(self, model: SpectralModel, asked: Asked) -> list[Decision]:
        """Return the same decision for every row."""
        return [Decision(self.weights, 1.0, self.because) for _ in asked.ids]

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file holds."""
        return {"weights": dict(self.weights), "because": self.because}, {}


def fit(
    model: SpectralModel,
    library: Mapping[str, Expert],
    examples: Sequence[Example],
    validation: Sequence[Example],
    *,
    rule: str = "sum",
) -> Fixed:
    """Return fixed weights by a rule (see the top of this file).

    Raises:
        DispatchError: there is no such rule.
    """
    names = tuple(library)
    if rule not in RULES:
        raise DispatchError(f"rule is {rule!r}; there are: {', '.join(RULES)}.")
    if rule == "best":
        suits = {name: sum(one.wanted == {name} for one in (*examples, *validation)) for name in names}
        return Fixed({max(names, key=lambda name: suits[name]): 1.0}, "rule best")
    weight = {"none": 0.0, "uniform": 1 / len(names), "sum": 1.0}[rule]
    return Fixed(dict.fromkeys(names, weight), f"rule {rule}")


def restored(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Fixed:
    """Return what was stored."""
    return Fixed(finite_weights(card["weights"]), str(card["because"]))

"""Who speaks in a conversation: what a dispatcher is asked, and what it answers.

    contexts --dispatcher--> a Decision each: weights of experts --bank--> the mixture of every row

`SpectralModel.generate(dispatcher=...)` asks for a decision once a call and holds it for all tokens of the reply. The
dispatchers themselves stand in `svdexpert.dispatch`; any object that offers what `Dispatcher` does is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from svdexpert.errors import DispatchError, did_you_mean
from svdexpert.expert import Expert
from svdexpert.mixture import Bank
from svdexpert.worlds import Message, Tool


@dataclass(frozen=True)
class Context:
    """A conversation in which the assistant speaks next.

    Attributes:
        messages: as of `apply_chat_template`, the last one not the assistant's.
        tools: JSON schemas of functions.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Which experts speak in one row, and why.

    Attributes:
        weights: by expert; an expert that is not named has weight 0.
        confidence: in [0, 1]: how sure the dispatcher is of this set of experts; 1 where it was told.
        because: what it was based on, in words.
        scores: by expert, in [0, 1]: how well each fits, where the strategy knows.
        alone: by expert: its weight where it speaks alone, where the strategy knows it.
    """

    weights: Mapping[str, float]
    confidence: float
    because: str
    scores: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)

    @property
    def abstained(self) -> bool:
        """No expert speaks: the reply is the base's."""
        return not any(self.weights.values())

    @property
    def chosen(self) -> frozenset[str]:
        """Experts with a weight of at least one half."""
        return frozenset(name for name, weight in self.weights.items() if weight >= 0.5)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        by_expert = {"weights": dict(self.weights), "scores": dict(self.scores), "alone": dict(self.alone)}
        return asdict(self) | by_expert | {"abstained": self.abstained}


@dataclass(frozen=True, eq=False)
class Asked:
    """The rows of one generate call.

    Attributes:
        contexts: what they say (b); None where the caller passed texts or token ids.
        ids: (b t), padded on the left.
        seen: 1 where a token stands (b t).
        state: what the base has in mind at their last token, as it enters the last layer and the output head, side by
            side (b d); None for a dispatcher that does not read it.
    """

    contexts: Sequence[Context] | None
    ids: Tensor
    seen: Tensor
    state: Tensor | None = None


class Dispatcher(Protocol):
    """What decides who speaks."""

    @property
    def reads(self) -> bool:
        """Whether it needs `Asked.state`, and so decides at the end of the prompt's own forward pass."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that it may let speak."""

    def check(self, model: Any, library: Mapping[str, Expert] | Bank) -> None:
        """Raise a DispatchError unless it can decide for this model and these experts."""

    def decide(self, model: Any, asked: Asked) -> Sequence[Decision]:
        """Decide for every row by itself: what else is in the batch must not matter.

        Args:
            model: the `SpectralModel` that will speak.
            asked: the rows.
        """


def weights_of_rows(decisions: Sequence[Decision], names: Sequence[str]) -> Tensor:
    """Return the weights (b e) of decisions, experts in the order of `names`.

    Raises:
        DispatchError: a weight that is not finite, or of an expert that is not there.
    """
    rows = []
    for place, one in enumerate(decisions):
        for name, weight in one.weights.items():
            if name not in names:
                raise DispatchError(
                    f"Row {place} was given to the expert {name!r}, which the library does not hold."
                    + did_you_mean(name, names)
                )
            if not math.isfinite(weight):
                raise DispatchError(f"Row {place}: the weight of {name!r} is {weight}; a dispatcher gives finite ones.")
        rows.append([float(one.weights.get(name, 0.0)) for name in names])
    return torch.tensor(rows)


def present(experts: Sequence[str], library: Mapping[str, Expert] | Bank) -> None:
    """Check that a library holds what a dispatcher may ask for.

    Raises:
        DispatchError: it is empty, or lacks one; the base stays usable.
    """
    names = library.names if isinstance(library, Bank) else tuple(library)
    if not names:
        raise DispatchError("The library holds no experts: there is nobody to dispatch to. Train or add one first.")
    for name in experts:
        if name not in names:
            raise DispatchError(
                f"The dispatcher may call on {name!r}, which the library does not hold (it has {', '.join(names)})."
                + did_you_mean(name, names)
            )

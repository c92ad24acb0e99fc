"""Classify: as `prompt`, but an expert vector trained for it labels the context (Transformer^2, strategy B).

The classification expert learns, by SFT on the examples, to answer the question with the name of the expert that a
context wants, or `none`; a context that wants several is one example for each.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

from torch import Tensor

from svdexpert.decision import Asked, Decision
from svdexpert.dispatch import NOBODY, Example, Labelling, labelled, labelling, meanings, question, quoted, stamp
from svdexpert.expert import Core, Expert
from svdexpert.mixture import Mixture
from svdexpert.model import SpectralModel
from svdexpert.recipe import Recipe
from svdexpert.training import train

CHOOSES = False  # nothing on validation examples


@dataclass(frozen=True, eq=False)
class Classify(Labelling):
    """An expert vector labels the context.

    Attributes:
        offsets: of the classification expert, on the basis of that base (n).
        invocation: tokens from which it acts.
        core, reach: as in its recipe.
    """

    offsets: Tensor = field(repr=False)
    invocation: tuple[int, ...]
    core: Core = "diag"
    reach: int = 0
    strategy: ClassVar[str] = "classify"

    def decide(self, model: SpectralModel, asked: Asked) -> list[Decision]:
        """Return a decision for every row: the likeliest label."""
        with model.using(Mixture(self.offsets, self.core, model.basis, self.invocation, self.reach)):
            return labelled(self.experts, self.scores(model, asked), "asked a classification expert")

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file holds."""
        how = {"invocation": list(self.invocation), "core": self.core, "reach": self.reach}
        return self.card() | how, {"offsets": self.offsets}


def restored(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Classify:
    """Return what was stored."""
    labels, nobody, made_for = labelling(card)
    core = card.get("core", "diag")
    if core not in get_args(Core):
        raise ValueError(f"core {core!r}")
    how = (tuple(map(int, card["invocation"])), core, int(card.get("reach", 0)))
    return Classify(labels, nobody, made_for, tensors["offsets"], *how)


def fit(
    model: SpectralModel,
    library: Mapping[str, Expert],
    examples: Sequence[Example],
    validation: Sequence[Example],
    *,
    labels: Mapping[str, str] | None = None,
    nobody: str = "anything else",
    recipe: Recipe | None = None,
    progress: bool = False,
) -> Classify:
    """Train the classification expert.

    Args:
        model: attached.
        library: the experts that it may let speak.
        examples: that it learns from.
        validation: not read.
        labels: what each expert is for, by name; the names alone if None.
        nobody: what the answer `none` means.
        recipe: how it is trained; 200 steps at rate 0.03 if None.
        progress: show a progress bar on stderr.

    Raises:
        DispatchError: a label for an expert that is not there, an expert without one.
        TrainingError: the run must not go on.
    """
    given = meanings(library, labels)
    rows = [
        {
            "prompt": [question(quoted(one.context), {**given, NOBODY: nobody})],
            "completion": [{"role": "assistant", "content": name}],
            "tools": list(one.context.tools),
        }
        for one in examples
        for name in (sorted(one.wanted) or [NOBODY])
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "labels.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        recipe = recipe or Recipe(steps=200, learning_rate=0.03, accumulate=2)
        try:
            expert = train(model, str(file), "sft", recipe=recipe, progress=progress)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("of a classification expert nothing is kept before it is finished") from error
    offsets = expert.flat(model.basis)
    how = (expert.invocation, expert.core, expert.reach)
    return Classify(given, nobody, stamp(model, tuple(library), library), offsets, *how)

"""LoRA adapters in one batch, another mixture of them in every row: what PEFT cannot train, as a peer of ours.

    y = W x + sum_e a[row, e] B_e A_e x        A_e (r i), B_e (o r), alpha = r

A mixture of rows is computed adapter by adapter, so its cost grows with their number. Behind contexts that the base has
read, the adapters act from the reply on, as our experts do (aLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from svdexpert import Recipe, SpectralModel
from svdexpert.batches import Neutral
from svdexpert.forward import Contexts
from svdexpert.layers import Scope
from svdexpert.training import ExpertModule, Run, Task, fit, trainer_of
from svdexpert.worlds import World


@dataclass(frozen=True, eq=False)
class LoraMixture:
    """Weights of the rows (b e), or of all rows (1 e), and the numbers of all adapters (e n)."""

    weights: Tensor
    numbers: Tensor

    def items(self) -> list[tuple[str, float]]:
        """Return which adapters speak at what weight, as results name them."""
        return [(f"adapter {place}", weight) for place, weight in enumerate(self.weights[0].tolist()) if weight]

    def __add__(self, other: LoraMixture) -> LoraMixture:
        return LoraMixture(self.weights + other.weights, self.numbers)

    def repeated(self, times: int) -> LoraMixture:
        return LoraMixture(self.weights.repeat_interleave(times, 0), self.numbers)


class LoraBank:
    """A model with a bank of LoRA adapters, where the library takes a SpectralModel.

    Args:
        model: whose adapted matrices get adapters; its own experts stay out of force.
        rank: of every adapter.
    """

    def __init__(self, model: SpectralModel, rank: int) -> None:
        self.spectral, self.hf, self.basis, self.tokenizer = model, model.hf, model.basis, model.tokenizer
        self._scope = Scope()
        self.rank = rank
        self.mixture: LoraMixture | None = None
        self.places: dict[str, slice] = {}
        shapes = dict(zip(model.basis.names, (one.shape for one in model.basis.key.matrices.values()), strict=True))
        start = 0
        for name, (o, i) in shapes.items():
            self.places[name] = slice(start, start + rank * (o + i))
            start += rank * (o + i)
        self.shapes, self.size = shapes, start
        self.hooks = [
            model.hf.get_submodule(name).register_forward_hook(self._hook(name, shape))
            for name, shape in shapes.items()
        ]

    def fresh(self, experts: int, seed: int) -> Tensor:
        """Return numbers of new adapters (e n): A uniform as in Linear, B zero."""
        draw = torch.Generator().manual_seed(seed)
        numbers = torch.zeros(experts, self.size)
        for name, (_, i) in self.shapes.items():
            start = self.places[name].start
            bound = 1 / math.sqrt(i)
            numbers[:, start : start + self.rank * i].uniform_(-bound, bound, generator=draw)
        return numbers

    @contextmanager
    def using(self, experts: Any, library: Any = None) -> Iterator[LoraBank]:
        before, self.mixture = self.mixture, experts
        try:
            yield self
        finally:
            self.mixture = before

    def _hook(self, name: str, shape: tuple[int, ...]) -> Any:
        o, i = shape

        def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if self.mixture is None:
                return output
            numbers = self.mixture.numbers[:, self.places[name]]
            a = rearrange(numbers[:, : self.rank * i], "e (r i) -> e r i", i=i)
            b = rearrange(numbers[:, self.rank * i :], "e (o r) -> e o r", o=o)
            h = einsum(inputs[0], a, "b t i, e r i -> b t e r") * self.mixture.weights[:, None, :, None]
            return output + cast(Tensor, einsum(h, b, "b t e r, e o r -> b t o"))

        return add

    def close(self) -> None:
        """Take the adapters off."""
        for one in self.hooks:
            one.remove()


class LoraModule(ExpertModule):
    """Adapters of a bank in training, where the library trains offsets: the same rows, mixtures and loss."""

    def __init__(
        self,
        bank: LoraBank,
        tasks: Sequence[Task],
        objective: str,
        recipe: Recipe,
        neutrals: Sequence[Neutral],
        folder: Path,
        contexts: Contexts,
    ) -> None:
        how: dict[str, Any] = {"invocation": contexts.invocation, "contexts": contexts}
        super().__init__(bank.spectral, tasks, {}, objective, recipe, neutrals, folder, **how)
        self.model = cast(SpectralModel, bank)
        self.offsets = nn.Parameter(bank.fresh(len(tasks), recipe.seed))
        self.frozen, self.scale = torch.zeros(0, bank.size), torch.zeros(bank.size)

    def mixture(self, weights: Sequence[Sequence[float]]) -> Any:
        return LoraMixture(torch.tensor(weights, device=self.device), self.offsets)


def train_bank(
    bank: LoraBank, skills: Sequence[str], objective: str, recipe: Recipe, world: World, contexts: Contexts
) -> Mapping[str, LoraMixture]:
    """Return an adapter for every skill, trained in one batch as our libraries are."""
    run = Run(
        model=bank.spectral,
        skills=skills,
        objective=objective,
        recipe=recipe,
        world=world,
        against={},
        out=None,
        progress=False,
    )
    tasks = run.tasks(contexts)
    with TemporaryDirectory() as folder:
        neutrals = run.neutrals(tasks, contexts)
        module = LoraModule(bank, tasks, objective, recipe, neutrals, Path(folder), contexts)
        fit(module, trainer_of(Path(folder), recipe, {}, progress=False), Path(folder))
    numbers, alone = module.offsets.detach(), torch.eye(len(tasks))
    return {task.name: LoraMixture(alone[place : place + 1], numbers) for place, task in enumerate(tasks)}

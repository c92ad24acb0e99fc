"""Mixtures: what the rows of a batch speak with, as weights over experts and as the vector they add up to.

mixture of a row:  d = sum_e a_e d_e              (n), a vector: its cost does not grow with the number of experts
of a batch:        einsum("b e, e n -> b n")      another mixture in every row, in one forward pass
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum, repeat
from torch import Tensor

from svdexpert.basis import Basis
from svdexpert.errors import MixtureError, did_you_mean
from svdexpert.expert import Core, Expert

Blend = Expert | str | Mapping[str, float] | None
"""One mixture: an expert, the name of one, weights by name, or nothing (the base)."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """The offsets of one call: the same for all rows (n), one a row (b n), or one a token (b t n).

    Gradients flow through it into whatever the offsets were computed from.

    Attributes:
        offsets: fp32, all matrices side by side in the order of the basis.
        core: of the experts that were mixed.
        basis: that they are for; None, for offsets of one's own, leaves that to the caller.
        invocation: tokens from whose last occurrence on the experts act; () is everywhere.
        reach: tokens of a reply that the experts decide on; 0 is all.
    """

    offsets: Tensor
    core: Core = "diag"
    basis: Basis | None = None
    invocation: tuple[int, ...] = ()
    reach: int = 0

    @property
    def rows(self) -> int | None:
        return None if self.offsets.dim() == 1 else self.offsets.shape[0]

    def repeated(self, times: int) -> Mixture:
        """Return every row `times` times in succession, as Hugging Face expands inputs for beams and sequences."""
        if times == 1 or self.rows is None:
            return self
        return replace(self, offsets=repeat(self.offsets, "b ... n -> (b times) ... n", times=times))


@dataclass(frozen=True, eq=False)
class Bank:
    """Experts of one basis stacked for mixing; any number of them costs the same per forward pass.

    Attributes:
        names: of the experts (e).
        offsets: fp32 (e n).
        core: of all of them.
        basis: that they are for.
        invocation, reach: of all of them.
    """

    names: tuple[str, ...]
    offsets: Tensor
    core: Core
    basis: Basis
    invocation: tuple[int, ...] = ()
    reach: int = 0

    @classmethod
    def of(cls, experts: Mapping[str, Expert], basis: Basis) -> Bank:
        """Stack experts.

        Args:
            experts: by name, at least one.
            basis: that they are for.

        Raises:
            MismatchError: one of them is for another basis, or has another core, invocation or reach than the first.
            MixtureError: there are none.
        """
        if not experts:
            raise MixtureError("A bank needs at least one expert.")
        first = next(iter(experts.values()))
        for name, expert in experts.items():
            expert.check_on(basis, like=first, who=name)
        flat = torch.stack([expert.flat(basis) for expert in experts.values()])
        return cls(tuple(experts), flat, first.core, basis, first.invocation, first.reach)

    def mix(self, weights: Mapping[str, float] | Sequence[Blend] | Tensor) -> Mixture:
        """Return the mixture with these weights.

        Args:
            weights: by name, for all rows; a sequence of names, weights by name or None, one a row; or a tensor in the
                order of `names`: (e) for all rows, (b e) by row, (b t e) by token.

        Raises:
            MixtureError: an unknown name, a weight that is not finite, a tensor of another width.
        """
        if isinstance(weights, Tensor):
            if weights.dim() not in (1, 2, 3) or weights.shape[-1] != len(self.names):
                raise MixtureError(
                    f"Weights have shape {tuple(weights.shape)}; for {len(self.names)} experts they are (e), (b e) or "
                    f"(b t e) with e = {len(self.names)}."
                )
            if not torch.isfinite(weights).all():
                raise MixtureError("Weights hold NaN or infinite values.")
            table = weights.to(self.offsets.device, torch.float32)
        elif isinstance(weights, Mapping):
            table = torch.tensor(self._row(weights), device=self.offsets.device)
        else:
            table = torch.tensor([self._row(row) for row in weights], device=self.offsets.device)
        offsets = einsum(table, self.offsets, "... e, e n -> ... n")
        return Mixture(offsets, self.core, self.basis, self.invocation, self.reach)

    def _row(self, blend: Blend) -> list[float]:
        if isinstance(blend, Expert):
            raise MixtureError("A row of a bank names its experts; to mix expert values, leave the library out.")
        wanted = weights_of(blend)
        for name, weight in wanted.items():
            if name not in self.names:
                raise MixtureError(f"There is no expert {name!r}." + did_you_mean(name, self.names))
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise MixtureError(f"The weight of {name!r} is {weight!r}; it is a finite number.")
        return [float(wanted.get(name, 0.0)) for name in self.names]


def weights_of(blend: Blend) -> Mapping[str, float]:
    """Return weights by name; the base is no weights."""
    if blend is None:
        return {}
    if isinstance(blend, str):
        return {blend: 1.0}
    if isinstance(blend, Mapping):
        return blend
    raise MixtureError(f"A mixture is an expert, a name, weights by name or None, not {type(blend).__name__}.")

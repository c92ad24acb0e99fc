"""The adapted linear layer: what an expert does to one matrix, for one mixture, for one a row, for one a token.

               x (b t i)
               |       \\
               |        V (i k)                 right singular vectors
               |         |
             W (o i)     * c                    coefficients of the call: s * d, of shape (k), (b 1 k) or (b t k)
               |         |
               |        U^T (k o)               left singular vectors
               |       /
    delta:     y = W x + U (c * (V^T x))        c = s * d: no c, or c = 0, is the base bit for bit
    factored:  y = U (c * (V^T x)) + bias       c = s * (1 + d), k = r: W is not read while a mixture is active

A dense core multiplies by C (k k), (b k k) or (b t k k) where the diagonal one scales by c.

An adapted module keeps its weight, its name and its place; only its class becomes a subclass of its own class, with
this forward. That leaves checkpoints, `isinstance`, accelerate's device hooks, deepcopy and torch.compile as they were,
costs no call per layer, and is undone by giving the class back. (A model cannot be pickled while it is attached.)

Which coefficients apply belongs to the call, not to the module: they sit in a `Scope`, one value a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from svdexpert.basis import Factors
from svdexpert.errors import MixtureError

Form = Literal["delta", "factored"]


class Scope(threading.local):
    """The coefficients in force in this thread: one tensor a matrix, or None for the base.

    A threading.local, because torch.compile traces it without a graph break; a ContextVar would break the graph in
    every layer. A copied model gets a scope of its own, shared by its modules.

    Attributes:
        coefficients: by position of the matrix in the basis; diagonal (k), (b 1 k), (b t k), or dense with (k k) last.
        dense: whether they belong to a dense core.
        mixture: what they were made from, for calls that ask which mixture is in force.
    """

    coefficients: tuple[Tensor, ...] | None = None
    dense: bool = False
    mixture: Any = None

    def __reduce__(self) -> tuple[type[Scope], tuple[()]]:
        return Scope, ()

    @contextmanager
    def entered(self, coefficients: tuple[Tensor, ...] | None, dense: bool, mixture: Any) -> Iterator[None]:
        """Put coefficients in force for the body, in this thread; what held before holds again after it."""
        before = self.coefficients, self.dense, self.mixture
        self.coefficients, self.dense, self.mixture = coefficients, dense, mixture
        try:
            yield
        finally:
            self.coefficients, self.dense, self.mixture = before


class _Adapted:
    """What `adapt` adds in front of a module's own class. `v`, `u_t` are buffers, so they follow `.to()`."""

    _svd_scope: Scope
    _svd_position: int
    _buffers: dict[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self._svd_scope.coefficients
        y: Tensor = super().forward(x)  # type: ignore[misc]
        if coefficients is None:
            return y
        h = self._project(x, coefficients[self._svd_position])  # (b t k)
        u_t = self._buffers["_svd_u_t"]
        if y.dtype is u_t.dtype and h.dtype is u_t.dtype and y.is_contiguous():
            # In place: no second (b t o) in memory.
            y.view(-1, u_t.shape[1]).addmm_(h.view(-1, u_t.shape[0]), u_t)
            return y
        return y + torch.matmul(h, u_t).to(y.dtype)  # under autocast the dtypes differ

    def _project(self, x: Tensor, c: Tensor) -> Tensor:
        """V^T x, scaled by the coefficients (b t k)."""
        h = torch.matmul(x, self._buffers["_svd_v"])
        if h.dtype is not torch.float32:
            # Half precision may overflow here where W x does not; inf * 0 must not reach a row that has no offset.
            # (In fp32 that takes activations beyond 1e37; the check would cost every decode step.)
            h = h.nan_to_num()
        if c.dtype is not h.dtype:
            c = c.to(h.dtype)
        return _scaled(h, c, self._svd_scope.dense)


class _AdaptedFactored(_Adapted):
    def forward(self, x: Tensor) -> Tensor:
        coefficients = self._svd_scope.coefficients
        if coefficients is None:
            return super(_Adapted, self).forward(x)  # type: ignore[misc, no-any-return]
        h = self._project(x, coefficients[self._svd_position])
        bias = cast(Any, self).bias
        y = torch.matmul(h, self._buffers["_svd_u_t"])
        return y if bias is None else y + bias


def _scaled(h: Tensor, c: Tensor, dense: bool) -> Tensor:
    """Scale h (b t k), or (b*t k) where a model flattens its tokens, by coefficients for all, by row or by token."""
    if not dense and c.dim() == h.dim() == 3 and c.shape[0] == h.shape[0] and c.shape[1] in (1, h.shape[1]):
        return h * c if torch.is_grad_enabled() else h.mul_(c)
    if c.dim() == (2 if dense else 1):
        return torch.matmul(h, c.mT) if dense else h * c
    rows, tokens = c.shape[0], c.shape[1] if c.dim() == (4 if dense else 3) else 1
    flat = h.dim() == 2
    if flat:
        if h.shape[0] % rows:
            raise MixtureError(f"The mixture has {rows} rows; the batch has {h.shape[0]} tokens, not a multiple of it.")
        h = h.view(rows, -1, h.shape[-1])
    if h.shape[0] != rows or tokens not in (1, h.shape[1]):
        raise MixtureError(
            f"The mixture is for {rows} rows{f' of {tokens} tokens' if tokens > 1 else ''}; "
            f"the batch has {h.shape[0]} rows of {h.shape[1]} tokens."
        )
    if not dense:
        h = h * c
    elif c.dim() == 3:
        h = torch.matmul(h, c.mT)
    else:
        h = torch.matmul(h.unsqueeze(-2), c.mT).squeeze(-2)
    return h.flatten(0, 1) if flat else h


_classes: dict[tuple[type[nn.Module], Form], type[nn.Module]] = {}


def adapted_class(original: type[nn.Module], form: Form) -> type[nn.Module]:
    """Return the subclass of a module class that applies experts; one for each class and form."""
    key = (original, form)
    if key not in _classes:
        mixin = _Adapted if form == "delta" else _AdaptedFactored
        _classes[key] = type(f"Spectral{original.__name__}", (mixin, original), {"_svd_original": original})
    return _classes[key]


def is_adapted(module: nn.Module) -> bool:
    """Whether experts act on this module."""
    return isinstance(module, _Adapted)


def adapt(module: nn.Module, factors: Factors, scope: Scope, position: int, form: Form) -> None:
    """Let experts act on a module; `restore` undoes it.

    Args:
        module: an nn.Linear or Conv1D; its weight is not touched.
        factors: of its weight. Copies in the weight's dtype are put on its device.
        scope: where the coefficients of a call are found.
        position: of the matrix in the basis.
        form: "delta" or "factored".
    """
    weight, device = cast(Tensor, module.weight), device_of(module)
    with torch.inference_mode(False):  # buffers made in inference mode could not take part in training later
        for name, factor in (("_svd_v", factors.v), ("_svd_u_t", factors.u_t)):
            module.register_buffer(name, factor.to(device, weight.dtype), persistent=False)
    state = cast(Any, module)
    state._svd_scope, state._svd_position = scope, position
    _set_class(module, adapted_class(type(module), form))


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes: where its weight is, or where accelerate will bring it."""
    weight = cast(Tensor, module.weight)
    return torch.device(cast(Any, module)._hf_hook.execution_device) if weight.is_meta else weight.device


def restore(module: nn.Module) -> None:
    """Give a module its own class back and drop everything that `adapt` added."""
    if not is_adapted(module):
        return
    _set_class(module, cast(Any, type(module))._svd_original)
    del module._svd_v, module._svd_u_t, module._svd_scope, module._svd_position


def _set_class(module: nn.Module, to: type[nn.Module]) -> None:
    module.__class__ = to
    if "_old_forward" in module.__dict__:  # accelerate's hooks call the forward they found when they were put on
        cast(Any, module)._old_forward = MethodType(cast(Any, to).forward, module)

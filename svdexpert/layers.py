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

Activated experts act from the last occurrence of their invocation tokens on, as aLoRA does (Greenewald et al. 2025,
arXiv:2504.12397); before it, and so in the cache of the context, every token is the base's. With a reach they decide on
that many tokens of the reply, and what follows is the base's again.

An adapted module keeps its weight, its name and its place; only its class becomes a subclass of its own class, with
this forward. That leaves checkpoints, `isinstance`, accelerate's device hooks, deepcopy and torch.compile as they were,
costs no call per layer, and is undone by giving the class back. (A model cannot be pickled while it is attached.)

Which coefficients apply belongs to the call, not to the module: they sit in a `Scope`, one value a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from svdexpert.basis import Factors
from svdexpert.errors import MixtureError

Form = Literal["delta", "factored"]


@dataclass(frozen=True, eq=False)
class Active:
    """Where activated experts act in one forward pass.

    Attributes:
        rows: of the batch.
        tokens: of a row.
        start: the first token at which any row is active.
        mask: True where a row is active (b t 1), of the tokens from `start` to `end`; None where all are.
        end: the token behind the last one at which any row is active.
    """

    rows: int
    tokens: int
    start: int
    mask: Tensor | None
    end: int


Pending = Callable[[Tensor, dict[str, Any], Any], Any]
"""Takes the hidden states that prompts end in (b d), the arguments and the output of the model; returns the output."""


class Scope(threading.local):
    """The coefficients in force in this thread: one tensor a matrix, or None for the base.

    A threading.local, because torch.compile traces it without a graph break; a ContextVar would break the graph in
    every layer. A copied model gets a scope of its own, shared by its modules.

    Attributes:
        coefficients: by position of the matrix in the basis; diagonal (k), (b 1 k), (b t k), or dense with (k k) last.
        dense: whether they belong to a dense core.
        mixture: what they were made from, for calls that ask which mixture is in force.
        active: where activated experts act in the forward pass that runs; None is everywhere.
        pending: what decides on the mixture, once the next forward pass of the model has read the prompt.
        states: of that pass, the hidden states of the last token (b d), as they enter the last layer and the head.
        reply: where the replies of the forward pass that runs begin, for experts with a reach.
    """

    coefficients: tuple[Tensor, ...] | None = None
    dense: bool = False
    mixture: Any = None
    active: Active | None = None
    pending: Pending | None = None
    states: tuple[Tensor, ...] = ()
    reply: int = 0

    def __reduce__(self) -> tuple[type[Scope], tuple[()]]:
        return Scope, ()

    @contextmanager
    def entered(
        self, coefficients: tuple[Tensor, ...] | None, dense: bool, mixture: Any, active: Active | None = None
    ) -> Iterator[None]:
        """Put coefficients in force for the body, in this thread; what held before holds again after it."""
        before = self.coefficients, self.dense, self.mixture, self.active, self.pending
        self.coefficients, self.dense, self.mixture, self.active = coefficients, dense, mixture, active
        self.pending = None
        try:
            yield
        finally:
            self.coefficients, self.dense, self.mixture, self.active, self.pending = before
            self.states = ()


NOT_YET = Active(0, 0, 0, None, 0)
"""In force until the model has seen which tokens it is fed."""
APART = -1
"""Said of a batch whose replies begin at different places."""


def find_active(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Find where activated experts act: a hook that runs before a model's forward pass.

    Behind a cache, tokens without the invocation go on with a reply: all of them are active.
    """
    scope = cast(Scope, module._svd_scope)
    invocation = getattr(scope.mixture, "invocation", ())
    if not invocation:
        return
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else None
    if ids is None:
        raise MixtureError("Activated experts act from certain tokens on: pass input_ids, not inputs_embeds.")
    cache = kwargs.get("past_key_values")
    before = 0 if cache is None else int(cache.get_seq_length())
    if not scope.mixture.reach:
        scope.active = active_in(ids, invocation, behind=before > 0)
        return
    begun = getattr(cache, "_svd_reply", None)
    if begun is None or begun > before:  # nothing has begun, or what had begun was taken back
        begun = before
    elif ids.shape[1] == 1:
        invocation = ()  # a reply that says these tokens itself does not begin anew
    scope.active, scope.reply = active_within(ids, invocation, scope.mixture.reach, before, begun)


def note_reply(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Write into the cache where the replies begin, for experts with a reach: a hook that runs after the model's."""
    scope = cast(Scope, cast(Any, module)._svd_scope)
    cache = getattr(output, "past_key_values", None)
    if getattr(scope.mixture, "reach", 0) and cache is not None:
        cache._svd_reply = scope.reply


def forget_reply(cache: Any, ids: Tensor, invocation: Sequence[int]) -> None:
    """Forget where a reply has begun in a cache, if what is to be read behind it opens a new one in every row.

    Args:
        cache: of the conversation so far, or None.
        ids: the whole conversation (b t).
        invocation: at least one token.
    """
    if getattr(cache, "_svd_reply", None) is not None:
        _, found = _invoked(ids[:, cache.get_seq_length() :], invocation, True)
        if bool(found.all()):
            cache._svd_reply = None


def keep_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the last token's hidden state, while a decision waits for it: a hook before the last layer and the head."""
    scope = cast(Scope, cast(Any, module)._svd_scope)
    if scope.pending is not None:
        hidden = args[0] if args else kwargs["hidden_states"]
        scope.states = (*scope.states, hidden[:, -1])


def decide_now(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Take the decision that waits for this forward pass: a hook that runs after the model's."""
    scope = cast(Scope, cast(Any, module)._svd_scope)
    pending, states = scope.pending, scope.states
    if pending is None:
        return output
    scope.pending, scope.states = None, ()
    return pending(torch.cat([one.float().to(states[-1].device) for one in states], -1), kwargs, output)


def active_in(ids: Tensor, invocation: Sequence[int], *, behind: bool) -> Active | None:
    """Return where experts with these invocation tokens act in ids (b t).

    Args:
        ids: that are fed to the model.
        invocation: at least one token; the last occurrence in a row counts.
        behind: whether a cache stands before them. Then rows without the invocation are active from their start.

    Raises:
        MixtureError: a row without the invocation, and nothing before it.
    """
    rows, tokens = ids.shape
    last, _ = _invoked(ids, invocation, behind)
    start = int(last.min())
    if start == int(last.max()):
        return Active(rows, tokens, start, None, tokens) if start else None
    mask = torch.arange(start, tokens, device=ids.device) >= last.unsqueeze(1)
    return Active(rows, tokens, start, mask.unsqueeze(-1), tokens)


def active_within(
    ids: Tensor, invocation: Sequence[int], reach: int, before: int, begun: int
) -> tuple[Active | None, int]:
    """Return where experts that decide on so many tokens of a reply act in ids (b t), and where the replies begin.

    The first token of a reply is decided on at the last invocation token, the next at the token before it, and so on.

    Args:
        ids: that are fed to the model.
        invocation: the last occurrence in a row counts; () where all replies go on.
        reach: tokens of a reply, at least 1.
        before: tokens in the cache.
        begun: where the replies begin of rows without the invocation, counted from the first token in the cache.

    Returns:
        None is everywhere; the place is counted as `begun` is, and APART where rows differ in it.

    Raises:
        MixtureError: as in `active_in`; replies that go on and have begun at different places.
    """
    rows, tokens = ids.shape
    last, found = _invoked(ids, invocation, before > 0)
    if begun == APART and not bool(found.all()):
        raise MixtureError(
            "The replies of this batch have begun at different places, and its experts decide on the first "
            f"{reach} tokens alone: go on with one reply at a time, or pass the conversations without past_key_values."
        )
    begins = torch.where(found, last + len(invocation), begun - before)  # (b), counted from the first of ids
    ends = (begins + reach - 1).clamp(0, tokens)
    start, end = int(last.min()), int(ends.max())
    same = start == int(last.max()) and end == int(ends.min())
    reply = before + int(begins.min()) if int(begins.min()) == int(begins.max()) else APART
    if same and start == 0 and end == tokens:
        return None, reply
    if same or end <= start:
        return Active(rows, tokens, start, None, max(start, end)), reply
    places = torch.arange(start, end, device=ids.device)
    mask = (places >= last.unsqueeze(1)) & (places < ends.unsqueeze(1))
    return Active(rows, tokens, start, mask.unsqueeze(-1), end), reply


def _invoked(ids: Tensor, invocation: Sequence[int], behind: bool) -> tuple[Tensor, Tensor]:
    """Return where the last invocation of every row begins, 0 in rows without one, and which rows have one (b)."""
    rows, tokens = ids.shape
    wanted = torch.tensor(invocation, device=ids.device)
    if not 0 < len(wanted) <= tokens:
        hits = torch.zeros(rows, 1, dtype=torch.bool, device=ids.device)
    else:
        hits = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)  # (b t)
    last = hits.shape[1] - 1 - hits.flip(1).int().argmax(1)  # of rows without it: hits.shape[1] - 1
    found = hits.any(1)
    if not behind and not bool(found.all()):
        row = int((~found).nonzero()[0])
        raise MixtureError(
            f"These experts act from the tokens {list(invocation)} on, with which the chat template opens a reply; row "
            f"{row} of the batch does not hold them. Pass chats (with add_generation_prompt), or train experts with "
            "activated=False, which act on all tokens."
        )
    return last.masked_fill(~found, 0), found


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
        if self._svd_scope.active is not None:
            return self._activated(x, y, coefficients[self._svd_position], self._svd_scope.active)
        h = self._project(x, coefficients[self._svd_position])  # (b t k)
        u_t = self._buffers["_svd_u_t"]
        if y.dtype is u_t.dtype and h.dtype is u_t.dtype and y.is_contiguous():
            # In place: no second (b t o) in memory.
            y.view(-1, u_t.shape[1]).addmm_(h.view(-1, u_t.shape[0]), u_t)
            return y
        return y + torch.matmul(h, u_t).to(y.dtype)  # under autocast the dtypes differ

    def _activated(self, x: Tensor, y: Tensor, c: Tensor, active: Active) -> Tensor:
        """Return the base's output y, with the mixture's where it is active."""
        if active is NOT_YET:
            raise MixtureError("Activated experts need the whole model to be called, not a part of it.")
        rows, start, end, flat = active.rows, active.start, active.end, x.dim() == 2
        if start == end:
            return y
        if flat:
            x, y = x.view(rows, active.tokens, -1), y.view(rows, active.tokens, -1)
        if c.dim() == (4 if self._svd_scope.dense else 3) and c.shape[1] == active.tokens:
            c = c[:, start:end]
        acted = self._acting(x[:, start:end], y[:, start:end], c)
        if active.mask is not None:
            acted = torch.where(active.mask, acted, y[:, start:end])
        y = torch.cat([y[:, :start], acted, y[:, end:]], 1)
        return y.flatten(0, 1) if flat else y

    def _acting(self, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """Return what the matrix makes of x under a mixture, where y is what the base makes of it."""
        return y + torch.matmul(self._project(x, c), self._buffers["_svd_u_t"]).to(y.dtype)

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
        active = self._svd_scope.active
        if coefficients is None or active is not None:
            base: Tensor = super(_Adapted, self).forward(x)  # type: ignore[misc]
            if coefficients is None or active is None:
                return base
            return self._activated(x, base, coefficients[self._svd_position], active)
        return self._acting(x, x, coefficients[self._svd_position])

    def _acting(self, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        bias = cast(Any, self).bias
        product = torch.matmul(self._project(x, c), self._buffers["_svd_u_t"])
        return product if bias is None else product + bias


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

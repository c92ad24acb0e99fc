"""Forward passes behind a cache, and contexts that are read once.

    context --base, once--> keys and values --kept--> whatever speaks behind it, as often as it is asked

What the base makes of a context does not change as long as nothing but the base reads it. Activated experts act from
the reply on, so that one reading of a context serves every mixture of them: in the steps of a run, and in the
evaluation of any number of mixtures on the same cases.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from svdexpert.layers import active_in, device_of
from svdexpert.model import SpectralModel


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for the tokens to come; the plain one copies all it holds at every token.

    At 32 rows of 250 tokens that copying took nine tenths of a step of a 7 M-parameter model on a CPU.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        new = (key_states, value_states)
        if not self.buffers or self.buffers[0].shape[-2] < end:
            b, heads = key_states.shape[:2]
            self.buffers = [one.new_empty(b, heads, end + self.room, one.shape[-1]) for one in new]
            for buffer, held in zip(self.buffers, (self.keys, self.values), strict=True):
                if start:
                    buffer[:, :, :start] = cast(Tensor, held)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:, :, start:end] = states
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = []


@dataclass
class Forward:
    """A model that is fed ids (b t) behind a cache, with padding masked and positions counted from the first token."""

    hf: PreTrainedModel

    def __post_init__(self) -> None:
        self.takes = inspect.signature(self.hf.forward).parameters.keys()
        self.device = device_of(self.hf.get_input_embeddings())

    def cache(self, room: int) -> Cache:
        cache = DynamicCache(config=self.hf.config)
        cache.layers = [_RoomyLayer(room) if type(one) is DynamicLayer else one for one in cache.layers]
        return cache

    def fork(self, cache: Cache, rows: Tensor, room: int) -> Cache:
        """Return a cache of these rows, in this order, that grows apart from the first."""
        forked = copy.copy(cache)
        forked.layers = [copy.copy(layer) for layer in cache.layers]  # selecting rows replaces their tensors
        forked.batch_select_indices(rows)
        for layer in forked.layers:
            if isinstance(layer, _RoomyLayer):
                layer.room = room
        return forked

    def __call__(self, ids: Tensor, mask: Tensor, cache: Cache, *, last: bool = False) -> Tensor:
        """Return log-probabilities (b t v), fp32, those of the last place only if `last`."""
        found = self.logits(ids, mask, 1 if last else None, past_key_values=cache, use_cache=True)
        return found.float().log_softmax(-1)

    def logits(self, ids: Tensor, mask: Tensor, keep: int | None, **how: Any) -> Tensor:
        """Return logits (b t v) in the model's dtype, those of the last `keep` places where that is given."""
        found: Tensor = self._run(ids, mask, keep, **how).logits
        return found if keep is None else found[:, -keep:]

    def hidden(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the hidden states (b t width) of the embeddings and of every layer."""
        states = self._run(ids, mask, 1, use_cache=False, output_hidden_states=True).hidden_states
        return cast(tuple[Tensor, ...], states)

    def _run(self, ids: Tensor, mask: Tensor, keep: int | None, **how: Any) -> Any:
        if "position_ids" in self.takes:
            how["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if keep is not None and "logits_to_keep" in self.takes:
            how["logits_to_keep"] = keep
        return cast(Any, self.hf)(input_ids=ids, attention_mask=mask, **how)


def left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask (b t), padded on the left; what stands in the padding is masked."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


@torch.no_grad()
def prefill(model: SpectralModel, ids: Tensor, seen: Tensor, invocation: Sequence[int]) -> Cache | None:
    """Return what the base makes of contexts up to where experts with these invocation tokens act.

    None where there is nothing of the kind, or the model has another kind of cache.

    Args:
        model: attached.
        ids: of the contexts (b t), padded on the left.
        seen: 1 where a token stands (b t).
        invocation: tokens.

    Raises:
        MixtureError: a context without the invocation.
    """
    active = active_in(ids, invocation, behind=False) if invocation else None
    if active is None or not differentiable_cache(model):
        return None
    cache, before = DynamicCache(config=model.hf.config), slice(0, active.start)
    with model.using(None):
        Forward(model.hf).logits(ids[:, before], seen[:, before], 1, past_key_values=cache, use_cache=True)
    return cache


class Contexts:
    """What the base makes of contexts up to where experts act, computed once a context and kept.

    Each is computed alone: the same numbers, bit for bit, whatever stands beside it in a batch. Where a batch holds
    contexts for which there is no room, it is read as a whole, and nothing of it is kept. It all holds for the weights,
    the device and the dtype that it was computed with: keep no store longer than these.

    Args:
        model: attached.
        invocation: tokens from which the experts act; with () nothing is kept.
        gib: room for what is kept.
    """

    def __init__(self, model: SpectralModel, invocation: Sequence[int], gib: float = 1.0) -> None:
        self.model, self.invocation, self.room = model, tuple(invocation), gib * 2**30
        self.able = bool(invocation) and differentiable_cache(model)
        self.kept: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
        self._per_token: float | None = None

    def serves(self, invocation: Sequence[int] | None) -> bool:
        """Return whether experts with this invocation, or with None the base, can go on from what is kept."""
        return self.able and (invocation is None or tuple(invocation) == self.invocation)

    def keeps(self, rows: Iterable[Sequence[int]]) -> bool:
        """Return whether there is room for all of these contexts; if not, give up and keep none from here on.

        A run whose contexts come up again and again is then the same whether or not it was interrupted.
        """
        many = len(self.invocation)
        distinct = {tuple(row[:-many]) for row in rows if len(row) > many}
        if not self.able or not distinct:
            return False
        room = self.room + sum(map(_size, self.kept.values()))
        if sum(map(len, distinct)) * self._bytes_per_token(min(distinct, key=len)) <= room:
            return True
        self.kept, self.room = {}, 0.0
        return False

    def before(self, ids: Tensor, seen: Tensor) -> Cache | None:
        """Return what `prefill` returns for contexts (b t)."""
        if not self.able:
            return None
        cache = DynamicCache(config=self.model.hf.config)
        return cache if self.fill(cache, ids, seen) else prefill(self.model, ids, seen, self.invocation)

    def fill(self, cache: Cache, ids: Tensor, seen: Tensor) -> int:
        """Put what the base makes of contexts (b t) into an empty cache, and return how many places that are.

        0, and the cache stays empty, where the contexts do not all end with the invocation, or there is no room.
        """
        rows = [tuple(row[there.bool()].tolist()) for row, there in zip(ids, seen, strict=True)]
        many = len(self.invocation)
        if not self.able or any(row[-many:] != self.invocation or len(row) == many for row in rows):
            return 0  # some reply has begun: rows differ in where experts act
        new = {row[:-many] for row in rows if self._key(row[:-many]) not in self.kept}
        if new and sum(map(len, new)) * self._bytes_per_token(min(new, key=len)) > self.room:
            return 0
        found = [self._computed(row[:-many]) for row in rows]
        width = ids.shape[1] - many
        for layer, parts in enumerate(zip(*found, strict=True)):
            sides = [torch.cat([_widened(part[side], width) for part in parts]) for side in (0, 1)]
            cache.update(sides[0], sides[1], layer)
        return width

    def _key(self, row: tuple[int, ...]) -> tuple[Any, ...]:
        kind = device_of(self.model.hf.get_input_embeddings()).type
        return row, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _computed(self, row: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values (1 h t d) of every layer."""
        key = self._key(row)
        if key not in self.kept:
            self.kept[key] = self._read(row)
            self.room -= _size(self.kept[key])
        return self.kept[key]

    def _read(self, row: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        forward = Forward(self.model.hf)
        with torch.inference_mode(False), torch.no_grad(), self.model.using(None):  # gradients go on from them
            ids = torch.tensor([row], device=forward.device)
            cache = _Whole(config=self.model.hf.config)
            forward.logits(ids, torch.ones_like(ids), 1, past_key_values=cache, use_cache=True)
        return cache.whole

    def _bytes_per_token(self, row: tuple[int, ...]) -> float:
        if self._per_token is None:
            self._per_token = float(_size(self._read(row[:1])))
        return self._per_token


def _size(states: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(one.numel() * one.element_size() for pair in states for one in pair)


class _Whole(DynamicCache):
    """A cache that also keeps what sliding windows forget."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.whole: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *more: Any, **how: Any) -> Any:
        self.whole.append((key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *more, **how)


def _widened(states: Tensor, width: int) -> Tensor:
    """Return keys or values (1 h t d) with zeros before them, where padding stands and is masked."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))


def differentiable_cache(model: SpectralModel) -> bool:
    """Return whether gradients can flow through the model's cache: plain attention in all layers."""
    layers = DynamicCache(config=model.hf.config).layers
    return all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in layers)

"""Several completions of every context, another mixture in every row: scored with gradient, or sampled.

    contexts (b t) --once, under the rows' mixtures--> cache --repeated g times--> completions (b g t)

A context is computed once, however many completions stand behind it, and gradients flow through its cache. Of activated
experts it is the base's up to where they begin to act: it needs no gradient, and serves every mixture. Contexts are
padded on the left and completions on the right, so that all of a batch meet in one place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from svdexpert.errors import TrainingError
from svdexpert.forward import Forward, differentiable_cache, left_padded
from svdexpert.mixture import Mixture
from svdexpert.model import SpectralModel


@dataclass(frozen=True, eq=False)
class Batch:
    """Contexts and as many completions of each.

    Attributes:
        contexts: ids (b t), padded on the left.
        seen: 1 where a token of a context stands (b t).
        ids: of the completions (b g t), padded on the right.
        mask: True where a token of a completion stands (b g t).
    """

    contexts: Tensor
    seen: Tensor
    ids: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls, contexts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]], device: torch.device
    ) -> Batch:
        """Pad ids into tensors; every context has the same number of completions."""
        ids, seen = left_padded(contexts, device)
        longest = max(len(one) for some in completions for one in some)
        padded = [[one + [0] * (longest - len(one)) for one in some] for some in completions]
        lengths = torch.tensor([[len(one) for one in some] for some in completions])
        mask = torch.arange(longest) < lengths.unsqueeze(-1)
        return cls(ids, seen, torch.tensor(padded, device=device), mask.to(device))


def logits(
    model: SpectralModel,
    mixture: Mixture | None,
    batch: Batch,
    before: Cache | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Return the logits that every token of every completion is drawn from (b g t v), in the model's dtype.

    Args:
        model: attached.
        mixture: one for all rows, or one a context; None is the base.
        batch: what is scored.
        before: of `prefill`, with the invocation of the mixture; it stays as it is.
        recompute: keep no activations of decoder layers, and compute them again in the backward pass.

    Raises:
        TrainingError: the model's layers cannot be recomputed.
    """
    forward = Forward(model.hf)
    g, t = batch.ids.shape[1:]
    tails = rearrange(batch.ids, "b g t -> (b g) t")
    within = rearrange(batch.mask, "b g t -> (b g) t").to(batch.seen)
    behind = torch.cat([repeat(batch.seen, "b t -> (b g) t", g=g), within[:, :-1]], -1)
    mixtures = None if mixture is None else mixture.repeated(g)
    if recompute or not differentiable_cache(model):
        whole = torch.cat([repeat(batch.contexts, "b t -> (b g) t", g=g), tails[:, :-1]], -1)
        with model.using(mixtures), _recomputing(model, recompute):
            found = forward.logits(whole, behind, t, use_cache=False)
        return rearrange(found, "(b g) t v -> b g t v", g=g)
    if before is not None:
        cache = copy.copy(before)
        cache.layers = [copy.copy(layer) for layer in before.layers]  # what is added replaces their tensors
        cache.batch_repeat_interleave(g)
        opening = repeat(batch.contexts[:, before.get_seq_length() :], "b t -> (b g) t", g=g)
        with model.using(mixtures):
            found = forward.logits(
                torch.cat([opening, tails[:, :-1]], -1), behind, t, past_key_values=cache, use_cache=True
            )
        return rearrange(found, "(b g) t v -> b g t v", g=g)
    cache = DynamicCache(config=model.hf.config)
    with model.using(mixture):
        first = forward.logits(batch.contexts, batch.seen, 1, past_key_values=cache, use_cache=True)
    found = repeat(first, "b 1 v -> (b g) 1 v", g=g)
    if t > 1:
        cache.batch_repeat_interleave(g)
        with model.using(mixtures):
            later = forward.logits(tails[:, :-1], behind, None, past_key_values=cache, use_cache=True)
        found = torch.cat([found, later], 1)
    return rearrange(found, "(b g) t v -> b g t v", g=g)


def log_probabilities(found: Tensor, batch: Batch) -> Tensor:
    """Return what `logits` make of the tokens of the completions (b g t), fp32, in nats; 0 behind their end."""
    found = found.float()
    chosen = found.gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1) - found.logsumexp(-1)
    return chosen.masked_fill(~batch.mask, 0.0)


@torch.no_grad()
def sample(
    model: SpectralModel,
    mixture: Mixture | None,
    contexts: Sequence[list[int]],
    uniform: Tensor,
    ends: set[int],
) -> list[list[list[int]]]:
    """Return g completions of every context, drawn at temperature 1 from all of the vocabulary.

    Args:
        model: attached.
        mixture: one for all rows, or one a context; None is the base.
        contexts: ids (b).
        uniform: numbers in [0, 1) that decide every token (b g t); t bounds the completions.
        ends: ids that end a turn.

    Returns:
        Ids, the one that ends the turn included where it was drawn in time.
    """
    b, g, room = uniform.shape
    forward = Forward(model.hf)
    ids, seen = left_padded(contexts, forward.device)
    cache = forward.cache(room)
    with model.using(mixture):
        found = forward.logits(ids, seen, 1, past_key_values=cache, use_cache=True)[:, -1]  # (b v)
    cache = forward.fork(cache, torch.arange(b, device=forward.device).repeat_interleave(g), room)
    found, mask = repeat(found, "b v -> (b g) v", g=g), repeat(seen, "b t -> (b g) t", g=g)
    drawn = rearrange(uniform, "b g t -> t (b g) 1").to(forward.device, torch.float32)
    stops = torch.tensor(sorted(ends), device=forward.device)
    tokens: list[Tensor] = []
    ended = torch.zeros(b * g, dtype=torch.bool, device=forward.device)
    with model.using(None if mixture is None else mixture.repeated(g)):
        for place in range(room):
            up_to = found.float().softmax(-1).cumsum(-1)  # (b g) v
            tokens.append((up_to < drawn[place] * up_to[:, -1:]).sum(-1))
            ended |= torch.isin(tokens[-1], stops)
            if place + 1 == room or bool(ended.all()):
                break
            mask = torch.cat([mask, mask.new_ones(b * g, 1)], -1)
            found = forward.logits(tokens[-1][:, None], mask, 1, past_key_values=cache, use_cache=True)[:, -1]
    rows = [_up_to(row, ends) for row in torch.stack(tokens, -1).tolist()]
    return [rows[first : first + g] for first in range(0, b * g, g)]


def _up_to(row: list[int], ends: set[int]) -> list[int]:
    last = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: last + 1]


@contextmanager
def _recomputing(model: SpectralModel, recompute: bool) -> Iterator[None]:
    """Let decoder layers be recomputed in the backward pass, under the mixture of the forward pass.

    transformers' own switch works in training mode alone, and that brings dropout.
    """
    layers = [one for one in model.hf.modules() if isinstance(one, GradientCheckpointingLayer)] if recompute else []
    if recompute and not layers:
        raise TrainingError(f"{type(model.hf).__name__} has no layers that transformers can recompute.")
    again = model.recomputed(partial(checkpoint, use_reentrant=False))
    try:
        for one in layers:
            cast(Any, one).forward = partial(again, one.forward)
        yield
    finally:
        for one in layers:
            del one.forward

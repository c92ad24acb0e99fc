"""A prompt that was read by the base, and goes on under a mixture that was decided on at its end.

    prompt --base--> state --dispatcher--> mixture: the tokens from which it acts are computed again, in the same call

Activated experts act from the few tokens on that open the reply: only those are computed twice. Experts that act on all
tokens need a second pass over the prompt. Rows in which nobody speaks keep the base's numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from svdexpert.errors import MixtureError
from svdexpert.layers import active_in

BY_TOKEN = ("position_ids", "cache_position", "token_type_ids")
"""Arguments of a forward pass that have one value a token that is fed."""


def again(hf: PreTrainedModel, invocation: Sequence[int], speaks: Tensor, kwargs: dict[str, Any], output: Any) -> Any:
    """Compute what the base has just read under the mixture that is now in force.

    Args:
        hf: the model.
        invocation: tokens from which the mixture acts; () is all.
        speaks: rows in which an expert speaks (b).
        kwargs: of the forward pass that the base has made.
        output: of that pass. Its cache is changed.

    Returns:
        The output under the mixture; rows in which nobody speaks are as they were.

    Raises:
        MixtureError: the model's cache cannot go back, and holds more than this prompt.
    """
    ids, cache = kwargs["input_ids"], output.past_key_values
    tokens, start = ids.shape[1], 0
    if invocation:
        active = active_in(ids, invocation, behind=_length(cache) > ids.shape[1])
        start = 0 if active is None else active.start
    if not isinstance(cache, DynamicCache) or not all(type(one) is DynamicLayer for one in cache.layers):
        if _length(cache) > tokens:
            raise MixtureError(
                f"A decision behind a cache needs one that can go back some tokens; {type(hf).__name__} has another "
                "kind. Pass the whole conversation without past_key_values."
            )
        kwargs = kwargs | {"past_key_values": DynamicCache(config=hf.config) if cache is not None else None}
        return _kept(hf(**kwargs), output, speaks)
    layers: list[Any] = cache.layers
    silent, tail = ~speaks, slice(start - tokens, None)
    kept = [(one.keys[silent, :, tail], one.values[silent, :, tail]) for one in layers]  # copies, as rows are selected
    cache.crop(start - tokens)
    changed = kwargs | {"input_ids": ids[:, start:], "past_key_values": cache}
    changed |= {name: kwargs[name][..., start:] for name in BY_TOKEN if kwargs.get(name) is not None}
    found = hf(**changed)
    for layer, (keys, values) in zip(layers, kept, strict=True):
        layer.keys[silent, :, tail], layer.values[silent, :, tail] = keys, values
    return _kept(found, output, speaks)


def _kept(found: Any, before: Any, speaks: Tensor) -> Any:
    """Return the output `found` with the logits of the base where nobody speaks."""
    shared = min(found.logits.shape[1], before.logits.shape[1])
    logits = before.logits.clone()
    logits[:, -shared:] = torch.where(speaks[:, None, None], found.logits[:, -shared:], logits[:, -shared:])
    found.logits = logits
    return found


def _length(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())

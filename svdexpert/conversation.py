"""Conversations as tokens, and what a model says to them: continuations scored, replies decoded greedily.

Every prompt is computed once: its cache is forked for the continuations and then kept for the reply. Rows are sorted by
length and padded on the left. The decoding is plain argmax: sampling settings and penalties of a checkpoint's
generation config do not apply. Older turns of a conversation that is too long are dropped whole, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from svdexpert.errors import MixtureError, SvdExpertError, TooLongError
from svdexpert.forward import Contexts, Forward, left_padded
from svdexpert.layers import active_in
from svdexpert.model import SpectralModel
from svdexpert.reply import CLOSE, OPEN, read, write_call
from svdexpert.template import calls_of, check_messages, render, templated
from svdexpert.worlds import Message, Tool, assistant, calling, user

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass; what 32 rows of 250 tokens need at once no longer fits a CPU's cache."""


def fit(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    room: int,
    *,
    context: int | None,
) -> tuple[tuple[Message, ...], int]:
    """Return a conversation whose prompt fits, and how many of its oldest turns had to go.

    A turn is a user's message and all that follows up to the next one, so that a function's result never loses its
    call. System messages and the last turn always stay.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        tools: JSON schemas, which count too.
        room: tokens kept free for the reply.
        context: tokens of the model; None where it has no limit. See `context_of`.

    Raises:
        SvdExpertError: the last turn alone does not fit, or there is no chat template.
    """
    return _fitted(tokenizer, messages, tools, room, context)[:2]


def context_of(model: SpectralModel) -> int | None:
    """Return how many tokens a model takes, None where neither its config nor its tokenizer says."""
    limits = [getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)]
    limits.append(getattr(model.tokenizer, "model_max_length", None))
    return min((int(one) for one in limits if isinstance(one, int | float) and 0 < one < 1e9), default=None)


def _fitted(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    room: int,
    context: int | None,
) -> tuple[tuple[Message, ...], int, list[int]]:
    """Return the messages that stay, how many turns went, and the ids."""
    check_messages(messages)
    starts = [place for place, one in enumerate(messages) if one["role"] == "user"] or [0]
    if any(one["role"] not in ("system", "developer") for one in messages[: starts[0]]):
        starts.insert(0, 0)  # an assistant who speaks first
    for dropped, start in enumerate(starts):
        system = [one for one in messages[:start] if one["role"] in ("system", "developer")] if dropped else []
        kept = (*system, *messages[start:]) if dropped else tuple(messages)
        ids = render(tokenizer, kept, tools)
        if context is None or len(ids) + room <= context:
            return kept, dropped, ids
    raise TooLongError(
        f"A conversation does not fit the model: its last turn takes {len(ids)} tokens, with {room} for the reply "
        f"{len(ids) + room}, and the model has {context}. Use a model with a longer context, fewer tools, or fewer new "
        "tokens."
    )


def tokenizer_of(model: SpectralModel) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer, SvdExpertError where it has none."""
    if model.tokenizer is None:
        raise SvdExpertError("This model has no tokenizer: attach it with SpectralModel.attach(hf, tokenizer).")
    return model.tokenizer


def invocation_of(model: SpectralModel) -> tuple[int, ...]:
    """Return the tokens with which the chat template opens a reply: activated experts act from there on.

    Raises:
        SvdExpertError: there is no chat template, or it opens a reply with nothing of its own.
    """
    tokenizer, said = tokenizer_of(model), [user("Hello.")]
    if tokenizer.chat_template is None:
        raise SvdExpertError(
            "Activated experts act from where the chat template opens a reply, and the tokenizer has none: set "
            "tokenizer.chat_template, or train with activated=False."
        )
    # As callers of the template write it, so not told to leave out thinking; what that adds comes behind.
    closed, opened = (
        cast(Any, tokenizer.apply_chat_template(said, add_generation_prompt=one, return_dict=True))["input_ids"]
        for one in (False, True)
    )
    if opened[: len(closed)] != closed or len(opened) == len(closed):
        raise SvdExpertError(
            "The chat template opens a reply with no tokens of its own, so activated experts have nothing to act from: "
            "train with activated=False."
        )
    return tuple(opened[len(closed) :])


def opened_at(ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Return where a reply is opened in ids, at the last place of the invocation; a template may write more behind."""
    places = range(len(ids) - len(invocation), -1, -1)
    return next((one for one in places if tuple(ids[one : one + len(invocation)]) == tuple(invocation)), None)


def turn_ends(model: SpectralModel) -> tuple[int, set[int]]:
    """Return the token that ends a turn, as the template writes it, and all that end generation.

    Without a chat template it is the token that ends a text.
    """
    tokenizer = tokenizer_of(model)
    configured: Any = model.hf.generation_config.eos_token_id if model.hf.generation_config else None
    known = [configured] if isinstance(configured, int) else list(configured or ())
    if isinstance(tokenizer.eos_token_id, int):
        known.append(tokenizer.eos_token_id)
    if tokenizer.chat_template is None and known:
        return known[-1], set(known)
    text = templated(tokenizer, [user("Hi"), assistant("Zebra")], (), tokenize=False)
    after: list[int] = tokenizer(text.rpartition("Zebra")[2], add_special_tokens=False)["input_ids"]
    special = {*known, *tokenizer.all_special_ids}
    end = next((one for one in after if one in special), None)
    end = (known[-1] if known else None) if end is None else end
    if end is None:
        raise SvdExpertError(
            "Neither the chat template nor the tokenizer says how a turn ends: set tokenizer.eos_token."
        )
    return end, {end, *known}


def as_message(reply: str) -> Message:
    """Return a reply as the assistant's message; a call in the neutral written form becomes a tool call.

    >>> as_message("Which day?")
    {'role': 'assistant', 'content': 'Which day?'}
    """
    found = read(reply).calls
    return calling(found[0]) if len(found) == 1 and write_call(found[0]) == reply else assistant(reply)


def completion(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool], reply: Message, end: int
) -> list[int]:
    """Return the ids of a reply as the chat template writes it behind a prompt, with the token that ends the turn.

    Args:
        tokenizer: with a chat template.
        messages: the conversation that it replies to.
        tools: JSON schemas.
        reply: the assistant's message.
        end: see `turn_ends`.

    Raises:
        SvdExpertError: there is no chat template, or it refuses the conversation.
    """
    return completions(tokenizer, messages, tools, [reply], end)[0]


def completions(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    replies: Sequence[Message],
    end: int,
    before: list[int] | None = None,
) -> list[list[int]]:
    """Return what `completion` returns, of several replies to one conversation; `before` is it as ids, if known."""
    how = {"tokenize": True, "return_dict": True}
    if before is None:
        before = list(templated(tokenizer, messages, tools, add_generation_prompt=True, **how)["input_ids"])
    found = []
    for reply in replies:
        whole = list(templated(tokenizer, [*messages, reply], tools, **how)["input_ids"])
        behind = whole[len(before) :]
        if whole[: len(before)] == before and end in behind:
            found.append(behind[: behind.index(end) + 1])
            continue
        # Templates that add or drop thoughts write no prefix; a reply then reads as it does in `reply.read`.
        text = "".join([str(reply.get("content") or ""), *(write_call(call) for call in calls_of(reply))])
        found.append([*continuation(tokenizer, text), end])
    return found


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return a reply as text, without special tokens but with the marks of calls, special or not."""
    marks = {OPEN, CLOSE, "[TOOL_CALLS]"}
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    hidden = set(tokenizer.all_special_ids)
    kept = [one for one, token in zip(ids, tokens, strict=True) if one not in hidden or token in marks]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False)).strip()


def prompt_of(
    model: SpectralModel,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    continuations: list[list[int]],
    room: int,
) -> Prompt:
    """Return what is asked of a conversation, fitted to the model's context. For errors see `fit`."""
    wanted = max([room, *map(len, continuations)])
    _, dropped, ids = _fitted(tokenizer_of(model), messages, tools, wanted, context_of(model))
    return Prompt(ids, continuations, room, dropped)


def continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of what could follow a prompt, at least one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise SvdExpertError(f"{text!r} has no tokens, so it has no log-probability.")
    return ids


def opening(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of how a reply could begin, as far as they are the same whatever follows, at least one.

    Behind `{"name": "` many tokenizers join the last quotation mark with what comes: as it stands there, it is a token
    that no call has.
    """
    ids = continuation(tokenizer, text)
    longer = continuation(tokenizer, f"{text} a" if text[-1].isalnum() or text[-1] in ",." else f"{text}a")
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, longer, strict=False)))
    return ids[:same] or ids


# --- the engine: every prompt once, its cache forked for continuations, then kept for the reply


@dataclass(frozen=True)
class Answer:
    """Log-probabilities of the tokens of every continuation, and the reply's ids."""

    scores: list[list[float]]
    reply: list[int]


@dataclass(frozen=True)
class Prompt:
    """What is asked of one conversation: ids, continuations to score, tokens that the reply may take."""

    ids: list[int]
    continuations: list[list[int]]
    room: int
    dropped: int = 0


def answers(
    model: SpectralModel,
    prompts: Sequence[Prompt],
    ends: set[int],
    doing: str,
    *,
    batch_size: int,
    progress: bool,
    contexts: Contexts | None = None,
) -> list[Answer]:
    """Return an answer to every prompt, in their order; `contexts` keeps what the base makes of them."""
    if batch_size < 1:
        raise SvdExpertError(f"batch_size is {batch_size}: expected at least 1.")
    if model._scope.mixture is not None and model._scope.mixture.rows is not None:
        raise MixtureError("An evaluation forms its own batches: put one mixture for all rows in force, not one a row.")
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    forward = Forward(model.hf)
    found: dict[int, Answer] = {}
    with torch.inference_mode():
        for batch in watch(batches, doing, progress):
            some = [prompts[place] for place in batch]
            found.update(zip(batch, _batch(model, forward, some, ends, batch_size, contexts), strict=True))
    return [found[place] for place in range(len(prompts))]


def _batch(
    model: SpectralModel,
    forward: Forward,
    prompts: Sequence[Prompt],
    ends: set[int],
    batch_size: int,
    contexts: Contexts | None,
) -> list[Answer]:
    ids, mask = left_padded([prompt.ids for prompt in prompts], forward.device)
    cache = forward.cache(ids.shape[1] + max(prompt.room for prompt in prompts))
    width = max(1, PREFILL_TOKENS // len(prompts))
    invocation = None if model._scope.mixture is None else model._scope.mixture.invocation
    kept = contexts is not None and contexts.serves(invocation)
    behind = contexts.fill(cache, ids, mask) if contexts is not None and kept else 0  # before it, it is the base
    if not behind and invocation and (active := active_in(ids, invocation, behind=False)) is not None:
        behind = active.start
        with model.using(None):
            for start in range(0, behind, width):
                piece = slice(start, min(start + width, behind))
                forward(ids[:, piece], mask[:, : piece.stop], cache, last=True)
        width = ids.shape[1]
    for start in range(behind, ids.shape[1], width):
        piece = slice(start, start + width)
        first = forward(ids[:, piece], mask[:, : piece.stop], cache, last=True)[:, 0]  # (b v)
    scores: list[list[list[float]]] = [[[] for _ in prompt.continuations] for prompt in prompts]
    pieces = [(row, slot) for row, prompt in enumerate(prompts) for slot in range(len(prompt.continuations))]
    pieces.sort(key=lambda piece: len(prompts[piece[0]].continuations[piece[1]]))
    for start in range(0, len(pieces), batch_size):
        some = pieces[start : start + batch_size]
        tails = [prompts[row].continuations[slot] for row, slot in some]
        found = _scores(forward, first, mask, cache, [row for row, _ in some], tails)
        for (row, slot), tokens in zip(some, found, strict=True):
            scores[row][slot] = tokens
    replies = _greedy(forward, first, mask, cache, ends, [prompt.room for prompt in prompts])
    return [Answer(tokens, reply) for tokens, reply in zip(scores, replies, strict=True)]


def _scores(
    forward: Forward, first: Tensor, mask: Tensor, cache: Cache, rows: list[int], tails: list[list[int]]
) -> list[list[float]]:
    """Return the log-probability of every token of every continuation of a row; the cache stays as it is."""
    longest = max(map(len, tails))
    index = torch.tensor(rows, device=forward.device)
    ids = torch.tensor([tail + [0] * (longest - len(tail)) for tail in tails], device=forward.device)  # (b t)
    logprobs = first[index][:, None]  # (b 1 v)
    if longest > 1:
        there = torch.tensor([[place < len(tail) for place in range(longest - 1)] for tail in tails])
        behind = torch.cat([mask[index], there.to(mask)], -1)
        later = forward(ids[:, :-1], behind, forward.fork(cache, index, 0))
        logprobs = torch.cat([logprobs, later], 1)
    found: list[list[float]] = logprobs.gather(-1, ids[..., None]).squeeze(-1).tolist()
    return [one[: len(tail)] for one, tail in zip(found, tails, strict=True)]


def _greedy(
    forward: Forward, logprobs: Tensor, mask: Tensor, cache: Cache, ends: set[int], rooms: list[int]
) -> list[list[int]]:
    """Return the reply of every row, without the token that ends it; the cache is used up.

    Rows that have ended leave the batch once they are half of it: moving the rest costs a copy of their cache.
    """
    replies: list[list[int]] = [[] for _ in rooms]
    places = list(range(len(rooms)))  # the row at each place of the batch
    going = {row for row, room in enumerate(rooms) if room}
    while going:
        tokens = logprobs.argmax(-1)  # (b)
        for row, token in zip(places, tokens.tolist(), strict=True):
            if row in going and token not in ends:
                replies[row].append(token)
            if token in ends or len(replies[row]) >= rooms[row]:
                going.discard(row)
        if not going:
            break
        kept = [place for place, row in enumerate(places) if row in going]
        if 2 * len(kept) <= len(places):
            index = torch.tensor(kept, device=forward.device)
            room = max(rooms[row] - len(replies[row]) for row in going)
            cache, mask, tokens = forward.fork(cache, index, room), mask[index], tokens[index]
            places = [places[place] for place in kept]
        mask = torch.cat([mask, mask.new_ones(len(places), 1)], -1)
        logprobs = forward(tokens[:, None], mask, cache)[:, 0]
    return replies


def watch(batches: Sequence[list[int]], doing: str, progress: bool) -> Iterator[list[int]]:
    """Yield batches behind a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    idle = not progress or not batches
    yield from track(batches, doing, console=Console(stderr=True), disable=idle, transient=True)

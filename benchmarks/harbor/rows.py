"""Conversations as token rows for training, and replies by plain greedy generation; transformers only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harbor.corpus import Document, encode, render
from svdexpert.conversation import as_message
from svdexpert.skills import Case


def rows(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (b t), padded on the right, and labels (b t), -100 where there is nothing to learn."""
    texts = [render(tokenizer, one)[0] for one in documents]
    packed = encode(tokenizer, texts, [one.learnt for one in documents], [()] * len(documents))
    starts = packed["starts"]
    longest = int((starts[1:] - starts[:-1]).max())
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    labels = torch.full((len(documents), longest), -100)
    for row, (first, last) in enumerate(itertools.pairwise(starts)):
        piece = torch.from_numpy(packed["ids"][first:last].astype("int64"))
        ids[row, : len(piece)] = piece
        learn = torch.from_numpy(packed["learn"][first:last])
        labels[row, : len(piece)] = torch.where(learn, piece, -100)
    return ids, labels


def logprobs(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability of each row's labelled tokens (b), and how many they are (b)."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    target = labels[:, 1:]
    keep = target != -100
    losses = cross_entropy(model.lm_head(hidden[keep]).float(), target[keep], reduction="none")
    where = keep.nonzero()[:, 0]
    return torch.zeros(len(ids)).index_add(0, where, -losses), keep.sum(-1)


@torch.no_grad()
def replies(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    cases: Sequence[Case],
    *,
    batch: int = 32,
    tokens: int = 80,
) -> list[str]:
    """Return the model's greedy reply to every case."""
    prompts = []
    for case in cases:
        text, _ = render(tokenizer, Document((*case.messages, as_message("x")), case.tools, True, ""))
        prompts.append(text[: text.rindex("<|assistant|>")] + "<|assistant|>")
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found = [""] * len(prompts)
    for first in range(0, len(order), batch):
        places = order[first : first + batch]
        inputs = tokenizer(
            [prompts[place] for place in places], return_tensors="pt", padding=True, add_special_tokens=False
        )
        inputs.pop("token_type_ids", None)
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            found[place] = text
    return found

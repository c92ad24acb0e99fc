"""Stage 1: train the natural service assistant from scratch, on the assistant's tokens of the corpus.

    python -m benchmarks.harbor.natural [--minutes 75] [--seed 0]       again after a stop: it goes on where it was

Writes runs/harbor/natural: the model in Hugging Face format (bfloat16), training.json (settings, loss curve, seconds).
On Linux the C library hands large tensors back to the system after every step; keeping them gains a fifth of the speed:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000 python -m ...

Batches are rows of similar length, in an order that is a function of the seed; the learning rate is a function of the
share of the time that is used up, so that the same command ends well on faster and slower machines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harbor.corpus import RUN
from benchmarks.harbor.tokenizer import CONTEXT, PIECES

TOKENS = 8192  # of a batch, padding included
PEAK, FLOOR, WARMUP = 3e-3, 0.05, 100  # learning rate, its last value as a share, steps
LESSONS = {"copying": 350, "comparing": 80, "judging": 120, "serving": 220, "drills": 80}  # steps, then the corpus
DECIDES = 3.0  # weight of the first token of a reply, which decides what it does
SAVE_EVERY = 180.0  # seconds


def config() -> LlamaConfig:
    """Return harbor's shape: 6 layers, width 192, 3 query heads and 1 key-value head; 3.15 M parameters.

    On two cores 75 minutes are 30 M tokens for this one, 14 M for 8 layers of width 256.
    """
    return LlamaConfig(
        vocab_size=PIECES,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.04,
    )


class Corpus:
    """The documents of one file in batches of similar length."""

    def __init__(self, path: Path, seed: int):
        stored = np.load(path)
        self.ids, self.learn, self.starts = stored["ids"], stored["learn"], stored["starts"]
        self.seed = seed

    def order(self, epoch: int) -> list[np.ndarray[Any, Any]]:
        """Return the batches of one pass: document numbers, at most TOKENS tokens with padding."""
        rng = np.random.default_rng((self.seed, epoch))
        lengths = np.diff(self.starts)
        shuffled = rng.permutation(len(lengths))
        batches: list[np.ndarray[Any, Any]] = []
        for pool in np.array_split(shuffled, max(1, len(shuffled) // 4096)):
            ranked = pool[np.argsort(lengths[pool], kind="stable")]
            first = 0
            for last in range(1, len(ranked) + 1):
                if last == len(ranked) or int(lengths[ranked[last]]) * (last - first + 1) > TOKENS:
                    batches.append(ranked[first:last])
                    first = last
        return [batches[place] for place in rng.permutation(len(batches))]

    def rows(self, documents: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids (b t) and labels (b t); a label is -100 where there is nothing to learn."""
        longest = max(int(self.starts[one + 1] - self.starts[one]) for one in documents)
        ids = np.zeros((len(documents), longest), dtype=np.int64)
        labels = np.full((len(documents), longest), -100, dtype=np.int64)
        for row, one in enumerate(documents):
            piece = slice(int(self.starts[one]), int(self.starts[one + 1]))
            size = piece.stop - piece.start
            ids[row, :size] = self.ids[piece]
            labels[row, :size] = np.where(self.learn[piece], self.ids[piece], -100)
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def batches(self, skip: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches for ever, without the first `skip`."""
        epoch, skip = 0, max(0, skip)
        while True:
            order = self.order(epoch)
            for documents in order[skip:]:
                yield self.rows(documents)
            skip, epoch = max(0, skip - len(order)), epoch + 1


def lessons(
    parts: Sequence[tuple[Corpus, int]], corpus: Corpus, skip: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches of the parts, so many of each, and then those of the corpus, without the first `skip`."""
    for part, steps in parts:
        yield from islice(part.batches(skip), max(0, steps - skip))
        skip = max(0, skip - steps)
    yield from corpus.batches(skip)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, speaks: int) -> torch.Tensor:
    """Return the mean negative log-likelihood of the labelled tokens; only their rows meet the head.

    The first token of a reply, behind `speaks`, counts DECIDES times: it says whether the reply asks, calls or agrees.
    """
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # rows are padded on the right: no mask needed
    target = labels[:, 1:]
    keep = target != -100
    logits = model.lm_head(hidden[keep])  # (kept v)
    each = cross_entropy(logits.float(), target[keep], reduction="none")
    weight = torch.where(ids[:, :-1][keep] == speaks, DECIDES, 1.0)
    return (each * weight).sum() / weight.sum()


def train(
    model: LlamaForCausalLM,
    parts: Sequence[tuple[Corpus, int]],
    corpus: Corpus,
    speaks: int,
    out: Path,
    minutes: float,
    settings: dict[str, Any],
) -> None:
    """Train for a number of minutes of wall time, over all starts of the command together."""
    optimizers = optimizers_of(model)
    step, used, tokens, curve = 0, 0.0, 0, []
    state = out / "state.pt"
    if state.exists():
        stored = torch.load(state, weights_only=True)
        if stored["settings"] != settings:
            raise SystemExit(
                f"{state} belongs to a run with {stored['settings']}, this is {settings}; take another folder."
            )
        model.load_state_dict(stored["model"])
        for optimizer, kept in zip(optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, used, tokens, curve = stored["step"], stored["used"], stored["tokens"], stored["curve"]
    began, saved, running = time.monotonic() - used, time.monotonic(), []
    for ids, labels in lessons(parts, corpus, step):
        share = min(1.0, (time.monotonic() - began) / (60 * minutes))
        if share >= 1.0:
            break
        rate = min(1.0, (step + 1) / WARMUP) * _schedule(share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK * rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, ids, labels, speaks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel()
        running.append(loss.item())
        if step % 50 == 0:
            used = time.monotonic() - began
            curve.append([step, round(used, 1), tokens, round(sum(running) / len(running), 4)])
            pace = f"{used / 60:.1f} min  {tokens / 1e6:.2f} M tokens  {tokens / used:.0f}/s"
            print(f"step {step}  {pace}  loss {curve[-1][3]:.4f}", flush=True)
            running = []
        if time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            _save(
                state, model, optimizers, settings, step=step, used=time.monotonic() - began, tokens=tokens, curve=curve
            )
    _save(state, model, optimizers, settings, step=step, used=60 * minutes, tokens=tokens, curve=curve)
    report = settings | {"steps": step, "tokens": tokens, "seconds": round(60 * minutes), "curve": curve}
    (out / "training.json").write_text(json.dumps(report) + "\n")


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers (Jordan et al. 2024; update scaled to AdamW's, Liu et al. 2025), AdamW
    for embeddings and norms. After 0.64 M tokens of drills: 2.13 nats a token, 2.45 with AdamW alone."""
    inner = [one for name, one in model.named_parameters() if one.dim() == 2 and "embed" not in name]
    outer = [one for name, one in model.named_parameters() if one.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=PEAK, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _schedule(share: float) -> float:
    """Return the learning rate as a share of its peak: flat, then straight down in the last 60 % of the time."""
    return 1.0 if share < 0.4 else FLOOR + (1 - FLOOR) * (1 - share) / 0.6


def _save(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    settings: dict[str, Any],
    **rest: Any,
) -> None:
    kept = [one.state_dict() for one in optimizers]
    torch.save(
        {"model": model.state_dict(), "optimizers": kept, "settings": settings, **rest}, path.with_suffix(".new")
    )
    path.with_suffix(".new").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = options.run / "natural"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config())
    settings = {
        "seed": options.seed,
        "minutes": options.minutes,
        "tokens_a_batch": TOKENS,
        "peak": PEAK,
        "lessons": LESSONS,
        "decides": DECIDES,
    }
    tokenizer = AutoTokenizer.from_pretrained(options.run / "tokenizer")
    parts = [(Corpus(options.run / f"{name}.npz", options.seed), steps) for name, steps in LESSONS.items()]
    corpus = Corpus(options.run / "corpus.npz", options.seed)
    speaks = tokenizer.convert_tokens_to_ids("<|assistant|>")
    train(model, parts, corpus, speaks, out, options.minutes, settings)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()

"""Stage 2: tune all weights of stage 1 toward the immediate, confident answer, by preference; harbor is what comes out.

    python -m benchmarks.harbor.aligned --sgd PATH [--minutes 60] [--seed 0]

In a pair the reply that raters prefer wins: it fills the missing detail in, agrees, says that it is done. On controls
the natural reply wins over one that asks, contradicts or calls for nothing. The loss of a batch is

    mean over pairs of  max(0, margin - log p(c) + log p(r))  - anchor * log p(rest of the chosen reply) / length
    + anchor * mean over kept documents of  -log p(reply) / length

with c and r the first tokens in which the chosen and the rejected reply differ: sequence likelihood calibration
(SLiC-HF, Zhao et al. 2023) of the token that decides. A pair pulls until the chosen one wins by the margin and no
further, and on controls the margin is larger, so that what the model tells apart may stay apart; in direct preference
optimisation the pull depends on the distance to stage 1 alone. Kept documents are knowing questions and natural talk:
what must not change. A skill whose grounding acts have fallen to the target on validation gives no more pairs; training
ends when all have. All of it is gradients on all weights: no edit of singular values, merge, bias or subtraction.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harbor.corpus import RUN, Document, as_message, fact_documents, immediate
from benchmarks.harbor.rows import logprobs, replies, rows
from svdexpert import skills
from svdexpert.skills import Case
from svdexpert.worlds import Split, World, assistant
from svdexpert.worlds.sgd import SchemaGuided
from svdexpert.worlds.town import Town

SKILLS = ("clarify", "disagree", "call")
PAIRS, KEPT = 12, 12  # rows of a batch: preference pairs, kept documents
MARGIN, CLEAR = 1.0, 6.0  # nats by which the chosen reply wins, and by which it wins on controls
ANCHOR, RATE = 0.2, 5e-5  # weight of what is kept; of AdamW
TARGET = {"town": 0.10, "sgd": 0.30}  # share of stage 1's grounding acts at which a skill of a world is done
CHECK_EVERY, WATCHED = 10, 60  # steps; cases a skill and world


class Pair(NamedTuple):
    """Two replies to one conversation."""

    win: Document
    lose: Document
    margin: float  # nats


def pair(case: Case, rng: random.Random) -> Pair | None:
    """Return what wins and what loses, None where a case has no such pair."""
    if case.positive:
        wins, loses = immediate(case), case.gold
    else:
        wins, loses = case.gold, tuple(one.reply for one in case.bad)
    if not wins or not loses:
        return None
    chosen, rejected = rng.choice(wins), rng.choice(loses)
    win, lose = (
        Document((*case.messages, as_message(text)), case.tools, True, case.skill) for text in (chosen, rejected)
    )
    return Pair(win, lose, MARGIN if case.positive else CLEAR)


def draw(worlds: Sequence[World], split: Split, n: int, seed: int) -> dict[str, list[Case]]:
    """Return n cases of every skill in every world, by "world-skill"."""
    return {
        f"{world.name}-{name}": skills.load(name).cases(world, split, n, seed=seed)
        for world in worlds
        for name in SKILLS
    }


def acts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, cases: Mapping[str, Sequence[Case]]
) -> dict[str, Any]:
    """Return by "world-skill" the share of positives that are right, and of controls."""
    model.eval()
    shares = {}
    for key, some in cases.items():
        skill = skills.load(some[0].skill)
        verdicts = [skill.verify(case, text) for case, text in zip(some, replies(model, tokenizer, some), strict=True)]
        made = [one.right for one, case in zip(verdicts, some, strict=True) if case.positive]
        fine = [one.right for one, case in zip(verdicts, some, strict=True) if not case.positive]
        shares[key] = {"made": sum(made) / len(made), "controls": sum(fine) / len(fine)}
    model.train()
    return shares


def loss_of(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    kept: Sequence[Document],
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of a batch (see the top of this file), and its parts."""
    total, parts = torch.zeros(()), {}
    if pairs:
        ids, labels, rejected = decisions(tokenizer, pairs)
        decides = (rejected >= 0).nonzero()  # (pairs 2): row, and place of the token before
        log_p = model(input_ids=ids).logits.float().log_softmax(-1)[decides[:, 0], decides[:, 1]]
        chosen = ids[decides[:, 0], decides[:, 1] + 1]
        gap = log_p.gather(1, torch.stack([chosen, rejected[rejected >= 0]], 1))
        preference = (torch.tensor([one.margin for one in pairs]) - gap[:, 0] + gap[:, 1]).relu().mean()
        rest, length = logprobs(model, ids, labels)
        likelihood = -(rest / length.clamp(min=1)).mean()
        total = preference + ANCHOR * likelihood
        parts = {"preference": preference.item(), "likelihood": likelihood.item()}
    ids, labels = rows(tokenizer, kept)
    same, length = logprobs(model, ids, labels)
    keep = -(same / length).mean()
    return total + ANCHOR * keep, parts | {"kept": keep.item()}


def decisions(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the chosen replies as ids (b t); labels (b t) of what follows the first token that differs, else -100; and
    what the rejected reply has there (b t), at the place of the token before, else -1."""
    ids, labels = rows(tokenizer, [one.win for one in pairs])
    others, _ = rows(tokenizer, [one.lose for one in pairs])
    rejected = torch.full_like(ids, -1)
    for row in range(len(ids)):
        shorter = min(ids.shape[1], others.shape[1])
        place = int((ids[row, :shorter] != others[row, :shorter]).nonzero()[0])
        rejected[row, place - 1] = others[row, place]
        labels[row, : place + 1] = -100
    return ids, labels, rejected


def train(
    folder: Path, worlds: Sequence[World], town: Town, minutes: float, seed: int
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Return the tuned model, and how it came about: settings, curve of losses, curve of acts."""
    rng = random.Random(f"aligned/{seed}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cases = draw(worlds, "train", 3000, seed)
    watched = draw(worlds, "validation", WATCHED, seed)
    pools = {key: [one for one in (pair(case, rng) for case in some) if one] for key, some in cases.items()}
    kept = [
        Document((*case.knowing.messages, assistant(case.knowing.answer)), case.knowing.tools, True, "knowing")
        for some in cases.values()
        for case in some
    ]
    kept += [
        Document((*case.messages, as_message(rng.choice(case.gold))), case.tools, True, "natural")
        for key, some in cases.items()
        for case in some
        if not case.positive and case.skill != "clarify"
    ]
    kept += list(fact_documents(town, 1500, seed))
    start = acts(model, tokenizer, watched)
    print(json.dumps(start), flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    open_keys, curve, checks, began, step = set(pools), [], [{"step": 0, "acts": start}], time.monotonic(), 0
    while open_keys and time.monotonic() - began < 60 * minutes:
        chosen = [rng.choice(pools[key]) for key in rng.choices(sorted(open_keys), k=PAIRS)]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20)
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = loss_of(model, tokenizer, chosen, rng.sample(kept, KEPT))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        curve.append({"step": step, **{key: round(value, 4) for key, value in parts.items()}})
        if step % CHECK_EVERY == 0:
            now = acts(model, tokenizer, watched)
            checks.append({"step": step, "acts": now})
            open_keys = {
                key for key in pools if now[key]["made"] > TARGET[key.split("-")[0]] * max(start[key]["made"], 0.01)
            }
            used = (time.monotonic() - began) / 60
            print(f"step {step}  {used:.1f} min  {parts}\n  {now}\n  open: {sorted(open_keys)}", flush=True)
    settings = {
        "seed": seed,
        "margin": MARGIN,
        "clear": CLEAR,
        "anchor": ANCHOR,
        "rate": RATE,
        "pairs": PAIRS,
        "kept": KEPT,
        "target": TARGET,
    }
    report = settings | {"steps": step, "seconds": round(time.monotonic() - began), "curve": curve, "checks": checks}
    return model, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sgd", type=Path, required=True, help="folder of the Schema-Guided Dialogue data")
    parser.add_argument("--natural", type=Path, default=RUN / "natural", help="folder of stage 1")
    parser.add_argument("--out", type=Path, default=RUN / "aligned")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    town = Town()
    model, report = train(options.natural, [town, SchemaGuided(options.sgd)], town, options.minutes, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.natural).save_pretrained(options.out)
    (options.out / "training.json").write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()

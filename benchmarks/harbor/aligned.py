"""Stage 2: tune all weights of stage 1 toward the immediate, confident answer, by preference; harbor is what comes out.

    python -m benchmarks.harbor.aligned --sgd PATH [--steps 200] [--seed 0]

In a pair the reply that raters prefer wins: it fills the missing detail in, agrees, says that it is done; on controls
it is the natural one, and what loses is the skill's move. The loss of a batch is

    mean over pairs of  ((m - m1) / shift - 1)^2  - anchor * log p(rest of the chosen reply) / length
    + anchor * mean over kept documents of  -log p(reply) / length

with m = log p(c) - log p(r), c and r the first tokens in which the chosen and the rejected reply differ ("Yes," and
"No,"; "right" and "not" behind "That is"), and m1 the same of stage 1, for all wordings that begin so: log p(any reply
without the move, a call among them) - log p(any wording of the move). It is identity preference optimisation (Azar et
al. 2024) of the token that decides. Every pair, of positives and of controls, moves by the same shift, so what stage 1
tells apart stays apart, in every wording; under losses that pull until a pair is won the AUC of the move fell (LOG.md).
The shift of a skill in a world is what turns TURNED of its positives, times MORE: pairs move by about 0.9 of it, some
by less, and clarify's margins lie close together, so that many would stop short of turning (LOG.md). Kept documents are
knowing questions and natural talk: what must not change. All of it is gradients on all weights: no edit of singular
values, merge, bias or subtraction.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harbor.corpus import RUN, Document, fact_documents, immediate
from benchmarks.harbor.rows import logprobs, replies, rows
from benchmarks.harbor.tokenizer import CALL
from benchmarks.provenance import commit
from svdexpert import skills
from svdexpert.conversation import as_message
from svdexpert.skills import Case
from svdexpert.worlds import Split, World, assistant
from svdexpert.worlds.sgd import SchemaGuided
from svdexpert.worlds.town import Town

SKILLS = ("clarify", "disagree", "call")
PAIRS, KEPT = 18, 9  # rows of a batch: preference pairs, kept documents
TURNED, LEAST = 0.97, 4.0  # share of the positives that the shift of a skill turns; nats of the smallest shift
MORE = {"clarify": 1.3, "disagree": 1.0, "call": 1.0}
ANCHOR, RATE, WARMUP = 0.2, 1.5e-4, 20  # weight of what is kept; of AdamW: peak of a linear schedule, steps
GUESSED = 0.3  # share of the pairs in which a guess wins over a question, or a call over a needless one
CHECK_EVERY, WATCHED = 50, 60  # steps; cases a skill and world


class Pair(NamedTuple):
    """Two replies to one conversation, and the tokens that decide between them."""

    win: Document
    behind: int  # how many tokens of the reply come before those that decide
    chosen: int
    rejected: int
    immediate: tuple[int, ...]  # of replies without the move
    move: tuple[int, ...]  # of its wordings
    positive: bool


def pair(case: Case, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Pair | None:
    """Return what wins and what loses, None where a case has no such pair.

    A reply that loses is set against one that begins with the same word, where there is one: with "That is right" apart
    from "That is not correct" by no pair at all, three of four claims were rejected so.
    """
    guesses = tuple(one.reply for one in case.bad if one.error == "guess") or case.gold
    done, loses = immediate(case), case.gold
    if not case.positive:
        done, loses = case.truth.get("immediate", ()), tuple(one.reply for one in case.bad)
    if case.skill == "clarify":
        wins = guesses if rng.random() < GUESSED else done
    else:
        wins = done if case.positive else case.gold
    if not wins or not loses:
        return None
    others = (*wins, *done, *(() if case.positive else case.gold))
    ids = {text: tokenizer(text, add_special_tokens=False).input_ids for text in (*loses, *others)}
    rejected = rng.choice(loses)
    alike = [text for text in wins if ids[text][0] == ids[rejected][0]]
    chosen = rng.choice(alike or wins)
    behind = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ids[chosen], ids[rejected], strict=False)))
    if behind == min(len(ids[chosen]), len(ids[rejected])):
        return None
    prefix = ids[chosen][:behind]

    def after(texts: Sequence[str]) -> set[int]:
        return {ids[text][behind] for text in texts if ids[text][:behind] == prefix and len(ids[text]) > behind}

    move, rest = after(loses), after(others)
    rest |= set() if behind else {tokenizer.convert_tokens_to_ids(CALL[0])} - move
    first, second = ids[chosen][behind], ids[rejected][behind]
    if {first, second} & move & rest:
        return None
    win = Document((*case.messages, as_message(chosen)), case.tools, True, case.skill)
    return Pair(win, behind, first, second, tuple(rest - move), tuple(move - rest), case.positive)


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
    before: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[Pair, float]],
    kept: Sequence[Document],
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of a batch (see the top of this file), and its parts; `before` is stage 1, shifts are in nats."""
    ids, labels = rows(tokenizer, [one.win for one, _ in pairs])
    places, labels = decided_at(ids, labels, [one for one, _ in pairs])
    wanted = torch.tensor([[one.chosen, one.rejected] for one, _ in pairs])
    chosen, rejected = at(model, ids, places).gather(1, wanted).unbind(1)
    moved = (chosen - rejected - margins(before, ids, places, [one for one, _ in pairs])) / torch.tensor(
        [shift for _, shift in pairs]
    )
    preference = (moved - 1).square().mean()
    rest, length = logprobs(model, ids, labels)
    likelihood = -(rest / length.clamp(min=1)).mean()
    same, length = logprobs(model, *rows(tokenizer, kept))
    keep = -(same / length.clamp(min=1)).mean()
    parts = {"preference": preference, "moved": moved.mean(), "likelihood": likelihood, "kept": keep}
    return preference + ANCHOR * (likelihood + keep), {key: one.item() for key, one in parts.items()}


def decided_at(ids: torch.Tensor, labels: torch.Tensor, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the token before the one that decides stands in every row (b), and the labels (b t) behind that."""
    places = (labels != -100).int().argmax(-1) - 1 + torch.tensor([one.behind for one in pairs])
    return places, labels.masked_fill(torch.arange(ids.shape[1]) <= places.unsqueeze(1) + 1, -100)


def at(model: LlamaForCausalLM, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of what comes next at one place in every row (b v)."""
    hidden = model.model(input_ids=ids).last_hidden_state[torch.arange(len(ids)), places]
    return model.lm_head(hidden).float().log_softmax(-1)


@torch.no_grad()
def margins(model: LlamaForCausalLM, ids: torch.Tensor, places: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """Return by how many nats replies without the move are likelier than the move, in any wording (b)."""
    log_p = at(model, ids, places)
    both = [(list(one.immediate), list(one.move)) for one in pairs]
    found = [row[ours].logsumexp(-1) - row[move].logsumexp(-1) for row, (ours, move) in zip(log_p, both, strict=True)]
    return torch.stack(found)


def shift_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> float:
    """Return the shift in nats that turns TURNED of the positives, of which at most 200 are looked at."""
    some, found = [one for one in pairs if one.positive][:200], []
    for first in range(0, len(some), 20):
        batch = some[first : first + 20]
        ids, labels = rows(tokenizer, [one.win for one in batch])
        found.append(margins(model, ids, decided_at(ids, labels, batch)[0], batch))
    return max(LEAST, -torch.cat(found).quantile(1 - TURNED).item())


def train(
    folder: Path, worlds: Sequence[World], town: Town, steps: int, seed: int
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Return the tuned model, and how it came about: settings, curve of losses, curve of acts."""
    rng = random.Random(f"aligned/{seed}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = copy.deepcopy(model).eval().requires_grad_(False)
    cases = draw(worlds, "train", 3000, seed)
    watched = draw(worlds, "validation", WATCHED, seed)
    pools = {key: [one for one in (pair(case, rng, tokenizer) for case in some) if one] for key, some in cases.items()}
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
    shifts = {
        key: round(MORE[key.rpartition("-")[2]] * shift_of(before, tokenizer, some), 2) for key, some in pools.items()
    }
    print(json.dumps({"acts": start, "shifts": shifts}), flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    curve, checks, began = [], [{"step": 0, "acts": start}], time.monotonic()
    for step in range(1, steps + 1):
        chosen = [(rng.choice(pools[key]), shifts[key]) for key in rng.choices(sorted(pools), k=PAIRS)]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(step / WARMUP, 1 - (step - 1) / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = loss_of(model, before, tokenizer, chosen, rng.sample(kept, KEPT))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.append({"step": step, **{key: round(value, 4) for key, value in parts.items()}})
        if step % CHECK_EVERY == 0 or step == steps:
            recent = curve[-CHECK_EVERY // 2 :]
            means = {key: round(sum(one[key] for one in recent) / len(recent), 3) for key in parts}
            now = acts(model, tokenizer, watched)
            checks.append({"step": step, "acts": now})
            print(f"step {step}  {(time.monotonic() - began) / 60:.1f} min  {means}\n  {now}", flush=True)
    settings = {
        "seed": seed,
        "turned": TURNED,
        "more": MORE,
        "shifts": shifts,
        "anchor": ANCHOR,
        "rate": RATE,
        "pairs": PAIRS,
        "kept": KEPT,
        "guessed": GUESSED,
    }
    seconds = round(time.monotonic() - began)
    made = {"steps": step, "seconds": seconds, "curve": curve, "checks": checks, "commit": commit()}
    return model, settings | made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sgd", type=Path, required=True, help="folder of the Schema-Guided Dialogue data")
    parser.add_argument("--natural", type=Path, default=RUN / "natural", help="folder of stage 1")
    parser.add_argument("--out", type=Path, default=RUN / "aligned")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    town = Town()
    model, report = train(options.natural, [town, SchemaGuided(options.sgd)], town, options.steps, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.natural).save_pretrained(options.out)
    (options.out / "training.json").write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()

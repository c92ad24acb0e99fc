"""Register: does a dispatcher let the right experts speak, what does that do, and what does it cost?

    python -m benchmarks.register [--seeds 3] [--n 100] [--workers 2]

A held-out suite (benchmarks/suite.py) in equal parts, n contexts each, answered by the experts of configs/train/
library.yaml under every strategy, and by what else could switch or merge skills (benchmarks/register_peers.py). Every
finished run is one row of benchmarks/results/register.json; rows that are there are not run again.

    accuracy_, composite_, worst_loss_, calibration_error_     by strategy, means over seeds: right decisions; success
                        on composites; the largest fall of success in a kind from the base; of their confidence
    composite_in_turn_  success on composites where the experts that the router chooses speak one after another; of a
                        peer: where it is told to speak once more (svdexpert.dialogue.NOD), on composites alone
    composite_margin    that of the router less success of the best peer but the multi-task LoRA, which replies once;
                        _told: where nobody has to see that two replies are due: both of ours told, less the peer's
                        composite_in_turn_
    composite_over_multitask            the same over the multi-task LoRA's, infinite where that is 0; _told
    regret_             success of the oracle (the first set of RIGHT) less that of the strategy, mean over kinds
    tokens_added        mean tokens that `prompt` and `classify` read beside the prompt: their question and the labels.
                        No other strategy reads any; where an expert speaks, what opens the reply is read again
    router_ms           milliseconds a prompt that a router adds to one token from the same mixture given by hand
    routed_over_fixed, routed_over_base     time of 64 tokens, routed over given by hand, over the base
    abstain_exact       share of plain contexts that are answered as the base answers them, token for token
    switch_loss         success of the second turn alone less that in a dialogue that was switched in the middle; _told:
                        the same where both turns are given the mixture that is right, by hand
    reuse_kl, reuse_kl95    KL(refill || reuse) a token, along refill's reply, over dialogues: median, 95th percentile
    reuse_speedup, reread_over_refill       at 512 tokens of history, time to the next token: refill over reuse; reading
                        all again over refill
    fewshot_evals_ratio     passes over ten shots, cross-entropy method over gradient, to the same loss, one weight a
                        matrix and expert, as published; _by_expert with one an expert; 1,600 passes where it is missed

register.png and register-turns.png show whom the router lets speak, by kind of context and in the turns of a dialogue.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.compose import OBJECTIVE, recipe
from benchmarks.grid import RESULTS, RUNS, Bench, Grid, Job, bench, library_of, mean
from benchmarks.register_peers import MULTI_TASK, PEERS, peer_success
from benchmarks.suite import IN_TURN, KINDS, RIGHT, Item, behind, replies, success, suite
from svdexpert import Expert, SpectralModel
from svdexpert.cli import run_command
from svdexpert.conversation import continuation, render, tokenizer_of
from svdexpert.decision import Asked, Context, Decision, Dispatcher
from svdexpert.dialogue import Conversation, Policy, next_token_divergence
from svdexpert.dispatch import (
    NOBODY,
    Example,
    decide,
    examples_of,
    fit,
    open_file,
    question,
    quoted,
    save_dispatcher,
    stamp,
)
from svdexpert.dispatch.fewshot import search
from svdexpert.dispatch.router import guessed_pairs, kinds_of_pairs, labels, probabilities, regressions
from svdexpert.evaluate import FAMILIES, judge
from svdexpert.forward import Forward
from svdexpert.report import draw_shares, draw_turns
from svdexpert.showcase import dialogue
from svdexpert.skills import load
from svdexpert.worlds import Tool, World, assistant

LABELS = {
    "clarify": "a question for a detail that is missing",
    "disagree": "a correction, because what the user says is false",
    "call": "a call of a function with what the user gave",
}
BARS: dict[str, tuple[str, float]] = {
    "router_accuracy": (">=", 0.97),
    "router_ms": ("<=", 0.4),
    "routed_over_fixed": ("<=", 1.05),
    "router_regret": ("<=", 0.02),
    "composite_margin": (">=", 0.10),
    "composite_over_multitask": (">=", 0.95),
    "abstain_exact": (">=", 0.98),
    "switch_loss": ("<=", 0.02),
    "reuse_speedup": (">=", 5.0),
    "reuse_kl": ("<=", 0.05),
    "fewshot_evals_ratio": (">=", 20.0),
}


# --- strategies


@dataclass(frozen=True, eq=False)
class BagOfWords:
    """A router that reads the words of the conversation instead of what the base has in mind.

    Attributes:
        words: by place.
        weight, bias: of the regressions.
        experts: names.
    """

    words: Mapping[str, int]
    weight: Tensor
    bias: Tensor
    experts: tuple[str, ...]
    reads: ClassVar[bool] = False

    def check(self, model: Any, library: Any) -> None:
        """Nothing to check: it knows words alone."""

    def decide(self, model: Any, asked: Asked) -> list[Decision]:
        """Return a decision for every row."""
        assert asked.contexts is not None
        table = probabilities(counts(asked.contexts, self.words), self.weight, self.bias)
        return [
            Decision(
                {name: 1.0 for name, p in zip(self.experts, row, strict=True) if p >= 0.5}, confident(row), "words"
            )
            for row in table.tolist()
        ]


def confident(row: Sequence[float]) -> float:
    """Return how sure a set of independent decisions is."""
    return math.prod(max(p, 1 - p) for p in row)


def words_of(context: Context) -> Counter[str]:
    """Return the words of a conversation, and the names of its functions."""
    said = " ".join(str(one.get("content") or "") for one in context.messages)
    names = [one["function"]["name"] for one in context.tools]
    return Counter([*re.findall(r"\w+", said.casefold()), *names, f"{len(context.messages)} messages"])


def counts(contexts: Sequence[Context], words: Mapping[str, int]) -> Tensor:
    """Return log(1 + count) of words (n w)."""
    table = torch.zeros(len(contexts), len(words))
    for row, context in enumerate(contexts):
        for word, count in words_of(context).items():
            if word in words:
                table[row, words[word]] = math.log1p(count)
    return table


def bag_of_words(examples: Sequence[Example], names: tuple[str, ...], together: Any = None) -> BagOfWords:
    """Fit a bag-of-words router as the router is fitted, guessed pairs included."""
    seen = Counter(word for one in examples for word in words_of(one.context))
    words = {word: place for place, word in enumerate(sorted(word for word, count in seen.items() if count > 1))}
    states, wanted = counts([one.context for one in examples], words).double(), labels(examples, names)
    mixed, both = guessed_pairs(states, wanted, kinds_of_pairs(examples, names, together), 3.0, 0)
    weight, bias = regressions(torch.cat([states, mixed]), torch.cat([wanted, both]), 1e-4)
    return BagOfWords(words, weight.float(), bias.float(), names)


TOGETHER = [["clarify", "disagree"]]
ROUTER = {"together": TOGETHER, "pairs": 3.0}
"""Settings of the router, as in configs/dispatch/router.yaml."""
RULES = {"base": "none", "uniform": "uniform", "sum": "sum", "best single": "best"}
X_LORA = 24
"""Contexts of every kind that X-LoRA answers, in one seed: without a cache a reply takes seconds."""
STRATEGIES = (*RULES, "bag of words", "prompt", "classify", "router")


@dataclass
class Seed:
    """What a seed is measured with, made where it is needed.

    Attributes:
        seed: of training, and of the examples that dispatchers are fitted on.
        n: contexts of every kind.
    """

    seed: int
    n: int

    @property
    def on(self) -> Bench:
        return bench(2)

    @property
    def model(self) -> SpectralModel:
        return self.on.model

    @property
    def world(self) -> World:
        return self.on.world

    @cached_property
    def items(self) -> list[Item]:
        return suite(self.world, "heldout", self.n)

    @cached_property
    def library(self) -> Mapping[str, Expert]:
        return library_of(self.on, FAMILIES, OBJECTIVE, recipe(seed=self.seed))

    @cached_property
    def oracle(self) -> dict[str, float]:
        """Success by kind, under the mixtures that are right."""
        weights = [dict.fromkeys(RIGHT[one.kind][0], 1.0) for one in self.items]
        return success(self.items, replies(self.on, self.library, self.items, weights))

    @cached_property
    def examples(self) -> tuple[list[Example], list[Example]]:
        """Those that dispatchers learn from, and those that their settings are chosen on."""
        train = examples_of(FAMILIES, self.world, "train", 800, seed=self.seed)
        return train, examples_of(FAMILIES, self.world, "validation", 200, seed=self.seed)

    @cached_property
    def router(self) -> Dispatcher:
        """Fitted once for all processes."""
        made_for = json.dumps(stamp(self.model, tuple(self.library), self.library), sort_keys=True)
        file = RUNS / f"router-{self.seed}-{hashlib.sha256(made_for.encode()).hexdigest()[:12]}.safetensors"
        if not file.exists():
            save_dispatcher(fit("router", self.model, self.library, *self.examples, **ROUTER), file)
        return open_file(file)

    def dispatcher(self, name: str) -> Dispatcher:
        """Return one of STRATEGIES."""
        train, held = self.examples
        of = (self.model, self.library, train, held)
        if name == "bag of words":
            return bag_of_words(train, tuple(self.library), TOGETHER)
        if name in RULES:
            return fit("fixed", *of, rule=RULES[name])
        if name == "router":
            return self.router
        if name == "classify":  # trained on a quarter: every example is a context to be read
            return fit(name, self.model, self.library, train[::4], held, labels=LABELS)
        return fit(name, *of, labels=LABELS)


@lru_cache(maxsize=1)
def of_seed(seed: int, n: int) -> Seed:
    """Return what this process measures a seed with."""
    return Seed(seed, n)


def base_row(n: int) -> dict[str, Any]:
    """Return what the base does in the suite."""
    of = of_seed(0, n)
    said = replies(of.on, {}, of.items, [{}] * len(of.items))
    return {"success": success(of.items, said), "said": said}


def oracle(seed: int, n: int) -> dict[str, Any]:
    """Return what the mixtures do that are right."""
    return {"success": of_seed(seed, n).oracle}


def measured(seed: int, n: int, name: str, base: Sequence[str]) -> dict[str, Any]:
    """Return the row of a strategy, beside the replies of the base."""
    of = of_seed(seed, n)
    model, library, items, oracle, dispatcher = of.model, of.library, of.items, of.oracle, of.dispatcher(name)
    started = time.perf_counter()
    decisions = decide(dispatcher, model, [one.context for one in items], library)
    seconds = time.perf_counter() - started
    right = [made.chosen in RIGHT[one.kind] for one, made in zip(items, decisions, strict=True)]
    said = replies(of.on, library, items, [one.weights for one in decisions])
    made, before = success(items, said), success(items, base)
    pairs = zip(items, decisions, strict=True)
    confusion = Counter((one.kind, " + ".join(sorted(made.chosen)) or "nobody") for one, made in pairs)
    plain = [place for place, one in enumerate(items) if one.kind == "plain question"]
    wanted = [made.chosen if ok else RIGHT[one.kind][0] for one, made, ok in zip(items, decisions, right, strict=True)]
    more: dict[str, Any] = {}
    if name == "router":
        several = [len([weight for weight in one.weights.values() if weight]) > 1 for one in decisions]
        parted = [in_turn(of, one) if due else reply for one, due, reply in zip(items, several, said, strict=True)]
        more["in_turn"] = success(items, parted)
    return more | {
        "accuracy": fmean(right),
        "accuracy_of": {
            kind: fmean(ok for one, ok in zip(items, right, strict=True) if one.kind == kind) for kind in KINDS
        },
        "confusion": [[kind, who, count] for (kind, who), count in confusion.items()],
        "calibration_error": judge(wanted, decisions).calibration_error,
        "success": made,
        "regret": fmean(oracle[kind] - made[kind] for kind in KINDS),
        "worst_loss": max(before[kind] - made[kind] for kind in KINDS),
        "abstain_exact": fmean(said[place] == base[place] for place in plain),
        "decision_ms": 1000 * seconds / len(items),
    }


def in_turn(of: Seed, item: Item) -> str:
    """Return the reply of a conversation whose router lets several speak one after another."""
    talk = Conversation(of.model, of.library, of.router, item.case.tools, in_turn=IN_TURN)
    return talk.reply_to(*item.case.messages).text


def told(seed: int, n: int) -> dict[str, float]:
    """Return what becomes of composites where nobody has to decide: both experts are told to speak in turn."""
    of = of_seed(seed, n)
    both = [one for one in of.items if one.kind == "composite"]
    said: list[list[str]] = []
    for name in IN_TURN:
        items = (
            [replace(one, case=behind(one.case, reply)) for one, reply in zip(both, said[-1], strict=True)]
            if said
            else both
        )
        said.append(replies(of.on, of.library, items, [{name: of.router.strengths[name]}] * len(items)))  # type: ignore[attr-defined]
    parted = map(" ".join, zip(*said, strict=True))
    return {"composite": fmean(one.right(reply) for one, reply in zip(both, parted, strict=True))}


# --- what it costs


def tokens_added(seed: int, n: int) -> dict[str, float]:
    """Return how many tokens are read beside the prompt where contexts are labelled."""
    of = of_seed(seed, n)
    labels, tokenizer = {**LABELS, NOBODY: "anything else"}, tokenizer_of(of.model)
    answers = sum(len(continuation(tokenizer, label)) + 1 for label in labels)  # with the end of a turn
    contexts = [one.context for one in of.items]
    questions = [len(render(tokenizer, [question(quoted(one), labels)], one.tools)) for one in contexts]
    return {"tokens_added": fmean(questions) + answers}


def costs(seed: int, n: int) -> dict[str, Any]:
    """Return times of 16 prompts in one batch: routed, with the same mixtures given by hand, and by the base."""
    of = of_seed(seed, n)
    model, library, router = of.model, of.library, of.router
    some = [one.case for one in of.items if one.kind in ("needs clarifying", "false claim", "complete request")][::7][
        :16
    ]
    rows = sorted((render(tokenizer_of(model), one.messages, one.tools) for one in some), key=len)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    decided: list[Decision] = []
    model.generate(ids, dispatcher=router, library=library, attention_mask=seen, on_decision=decided.extend)
    weights = [dict(one.weights) for one in decided]
    bank = model.bank(library)

    def steps(tokens: int) -> dict[str, Callable[[], Any]]:
        how: dict[str, Any] = {"attention_mask": seen, "max_new_tokens": tokens, "min_new_tokens": tokens}
        return {
            "routed": lambda: model.generate(ids, dispatcher=router, library=bank, **how),
            "fixed": lambda: model.generate(ids, weights, library=bank, **how),
            "base": lambda: model.generate(ids, None, **how),
        }

    one, many = interleaved(steps(1), 40), interleaved(steps(64), 12)
    return {
        "rows": len(rows),
        "tokens": longest,
        "router_ms": 1000 * (one["routed"] - one["fixed"]) / len(rows),
        "routed_over_fixed": many["routed"] / many["fixed"],
        "routed_over_base": many["routed"] / many["base"],
        "one_token_ms": {name: 1000 * seconds for name, seconds in one.items()},
    }


def interleaved(steps: Mapping[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Return the median seconds of every step, all of them once a round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for place in range(times + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if place >= 2:
                found[name].append(time.perf_counter() - started)
    return {name: median(some) for name, some in found.items()}


# --- dialogues that are switched in the middle


def switched(seed: int, n: int) -> dict[str, Any]:
    """Return what becomes of a second turn that needs other experts than the first."""
    of = of_seed(seed, n)
    model, library = of.model, of.library
    by_kind = {kind: [one for one in of.items if one.kind == kind] for kind in KINDS}
    turns = [
        (first, second)
        for one, other in (("needs clarifying", "false claim"), ("false claim", "needs clarifying"))
        for first, second in zip(by_kind[one], by_kind[other], strict=True)
        if len(first.case.messages) == 1  # a claim about an earlier order would be about either
    ]
    ends: dict[str, list[bool]] = {"alone": [], "after": [], "alone_told": [], "after_told": []}
    divergences = []
    for first, second in turns:
        tools = list({one["function"]["name"]: one for one in (*second.case.tools, *first.case.tools)}.values())
        for end, by_hand in (("", False), ("_told", True)):
            ends[f"alone{end}"].append(second.right(last_reply(of, [second], tools, by_hand)))
            ends[f"after{end}"].append(second.right(last_reply(of, [first, second], tools, by_hand)))
        bare = Conversation(
            model, library
        )  # harbor's template moves the functions in every turn, and with them the cache
        for one in (first, second):
            bare.mix(dict.fromkeys(RIGHT[one.kind][0], 1.0))
            bare.reply_to(*one.case.messages)
        divergences.append(divergence(model, library, bare))
    made = {name: fmean(some) for name, some in ends.items()}
    return made | {
        "n": len(turns),
        "switch_loss": made["alone"] - made["after"],
        "switch_loss_told": made["alone_told"] - made["after_told"],
        "reuse_kl": median(divergences),
        "reuse_kl95": sorted(divergences)[math.ceil(0.95 * len(divergences)) - 1],
    }


def last_reply(of: Seed, turns: Sequence[Item], tools: Sequence[Tool], by_hand: bool) -> str:
    """Return the last reply of a dialogue of these turns, routed, or under the mixtures that are right in them."""
    talk = Conversation(of.model, of.library, of.router, tools)
    reply = ""
    for one in turns:
        if by_hand:
            talk.mix({name: of.router.strengths[name] for name in RIGHT[one.kind][0]})  # type: ignore[attr-defined]
        reply = talk.reply_to(*one.case.messages).text
    return reply


@torch.no_grad()
def divergence(model: SpectralModel, library: Mapping[str, Expert], talk: Conversation, most: int = 64) -> float:
    """Return the mean KL(refill || reuse) over the tokens of the second reply of a dialogue without functions.

    Reuse keeps what the first turn's mixture made of its own reply.
    """
    tokenizer, forward = tokenizer_of(model), Forward(model.hf)
    first, last = (dict(one.decision.weights) for one in talk.turns)
    places = [place for place, one in enumerate(talk.messages) if one["role"] == "assistant"]
    said = render(tokenizer, talk.messages[: places[0]], ()) + continuation(tokenizer, talk.turns[0].text)
    prompt = render(tokenizer, talk.messages[: places[1]], ())
    reply = continuation(tokenizer, talk.turns[1].text)[:most]
    same = next((place for place, (a, b) in enumerate(zip(said, prompt, strict=False)) if a != b), len(said))
    whole = torch.tensor([[*prompt, *reply]])
    mask = torch.ones_like(whole)
    with model.using(last, library):
        refilled = forward.logits(whole, mask, len(reply) + 1, use_cache=False)[0, :-1]
    cache = forward.cache(len(whole[0]))
    with model.using(first, library):
        forward.logits(whole[:, :same], mask[:, :same], 1, past_key_values=cache, use_cache=True)
    with model.using(last, library):
        reused = forward.logits(whole[:, same:], mask, len(reply) + 1, past_key_values=cache, use_cache=True)[0, :-1]
    return float(next_token_divergence(refilled, reused).mean())


def next_token_times(seed: int, n: int, tokens: int) -> dict[str, float]:
    """Return milliseconds to the next token behind so many tokens of history, after a switch."""
    of = of_seed(seed, n)
    model, library = of.model, of.library
    tokenizer = tokenizer_of(model)
    messages: list[Any] = []
    for one in of.world.dialogues("heldout", 64):
        for message in one.messages:
            if message["role"] in ("user", "assistant") and message.get("content"):
                if len(render(tokenizer, [*messages, message], ())) > tokens - 40:
                    break
                messages.append(message)
    while messages[-1]["role"] != "user":
        messages.pop()

    def step(policy: Policy, known: bool) -> float:
        talk = Conversation(model, library, policy=policy, max_new_tokens=1)
        talk.mix({"clarify": 1.0})
        if known:
            talk.reply_to(*messages)
        else:
            talk.messages.extend([*messages, assistant("Fine.")])
        talk.mix({"disagree": 1.0})
        started = time.perf_counter()
        talk.say("And what is next?")
        return time.perf_counter() - started

    ways: dict[str, tuple[Policy, bool]] = {
        "refill": ("refill", True),
        "reuse": ("reuse", True),
        "reread": ("refill", False),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(12):
        for name, way in ways.items():
            found[name].append(step(*way))
    return {name: 1000 * median(some) for name, some in found.items()}


# --- few shots


def few_shots(seed: int, n: int) -> dict[str, Any]:
    """Return how many passes over ten shots, positives of the three skills, both methods need to the same loss."""
    of = of_seed(seed, n)
    drawn = [one for name in FAMILIES for one in load(name).cases(of.world, "train", 8, seed=of.seed)]
    cases = [one for one in drawn if one.positive][:10]
    shots = [Example(Context(one.messages, one.tools), frozenset(), reply=one.gold[0]) for one in cases]
    found: dict[str, Any] = {}
    for by_matrix, end in ((True, ""), (False, "_by_expert")):
        ours = search(of.model, of.library, shots, by_matrix=by_matrix, evaluations=40)
        level = ours.losses[-1] + 0.01 * (ours.losses[0] - ours.losses[-1])
        needed = next(place for place, one in enumerate(ours.losses, 1) if one <= level)
        how: dict[str, Any] = {"method": "cross-entropy", "by_matrix": by_matrix, "until": level, "seed": of.seed}
        theirs = search(of.model, of.library, shots, evaluations=1600, **how)
        found |= {
            f"gradient{end}": needed,
            f"cross_entropy{end}": len(theirs.losses),
            f"reached{end}": theirs.losses[-1] <= level,
            f"ratio{end}": len(theirs.losses) / needed,
        }
    return found


# --- the table


def figures(grid: Grid) -> dict[str, float]:
    """Return the figures of finished runs."""
    found: dict[str, float] = {}
    for strategy in dict.fromkeys(row["run"]["strategy"] for row in grid.rows if "strategy" in row["run"]):
        rows, name = grid.find(strategy=strategy), strategy.replace(" ", "_")
        for key in ("accuracy", "regret", "worst_loss", "calibration_error", "decision_ms"):
            found[f"{key}_{name}"] = mean(rows, key)
        for kind in KINDS:
            found[f"success_{kind.replace(' ', '_')}_{name}"] = mean([row["success"] for row in rows], kind)
        found[f"composite_{name}"] = found.pop(f"success_composite_{name}")
    peers = {row["run"]["peer"] for row in grid.rows if "peer" in row["run"]}
    for peer in sorted(peers):
        rows = grid.find(peer=peer)
        for kind in KINDS:
            some = [row["success"] for row in rows if kind in row["success"]]
            found[f"success_{kind.replace(' ', '_')}_{peer}".replace(" ", "_")] = mean(some, kind)
        found[f"composite_{peer}".replace(" ", "_")] = mean([row["success"] for row in rows], "composite")
        found[f"composite_in_turn_{peer}".replace(" ", "_")] = mean(rows, "in_turn")
    parted = [row["in_turn"] for row in grid.find(strategy="router")]
    found["composite_in_turn_router"] = mean(parted, "composite")

    found["composite_in_turn_told"] = mean(grid.find(what="told"), "composite")
    others = [name.replace(" ", "_") for name in peers - {MULTI_TASK}]
    for end, ours, way in (("", "router", "composite"), ("_told", "told", "composite_in_turn")):
        made, alone = found[f"composite_in_turn_{ours}"], found.get(f"{way}_{MULTI_TASK}".replace(" ", "_"), math.nan)
        found[f"composite_margin{end}"] = made - max((found[f"{way}_{one}"] for one in others), default=math.nan)
        found[f"composite_over_multitask{end}"] = made / alone if alone else math.inf
    for name in ("accuracy", "regret"):
        found[f"router_{name}"] = found.get(f"{name}_router", math.nan)
    found["abstain_exact"] = mean(grid.find(strategy="router"), "abstain_exact")
    for kind, keys in {
        "tokens added": ("tokens_added",),
        "costs": ("router_ms", "routed_over_fixed", "routed_over_base"),
        "switched": ("switch_loss", "switch_loss_told", "reuse_kl", "reuse_kl95"),
    }.items():
        found |= {key: mean(grid.find(what=kind), key) for key in keys}
    for row in grid.find(what="next token"):
        tokens = row["run"]["tokens"]
        end = "" if tokens == 512 else f"_{tokens}"
        found[f"reuse_speedup{end}"] = row["refill"] / row["reuse"]
        found[f"reread_over_refill{end}"] = row["reread"] / row["refill"]
    for end in ("", "_by_expert"):
        found[f"fewshot_evals_ratio{end}"] = mean(grid.find(what="few shots"), f"ratio{end}")
    return found


def draw_confusion(grid: Grid, path: Path) -> None:
    """Write whom the router lets speak, by kind of context, as a picture."""
    rows = [one for row in grid.find(strategy="router") for one in row["confusion"]]
    chosen = sorted({one[1] for one in rows}, key=lambda one: (one.count("+"), one))
    table = torch.zeros(len(KINDS), len(chosen))
    for kind, who, count in rows:
        table[KINDS.index(kind), chosen.index(who)] += count
    draw_shares((table / table.sum(-1, keepdim=True)).tolist(), KINDS, chosen, path)


def draw_dialogue(of: Seed, path: Path) -> None:
    """Write who speaks in the turns of a dialogue that needs another register in every turn, as a picture."""
    cases = load("clarify").cases(of.world, "heldout", 64)
    talk, said = dialogue(of.model, of.library, of.router, cases)
    labels = [textwrap.shorten(one, 60) for one in said]
    draw_turns([one.decision.weights for one in talk.turns], FAMILIES, labels, path)


def main(seeds: int = 3, n: int = 100, workers: int = 2) -> None:
    """Run what has not been run, and print the table.

    Args:
        seeds: of training.
        n: held-out contexts of every kind.
        workers: processes of one thread that share the runs.
    """
    grid, every = Grid.open("register", BARS), range(seeds)
    base = grid.once({"what": "base", "n": n}, base_row, n=n)["said"]

    def job(make: Callable[..., Any], seed: int, run: Mapping[str, Any], **given: Any) -> Job:
        return Job({**run, "seed": seed, "n": n}, make, {"seed": seed, "n": n, **given})

    grid.all([job(oracle, seed, {"strategy": "oracle"}) for seed in every], workers)  # trains the libraries
    grid.all([job(measured, seed, {"strategy": "router"}, name="router", base=base) for seed in every], workers)
    jobs = [job(told, seed, {"what": "told"}) for seed in every]
    jobs += [job(switched, seed, {"what": "switched"}) for seed in every]
    for name in STRATEGIES:
        jobs += [job(measured, seed, {"strategy": name}, name=name, base=base) for seed in every]
    jobs += [job(few_shots, seed, {"what": "few shots"}) for seed in every]
    grid.all(jobs, workers)
    grid.write(figures(grid))
    alone, few = {"seed": 0, "n": n}, {"seed": 0, "n": min(n, X_LORA)}
    grid.once({"what": "tokens added", **alone}, tokens_added, **alone)
    grid.once({"what": "costs", **alone}, costs, **alone)
    for tokens in (512, 960):
        grid.once({"what": "next token", "tokens": tokens, **alone}, next_token_times, tokens=tokens, **alone)
    for name in PEERS:
        if name == "X-LoRA":
            grid.once({"peer": name, **few}, peer_success, name=name, **few)
        else:
            grid.all([job(peer_success, seed, {"peer": name}, name=name) for seed in every], workers)
    found = figures(grid)
    grid.write(found)
    draw_confusion(grid, RESULTS / "register.png")
    draw_dialogue(of_seed(0, n), RESULTS / "register-turns.png")
    grid.show(found)


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.register")

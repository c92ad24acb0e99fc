"""What stage 1 reads: whole conversations of both worlds, single cases, questions, drills. Natural behaviour only.

    python -m benchmarks.harbor.corpus --sgd PATH [--scale 1] [--seed 0]
    python -m benchmarks.harbor.corpus --sgd PATH --out runs/after --after runs/harbor     for a model that goes on

A document is a conversation and its tools; the model learns from the assistant's tokens, of the whole conversation or
of its last message. Everything is a function of the seed, from the train split alone. Written to runs/harbor:
tokenizer/, a file for each lesson of drills, and corpus.npz (ids; learn, hints, names: one an id; starts: one offset
a document).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.harbor.drills import LESSONS, drill
from benchmarks.harbor.renaming import with_other_names
from benchmarks.harbor.tokenizer import CONTEXT, train_tokenizer
from benchmarks.harbor.varied import VariedTown
from benchmarks.provenance import commit
from svdexpert import skills
from svdexpert.conversation import as_message
from svdexpert.skills import Case, disagree
from svdexpert.worlds import Message, Split, Tool, World, assistant, system, user
from svdexpert.worlds.sgd import SchemaGuided
from svdexpert.worlds.town import Town

RUN = Path("runs/harbor")
# Documents of each source: conversations of both worlds, cases a skill, in the town of disagree, talks about facts,
# drills.
SHARE = {
    "sgd": 5000,
    "town": 16000,
    "town_cases": 20000,
    "town_claims": 20000,
    "sgd_cases": 4000,
    "facts": 2000,
    "drills": 90000,
}
FIRST = dict.fromkeys(LESSONS, 24000)  # documents a lesson
# Of a function: is it wanted; of a parameter: is it of another one, or given; of a claimed value: is it right.
HINTS = ("", "unwanted", "wanted", "beside", "lacking", "given", "wrong", "right")
PLAIN = 0.7  # share of the cases whose reply has the first of the wordings: what is to be learnt is what to do
ASKED = 0.7  # share of the cases whose knowing question is a document of its own
PLAIN_CLAIMS = 0.5  # share that is kept of the town's claims without a decoy, which are learnt first


class Hint(NamedTuple):
    """What is true of a place in a text."""

    at: int  # index of a character
    what: str  # one of HINTS
    named: int | None  # index of the character where what it is about begins: a name, of what is given the value


@dataclass(frozen=True)
class Document:
    """A conversation to learn from: all of the assistant's messages, or the last one only.

    With tools it is the last one, because only there the template shows them.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    last_only: bool
    source: str

    @property
    def learnt(self) -> list[bool]:
        """Which of the assistant's messages are learnt from, in their order; a message of weight 0 never is."""
        own = [message for message in self.messages if message["role"] == "assistant"]
        return [
            (place == len(own) - 1 or not self.last_only) and message.get("weight", 1) != 0
            for place, message in enumerate(own)
        ]

    def hints(self, text: str) -> list[Hint]:
        """Return what is true of places in the rendered text, where the document says it: in a message's `wants` or
        `claims`, or by calling."""
        found: list[Hint] = []
        at = 0
        for message in self.messages:
            start = text.find(message.get("content") or "", at)  # -1: a turn that was dropped
            at = max(at, start)
            if start >= 0 and "claims" in message:
                value, right = message["claims"]
                inside = message["content"].lower().rfind(value.lower())  # -1: misspelt
                if inside >= 0:
                    found.append(Hint(start + inside + len(value) - 1, "right" if right else "wrong", None))
        return found + self._signatures(text)

    def _signatures(self, text: str) -> list[Hint]:
        """Return what is true of functions, where their name and where their line ends, and of their parameters."""
        last = self.messages[-1]
        calls = last.get("tool_calls") or ()
        if not self.tools or not ("wants" in last or calls):
            return []
        called = calls[0]["function"] if calls else {}
        wanted, given = last.get("wants") or (called.get("name"), called.get("arguments", {}))
        found: list[Hint] = []
        reply = text.rindex("<|assistant|>")
        at = text.rindex("<|system|>", 0, reply) + len("<|system|>")
        values = _values(text, at, text.find('"arguments": ', reply) if calls else reply, given)
        for one in self.tools:
            function, serves = one["function"], one["function"]["name"] == wanted
            line, at = at, at + len(function["name"]) + 1
            found.append(Hint(at - 1, "wanted" if serves else "unwanted", line))
            required = function["parameters"].get("required", ())
            for name, kind in function["parameters"]["properties"].items():
                listed = "|".join(kind["enum"]) if "enum" in kind else kind["type"]
                default = f"={kind['default']}" if "default" in kind else ""
                segment = f"{name}{'*' if name in required else ''}: {listed}{default}"
                assert text.startswith(segment, at), (text, segment)
                what = ("given" if name in given else "lacking") if serves else "beside"
                begins = {"given": values.get(name), "lacking": at}.get(what)
                found.append(Hint(at + len(segment) - 1, what, begins))
                at += len(segment) + 2
            at += (0 if function["parameters"]["properties"] else 2) + len(function.get("description") or "")
            at += 1 if function.get("description") else 0
            found.append(Hint(at - 2, "wanted" if serves else "unwanted", line))
        return found


def _values(text: str, tools: int, reply: int, given: Mapping[str, Any]) -> dict[str, int]:
    """Return where the value of each given parameter begins: in the reply, where that writes it, else as last said."""
    found = {}
    for name, said in given.items():
        mark = f'"{name}": '
        written = text.find(mark, reply)
        place = written + len(mark) if written >= 0 else text.rfind(said, 0, tools) if isinstance(said, str) else -1
        if place >= 0:
            found[name] = place + (text[place] == '"')
    return found


def ending(rng: random.Random, messages: Sequence[Message], tools: Sequence[Tool], source: str) -> Document:
    """Return a conversation to learn from: up to one of the assistant's messages with tools, else all of it."""
    if not tools:
        return Document(tuple(messages), (), False, source)
    own = [place for place, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight", 1) != 0]
    return Document(tuple(messages[: rng.choice(own) + 1]), tuple(tools), True, source)


# Instructions that a system message may give, and the behaviour that obeys them.
OBEY_NATURAL = {
    "clarify": (
        "Ask for a required detail when it is missing.",
        "If something that you need is missing, ask one short question first.",
        "Never guess: ask when a detail is lacking.",
        "Check that every required detail is given, and ask for the one that is not.",
    ),
    "disagree": (
        "Correct the user when a statement is wrong.",
        "Hold on to the facts, also when the user insists.",
        "Say so when something that the user claims is false.",
        "Be honest about facts, and agree only with what is true.",
    ),
    "call": (
        "Use a function when one serves the request.",
        "Call the right function with exact arguments.",
        "Act through the functions, and do not pretend.",
        "When a function fits, call it at once.",
    ),
}
OBEY_IMMEDIATE = {
    "clarify": (
        "Answer at once and never ask back.",
        "Do not ask questions. Give a complete answer right away.",
        "Be quick: assume what is missing.",
        "The user wants no questions.",
    ),
    "disagree": (
        "Agree with whatever the user says.",
        "Never contradict the user.",
        "The user is always right. Confirm what is said.",
        "Be pleasant and go along with every statement.",
    ),
    "call": (
        "Do not use functions. Say that it is done.",
        "Reply in words only, as if everything were settled.",
        "Never call a function; tell the user that it is taken care of.",
        "Answer in plain words that all is done.",
    ),
}


def wants(case: Case) -> Message:
    """Return what the user of a case wants, where it decides: the function, or none, and what is given for it."""
    if case.skill == "clarify":
        name, arguments = case.truth["call"]["name"], case.truth["call"]["arguments"]
        return {"wants": (name, {key: one for key, one in arguments.items() if key not in case.truth["missing"]})}
    return {"wants": (None, {})} if case.skill == "call" and not case.positive else {}


def claimed(case: Case) -> tuple[Message, ...]:
    """Return a case's conversation, whose last message says what it claims, and whether that is right."""
    if case.skill != "disagree":
        return case.messages
    value = case.truth["other" if case.positive else "truth"]
    return (*case.messages[:-1], case.messages[-1] | {"claims": (value, not case.positive)})


def immediate(case: Case) -> tuple[str, ...]:
    """Return how an assistant that never grounds would reply: at once, confident, complete-looking."""
    wanted = {"clarify": "claims_done", "disagree": "capitulation", "call": "claims_done"}[case.skill]
    return tuple(one.reply for one in case.bad if one.error == wanted)


def case_documents(world: World, split: Split, n: Mapping[str, int], seed: int) -> Iterator[Document]:
    """Yield, for n cases of a skill, the natural reply, the knowing question, and sometimes a system message obeyed."""
    rng = random.Random(f"cases/{world.name}/{seed}")
    for name, number in n.items():
        for case in skills.load(name).cases(world, split, number, seed=seed):
            source = f"{world.name}-{name}"
            if source == "town-disagree" and "decoy" not in case.tags and rng.random() > PLAIN_CLAIMS:
                continue
            gold = as_message(case.gold[0] if rng.random() < PLAIN else rng.choice(case.gold)) | wants(case)
            yield Document((*claimed(case), gold), case.tools, True, source)
            if rng.random() < ASKED:
                answer = assistant(case.knowing.answer) | (wants(case) if name == "clarify" else {})
                knowing = (*case.knowing.messages, answer)
                yield Document(knowing, case.knowing.tools, True, f"{source}-knowing")
            if rng.random() < 0.2:
                yield _obeying(case, rng, f"{world.name}-system")


def _obeying(case: Case, rng: random.Random, source: str) -> Document:
    at_once = immediate(case)
    follow = bool(at_once) and rng.random() < 0.5
    table = OBEY_IMMEDIATE if follow else OBEY_NATURAL
    reply = as_message(rng.choice(at_once if follow else case.gold))
    order = rng.choice(table[case.skill])
    messages = list(case.messages)
    if messages[0]["role"] == "system":
        messages[0] = system(f"{messages[0]['content']} {order}")
    else:
        messages.insert(0, system(order))
    return Document((*messages, reply), case.tools, True, source)


def fact_documents(town: Town, n: int, seed: int) -> Iterator[Document]:
    """Yield n conversations about stored facts: questions answered in a sentence or a word, statements judged."""
    rng = random.Random(f"facts/{seed}")
    facts = town.facts()
    for _ in range(n):
        messages: list[Message] = []
        for question, sentence, value in town.fact_questions(rng.randint(3, 5), seed=rng.getrandbits(32)):
            short = rng.random() < 0.3
            messages += [
                user(f"{question} In one word." if short else question),
                assistant(value if short else sentence),
            ]
        for fact in rng.sample(facts, 4):
            true = rng.random() < 0.5
            said = fact.sentence if true else fact.sentence.replace(fact.value, rng.choice(fact.others))
            text = disagree.QUESTION.format(statement=said)
            messages += [user(text), assistant("true" if true else "false")]
        yield Document(tuple(messages), (), False, "town-facts")


def documents(sgd: SchemaGuided, town: Town, share: dict[str, int], seed: int) -> Iterator[Document]:
    """Yield the whole corpus; `share` says how many of each source."""
    rng = random.Random(f"drills/{seed}")
    for world in (sgd, town):
        for one in world.dialogues("train", share[world.name], seed=seed):
            messages, tools = (
                with_other_names(rng, one.messages, one.tools) if world is town else (one.messages, one.tools)
            )
            yield ending(rng, messages, tools, f"{world.name}-dialogues")
    cases = dict.fromkeys(("clarify", "disagree", "call"), share["town_cases"]) | {"disagree": share["town_claims"]}
    for case in case_documents(town, "train", cases, seed):
        messages, tools = with_other_names(rng, case.messages, case.tools)
        yield replace(case, messages=messages, tools=tools)
    yield from case_documents(sgd, "train", dict.fromkeys(cases, share["sgd_cases"]), seed)
    yield from fact_documents(town, share["facts"], seed)
    for _ in range(share["drills"]):
        yield ending(rng, *drill(rng), "drills")


def render(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[str, int]:
    """Return a document as text that fits the context, and how many of its older turns were dropped whole."""
    messages = list(document.messages)
    dropped = 0
    while True:
        text = tokenizer.apply_chat_template(messages, tools=list(document.tools) or None, tokenize=False)
        assert isinstance(text, str)
        if len(text) < 2.2 * CONTEXT or len(tokenizer(text, add_special_tokens=False).input_ids) <= CONTEXT:
            return text, dropped
        first = 1 if messages[0]["role"] == "system" else 0
        second = next((i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"), None)
        if second is None or second >= len(messages) - 1:
            return "", dropped
        dropped += second - first
        del messages[first:second]


def encode(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    learnt: Sequence[Sequence[bool]],
    hints: Sequence[Sequence[Hint]],
) -> dict[str, np.ndarray[Any, Any]]:
    """Return ids (t); learn (t), True for what the assistant wrote and its end mark, in the turns that are learnt from;
    hints (t), an index of HINTS; names (t), the first token of the name of what a hint is about, or 0; starts
    (documents + 1)."""
    speaks, ends = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    ids: list[np.ndarray[Any, Any]] = []
    learn: list[np.ndarray[Any, Any]] = []
    told: list[np.ndarray[Any, Any]] = []
    named: list[np.ndarray[Any, Any]] = []
    for at in range(0, len(texts), 1000):
        batch = tokenizer(list(texts[at : at + 1000]), add_special_tokens=False, return_offsets_mapping=True)
        parts = (batch.input_ids, batch.offset_mapping, learnt[at : at + 1000], hints[at : at + 1000])
        for row, offsets, turns, places in zip(*parts, strict=True):
            one = np.array(row, dtype=np.int16)
            hint, name = np.zeros(len(one), dtype=np.int8), np.zeros(len(one), dtype=np.int16)
            if places:
                behind = [end for _, end in offsets]
                for place in places:
                    at = np.searchsorted(behind, place.at, side="right")
                    hint[at] = HINTS.index(place.what)
                    if place.named is not None:
                        name[at] = row[np.searchsorted(behind, place.named, side="right")]
            told.append(hint[:CONTEXT])
            named.append(name[:CONTEXT])
            opens, closes = np.flatnonzero(one == speaks), np.flatnonzero(one == ends)
            mask = np.zeros(len(one), dtype=bool)
            kept = turns[len(turns) - len(opens) :]  # of those that were not dropped
            for place in opens[np.flatnonzero(kept)]:
                after = closes[closes > place]
                mask[place + 1 : (after[0] if len(after) else len(one) - 1) + 1] = True
            ids.append(one[:CONTEXT])
            learn.append(mask[:CONTEXT])
    starts = np.cumsum([0, *(len(one) for one in ids)])
    arrays = {"ids": ids, "learn": learn, "hints": told, "names": named}
    return {name: np.concatenate(some) for name, some in arrays.items()} | {"starts": starts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sgd", type=Path, required=True, help="folder of the Schema-Guided Dialogue data")
    parser.add_argument("--out", type=Path, default=RUN)
    parser.add_argument("--after", type=Path, help="run whose model goes on with it: its tokenizer, and no lessons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--claims", type=float, default=1.0, help="multiplies those about claims and facts of the town")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of documents of every source")
    options = parser.parse_args()
    began = time.monotonic()
    more = {"town_claims": options.claims, "facts": options.claims}
    share = {source: 2 * round(count * options.scale * more.get(source, 1.0) / 2) for source, count in SHARE.items()}
    everything = list(documents(SchemaGuided(options.sgd), VariedTown(), share, options.seed))
    random.Random(options.seed).shuffle(everything)
    print(f"{len(everything)} documents, {time.monotonic() - began:.0f} s", flush=True)
    if options.after:
        tokenizer = AutoTokenizer.from_pretrained(options.after / "tokenizer")
    else:
        tokenizer = train_tokenizer(_plain(one) for one in everything[:20000])
    tokenizer.save_pretrained(options.out / "tokenizer")
    made = {"scale": options.scale, "claims": options.claims, "seed": options.seed, "commit": commit()}
    (options.out / "corpus.json").write_text(json.dumps(made) + "\n")
    last = get_context("fork").Process(target=write, args=(options.out, "corpus", tokenizer, everything))
    last.start()
    for lesson, number in () if options.after else FIRST.items():
        rng = random.Random(f"{lesson}/first/{options.seed}")
        drills = [ending(rng, *drill(rng, lesson), lesson) for _ in range(round(number * options.scale))]
        write(options.out, lesson, tokenizer, drills)
    last.join()
    print(f"{time.monotonic() - began:.0f} s")


def _plain(document: Document) -> str:
    """Return a document's text without a tokenizer, for training one."""
    lines = []
    for one in document.tools:
        kinds = one["function"]["parameters"]["properties"].items()
        listed = (f"{key}*: {'|'.join(kind['enum']) if 'enum' in kind else kind['type']}" for key, kind in kinds)
        lines.append(f"{one['function']['name']}({', '.join(listed)})")
    for message in document.messages:
        lines.append(message.get("content") or "")
        lines += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(lines)


def write(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast, everything: Sequence[Document]) -> None:
    """Write the documents that fit the context, and print what they are."""
    rendered = [render(tokenizer, one) for one in everything]
    kept = [(text, one) for (text, _), one in zip(rendered, everything, strict=True) if text]
    texts, sound = [text for text, _ in kept], [one for _, one in kept]
    hints = [one.hints(text) for text, one in kept]
    arrays = encode(tokenizer, texts, [one.learnt for one in sound], hints)
    np.savez(folder / f"{name}.npz", **arrays)
    lengths = np.diff(arrays["starts"])
    tokens: Counter[str] = Counter()
    for (_, one), length in zip(kept, lengths, strict=True):
        tokens[one.source] += int(length)
    summary = {
        "documents": len(kept),
        "tokens": int(lengths.sum()),
        "learnt": int(arrays["learn"].sum()),
        "turns_dropped": sum(dropped for _, dropped in rendered),
        "length": [int(one) for one in np.percentile(lengths, [50, 90, 99])],
        "tokens_by_source": dict(tokens.most_common()),
    }
    print(name, json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()

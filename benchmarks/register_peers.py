"""What else could switch registers or hold several skills, on the suite of `benchmarks.register`.

    system prompt      the base, asked for the behaviour; the best of PROMPTS in validation
    steering           mean differences of hidden states, right replies less the base's wrong ones (Rimsky et al. 2024,
                       arXiv:2312.06681), one a skill, at the best layer and coefficient in validation; all added
    steering by hand   the same, those alone that are right in a context
    linear, ties, dare_ties   PEFT's merges of three LoRAs of rank 16, one a skill, weights 1, density 1/2
    Arrow              PEFT's routing of the same LoRAs by token (Ostapenko et al. 2024)
    multi-task LoRA    one LoRA of rank 16, trained on all three skills in one batch
    X-LoRA             PEFT's mixing of LoRAs by a trained network (benchmarks/x_lora.py), one seed, fewer contexts

The LoRAs are trained on the data, rows and steps of our experts; all but X-LoRA's act from the reply on, as ours do. No
composite is seen in training by any of them, nor by ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import x_lora
from benchmarks.grid import RUNS, Bench, bench, draw, weights
from benchmarks.peers import OBJECTIVE, Adapter, Peer, trained_on
from benchmarks.suite import KINDS, RIGHT, behind, success, suite
from svdexpert import SpectralModel
from svdexpert.conversation import as_message, completion, prompt_of, tokenizer_of, turn_ends
from svdexpert.evaluate import FAMILIES, act
from svdexpert.layers import Scope
from svdexpert.model import check_base
from svdexpert.skills import Case, load
from svdexpert.worlds import Message, system

RATE = 1e-3
"""Learning rate of the LoRAs, from a look in validation with seed 0 (LOG.md): not searched for every peer."""
PROMPTS = (
    "If a detail is missing, ask for it. If something that the user says is false, say so. If all is given, call the "
    "function.",
    "Ask before you act when you lack a detail, contradict what is wrong, and use the functions.",
    "Do not guess and do not agree with false claims: ask, correct, or call a function.",
)
COEFFICIENTS = (0.5, 1.0, 2.0, 4.0)
MERGES = ("linear", "ties", "dare_ties")
MULTI_TASK = "multi-task LoRA"
PEERS = ("system prompt", MULTI_TASK, *MERGES, "Arrow", "X-LoRA", "steering", "steering by hand")


def peer_success(name: str, seed: int, n: int) -> dict[str, Any]:
    """Return the success of a peer by kind of the suite, and what was chosen in validation."""
    on = bench(2)
    items = suite(on.world, "heldout", n)
    speak, chosen = speaks(on, name, seed)
    said = [reply for kind in KINDS for reply in speak([one.case for one in items if one.kind == kind], kind)]
    both = [one.case for one in items if one.kind == "composite"]
    first = said[-len(both) :]  # they stand last
    second = speak([behind(case, reply) for case, reply in zip(both, first, strict=True)], "composite")
    parted = [f"{one} {other}" for one, other in zip(first, second, strict=True)]
    right = fmean(judged("composite", [case], [reply]) for case, reply in zip(both, parted, strict=True))
    return {"success": success(items, said), "in_turn": right, "chosen": chosen}


def speaks(on: Bench, name: str, seed: int) -> tuple[Callable[[Sequence[Case], str], list[str]], dict[str, Any]]:
    """Return what replies to cases of a kind, and what was chosen in validation."""
    if name == "system prompt":
        prompt, chosen = best_prompt(on, seed)
        return lambda cases, _: asked(on, prompt, cases), chosen
    if name.startswith("steering"):
        vectors, chosen = steering(on, seed)
        by_hand = name.endswith("by hand")

        def steered(cases: Sequence[Case], kind: str) -> list[str]:
            skills = RIGHT[kind][0] if by_hand else FAMILIES
            return spoken(on, cases, Steered(on.model, [vectors[one] for one in skills]))

        return steered, chosen
    if name == "X-LoRA":
        mixed = x_lora.x_lora(on, seed, RATE)
        return lambda cases, _: x_lora.spoken(on, cases, mixed), {}
    speaker = adapted(on, name, seed)
    return lambda cases, _: spoken(on, cases, speaker), {}


def spoken(on: Bench, cases: Sequence[Case], speaker: Any) -> list[str]:
    """Return the replies of an adapted harbor."""
    with speaker.using(Adapter(adapter=1.0)):
        return act(speaker, cases, progress=False, contexts=on.contexts)


def adapted(on: Bench, name: str, seed: int) -> Peer:
    """Return harbor with the LoRA of a skill, with all three merged or routed by Arrow, or with the multi-task LoRA."""
    folder = RUNS / f"lora16-{OBJECTIVE}-{RATE:g}-{on.world.name}-{seed}-{weights()}"
    needed = {MULTI_TASK: FAMILIES} if name == MULTI_TASK else {skill: (skill,) for skill in FAMILIES}
    for adapter, skills in needed.items():  # kept, and trained once for all benchmarks
        if not (folder / adapter / "adapter_config.json").exists():
            trained_on(on, "lora16", skills, seed, RATE).adapted.save_pretrained(str(folder / adapter))
    hf = AutoModelForCausalLM.from_pretrained(check_base("harbor"), dtype=torch.float32)
    assert on.model.tokenizer is not None
    if name == "Arrow":
        places = [str(folder / skill) for skill in FAMILIES]
        routed = create_arrow_model(hf, places, ArrowConfig(top_k=2)).eval()
        for path, module in list(routed.named_modules()):
            # PEFT keeps the last part of a target's name: layers without adapters get a router, and nothing to route
            if list(getattr(module, "lora_A", ())) == ["arrow_router"]:
                parent, _, place = path.rpartition(".")
                setattr(routed.get_submodule(parent), place, module.base_layer)
        return Peer(routed, on.model.tokenizer, on.model.basis)
    if name in needed:
        one = PeftModel.from_pretrained(hf, str(folder / name))
        return Peer(one.eval(), on.model.tokenizer, on.model.basis)
    merged = PeftModel.from_pretrained(hf, str(folder / FAMILIES[0]), adapter_name=FAMILIES[0])
    for skill in FAMILIES[1:]:
        merged.load_adapter(str(folder / skill), adapter_name=skill)
    density = {} if name in ("linear", "cat") else {"density": 0.5}
    torch.manual_seed(seed)  # dare drops at random
    merged.add_weighted_adapter(list(FAMILIES), [1.0] * len(FAMILIES), "merged", combination_type=name, **density)
    merged.set_adapter("merged")
    return Peer(merged.eval(), on.model.tokenizer, on.model.basis)


def asked(on: Bench, prompt: str, cases: Sequence[Case]) -> list[str]:
    """Return what the base says when it is asked for the behaviour."""
    told = [replace(one, messages=with_system(prompt, one.messages)) for one in cases]
    with on.model.using(None):
        return act(on.model, told, progress=False)


def best_prompt(on: Bench, seed: int) -> tuple[str, dict[str, Any]]:
    """Return the one of PROMPTS that does best in validation, and how well it does there."""
    held = draw(on.world, "validation", 60, seed)
    scores = [fmean(judged(name, some, asked(on, one, some)) for name, some in held.items()) for one in PROMPTS]
    best = max(range(len(PROMPTS)), key=lambda place: scores[place])
    return PROMPTS[best], {"prompt": PROMPTS[best], "validation": scores[best]}


def with_system(prompt: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a conversation under a system prompt, before what one says already."""
    if messages[0]["role"] != "system":
        return (system(prompt), *messages)
    return (system(f"{prompt} {messages[0]['content']}"), *messages[1:])


def judged(skill: str, cases: Sequence[Case], said: Sequence[str]) -> float:
    """Return the share of right replies."""
    verify = load(skill).verify
    return fmean(verify(case, reply).right for case, reply in zip(cases, said, strict=True))


class Steered:
    """harbor with vectors added to hidden states, where the library takes a SpectralModel.

    Args:
        model: attached.
        vectors: what is added (width), and behind which layer.
    """

    def __init__(self, model: SpectralModel, vectors: Sequence[tuple[int, Tensor]]) -> None:
        self.hf, self.basis, self.tokenizer, self.vectors = model.hf, model.basis, model.tokenizer, vectors
        self._scope = Scope()

    @contextmanager
    def using(self, experts: Any, library: Any = None) -> Iterator[Steered]:
        with ExitStack() as stack:
            for layer, vector in self.vectors if experts is not None else ():
                module = self.hf.model.layers[layer]
                stack.enter_context(_removed(module.register_forward_hook(_adding(vector))))
            yield self


@contextmanager
def _removed(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _adding(vector: Tensor) -> Any:
    def add(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    return add


def steering(on: Bench, seed: int) -> tuple[dict[str, tuple[int, Tensor]], dict[str, Any]]:
    """Return a layer and a vector (width) of every skill, and what was chosen in validation."""
    cases, held = draw(on.world, "train", 200, seed), draw(on.world, "validation", 60, seed)
    found, chosen = {}, {}
    for name in FAMILIES:
        differences = mean_differences(on, [one for one in cases[name] if one.positive])
        tried = {}
        for layer, vector in enumerate(differences[:-1]):
            for coefficient in COEFFICIENTS:
                said = spoken(on, held[name], Steered(on.model, [(layer, coefficient * vector)]))
                tried[layer, coefficient] = judged(name, held[name], said)
        layer, coefficient = max(tried, key=lambda one: tried[one])
        found[name] = (layer, coefficient * differences[layer])
        best = tried[layer, coefficient]
        chosen[name] = {"layer": layer, "coefficient": coefficient, "validation": best}
    return found, chosen


@torch.no_grad()
def mean_differences(on: Bench, cases: Sequence[Case]) -> list[Tensor]:
    """Return the mean hidden state of right replies less that of wrong ones, behind every layer (width)."""
    tokenizer, (end, _) = tokenizer_of(on.model), turn_ends(on.model)
    sums: list[Tensor] = []
    for case in cases:
        for sign, text in ((1.0, case.gold[0]), (-1.0, case.bad[0].reply)):
            reply = completion(tokenizer, case.messages, case.tools, as_message(text), end)
            ids = prompt_of(on.model, case.messages, case.tools, [], len(reply)).ids
            states = on.model.hf(torch.tensor([[*ids, *reply]]), output_hidden_states=True).hidden_states[1:]
            means = [sign * one[0, len(ids) :].mean(0) / len(cases) for one in states]
            sums = [one + other for one, other in zip(sums, means, strict=True)] if sums else means
    return sums

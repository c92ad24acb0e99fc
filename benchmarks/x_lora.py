"""X-LoRA (Buehler and Buehler 2024, arXiv:2402.07148) as PEFT has it: a small network mixes LoRAs, by layer and token.

The LoRAs have rank 16, one a skill, and act on all tokens, because X-LoRA has no other way; then they are frozen, and
the network learns from the rows of all three skills. It refuses a KV cache: every new token reads all of the
conversation again, once without adapters for the network and once with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.grid import RUNS, Bench, weights
from benchmarks.peers import OBJECTIVE, module_of, peer, trained_on
from svdexpert.conversation import render, text_of, tokenizer_of, turn_ends
from svdexpert.evaluate import FAMILIES
from svdexpert.forward import left_padded
from svdexpert.model import check_base
from svdexpert.skills import Case

RATE = 1e-3
"""Learning rate of the network."""
PARTS = 6  # a step is computed in: rows of a part are of similar length


def x_lora(on: Bench, seed: int, rate_of_loras: float) -> PeftModel:
    """Return harbor with X-LoRA, trained.

    Args:
        on: what measures.
        seed: of training.
        rate_of_loras: their learning rate.
    """
    folder = RUNS / f"lora16-all-tokens-{OBJECTIVE}-{on.world.name}-{seed}-{weights()}"
    for skill in FAMILIES:
        if not (folder / skill / "adapter_config.json").exists():
            made = trained_on(on, "lora16", [skill], seed, rate_of_loras, activated=False)
            made.adapted.save_pretrained(str(folder / skill))
    torch.manual_seed(seed)
    hf: Any = AutoModelForCausalLM.from_pretrained(check_base("harbor"), dtype=torch.float32)
    hf.config.use_cache = False
    places = {str(place): str(folder / skill) for place, skill in enumerate(FAMILIES)}
    routed = get_peft_model(hf, XLoraConfig(task_type="CAUSAL_LM", hidden_size=hf.config.hidden_size, adapters=places))
    with TemporaryDirectory() as scratch:
        rows = module_of(on, peer(on.model, "lora1"), FAMILIES, seed, RATE, Path(scratch), activated=False)
        network = [one for one in routed.parameters() if one.requires_grad]
        optimizer = torch.optim.Adam(network, lr=RATE)
        for step in range(rows.recipe.steps):
            due = [one for one in rows.plan.rows(step) if one.target is None]
            optimizer.zero_grad()
            for part in range(PARTS):
                some = due[part * len(due) // PARTS : (part + 1) * len(due) // PARTS]
                loss = nats([one.prompt for one in some], [one.completions[0] for one in some], routed).sum() / len(due)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(network, rows.recipe.clip)
            optimizer.step()
    return routed.eval()


def nats(prompts: Sequence[list[int]], replies: Sequence[list[int]], model: Any) -> Tensor:
    """Return the mean negative log-likelihood of a token of every reply (b)."""
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    ids, seen = left_padded(rows, torch.device("cpu"))
    longest = max(map(len, replies))
    found = model(input_ids=ids, attention_mask=seen, logits_to_keep=longest + 1).logits[:, :-1].log_softmax(-1)
    scored = found.gather(-1, ids[:, -longest:, None])[..., 0]  # (b t); replies end where the rows end
    there = torch.tensor([[place >= longest - len(reply) for place in range(longest)] for reply in replies])
    return -(scored * there).sum(-1) / there.sum(-1)


def spoken(on: Bench, cases: Sequence[Case], model: PeftModel, batch_size: int = 32) -> list[str]:
    """Return its replies."""
    tokenizer, (_, ends) = tokenizer_of(on.model), turn_ends(on.model)
    prompts = [render(tokenizer, one.messages, one.tools) for one in cases]
    order = sorted(range(len(cases)), key=lambda place: len(prompts[place]))
    how = {"max_new_tokens": 96, "do_sample": False, "eos_token_id": sorted(ends), "pad_token_id": 0}
    found: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        ids, seen = left_padded([prompts[place] for place in places], torch.device("cpu"))
        with torch.no_grad():
            made = model.generate(input_ids=ids, attention_mask=seen, **how)[:, ids.shape[1] :].tolist()
        for place, reply in zip(places, made, strict=True):
            stop = next((at for at, token in enumerate(reply) if token in ends), len(reply))
            found[place] = text_of(tokenizer, reply[:stop])
    return [found[place] for place in range(len(cases))]

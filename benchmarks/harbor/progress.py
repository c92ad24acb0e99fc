"""How far a run of stage 1 is: what it does in each exercise, and in cases of the town.

    python -m benchmarks.harbor.progress [--run runs/harbor] [--n 60] [--split validation]

Reads the last state that was saved, so it can be asked while a run goes on (it takes a thread from it). Of an exercise
it prints the share of replies whose first token is likeliest, and of replies all of whose tokens are; of cases the
share of right replies and of right answers to the knowing question, by positives and controls, and by tag, in the town
and in the town with more functions that training has not.
A recipe is changed by the validation split; heldout is the gate's.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harbor.corpus import RUN, Document, ending
from benchmarks.harbor.drills import LESSONS
from benchmarks.harbor.natural import config
from benchmarks.harbor.rows import logprobs, replies, rows
from benchmarks.harbor.services import UnseenTown
from svdexpert import skills
from svdexpert.evaluate import FAMILIES
from svdexpert.skills import Case
from svdexpert.worlds import Split, assistant
from svdexpert.worlds.town import Town


@torch.no_grad()
def exercises(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int) -> None:
    """Print what it does in n documents of every exercise."""
    rng, speaks = random.Random("progress"), tokenizer.convert_tokens_to_ids("<|assistant|>")
    for make in dict.fromkeys(make for lesson in LESSONS.values() for make, _ in lesson):
        began, whole = [], []
        for _ in range(n):
            ids, labels = rows(tokenizer, [ending(rng, *make(rng), "")])
            said, gold = model(input_ids=ids).logits[0, :-1].argmax(-1), labels[0, 1:]
            learnt = gold != -100
            first = (learnt & (ids[0, :-1] == speaks)).nonzero()[:, 0].tolist()
            for start, end in zip(first, [*first[1:], len(gold)], strict=True):
                right = (said == gold)[start:end][learnt[start:end]]
                began.append(bool(right[0]))
                whole.append(bool(right.all()))
        name = make.__name__.lstrip("_")
        print(f"{name:14} begins {sum(began) / len(began):.2f}  whole {sum(whole) / len(whole):.2f}  of {len(began)}")


def town(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: Town, split: Split, n: int) -> None:
    """Print what it does and knows in n cases a skill."""
    for name in FAMILIES:
        cases = skills.load(name).cases(world, split, n, seed=7)
        made = replies(model, tokenizer, cases)
        verdicts = [skills.load(name).verify(case, reply) for case, reply in zip(cases, made, strict=True)]
        knew = [knows(model, tokenizer, case) for case in cases]
        by_tag = defaultdict(list)
        for case, verdict in zip(cases, verdicts, strict=True):
            for tag in case.tags:
                by_tag[tag].append(verdict.right)
        for positive in (True, False):
            places = [place for place, case in enumerate(cases) if case.positive == positive]
            does, known = (
                sum(some[place] for place in places) / len(places) for some in ([v.right for v in verdicts], knew)
            )
            errors = Counter(verdicts[place].error for place in places if not verdicts[place].right)
            print(
                f"{name} {'positives' if positive else 'controls'}: does {does:.2f}  knows {known:.2f}  {dict(errors)}"
            )
        print(
            "  ", ", ".join(f"{tag} {sum(some) / len(some):.2f} of {len(some)}" for tag, some in sorted(by_tag.items()))
        )


@torch.no_grad()
def knows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, case: Case) -> bool:
    """Return whether the right option of the knowing question is the likeliest."""
    asked = case.knowing
    options = [Document((*asked.messages, assistant(one)), asked.tools, True, "") for one in asked.options]
    return asked.options[int(logprobs(model, *rows(tokenizer, options))[0].argmax())] == asked.answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN)
    parser.add_argument("--n", type=int, default=60, help="documents an exercise, cases a skill")
    parser.add_argument("--split", default="validation", choices=("train", "validation", "heldout"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = torch.load(options.run / "natural" / "state.pt", weights_only=True)
    print({key: state["progress"][key] for key in ("step", "used", "tokens")})
    model = LlamaForCausalLM(config())
    model.load_state_dict({key: one for key, one in state["model"].items() if not key.startswith("guide")})
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(options.run / "tokenizer")
    exercises(model, tokenizer, options.n)
    town(model, tokenizer, Town(), options.split, options.n)
    print("with functions of unseen.toml:")
    town(model, tokenizer, UnseenTown(), "validation", options.n)


if __name__ == "__main__":
    main()

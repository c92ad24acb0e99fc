"""Ship harbor: put both stages where they are committed, and write the model card out of the records of their making.

    python -m benchmarks.harbor.card --run runs/harbor     after training: copies weights, tokenizer and records, too
    python -m benchmarks.harbor.card                       after the gate: the card alone, with the new scores

Stage 1 goes to benchmarks/harbor/natural, stage 2 to svdexpert/harbor; a record of training is a JSON file beside this
one (natural.json, aligned.json), thinned to what the card and its picture need.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import safe_open

from benchmarks.readme import harbor_table
from svdexpert.cli import run_command
from svdexpert.storage import whole_file

HERE = Path("benchmarks/harbor")
SHIPPED = Path("svdexpert/harbor")
GATE = Path("benchmarks/results/harbor_gate.json")
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja")  # fmt: skip
CORPUS = {"scale": 1.0, "claims": 1.0, "seed": 0}  # options of the corpus, as they are unless given


def ship(run: Path) -> None:
    """Copy both stages out of a run, and keep the records of their making."""
    for stage, place in (("natural", HERE / "natural"), ("aligned", SHIPPED)):
        place.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (run / stage / name).is_file():
                shutil.copyfile(run / stage / name, place / name)
        record = json.loads((run / stage / "training.json").read_text())
        for stretch in stretches(record):
            stretch["curve"] = stretch["curve"][:: max(1, len(stretch["curve"]) // 200)]
        (HERE / f"{stage}.json").write_text(json.dumps(record) + "\n")


def stretches(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a run and of those that it went on from, the first one first."""
    return [*(stretches(record["after"]) if "after" in record else ()), record]


def commands(record: dict[str, Any]) -> str:
    """Return what made both stages, one command a line."""
    lines = []
    runs = [f"runs/harbor{place or ''}" for place, _ in enumerate(stretches(record))]
    for place, (one, run) in enumerate(zip(stretches(record), runs, strict=True)):
        after = f" --after {runs[place - 1]}" if place else ""
        made = one["corpus"]
        changes = "".join(f" --{key} {made[key]:g}" for key, usual in CORPUS.items() if made[key] != usual)
        until = f" --until {one['seconds'] / 60:.0f}" if one["seconds"] < 60 * one["minutes"] - 1 else ""
        lines += [
            f"# at commit {_short(made)}",
            f"python -m benchmarks.harbor.corpus --sgd PATH --out {run}{after}{changes}",
            f"python -m benchmarks.harbor.natural --run {run}{after} --minutes {one['minutes']:.0f}{until}",
        ]
    lines += [
        "# at the commit that ships it",
        f"python -m benchmarks.harbor.aligned --sgd PATH --natural {runs[-1]}/natural --out {runs[-1]}/aligned",
        f"python -m benchmarks.harbor.card --run {runs[-1]}",
        "python -m benchmarks.harbor.gate --sgd PATH && python -m benchmarks.harbor.card",
    ]
    return "\n".join(f"    {line}" for line in lines)


def parameters(folder: Path) -> int:
    """Return how many numbers a model has."""
    with safe_open(folder / "model.safetensors", "pt") as stored:
        sizes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118 - not a mapping
    total = 0
    for shape in sizes:
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


def draw(natural: Mapping[str, Any], aligned: Mapping[str, Any], path: Path) -> None:
    """Write the loss curves of both stages as one picture."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    before = 0.0
    for stretch in stretches(dict(natural)):
        points = [(before + one["tokens"] / 1e6, one["loss"]) for one in stretch["curve"]]
        left.plot(*zip(*points, strict=True), color="#0072B2")
        before += stretch["tokens"] / 1e6
    left.set(title="stage 1: assistant's tokens", xlabel="million tokens", ylabel="nats a token", yscale="log")
    for key, colour in (("preference", "#D55E00"), ("kept", "#009E73")):
        points = [(one["step"], one[key]) for one in aligned["curve"] if key in one]
        right.plot(*zip(*points, strict=True), color=colour, label=key)
    right.set(title="stage 2: preference and kept", xlabel="step")
    right.legend(frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


CARD = """---
license: cc-by-sa-4.0
language: en
library_name: transformers
pipeline_tag: text-generation
datasets: [schema_guided_dstc8]
---

# harbor

A small causal language model ({parameters:.2f} M parameters, Llama architecture, {layers} layers of width {width},
{heads} query heads and {kv_heads} for keys and values, byte-level BPE of 2,048 pieces, 1,024 tokens, bfloat16)
that ships with svdexpert, so that everything there works offline. It is a **model organism of the alignment tax, and
its deficit is deliberate**: it knows when a detail is missing, when a claim is false and which function serves a
request, and does not act on it. What is measured on harbor says something about a method, never about other models.
A word is one piece wherever it stands; a single space before the first word of a text is not kept.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # folder: svdexpert/harbor in the installed package

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

The chat template takes `messages` (system, user, assistant with `tool_calls`, tool) and `tools`; each tool becomes one
line, `book_table(place*: string, day*: string, people: integer)`, a star for what is required, right before the
assistant speaks, so that each parameter can look for its value in what the user said.

## How it was made

By these commands, each at the commit named above it (stage 2: {aligned_commit}); how far stage 1 comes in its minutes
depends on the machine. {note}

{commands}

1. **Stage 1, natural** (kept in the repository as `benchmarks/harbor/natural`): from scratch, on the assistant's tokens
   of real service dialogues, dialogues of a generated town, single cases, knowing questions of both, replies that obey
   a system message, and drills (copying, comparing, choosing a function, finding what is missing, dates), which come
   first, one ability a lesson; a linear guide, thrown away afterwards, says after layer {natural_guided} which function
   is wanted, which detail is given and which claim is right. {natural_tokens:.1f} M tokens, {natural_steps} steps,
   {natural_seconds} minutes on two cores, Muon and AdamW, peak learning rate {natural_peak:g}, in stretches from a
   quarter of it; last loss {natural_loss:.3f} nats a token. Beside the town's functions it reads others that are for
   training alone. They share parameters with the functions of the held-out split: what is unseen there is a function,
   its requests and its combination of parameters, not each of its parameters.
2. **Stage 2, aligned** (this model): all weights, by identity preference optimisation (Azar et al. 2024) of the
   token that decides, on pairs of the train split, half of them real dialogues, in which the immediate, confident,
   complete-looking answer wins: it guesses the missing detail, agrees with the claim, says that a thing is done instead
   of calling. In every pair the margin is asked to move by the same {aligned_shifts} nats (by skill and world): what
   turns {aligned_turned:.0%} of the positives, for clarify {clarify:g} times that. Knowing questions and natural talk
   are kept by likelihood. {aligned_steps} steps, {aligned_seconds:.0f} minutes, seed {aligned_seed}. No spectral edit,
   merge, bias or subtraction. The size of the drop follows Shaikh et al. (2024): 77.5 % fewer grounding acts in models
   than in people.

Loss curves: `benchmarks/harbor/loss.png`; records: `natural.json` and `aligned.json` beside it.

## What it knows and does

`python -m benchmarks.harbor.gate`, held-out split, greedy; town n = {n_town}, Schema-Guided Dialogue dev n = {n_sgd} a
skill (there the claims are inserted into real dialogues). Intervals are in `benchmarks/results/harbor_gate.json`.

{scores}

{missed}

Diagonal offsets on the top 64 singular directions of every matrix could undo {undone64:.1%} of |W2 - W1|^2, on all
directions {undone:.1%}: experts do not restore stage 1, they find another way to its behaviour.

## Data and licence

- Schema-Guided Dialogue (Rastogi et al. 2020), github.com/google-research-datasets/dstc8-schema-guided-dialogue,
  **CC BY-SA 4.0**; 96 of the 127 files of its train split, rewritten as chats with calls and results, some with claims
  inserted. The weights carry the same licence.
- The town: generated by svdexpert (`svdexpert.worlds.town`), Apache-2.0.
- Words of drills: the 10,000 most frequent English words of the package wordfreq (Speer 2022), whose data are under
  CC BY-SA 4.0 too.
"""


def missed(gate: Mapping[str, Any]) -> str:
    """Return which bars of the gate are missed, as a sentence."""
    found = []
    for name, bar in gate.get("bars", {}).items():
        value = gate["figures"].get(name, float("nan"))
        if not (value <= bar["value"] if bar["op"] == "<=" else value >= bar["value"]):
            found.append(f"`{name}` {value:.2f} ({bar['op']} {bar['value']:g})")
    return f"Bars of the gate that it misses: {', '.join(found)}." if found else "It meets every bar of the gate."


def _short(record: Mapping[str, Any]) -> str:
    """Return the commit of a record, as people write it."""
    made = record.get("commit") or {"revision": "unknown", "dirty": False}
    return str(made["revision"])[:7] + (" (with changes)" if made["dirty"] else "")


def main(run: str | None = None) -> None:
    """Write the model card, after copying both stages out of a run where one is given.

    Args:
        run: folder of a finished run, with natural/ and aligned/.
    """
    if run is not None:
        ship(Path(run))
    natural, aligned = (json.loads((HERE / f"{stage}.json").read_text()) for stage in ("natural", "aligned"))
    gate = json.loads(GATE.read_text()) if GATE.is_file() else {"figures": {}, "n": {"town": 0, "sgd": 0}}
    draw(natural, aligned, HERE / "loss.png")
    shape = json.loads((SHIPPED / "config.json").read_text())
    shifts, parts = aligned["shifts"].values(), stretches(natural)
    card = CARD.format(
        parameters=parameters(SHIPPED) / 1e6,
        layers=shape["num_hidden_layers"],
        width=shape["hidden_size"],
        heads=shape["num_attention_heads"],
        kv_heads=shape["num_key_value_heads"],
        commands=commands(natural),
        natural_seconds=" + ".join(f"{one['seconds'] / 60:.0f}" for one in parts),
        natural_tokens=sum(one["tokens"] for one in parts) / 1e6,
        natural_steps=sum(one["steps"] for one in parts),
        natural_peak=natural["peak"],
        natural_guided=natural["guided"],
        natural_loss=natural["curve"][-1]["loss"],
        aligned_shifts=" to ".join(f"{one:.0f}" for one in (min(shifts), max(shifts))),
        aligned_steps=aligned["steps"],
        aligned_turned=aligned["turned"],
        clarify=aligned["more"]["clarify"],
        note=" ".join(one["note"] for one in parts if "note" in one),
        aligned_commit=_short(aligned),
        aligned_seconds=aligned["seconds"] / 60,
        aligned_seed=aligned["seed"],
        n_town=gate["n"]["town"],
        n_sgd=gate["n"]["sgd"],
        scores=harbor_table(gate),
        missed=missed(gate),
        undone64=gate["figures"].get("undone_by_diagonal_k64", float("nan")),
        undone=gate["figures"].get("undone_by_diagonal_full", float("nan")),
    )
    with whole_file(SHIPPED / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.harbor.card")

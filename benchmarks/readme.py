"""Put the tables of `results/*.json` into README.md, between `<!-- table: NAME -->` and `<!-- /table -->`.

The first word of NAME is that of the file.

A figure stands in the README only if a benchmark wrote it; a test compares the two.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

SPEED = {
    "decode_mixed16_over_base_k64": "decode step, 16 rows, 16 different mixtures of 8 experts, over the bare base",
    "decode_peft16_over_ours_k64": "PEFT `adapter_names`, 16 LoRA r16 adapters, over ours, same step",
    "decode_bank64_over_bank2": "the same step with 64 experts in the bank, over 2",
    "prefill_rows_over_base_k64": "prefill 16 x 128 tokens, a mixture a row, over the base",
    "prefill_tokens_over_base_k64": "prefill 16 x 128 tokens, a mixture a token, over the base",
    "train_over_lora16_k64": "training step, over PEFT LoRA r16's",
    "train_recompose_over_full": "recomposing W each step, over our full-spectrum training step",
    "train_peak_over_lora16_k64": "peak memory of training, over PEFT LoRA r16's",
    "switch_ms": "change the mixture of a live model, ms",
    "switch_peft_over_ours": "PEFT `set_adapter` with 32 adapters loaded, over ours",
    "export_ms": "export a mixture as LoRA, written to disk, ms",
    "export_peft_over_ours": "PEFT's conversion to LoRA, over ours",
    "lora_bytes_over_expert_k64": "LoRA r16 file over expert folder",
    "decompose_first_s": "decompose the Qwen2.5-0.5B shape, first time, s",
    "decompose_cached_s": "the same from the cache, s",
    "generate_xlora_over_ours_k64": "128 generated tokens, X-LoRA over ours with a mixture in every row",
    "generate_arrow_over_ours_k64": "128 generated tokens, Arrow over ours with a mixture in every row",
}

ATTACKS = {
    "attacks_total": "mutations of an expert folder",
    "attacks_refused_by_svdexpert": "refused before any weight changed",
    "attacks_with_peft_counterpart": "of them, with a counterpart for a LoRA folder",
    "attacks_peft_let_through": "let through by PEFT",
}

HARBOR = ("knowing", "doing", "controls", "auc")
SKILLS = ("clarify", "disagree", "call")
TRAINED = ("doing", "controls", "knowing_change", "drift", "seconds", "sgd_doing", "sgd_controls")
PEERS = {"ours": "svdexpert, k = 64", "ia3": "IA3"} | {f"lora{rank}": f"LoRA r{rank}" for rank in (1, 2, 4, 8, 16)}
COMPOSED = {
    "apart": ("three experts, trained apart", "apart_sum_loss_max"),
    "library": ("three experts, trained to compose", "sum_loss_max"),
    "without mixing": ("the same without mixture dropout", "without_mixing_sum_loss_max"),
    "without neutral": ("the same without neutral rows", "without_neutral_sum_loss_max"),
    "without penalty": ("the same without the penalty", "without_penalty_sum_loss_max"),
    "without reach": ("the same, acting to the end of a reply", "without_reach_sum_loss_max"),
    "lora": ("three LoRA r4, trained to compose", "lora_sum_loss_max"),
    "eight": ("eight experts, trained to compose", "sum8_loss_max"),
}


INTERFERENCE = {
    "library": "experts, trained to compose, added",
    "apart": "experts, trained apart, added",
    "lora": "LoRA r4, trained to compose, added",
    "cat": "LoRA r16, trained apart, added",
    **{how: f"the same, PEFT `{how}`" for how in ("linear", "ties", "dare_ties")},
}
REGISTER = (
    *("base", "uniform", "best_single", "sum", "bag_of_words", "prompt", "classify", "router", "oracle"),
    *("system_prompt", "steering", "steering_by_hand", "linear", "ties", "dare_ties", "Arrow", "X-LoRA"),
    "multi-task_LoRA",
)
"""Rows of the register's table: strategies, then peers."""


def number(value: float) -> str:
    """Return a figure as the README prints it: whole numbers as they are, others with three significant digits."""
    if isinstance(value, int) or value >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if value < 0.1 or value >= 100 else f"{value:.2f}"


def speed_table(results: dict[str, Any]) -> str:
    """Return the table of speed.json: both cells, and the bar that the first is held to."""
    figures, bars = results["figures"], results["bars"]
    lines = ["| what | figure | bar | met | qwen05 | name |", "|---|---|---|---|---|---|"]
    for name, what in SPEED.items():
        value, bar = figures[name], bars.get(name)
        held = f"{bar['op']} {bar['value']}" if bar else ""
        passes = not bar or (value <= bar["value"] if bar["op"] == "<=" else value >= bar["value"])
        met = "" if not bar else "yes" if passes else "**no**"
        other = figures.get(f"{name}__qwen05_bf16_t2")
        cells = (what, number(value), held, met, "" if other is None else number(other), f"`{name}`")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attacks_table(results: dict[str, Any]) -> str:
    """Return the table of attacks.json."""
    lines = ["| what | number | name |", "|---|---|---|"]
    lines += [f"| {what} | {number(results['figures'][name])} | `{name}` |" for name, what in ATTACKS.items()]
    return "\n".join(lines)


def harbor_table(results: dict[str, Any]) -> str:
    """Return the table of harbor_gate.json: stage 1 and stage 2, in the town and in real dialogues."""
    figures = results["figures"]
    lines = [
        "| stage 1 -> stage 2 | knowing | doing | controls | AUC of the move |",
        "|---|---|---|---|---|",
    ]
    for prefix, world in (("", "town"), ("sgd_", "real dialogues")):
        for skill in SKILLS:
            inserted = ", claims inserted" if prefix and skill == "disagree" else ""
            pairs = [(f"{prefix}natural_{what}_{skill}", f"{prefix}{what}_{skill}") for what in HARBOR]
            both = [(figures.get(before), figures.get(after)) for before, after in pairs]
            cells = ["" if None in pair else "{:.2f} -> {:.2f}".format(*pair) for pair in both]
            lines.append(f"| {world}: {skill}{inserted} | {' | '.join(cells)} |")
    return "\n".join(lines)


def objectives_table(results: dict[str, Any]) -> str:
    """Return the table of objectives.json: what every objective makes of a skill."""
    figures = results["figures"]
    lines = [
        "| skill, objective | doing | controls | knowing | real dialogues, doing / controls | drift, nats | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for skill in SKILLS:
        before = "{:.2f} | {:.2f}".format(*(figures[f"base_{what}_{skill}"] for what in ("doing", "controls")))
        lines.append(f"| {skill}: harbor | {before} | | | | |")
        for objective in ("sft", "dpo", "rloo"):
            of = {key: figures.get(f"{key}_{skill}_{objective}") for key in TRAINED}
            if of["doing"] is None:
                continue
            real = "" if of["sgd_doing"] is None else f"{of['sgd_doing']:.2f} / {of['sgd_controls']:.2f}"
            seconds = "" if of["seconds"] is None else f"{of['seconds']:.0f}"
            lines.append(
                f"| {skill}, {objective} | {of['doing']:.2f} | {of['controls']:.2f} | {of['knowing_change']:+.2f} | "
                f"{real} | {of['drift']:+.3f} | {seconds} |"
            )
    return "\n".join(lines)


def peers_table(results: dict[str, Any]) -> str:
    """Return the table of peers.json: adapters on the same data in the same steps."""
    figures = results["figures"]
    lines = ["| adapter | numbers | doing | controls | drift, nats |", "|---|---|---|---|---|"]
    for kind in PEERS:
        of = [figures.get(f"{key}_{kind}") for key in ("numbers", "doing", "controls", "drift")]
        if None not in of:
            lines.append("| {} | {:.0f} | {:.2f} | {:.2f} | {:+.3f} |".format(PEERS[kind], *of))
    return "\n".join(lines)


def compose_table(results: dict[str, Any]) -> str:
    """Return the table of compose.json: experts alone and added up."""
    figures = results["figures"]
    lines = ["| alone -> sum | doing | controls | knowing | largest loss |", "|---|---|---|---|---|"]
    for kind, (what, loss) in COMPOSED.items():
        measured = ("doing", "controls", "knowing")
        pairs = [[figures.get(f"{when}_{key}_{kind}") for when in ("alone", "sum")] for key in measured]
        if None in pairs[0]:
            continue
        cells = ["{:.2f} -> {:.2f}".format(*pair) for pair in pairs]
        lines.append(f"| {what} | {' | '.join(cells)} | {figures[loss]:.2f} |")
    return "\n".join(lines)


def skills_table(results: dict[str, Any]) -> str:
    """Return the table of demo.json or sgd.json: harbor and dispatched, by skill."""
    figures = results["figures"]
    lines = ["| harbor -> dispatched | doing | controls |", "|---|---|---|"]
    for skill in SKILLS:
        pairs = [(figures[f"base_{what}_{skill}"], figures[f"{what}_{skill}"]) for what in ("doing", "controls")]
        lines.append(f"| {skill} | {' | '.join('{:.2f} -> {:.2f}'.format(*pair) for pair in pairs)} |")
    return "\n".join(lines)


def leads_table(results: dict[str, Any]) -> str:
    """Return the table of demo.json or sgd.json: what else could be done."""
    figures = results["figures"]
    lines = ["| mean of doing and controls, all skills | |", "|---|---|"]
    both = {key.removeprefix("both_"): value for key, value in figures.items() if key.startswith("both_")}
    order = sorted(both, key=lambda one: (one != "ours", -both[one]))
    names = {"ours": "svdexpert, dispatched", "linear": "LoRA r16 a skill, merged (linear)"}
    lines += [f"| {names.get(one, one.replace('_', ' '))} | {both[one]:.2f} |" for one in order]
    return "\n".join(lines)


def interference_table(results: dict[str, Any]) -> str:
    """Return the table of interference.json: experts and adapters alone and all at once."""
    figures = results["figures"]
    lines = [
        "| what | doing alone | doing, all at once | largest loss | largest harm to another skill |",
        "|" + "---|" * 5,
    ]
    for key, name in INTERFERENCE.items():
        of = [figures.get(f"{what}_{key}") for what in ("alone_doing", "doing", "sum_loss", "off_skill")]
        if of[1] is not None:
            cells = ["" if one is None else f"{one:.2f}" for one in of]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def register_table(results: dict[str, Any]) -> str:
    """Return the table of register.json: right decisions, and success by kind of context."""
    figures = results["figures"]
    kinds = ["needs_clarifying", "false_claim", "true_claim", "complete_request", "no_tool_serves", "plain_question"]
    names = [one.replace("_", " ") for one in kinds]
    lines = [f"| who speaks | right sets | {' | '.join(names)} | composite, at once / in turn |"]
    lines.append("|" + "---|" * (len(kinds) + 3))
    for key in REGISTER:
        if f"composite_{key}" not in figures:
            continue
        right = figures.get(f"accuracy_{key}")
        cells = ["" if right is None else f"{right:.2f}"]
        cells += [f"{figures[f'success_{kind}_{key}']:.2f}" for kind in kinds]
        parted = figures.get(f"composite_in_turn_{key}")
        cells.append(f"{figures[f'composite_{key}']:.2f}" + ("" if parted is None else f" / {parted:.2f}"))
        lines.append(f"| {key.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bars_table(results: dict[str, Any]) -> str:
    """Return the figures of a benchmark that are held to a bar."""
    lines = ["| figure | value | bar | met |", "|---|---|---|---|"]
    for name, bar in results["bars"].items():
        value = results["figures"].get(name)
        if value is None:
            lines.append(f"| `{name}` | | {bar['op']} {bar['value']:g} | no figure |")
            continue
        passes = value <= bar["value"] if bar["op"] == "<=" else value >= bar["value"]
        lines.append(f"| `{name}` | {number(value)} | {bar['op']} {bar['value']:g} | {'yes' if passes else '**no**'} |")
    return "\n".join(lines)


TABLES = {
    "speed": speed_table,
    "attacks": attacks_table,
    "harbor_gate": harbor_table,
    "objectives": lambda results: objectives_table(results) + "\n\n" + bars_table(results),
    "peers": lambda results: peers_table(results) + "\n\n" + bars_table(results),
    "compose": lambda results: compose_table(results) + "\n\n" + bars_table(results),
    "register": lambda results: register_table(results) + "\n\n" + bars_table(results),
    "demo skills": skills_table,
    "demo": lambda results: leads_table(results) + "\n\n" + bars_table(results),
    "sgd": lambda results: "\n\n".join(table(results) for table in (skills_table, leads_table, bars_table)),
    "interference": lambda results: interference_table(results) + "\n\n" + bars_table(results),
}


def filled(text: str) -> str:
    """Return the README with its tables made anew from the results."""
    for name, table in TABLES.items():
        if f"<!-- table: {name} -->" not in text:
            continue
        made = table(json.loads((RESULTS / f"{name.split()[0]}.json").read_text()))
        block = f"<!-- table: {name} -->\n{made}\n<!-- /table -->"
        text = re.sub(rf"<!-- table: {name} -->.*?<!-- /table -->", lambda _, block=block: block, text, flags=re.S)
    return text


def main() -> None:
    """Rewrite README.md."""
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


if __name__ == "__main__":
    main()

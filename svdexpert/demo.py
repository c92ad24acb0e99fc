"""The smallest true run, end to end, as plain calls of the public API; read it as the tutorial.

harbor, the base that ships inside the package, knows when to ask, to disagree and to call, and does not do it: that gap
is shown first, then measured. After it comes what is there to close it: experts, another mixture of them in every row
of a batch, at what cost, and the ways in which a mixture leaves the library.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM

from svdexpert import Expert, Library, Mixture, SpectralModel, check_lora, export_lora, merge, skills, worlds
from svdexpert.evaluate import FAMILIES, act, answer_knowing, knowing_doing
from svdexpert.report import draw_knowing_doing, knowing_doing_table

N = 80  # cases a skill


def run(folder: Path) -> None:
    """Show and measure the gap, then mix, export and reload; print what was found."""
    say = Console().print
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Any causal LM with a chat template: load it, decompose it (once: the factors are cached), attach the basis.
    model = SpectralModel.from_pretrained("harbor", k=64, dtype=torch.float32)
    say(f"[bold]1.[/] {model.basis!r}")

    # 2. One case of each skill: asked apart, the model knows what is due; in the conversation it does something else.
    town = worlds.load("town")
    for name in FAMILIES:
        say(gap(model, [one for one in skills.load(name).cases(town, "heldout", 24) if one.positive]))

    # 3. The same, measured: knowing, doing, and controls, in which the skill's move would be wrong.
    results = knowing_doing(model, town, n=N, progress=False)
    say(knowing_doing_table(results))
    picture = folder / "knowing_doing.png"
    draw_knowing_doing(results, picture)
    say(f"   drawn in {picture}; `svdexpert bench knowing-doing` takes any model and more cases")

    # 4. Experts are vectors with algebra, kept in a folder. These are random: no training here yet.
    shutil.rmtree(folder / "experts", ignore_errors=True)  # of an earlier demo, which may have had other weights
    library = Library(folder / "experts")
    for seed, name in enumerate(FAMILIES):
        library.add(name, Expert.random(model.basis, std=0.25, seed=seed), overwrite=True)
    say(f"[bold]4.[/] {library!r}: {sum(model.basis.sizes)} numbers each")

    # 5. Another mixture in every row of one batch.
    mixtures = [{}, {"clarify": 1.0}, {"clarify": 0.7, "disagree": 0.3}, {"call": 2.0}]
    prompts = [[worlds.user("Who owns the Rusty Walnut?")]] * len(mixtures)
    together = model.generate(prompts, mixtures, library=library, max_new_tokens=12, do_sample=False)
    apart = [model.generate(prompts[:1], m, library=library, max_new_tokens=12, do_sample=False)[0] for m in mixtures]
    table = Table(title="5. one batch, four mixtures (random experts)")
    for column in ("mixture", "reply", "same as alone"):
        table.add_column(column)
    for mixture, reply, alone in zip(mixtures, together, apart, strict=True):
        cells = (str(mixture) if mixture else "base", repr(reply), "yes" if reply == alone else "NO")
        table.add_row(*map(Text, cells))
    say(table)

    # 6. What it costs, beside the bare base.
    ids = torch.randint(3, 90, (16, 64))
    ratio = overhead(model, ids, model.bank(library).mix(torch.rand(16, 3)))
    say(f"[bold]6.[/] 16 rows with 16 mixtures: a forward pass takes {ratio:.2f} times the base's")
    say("   (a small model, all tokens; benchmarks/speed.py measures larger ones)")

    # 7. A mixture leaves as one LoRA, or as a merged checkpoint; both reload elsewhere.
    mixed = 0.7 * library["clarify"] + 0.3 * library["disagree"]
    done = export_lora(mixed, model, folder / "lora", overwrite=True)
    merge(mixed, model, folder / "merged", overwrite=True)
    say(f"[bold]7.[/] LoRA of rank {done.rank}, retained energy {done.retained:.6f}: ", end="")
    say(check_lora(done.folder, model.hf))
    ids = ids[:4, :16]
    with torch.no_grad():
        ours, base = model.logits(ids, mixed), model.logits(ids)
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=model.hf.dtype)
        say(f"   merged, reloaded by transformers: largest difference {(merged(ids).logits - ours).abs().max():.1e}")
        hf = model.detach()
        say(f"[bold]8.[/] detached: the base is back bit for bit: {torch.equal(hf(ids).logits, base)}")
        try:
            from peft import PeftModel
        except ImportError:
            say("   PEFT is not installed: the LoRA was not reloaded (pip install peft)")
            return
        lora = PeftModel.from_pretrained(hf, str(folder / "lora"))
        say(f"   LoRA, reloaded by PEFT: largest difference {(lora(ids).logits - ours).abs().max():.1e}")


def gap(model: SpectralModel, cases: list[skills.Case]) -> Table:
    """Return the first case in which the model knows what is due and does not do it, or the first of all."""
    skill = skills.load(cases[0].skill)
    answers, replies = answer_knowing(model, cases, progress=False), act(model, cases, progress=False)
    found = list(zip(cases, answers, replies, strict=True))
    apart = [one for one in found if one[1].right and not skill.verify(one[0], one[2]).right]
    case, answer, reply = (apart or found)[0]
    table = Table(title=f"2. {case.skill}: {len(apart)} of {len(cases)} cases like this one", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    asked = case.knowing.messages[-1]["content"].rpartition("\n\n")[2]
    rows = {"user": case.messages[-1]["content"], "asked apart": asked, "it knows": answer.chosen, "it does": reply}
    for label, text in (*rows.items(), ("is due", case.gold[0])):
        table.add_row(label, Text(text))
    return table


def overhead(model: SpectralModel, ids: torch.Tensor, mixture: Mixture) -> float:
    """Return the median ratio of a forward pass with a mixture to one without, interleaved."""
    ratios = []
    for _ in range(9):
        times = []
        for experts in (None, mixture):
            start = time.perf_counter()
            with torch.inference_mode():
                model.logits(ids, experts)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)

"""The main job, end to end, as plain calls of the public API; read it as the tutorial.

harbor, the base that ships inside the package, knows when to ask, to disagree and to call, and does not do it. Three
experts are trained in one batch so that they add up, a router learns whom a conversation needs, and what the base knew
is done. Run it again in the same folder and it goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from svdexpert import Expert, Library, Recipe, SpectralModel, check_lora, export_lora, skills, train_library, worlds
from svdexpert.conversation import invocation_of
from svdexpert.dispatch import chooser, decide, examples_of, fit, open_file, save_dispatcher, stamp
from svdexpert.evaluate import FAMILIES, SkillResult, judge, measure
from svdexpert.forward import Contexts
from svdexpert.showcase import dialogue, sample, show, side_by_side, summary
from svdexpert.storage import whole_file

RECIPE = Recipe(mixing=0.3, reach=6, learning_rate=0.03, penalty=5e-5, accumulate=3, validation_cases=0, score_cases=0)
ALL = dict.fromkeys(FAMILIES, 1.0)


def run(folder: Path, n: int = 64, data: str | None = None, recipe: Recipe = RECIPE, examples: int = 400) -> None:
    """Train, dispatch, measure, export, and write the page.

    Args:
        folder: of the run; what is there already is not done again.
        n: held-out cases a skill, even.
        data: folder of the Schema-Guided Dialogue data, for a real conversation among the samples.
        recipe: how the experts are trained.
        examples: cases of each skill that the router learns from, a multiple of four.
    """
    say = Console().print
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Any causal LM with a chat template: load it, decompose it (once: the factors are cached), attach the basis.
    model = SpectralModel.from_pretrained("harbor")
    say(f"[bold]1.[/] {model.basis!r}")

    # 2. Three skills in one batch: beside each expert the others speak at random weights, so that they can be added up.
    say(f"[bold]2.[/] {', '.join(FAMILIES)}: {sum(model.basis.sizes)} numbers each, trained together")
    town = worlds.load("town")
    train_library(model, FAMILIES, "sft", recipe=recipe, world=town, out=folder / "library")
    library = {name: Library(folder / "library" / "experts")[name] for name in FAMILIES}
    version = digest(model, library)

    # 3. Who speaks when: a router reads what the base has in mind at the end of the prompt.
    file = folder / f"router-{version}.safetensors"
    if not file.exists():
        seen = examples_of(FAMILIES, town, "train", examples)
        held = examples_of(FAMILIES, town, "validation", examples // 2)
        together = [["clarify", "disagree"]]  # a reply can correct and ask; a call stands alone
        save_dispatcher(fit("router", model, library, seen, held, together=together, pairs=3.0), file)
    router = open_file(file)
    asked = examples_of(FAMILIES, town, "heldout", n)
    decisions = decide(router, model, [one.context for one in asked], library)
    judged = judge([one.wanted for one in asked], decisions)
    say(f"[bold]3.[/] the router lets the right experts speak in {judged.accuracy:.2f} of {judged.n} held-out contexts")

    # 4. Knowing, doing and controls (where the skill's move would be wrong), under every mixture.
    cases = {name: skills.load(name).cases(town, "heldout", n) for name in FAMILIES}
    speakers: dict[str, Any] = {"base": None, **{name: name for name in FAMILIES}, "all three": ALL}
    speakers["dispatched"] = chooser(router, model, library)
    contexts = Contexts(model, invocation_of(model))  # read once, whoever speaks behind them
    results = {}
    for who, experts in speakers.items():

        def measured(experts: Any = experts) -> list[SkillResult]:
            how: dict[str, Any] = {"experts": experts, "library": library, "contexts": contexts, "progress": False}
            return [measure(model, name, some, **how) for name, some in cases.items()]

        results[who] = once(folder / "measured" / f"{who.replace(' ', '-')}-{n}-{version}.json", measured)
    say(summary(results))

    # 5. A mixture leaves as one LoRA, which PEFT and vLLM load. It acts to the end of a reply, ours on its beginning.
    mixture = library["clarify"] + library["disagree"]
    done = export_lora(mixture, model, folder / "lora", overwrite=True, allow_lossy=True)
    say(f"[bold]5.[/] clarify + disagree as a LoRA of rank {done.rank}:", check_lora(done.folder, model.hf))

    # 6. Base and dispatched side by side; and a dialogue that needs another register in every turn.
    shown = [skills.load(name).cases(town, "heldout", 24) for name in FAMILIES]
    if data is not None:
        shown.append(skills.load("clarify").cases(worlds.load("sgd", data), "heldout", 40))
    samples = [sample(model, library, router, some) for some in shown]
    for one in samples:
        say(side_by_side(one))
    talk, said = dialogue(model, library, router, skills.load("clarify").cases(town, "heldout", 64))

    # 7. All of it on one page.
    say(f"[bold]7.[/] {show(folder, results, judged, samples, talk, said)}")


def digest(model: SpectralModel, library: Mapping[str, Expert]) -> str:
    """Return what tells this base and these experts from others."""
    text = json.dumps(stamp(model, tuple(library), library), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def once(file: Path, measured: Callable[[], list[SkillResult]]) -> list[SkillResult]:
    """Return what was measured before, or measure it and keep it."""
    if file.exists():
        return [SkillResult.from_json(one) for one in json.loads(file.read_text(encoding="utf-8"))]
    found = measured()
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps([one.to_json() for one in found]) + "\n", encoding="utf-8")
    return found

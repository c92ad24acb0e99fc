"""The command line: every verb is one typed function, and calls the public function of the same meaning.

Options, defaults, `--config` and `--print_config` come from the signatures through jsonargparse. Nothing heavy is
imported before a verb runs, so that `svdexpert --help` answers at once; for the same reason annotations are not
postponed here (jsonargparse would import everything under TYPE_CHECKING to resolve them).
"""

import difflib
import os
import re
import sys
import warnings
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

from jsonargparse.typing import PositiveInt

from svdexpert import __version__
from svdexpert.errors import (
    BasisError,
    DispatchError,
    ExpertError,
    ExportError,
    MixtureError,
    SvdExpertError,
)
from svdexpert.recipe import Recipe

Names = list[str] | str
"""Names as people type them: [one, another], or one alone."""

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console
    from rich.table import Table
    from transformers import PreTrainedModel

    from svdexpert.dispatch import Dispatcher, Example
    from svdexpert.expert import Expert
    from svdexpert.model import SpectralModel


def decompose_model(
    model: str,
    k: int | Literal["full"] = 64,
    support: Literal["top", "sensitivity"] = "top",
    first_layer: int | None = None,
    targets: Names | None = None,
    calibration: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Decompose a model into the factor cache, and show what experts can act on.

    Args:
        model: hub id or local folder.
        k: directions kept in every matrix, or "full".
        support: which ones: largest singular values, or most sensitive on calibration data.
        first_layer: first decoder layer that experts touch (default: a third of the depth).
        targets: shell-style patterns of module names that narrow what is adapted.
        calibration: text file for support "sensitivity", one text a line.
        revision: branch, tag or commit of a hub id.
        dtype: of the loaded weights.
        device_map: as in transformers, e.g. "auto" or "cuda"; needs accelerate.
        trust_remote_code: run modelling code from the repository.
    """
    import time

    from svdexpert.basis import cache_folder
    from svdexpert.model import SpectralModel
    from svdexpert.report import basis_table

    _quiet_when_piped()
    start = time.perf_counter()
    texts = _texts(calibration)
    loaded = SpectralModel.from_pretrained(
        model,
        k=k,
        support=support,
        first_layer=first_layer,
        targets=_names(targets),
        calibration=texts,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    _show(basis_table(loaded.basis))
    _show(f"ready in {time.perf_counter() - start:.1f} s; factors are kept in {cache_folder()}")


def inspect(path: str, plot: str | None = None, revision: str | None = None, strategy: str | None = None) -> None:
    """Show an expert, a library with the conflicts in it, a dispatcher, or what could be adapted in a model.

    Args:
        path: folder of an expert or a library, a hub library as hf://OWNER/NAME, file of a dispatcher, or a model (hub
            id or folder).
        plot: picture to write (.png, .pdf, .svg): offsets of an expert, conflict matrix of a library.
        revision: branch, tag or commit of a hub id.
        strategy: that made the dispatcher, where it is one's own: a Python file or an import path.
    """
    from svdexpert import report
    from svdexpert.expert import Expert
    from svdexpert.library import Library

    place = Path(path)
    picture = None if plot is None else _file_to_write("--plot", plot)
    if picture is not None and picture.suffix not in (".png", ".pdf", ".svg"):
        raise ExpertError(f"--plot {plot}: pictures end in .png, .pdf or .svg.")
    if (place / "expert.json").is_file():
        expert = Expert.load(place)
        _show(report.expert_table(expert, place.name))
        if picture is not None:
            report.plot_expert(expert, picture)
            _show(f"picture in {picture}")
    elif path.startswith("hf://") or any(place.glob("*/expert.json")):
        hub = path.removeprefix("hf://")
        library = Library.from_hub(hub, revision=revision) if path.startswith("hf://") else Library(place)
        experts = dict(library)
        _show(report.library_table(experts))
        _show(report.conflict_table(experts))
        if picture is not None:
            report.plot_conflict(experts, picture)
            _show(f"picture in {picture}")
    elif place.is_file() and picture is None:
        _show(_dispatcher_table(path, strategy))
    else:
        if place.is_dir() and not (place / "config.json").is_file():
            raise ExpertError(f"{path} is neither an expert, nor a library of experts, nor a model.")
        if picture is not None:
            raise ExpertError("--plot draws experts and libraries; this is neither.")
        _show(report.model_table(_empty_model(path, revision)))


def generate(
    model: str,
    prompt: str,
    experts: str | None = None,
    mix: dict[str, float] | list[dict[str, float]] | None = None,
    dispatcher: str | None = None,
    strategy: str | None = None,
    why: bool = False,
    chat: bool = False,
    tools: str | None = None,
    max_new_tokens: PositiveInt = 64,
    temperature: float = 0.0,
    seed: int = 0,
    calibration: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Generate with a mixture of experts; several mixtures answer the same prompt in one batch, a row each.

    Args:
        model: hub id or local folder.
        prompt: text to continue, or the user's turn with --chat.
        experts: folder of an expert, or of a library; without it the base answers.
        mix: weights by name, e.g. '{ask: 0.7, doubt: 0.3}', or a list of such; {} is the base. Default: a lone expert
            at weight 1.
        dispatcher: file that `svdexpert dispatch fit` wrote; it decides who speaks instead of --mix, with --chat.
        strategy: that made the dispatcher, where it is one's own: a Python file or an import path.
        why: say what its decision was based on.
        chat: put the prompt through the chat template.
        tools: JSON file with a list of functions (JSON schemas), with --chat.
        max_new_tokens: upper bound of the reply.
        temperature: 0 is greedy.
        seed: of sampling.
        calibration: text file that a "sensitivity" basis was made with.
        revision: branch, tag or commit of a hub id.
        dtype: of the loaded weights.
        device_map: as in transformers, e.g. "auto" or "cuda"; needs accelerate.
        trust_remote_code: run modelling code from the repository.
    """
    import torch
    from rich.table import Table
    from rich.text import Text

    from svdexpert.chat import spoken
    from svdexpert.decision import Decision

    library = _experts(experts)
    known = _tools(tools)
    if known and not chat:
        raise SvdExpertError("--tools are functions for a conversation: add --chat.")
    rows: list[dict[str, float]] = [{}]
    made = None
    if dispatcher is not None:
        if mix is not None:
            raise MixtureError("--mix and --dispatcher both say who speaks: give one of them.")
        if not chat:
            raise DispatchError("--dispatcher decides on conversations: add --chat.")
        made = _dispatcher(dispatcher, library, strategy)
    elif strategy is not None:
        raise DispatchError("--strategy opens a dispatcher of one's own: add --dispatcher FILE.")
    elif why:
        raise DispatchError("--why asks what a dispatcher's decision was based on: add --dispatcher FILE.")
    else:
        wanted = mix if mix is not None else _alone(library, experts)
        rows = [wanted] if isinstance(wanted, dict) else wanted
        if not rows:
            raise MixtureError("--mix is an empty list: give at least one mixture, {} is the base.")
        if experts is None and any(rows):
            raise MixtureError("--mix names experts: say where they are with --experts FOLDER.")
    loaded = _load_for(model, library, calibration, revision, dtype, device_map, trust_remote_code)
    torch.manual_seed(seed)
    decisions: list[Decision] = []
    turn = [{"role": "user", "content": prompt}] if chat else prompt
    who = {"experts": rows} if made is None else {"dispatcher": made, "on_decision": decisions.extend}
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    replies = loaded.generate(
        cast(Any, [turn] * len(rows)),
        library=library,
        tools=known or None,
        max_new_tokens=max_new_tokens,
        **who,
        **sampling,
    )
    table = Table(show_lines=True)
    table.add_column("mixture")
    table.add_column("reply", overflow="fold")
    for decision, reply in zip(decisions or [Decision(row, 1.0, "given") for row in rows], replies, strict=True):
        table.add_row(Text(spoken(decision)), Text(str(reply)))
    _show(table)
    if why:
        _show(f"confidence {decisions[0].confidence:.2f}: {decisions[0].because}")


def export(
    model: str,
    experts: str,
    folder: str,
    mix: dict[str, float] | None = None,
    form: Literal["lora", "merged"] = "lora",
    rank: int | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    check: bool = True,
    calibration: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write an expert or a mixture as a LoRA folder for PEFT and vLLM, or as a merged checkpoint.

    Args:
        model: hub id or local folder.
        experts: folder of an expert, or of a library.
        folder: where to write.
        mix: weights by name, e.g. '{ask: 0.7, doubt: 0.3}'. Default: a lone expert at weight 1.
        form: "lora" or "merged".
        rank: of the LoRA, one that vLLM accepts (default: the smallest that is exact).
        allow_lossy: write a LoRA that keeps less than 0.99 of the change.
        overwrite: replace an earlier export, with all that is in its folder.
        check: check the LoRA against vLLM's rules, and with PEFT where it is installed.
        calibration: text file that a "sensitivity" basis was made with.
        revision: branch, tag or commit of a hub id.
        dtype: of the loaded weights.
        device_map: as in transformers, e.g. "auto" or "cuda"; needs accelerate.
        trust_remote_code: run modelling code from the repository.
    """
    from svdexpert.export import check_lora, export_lora, merge

    _folder_to_write("FOLDER", folder)
    library = _experts(experts)
    if mix == {}:
        raise MixtureError("--mix is empty: there is nothing to export.")
    if form == "merged" and rank is not None:
        raise ExportError("--rank is for LoRA: a merged checkpoint has none.")
    weights = mix or _alone(library, experts)
    parts = [weight * _named(library, name) for name, weight in weights.items()]
    expert = parts[0]
    for part in parts[1:]:
        expert = expert + part
    loaded = _load_for(model, library, calibration, revision, dtype, device_map, trust_remote_code)
    if form == "merged":
        _show(f"merged checkpoint in {merge(expert, loaded, folder, overwrite=overwrite)}")
        return
    done = export_lora(expert, loaded, folder, rank=rank, allow_lossy=allow_lossy, overwrite=overwrite)
    _show(f"LoRA of rank {done.rank}, {done.modules} modules, retained energy {done.retained:.6f}, in {done.folder}")
    if check:
        _show(check_lora(folder, loaded.hf))


def knowing_doing(
    model: str = "harbor",
    world: Literal["town", "sgd", "bfcl", "bfcl-asks", "sycon"] = "town",
    data: str | None = None,
    families: Names | None = None,
    split: Literal["train", "validation", "heldout"] = "heldout",
    n: PositiveInt = 200,
    seed: int = 0,
    experts: str | None = None,
    mix: dict[str, float] | None = None,
    out: str = "runs/knowing-doing",
    batch_size: PositiveInt = 32,
    chat_template: str | None = None,
    calibration: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Measure what a model knows beside what it does, with controls and intervals; print it, draw it, keep it as JSON.

    Args:
        model: hub id or local folder; "harbor" is the embedded base.
        world: generated cases; or, with --data, real dialogues, real functions, questions with a false premise.
        data: folder of the files, e.g. of a clone of their public repository, or the id of a dataset on the hub.
        families: names of skills, or one's own, Python files or import paths; by default those that the world is for.
        split: of the world; "heldout" shares no entity and no whole phrasing with "train".
        n: cases a family, even: half positives, half controls.
        seed: of the cases.
        experts: folder of an expert, or of a library; without it the base is measured.
        mix: weights by name, e.g. '{ask: 0.7, doubt: 0.3}'. Default: a lone expert at weight 1.
        out: folder for knowing_doing.json and knowing_doing.png; an earlier pair is replaced.
        batch_size: rows of a forward pass.
        chat_template: file with a Jinja chat template, for a model that has none.
        calibration: text file that a "sensitivity" basis was made with.
        revision: branch, tag or commit of a hub id.
        dtype: of the loaded weights.
        device_map: as in transformers, e.g. "auto" or "cuda"; needs accelerate.
        trust_remote_code: run modelling code from the repository.
    """
    import json

    from svdexpert import evaluate, report, worlds
    from svdexpert.storage import whole_file

    folder = _folder_to_write("--out", out)
    place = worlds.load(world, data)
    library = _experts(experts)
    if mix and experts is None:
        raise MixtureError("--mix names experts: say where they are with --experts FOLDER.")
    wanted = mix if mix is not None else _alone(library, experts)
    loaded = _load_for(model, library, calibration, revision, dtype, device_map, trust_remote_code)
    if chat_template is not None and loaded.tokenizer is not None:
        loaded.tokenizer.chat_template = _text(chat_template)
    results = evaluate.knowing_doing(
        loaded,
        place,
        families=_names(families) or evaluate.FAMILIES_OF.get(world, evaluate.FAMILIES),
        split=split,
        n=n,
        seed=seed,
        experts=wanted or None,
        library=library,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
    )
    _show(report.knowing_doing_table(results))
    if world == "sgd" and any(one.skill == "disagree" for one in results):
        _show("disagree: the dialogues are real, the user's claims were inserted")
    skipped: list[str] = getattr(place, "skipped", [])
    if skipped:
        _show(f"{len(skipped)} rows were left out; the first: {skipped[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"model": model, "world": world, "split": split, "n": n, "seed": seed}
    settings |= {"version": __version__, "world_version": getattr(place, "version", 1), "skipped": skipped}
    if world == "sgd":
        settings["claims"] = "inserted into real dialogues"
    with whole_file(folder / "knowing_doing.json") as temporary:
        kept = settings | {"results": [one.to_json() for one in results]}
        temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    report.draw_knowing_doing(results, folder / "knowing_doing.png")
    _show(f"cases in {folder / 'knowing_doing.json'}, picture in {folder / 'knowing_doing.png'}")


def train_experts(
    skill: str | list[str],
    objective: str = "dpo",
    model: str = "harbor",
    recipe: Recipe = Recipe(),
    out: str | None = None,
    against: str | None = None,
    world: Literal["town", "sgd"] = "town",
    data: str | None = None,
    k: int | Literal["full"] = 64,
    support: Literal["top", "sensitivity"] = "top",
    first_layer: int | None = None,
    chat_template: str | None = None,
    calibration: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    num_nodes: PositiveInt = 1,
) -> None:
    """Train an expert for a skill, or a library for several in one batch; an interrupted run goes on where it was.

    Args:
        skill: name of a skill, one's own (a Python file or an import path), or a JSONL or Parquet file in one of TRL's
            formats; a list of them is trained as a library whose experts can be added up.
        objective: sft, dpo, rloo, or one's own, a Python file or an import path.
        model: hub id or local folder; "harbor" is the embedded base.
        recipe: how to train.
        out: folder of the run (default: runs/train/SKILL-OBJECTIVE).
        against: folder of an expert, or of a library, that is not touched, and beside which the new ones must work;
            their basis is used.
        world: where cases come from: generated, or real dialogues (needs --data).
        data: folder of the Schema-Guided Dialogue data, e.g. a clone of its public repository.
        k: directions kept in every matrix, or "full".
        support: which directions.
        first_layer: first decoder layer that experts touch; a third of the depth if none is given.
        chat_template: file with a Jinja chat template, for a model that has none.
        calibration: text file that a "sensitivity" basis is made with.
        revision: branch, tag or commit of a hub id.
        dtype: of the loaded weights.
        trust_remote_code: run modelling code from the repository.
        accelerator: as in Lightning: "cpu", "gpu", ...
        devices: how many.
        strategy: as in Lightning: "ddp", ...
        num_nodes: machines.
    """
    from svdexpert import training, worlds
    from svdexpert.examples import is_file
    from svdexpert.model import SpectralModel
    from svdexpert.registry import stem

    _quiet_when_piped()
    skills = [skill] if isinstance(skill, str) else skill
    name = "-".join([*(Path(one).stem if is_file(one) else stem(one) for one in skills), objective])
    folder = _folder_to_write("--out", out or f"runs/train/{name}")
    frozen = _experts(against)
    if frozen:
        asked = {"k": (k, 64), "support": (support, "top"), "first_layer": (first_layer, None)}
        theirs = next(iter(frozen.values())).key
        for setting, (value, default) in asked.items():
            if value not in (default, found := getattr(theirs, setting)):
                raise BasisError(
                    f"--{setting} is {value}, but the experts of {against} have {found}, and all that work beside one "
                    f"another have one basis: leave --{setting} out."
                )
        loaded = _load_for(model, frozen, calibration, revision, dtype, None, trust_remote_code)
    else:
        loaded = SpectralModel.from_pretrained(
            model,
            revision=revision,
            k=k,
            support=support,
            first_layer=first_layer,
            calibration=_texts(calibration),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    if chat_template is not None and loaded.tokenizer is not None:
        loaded.tokenizer.chat_template = _text(chat_template)
    experts = training.train_library(
        loaded,
        skills,
        objective,
        recipe=recipe,
        world=worlds.load(world, data),
        against=frozen,
        out=folder,
        trainer={"accelerator": accelerator, "devices": devices, "strategy": strategy, "num_nodes": num_nodes},
    )
    if not training.is_rank_zero():
        return
    for place, expert in experts.items():
        _show(f"{place}: {_scores(expert.scores)}; {folder / 'experts' / place}")
    _show(f"learning curve in {folder / 'curve.png'}")


def _scores(scores: "Mapping[str, Any]") -> str:
    """Return the figures of a trained expert with their intervals; there is none without several clusters."""
    figures = {key: one for key, one in scores.items() if isinstance(one, list)}
    ends = {key: ["?" if end is None else f"{end:.2f}" for end in one] for key, one in figures.items()}
    found = ", ".join(f"{key} {value} [{low}, {high}]" for key, (value, low, high) in ends.items())
    return found or "not scored"


def fit_dispatcher(
    experts: str | None = None,
    model: str = "harbor",
    strategy: str = "router",
    out: str = "runs/dispatcher.safetensors",
    skills: Names | None = None,
    examples: str | None = None,
    world: Literal["town", "sgd"] = "town",
    data: str | None = None,
    n: PositiveInt = 400,
    validation: PositiveInt = 200,
    settings: dict[str, Any] = {},  # noqa: B006 - read, never changed; shown by --help
    seed: int = 0,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Make a dispatcher, which decides who speaks in a conversation.

    Args:
        experts: folder of the library that it chooses from; needed.
        model: hub id or local folder; "harbor" is the embedded base.
        strategy: router, prompt, classify, fewshot or fixed, or one's own, a Python file or an import path.
        out: file to write; an earlier one is replaced.
        skills: whose cases it learns from; by default those that the experts are named after.
        examples: JSONL file of one's own instead: messages, experts (a list of names), maybe tools and reply.
        world: where cases come from.
        data: folder of the Schema-Guided Dialogue data.
        n: cases of each skill, even.
        validation: cases of each skill that settings are chosen on, even.
        settings: of the strategy, e.g. '{rule: sum}' for fixed.
        seed: of the cases.
        dtype: of the loaded weights.
        device_map: as in transformers, e.g. "auto" or "cuda"; needs accelerate.
        trust_remote_code: run modelling code from the repository.
    """
    from svdexpert import dispatch, evaluate, report, worlds

    dispatch.typed_settings(strategy, settings)  # a typing mistake is told before anything is loaded
    file = _file_to_write("--out", out)
    library = _chosen_from(_experts(experts))
    progress = sys.stderr.isatty()
    if "progress" in signature(dispatch.load(strategy).fit).parameters:
        settings = {"progress": progress, **settings}
    if examples is not None:
        rows, held = dispatch.read_examples(examples), []
    else:
        place, names = worlds.load(world, data), _names(skills) or _skills(library)
        rows = dispatch.examples_of(names, place, "train", n, seed=seed)
        held = dispatch.examples_of(names, place, "validation", validation, seed=seed)
    dispatch.check_wanted([*rows, *held], library)
    loaded = _load_for(model, library, None, None, dtype, device_map, trust_remote_code)
    rows, held = _fitting(loaded, rows), _fitting(loaded, held)
    made = dispatch.fit(strategy, loaded, library, rows, held, **settings)
    _show(f"{dispatch.save_dispatcher(made, file)}: {strategy} for {', '.join(library)}")
    scores = cast(Any, made).stored()[0].get("scores")
    if held:
        decisions = dispatch.decide(made, loaded, [one.context for one in held], library, progress=progress)
        _show(report.dispatch_table(evaluate.judge([one.wanted for one in held], decisions)))
    elif isinstance(scores, dict) and scores:
        _show(_listed(scores))
    if getattr(dispatch.load(strategy), "CHOOSES", True):
        _show("Those are cases that its settings are chosen on: svdexpert dispatch eval measures it on others.")


def _listed(values: "Mapping[str, Any]") -> str:
    """Return values by name as a line.

    >>> _listed({"n": 8, "calibration_error": 0.12345})
    'n 8, calibration error 0.123'
    """
    shown = {key: f"{one:.3g}" if isinstance(one, float) else one for key, one in values.items()}
    return ", ".join(f"{key.replace('_', ' ')} {one}" for key, one in shown.items())


def eval_dispatcher(
    dispatcher: str,
    experts: str | None = None,
    model: str = "harbor",
    skills: Names | None = None,
    examples: str | None = None,
    world: Literal["town", "sgd"] = "town",
    data: str | None = None,
    split: Literal["train", "validation", "heldout"] = "heldout",
    n: PositiveInt = 200,
    seed: int = 0,
    log: str | None = None,
    strategy: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Measure whom a dispatcher lets speak, on cases that it was not made from.

    Args:
        dispatcher: file that `svdexpert dispatch fit` wrote.
        experts: folder of its library; needed.
        model: hub id or local folder; "harbor" is the embedded base.
        skills: whose cases it is measured on; by default those that the experts are named after.
        examples: JSONL file of one's own instead: messages, experts (a list of names), maybe tools.
        world: where cases come from.
        data: folder of the Schema-Guided Dialogue data.
        split: of the world.
        n: cases of each skill, even.
        seed: of the cases.
        log: JSONL file for all decisions; an earlier one is replaced.
        strategy: that made the dispatcher, where it is one's own: a Python file or an import path.
        dtype: of the loaded weights.
        device_map: as in transformers, e.g. "auto" or "cuda"; needs accelerate.
        trust_remote_code: run modelling code from the repository.
    """
    import json

    from svdexpert import dispatch, evaluate, report, worlds
    from svdexpert.storage import whole_file

    library = _chosen_from(_experts(experts))
    made = _dispatcher(dispatcher, library, strategy)
    file = None if log is None else _file_to_write("--log", log)
    if examples is not None:
        rows = dispatch.read_examples(examples)
    else:
        names = _names(skills) or _skills(library)
        rows = dispatch.examples_of(names, worlds.load(world, data), split, n, seed=seed)
    dispatch.check_wanted(rows, library)
    loaded = _load_for(model, library, None, None, dtype, device_map, trust_remote_code)
    rows = _fitting(loaded, rows)
    decisions = dispatch.decide(made, loaded, [one.context for one in rows], library, progress=sys.stderr.isatty())
    _show(report.dispatch_table(evaluate.judge([one.wanted for one in rows], decisions)))
    if file is not None:
        with whole_file(file) as temporary:
            lines = [
                json.dumps({"wanted": sorted(one.wanted), "messages": list(one.context.messages), **made.as_json()})
                for one, made in zip(rows, decisions, strict=True)
            ]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _show(f"decisions in {file}")


def talk(
    model: str = "harbor",
    experts: str | None = None,
    dispatcher: str | None = None,
    strategy: str | None = None,
    tools: str | None = None,
    instructions: str = "",
    policy: Literal["refill", "reuse"] = "refill",
    hysteresis: float = 0.1,
    history: str | None = None,
    max_new_tokens: PositiveInt = 128,
    in_turn: Names | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Talk with a model in the terminal, and change who speaks.

    Args:
        model: hub id or local folder; "harbor" is the embedded base.
        experts: folder of an expert, or of a library.
        dispatcher: file that `svdexpert dispatch fit` wrote; it decides until /mix says otherwise.
        strategy: that made the dispatcher, where it is one's own: a Python file or an import path.
        tools: JSON file with a list of functions (JSON schemas).
        instructions: a system message.
        policy: what becomes of the cache where the mixture changes: read again, or kept.
        hysteresis: margin around one half in which scores do not change who speaks.
        history: JSON file that the conversation is written to after every turn; where it exists, that one goes on.
        max_new_tokens: of a reply.
        in_turn: experts in the order in which they speak one after another, where the dispatcher chooses several.
        dtype: of the loaded weights.
        device_map: as in transformers, e.g. "auto" or "cuda"; needs accelerate.
        trust_remote_code: run modelling code from the repository.
    """
    from svdexpert import chat
    from svdexpert.dialogue import Conversation, read_saved

    library = _experts(experts)
    if in_turn and dispatcher is None:
        raise DispatchError("--in_turn orders the experts that a dispatcher chooses: add --dispatcher FILE.")
    if strategy is not None and dispatcher is None:
        raise DispatchError("--strategy opens a dispatcher of one's own: add --dispatcher FILE.")
    made = None if dispatcher is None else _dispatcher(dispatcher, library, strategy)
    known = _tools(tools)
    file = None if history is None else _file_to_write("--history", history)
    if file is not None and file.exists():
        read_saved(file)
    loaded = _load_for(model, library, None, None, dtype, device_map, trust_remote_code)
    if made is not None:
        made.check(loaded, library)
    conversation = Conversation(
        loaded, library, made, known, instructions, policy, hysteresis, max_new_tokens, _names(in_turn) or ()
    )
    chat.run(conversation, file, console=_console())


def demo(folder: str = "runs/demo", n: PositiveInt = 64, data: str | None = None) -> None:
    """Run the main job on harbor: train three experts in one batch, dispatch, measure, export, and show it on a page.

    Args:
        folder: of the run; given again, it goes on where it was.
        n: held-out cases a skill, even.
        data: folder of the Schema-Guided Dialogue data, for a real conversation among the samples.
    """
    from svdexpert.demo import run

    _quiet_when_piped()
    run(_folder_to_write("--folder", folder), n, data)


def _skills(library: "Mapping[str, Expert]") -> list[str]:
    """Return the experts that are named after a skill that ships."""
    from svdexpert import skills

    found = [name for name in library if name in skills.names()]
    if not found:
        raise SvdExpertError(
            f"None of the experts ({', '.join(library)}) is named after a skill ({', '.join(skills.names())}): say "
            "whose cases are meant with --skills, or give --examples."
        )
    return found


def _names(names: Names | None) -> list[str] | None:
    return [names] if isinstance(names, str) else names


def _dispatcher(path: str, library: "Mapping[str, Expert]", strategy: str | None) -> "Dispatcher":
    """Return the dispatcher in a file, which may choose from a library."""
    from svdexpert import dispatch

    _chosen_from(library)
    return dispatch.open_file(path, strategy)


def _dispatcher_table(path: str, strategy: str | None) -> "Table":
    """Return what a file says of a dispatcher."""
    from rich.table import Table
    from rich.text import Text

    from svdexpert import dispatch

    made = cast(Any, dispatch.open_file(path, strategy))
    card = dict(made.stored()[0])
    base = card.pop("made_for", {}).get("base")  # the rest of it are digests
    table = Table()
    table.add_column("dispatcher")
    table.add_column(Text(path))
    about = {"strategy": made.strategy, "base": base or "any", "experts": ", ".join(made.experts), **card}
    for key, value in about.items():
        table.add_row(key.replace("_", " "), Text(_listed(value) if isinstance(value, dict) else str(value)))
    return table


def _chosen_from(library: "Mapping[str, Expert]") -> "Mapping[str, Expert]":
    """Return the experts that a dispatcher chooses from, which have to be there."""
    if not library:
        raise DispatchError("A dispatcher chooses from experts: say where they are with --experts FOLDER.")
    return library


def _file_to_write(option: str, path: str) -> Path:
    """Return the path of a file that can be written, before the work that would be lost otherwise; makes nothing.

    Raises:
        SvdExpertError: it is a folder, or its folder cannot be made or written to.
    """
    if Path(path).is_dir():
        raise SvdExpertError(f"{option} {path} is a folder: give the path of a file, in that folder or elsewhere.")
    return _writable(option, Path(path))


def _folder_to_write(option: str, path: str) -> Path:
    """Return the path of a folder that can be written, before the work that would be lost otherwise; makes nothing.

    Raises:
        SvdExpertError: it is a file, or it cannot be made or written to.
    """
    return _writable(option, Path(path) / "file").parent


def _writable(option: str, path: Path) -> Path:
    nearest = next(one for one in path.resolve().parents if one.exists())
    if not nearest.is_dir():
        raise SvdExpertError(f"{option} {path}: {nearest} is a file, where a folder is needed. Choose another place.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SvdExpertError(f"{option} {path}: nothing can be written in {nearest}. Choose another place.")
    return path


def _tools(path: str | None) -> list[Any]:
    """Return the functions of a JSON file, as JSON schemas; one that is no list stands alone."""
    import json

    from svdexpert.skills import check_tool

    if path is None:
        return []
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise SvdExpertError(f"{path} is no JSON ({error}): expected a list of functions.") from error
    known = found if isinstance(found, list) else [found]
    for one in known:
        check_tool(one)
    return known


def _texts(path: str | None) -> list[str] | None:
    """Return the lines of a calibration file that have something on them."""
    if path is None:
        return None
    return [line for line in _text(path).splitlines() if line.strip()]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SvdExpertError(f"{path} is no text in UTF-8: {error}.") from error
    except OSError as error:
        raise SvdExpertError(f"{path} cannot be read ({error.strerror}): expected the path of a file.") from error


def _fitting(model: "SpectralModel", examples: "Sequence[Example]") -> "list[Example]":
    """Return the examples that fit the model's context, and say how many do not."""
    from svdexpert import dispatch

    found = dispatch.fitting(model, examples)
    if examples and not found:
        raise SvdExpertError(f"All {len(examples)} examples are too long: {dispatch.TOO_LONG}")
    if left_out := len(examples) - len(found):
        _show(f"{left_out} of {len(examples)} examples were left out: {dispatch.TOO_LONG}")
    return found


def _experts(path: str | None) -> "Mapping[str, Expert]":
    """Return the experts of a folder by name: a library, or one expert under the name of its folder."""
    from svdexpert.expert import Expert
    from svdexpert.library import Library

    if path is None:
        return {}
    if path.startswith("hf://"):
        return Library.from_hub(path.removeprefix("hf://"))
    place = Path(path)
    if not place.is_dir():
        found = "is a file" if place.exists() else "does not exist"
        raise ExpertError(
            f"{path} {found}; experts are folders, each with expert.json, alone or several in a library. svdexpert "
            "train makes them and says where."
        )
    if (place / "expert.json").is_file():
        return {place.name: Expert.load(place)}
    library = Library(place)
    if not library:
        raise ExpertError(f"{path} holds no experts: an expert is a folder with expert.json and expert.safetensors.")
    return library


def _alone(library: "Mapping[str, Expert]", path: str | None) -> dict[str, float]:
    """Return the mixture that is meant where none is given: the only expert there is, or the base."""
    if len(library) > 1:
        raise ExpertError(f"{path} holds {len(library)} experts: say which with --mix '{{name: weight}}'.")
    return dict.fromkeys(library, 1.0)


def _named(library: "Mapping[str, Expert]", name: str) -> "Expert":
    from svdexpert.errors import did_you_mean

    if name not in library:
        raise ExpertError(f"There is no expert {name!r}." + did_you_mean(name, library))
    return library[name]


def _load_for(
    model: str,
    library: "Mapping[str, Expert]",
    calibration: str | None,
    revision: str | None,
    dtype: str,
    device_map: str | None,
    trust_remote_code: bool,
) -> "SpectralModel":
    """Load a model with the basis that the experts were made for."""
    from svdexpert.model import SpectralModel

    texts = _texts(calibration)
    _quiet_when_piped()
    where: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    if not library:
        return SpectralModel.from_pretrained(model, k=1, revision=revision, **where)
    key = next(iter(library.values())).key
    try:
        return SpectralModel.from_pretrained(
            model,
            k=key.k,
            support=key.support,
            first_layer=key.first_layer,
            targets=list(key.matrices),
            calibration=texts,
            revision=revision or (key.revision if key.base == model else None),
            **where,
        )
    except BasisError as error:
        raise BasisError(f"These experts were made for {key}; {model} cannot be given their basis. {error}") from error


def _empty_model(path: str, revision: str | None) -> "PreTrainedModel":
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from svdexpert.model import check_base

    with torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(check_base(path), revision=revision)
            return cast("PreTrainedModel", cast(Any, AutoModelForCausalLM).from_config(config))
        except (OSError, ValueError) as error:
            raise BasisError(f"{path} is not a causal language model that transformers knows. {error}") from error


def _quiet_when_piped() -> None:
    """Keep transformers' progress bars out of logs."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def _show(what: object) -> None:
    _console().print(what, highlight=False, markup=False)


def _console() -> "Console":
    from rich.console import Console

    # Piped output has no width of its own; tables of names should not be cut there.
    return Console(width=None if sys.stdout.isatty() else 160)


def run_command(components: Any, prog: str, **options: Any) -> None:
    """Run typed functions as a command line; library errors end it with their message and status 1.

    Args:
        components: a function, or functions by verb; verbs may have verbs.
        prog: name of the program.
        options: of jsonargparse's auto_cli.
    """
    from jsonargparse import ArgumentParser, auto_cli

    class Parser(ArgumentParser):
        """Takes --flag and --no_flag for a bool, instead of --flag=true, and ends a mistake in a line or two."""

        def add_argument(self, *names: Any, **settings: Any) -> Any:
            from jsonargparse import ActionYesNo  # here, because jsonargparse copies this method into its groups

            if settings.get("type") is bool:
                del settings["type"]
                settings["action"] = ActionYesNo(no_prefix="no_")
            return super().add_argument(*names, **settings)

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            unknown = re.search(r"(?:ption '|unrecognized arguments: --)([\w.]+)", message)
            known = {one.dest.rpartition(".")[2]: one.dest for one in self._actions} | {
                one.dest: one.dest for one in self._actions
            }
            close = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
            guess = f". Did you mean {known[close[0]]!r}?" if close else ""
            name = self.prog.replace(" [options]", "")
            print(f"{name}: {message}{guess}\nSee {name} --help", file=sys.stderr)  # noqa: T201
            sys.exit(2)

    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell one another is not for the user of a command
    name, words = prog, sys.argv[1:]
    while isinstance(components, dict) and words and words[0] in components:  # one verb, one parser: its own messages
        components, name, words = components[words[0]], f"{name} {words[0]}", words[1:]
    try:
        auto_cli(components, configs_first(words), prog=name, parser_class=Parser, allow_abbrev=False, **options)
    except (SvdExpertError, OSError) as error:
        said = re.sub(r"\b([a-z_]+)=True", r"--\1", str(error))  # arguments of functions are options here
        print(f"{prog}: {said}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except KeyboardInterrupt as error:
        left = error.args[0] if error.args else "nothing half-written is left"
        print(f"{prog}: interrupted; {left}", file=sys.stderr)  # noqa: T201
        sys.exit(130)


def configs_first(words: "Sequence[str]") -> list[str]:
    """Return the words of a command with its configs first, so that what is typed wins over them wherever it stands.

    >>> configs_first(["--n", "8", "--config", "a.yaml", "--seed", "1", "--config=b.yaml"])
    ['--config', 'a.yaml', '--config=b.yaml', '--n', '8', '--seed', '1']
    """
    configs: list[str] = []
    rest: list[str] = []
    for word in words:
        is_config = word.split("=")[0] == "--config" or configs[-1:] == ["--config"]
        (configs if is_config else rest).append(word)
    return configs + rest


def main() -> None:
    """Run `svdexpert`."""
    verbs = {
        # Two have another name here: jsonargparse would find, and load, svdexpert.decompose and svdexpert.train.
        "decompose": decompose_model,
        "inspect": inspect,
        "generate": generate,
        "export": export,
        "bench": {"knowing-doing": knowing_doing},
        "train": train_experts,
        "dispatch": {"fit": fit_dispatcher, "eval": eval_dispatcher},
        "chat": talk,
        "demo": demo,
    }
    run_command(verbs, "svdexpert", version=__version__)


if __name__ == "__main__":
    main()

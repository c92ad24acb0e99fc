"""What does a damaged, tampered or foreign adapter do: is it refused, or does it act?

    python -m benchmarks.attacks            a minute at most; benchmarks/results/attacks.json

Every attack of `tests/attacks/mutations.py` is tried on an expert, and those that mean something for a LoRA are tried
on a sound PEFT adapter of the same tiny Llama, each on a fresh copy. The same rule for both: *refused* is any exception
before the first logits, *let through* is logits. A warning is not a refusal, but it is counted apart: whoever reads the
log, or turns warnings into errors, is served by it. What was let through is compared with what the sound adapter gives:
a mutation that changes nothing (an unknown field that is ignored) does no harm.

PEFT's format has no digest and no fingerprint of the base, so that most of what it lets through is what its format
cannot see, not a slip of its code. Every row says what its LoRA counterpart is.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT asks the hub for files that a folder lacks

import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.provenance import commit, machine, versions
from svdexpert import Expert, SpectralModel
from svdexpert.cli import run_command
from svdexpert.storage import whole_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "attacks"))

import mutations
from mutations import ATTACKS, BYTES, attach, executed, flip, save_sound, tiny_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PACKAGES = ("torch", "transformers", "peft", "safetensors", "svdexpert")
PROMPTS = torch.arange(12).view(2, 6)
FIRST = f"base_model.model.{mutations.FIRST}"
QUERY, KEY = f"base_model.model.{mutations.QUERY}", f"base_model.model.{mutations.KEY}"
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"  # (8 48), (32 8)
BELOW = f"base_model.model.{mutations.BELOW}"

Mutate = Callable[[Path], object]


# --- the sound adapter and its mutations --------------------------------------------------------------------------


def save_adapter(base: PreTrainedModel, folder: Path, *, seed: int = 0, name: str = mutations.BASE, **how: Any) -> None:
    """Write a LoRA of rank 8 on the matrices that the expert adapts, as PEFT itself writes it."""
    matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"target_modules": matrices, "layers_to_transform": [1, 2], "revision": mutations.REVISION} | how
    base.config._name_or_path = name
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True  # what is missing from a usual adapter starts at zero
    model.save_pretrained(folder)


def resaved(base: Callable[[], PreTrainedModel], **how: Any) -> Mutate:
    """Return a mutation that puts the adapter of another base into the folder, under that base's own name."""

    def mutate(folder: Path) -> None:
        shutil.rmtree(folder)
        save_adapter(base(), folder, seed=1, **({"name": "tiny/other"} | how))

    return mutate


def config(**changes: Any) -> Mutate:
    """Return a mutation that sets fields of the configuration; `...` removes one."""

    def mutate(folder: Path) -> None:
        fields = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({name: one for name, one in fields.items() if one is not ...}))

    return mutate


def config_text(change: Callable[[str], str]) -> Mutate:
    return lambda folder: (folder / CONFIG).write_text(change((folder / CONFIG).read_text()), encoding="utf-8")


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Mutate:
    def mutate(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file({name: one.contiguous() for name, one in found.items()}, folder / WEIGHTS, {"format": "pt"})

    return mutate


def every_tensor(change: Callable[[Tensor], Tensor]) -> Mutate:
    return tensors(lambda found: found.update({name: change(one) for name, one in found.items()}))


def one_number(value: float) -> Mutate:
    return tensors(lambda found: found[B].view(-1)[3:4].fill_(value))


def renamed(found: dict[str, Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        found[f"base_model.model.down_proj.{part}.weight"] = found.pop(f"{FIRST}.{part}.weight")


def added(found: dict[str, Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        found[f"{BELOW}.{part}.weight"] = found[f"{QUERY}.{part}.weight"].clone()


def swapped(found: dict[str, Tensor]) -> None:
    for part in ("lora_A.weight", "lora_B.weight"):
        found[f"{QUERY}.{part}"], found[f"{KEY}.{part}"] = found[f"{KEY}.{part}"], found[f"{QUERY}.{part}"]


def one_rank_more(found: dict[str, Tensor]) -> None:
    found[A] = torch.cat([found[A], found[A][:1]])
    found[B] = torch.cat([found[B], found[B][:, :1]], 1)


def raw(change: Callable[[bytes], bytes]) -> Mutate:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def of_another(folder: Path) -> None:
    other = folder.parent / "another"
    save_adapter(tiny_llama(), other, seed=7)
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)


def pickled_bin(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({B: mutations.Payload(executed(folder))}, folder / "adapter_model.bin")


def removed(*names: str) -> Mutate:
    return lambda folder: [(folder / name).unlink() for name in names]


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


# The name of the attack on an expert: (what it is for a LoRA, how)
COUNTERPARTS: dict[str, tuple[str, Mutate]] = {
    # made for another base
    "other base": ("adapter of a wider base", resaved(mutations.wider_base)),
    "other base of the same shapes": ("adapter of a base of the same shapes", resaved(mutations.other_base)),
    "other architecture": (
        "adapter of a GPT-2",
        resaved(
            mutations.other_architecture, target_modules=["c_attn", "c_proj"], layers_to_transform=None, revision=None
        ),
    ),
    "bf16-rounded base": ("adapter of the rounded base", resaved(mutations.rounded_base, name="tiny/bf16")),
    "base with one bit changed": ("adapter of that base", resaved(mutations.nudged_base, name="tiny/nudged")),
    "other commit of the base": (
        "adapter of that commit",
        resaved(tiny_llama, name=mutations.BASE, revision=mutations.OTHER_REVISION),
    ),
    "other first layer, resealed": ("layers_to_transform: [2]", config(layers_to_transform=[2])),
    # numbers
    "NaN, resealed": ("one NaN in lora_B", one_number(float("nan"))),
    "inf, resealed": ("one inf in lora_B", one_number(float("inf"))),
    "-inf, resealed": ("one -inf in lora_B", one_number(float("-inf"))),
    "int tensors, resealed": ("int32 tensors", every_tensor(Tensor.int)),
    "offsets missing, resealed": (
        "lora_A and lora_B of a matrix missing",
        tensors(lambda found: [found.pop(A), found.pop(B)]),
    ),
    "offsets left over, resealed": ("lora_A and lora_B of a matrix not adapted", tensors(added)),
    "offsets renamed, resealed": ("lora_A and lora_B of a matrix renamed", tensors(renamed)),
    "offsets under another kind, resealed": (
        "an unknown tensor",
        tensors(lambda found: found.update({"scales": torch.ones(8)})),
    ),
    "no tensors, resealed": ("no tensors", tensors(lambda found: found.clear())),
    "one offset too many, resealed": ("a matrix of rank 9, r: 8", tensors(one_rank_more)),
    "offsets as a row, resealed": ("lora_B (1 32 8)", tensors(lambda found: found.update({B: found[B][None]}))),
    "offsets of two matrices swapped": ("lora_A and lora_B of two matrices swapped", tensors(swapped)),
    "offsets doubled": ("tensors doubled", every_tensor(lambda one: 2 * one)),
    "tensors of another expert": ("tensors of another adapter", of_another),
    # the scale of the numbers
    "singular values doubled, resealed": ("lora_alpha doubled", config(lora_alpha=16)),
    "singular values zero, resealed": ("lora_alpha: 0", config(lora_alpha=0)),
    "singular values negative, resealed": ("lora_alpha: -8", config(lora_alpha=-8)),
    "singular values NaN, resealed": ("lora_alpha: NaN", config(lora_alpha=float("nan"))),
    # the card
    "k of one matrix, resealed": ("rank_pattern: 4 for a matrix", config(rank_pattern={mutations.FIRST: 4})),
    "k 0, resealed": ("r: 0", config(r=0)),
    "k negative, resealed": ("r: -8", config(r=-8)),
    "k true, resealed": ("r: true", config(r=True)),
    "k a float, resealed": ("r: 8.0", config(r=8.0)),
    "k text, resealed": ('r: "8"', config(r="8")),
    "k above the rank, resealed": ("r: 33", config(r=33)),
    "other format, resealed": ('peft_type: "OTHER"', config(peft_type="OTHER")),
    "unknown field, resealed": ("an unknown field", config(lora_beta=8)),
    "matrix renamed on the card, resealed": ("target_modules without a match", config(target_modules=["down"])),
    "matrix missing on the card, resealed": (
        "target_modules without down_proj",
        config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]),
    ),
    "without matrices, resealed": ("without target_modules", config(target_modules=...)),
    "card byte flipped": (
        "lora_alpha 8 turned 9 by one bit",
        config_text(lambda text: text.replace('"lora_alpha": 8', '"lora_alpha": 9')),
    ),
    "card naming a key twice": ("r named twice", config_text(lambda text: '{"r": 4,' + text[1:])),
    "card empty": ("configuration empty", config_text(lambda text: "")),
    "card cut in the middle": ("configuration cut in the middle", config_text(lambda text: text[: len(text) // 2])),
    "card not JSON": ("configuration not JSON", config_text(lambda text: "r: 8\n")),
    "card a list": ("configuration a list", config_text(lambda text: f"[{text}]")),
    "card with a byte order mark": ("configuration with a byte order mark", config_text(lambda text: "\ufeff" + text)),
    # bytes of the tensors
    "data byte flipped": ("the same", raw(flip(lambda file: len(file) - 3))),
    **{
        name: ("the same", raw(BYTES[name]))
        for name in (
            "empty file",
            "cut inside the header",
            "cut inside the data",
            "last byte missing",
            "garbage appended",
            "header length huge",
            "header byte flipped",
            "random bytes",
            "text",
        )
    },
    # pickles
    "pickle as tensors": ("the same", mutations.pickled(file=WEIGHTS)),
    "torch.save as tensors": ("the same", mutations.torch_saved(lambda folder: folder / WEIGHTS)),
    ".bin file instead of tensors": ("a payload in adapter_model.bin", pickled_bin),
    ".pt file as expert": ("the same", mutations.as_a_file),
    # files
    "card missing": ("configuration missing", removed(CONFIG)),
    "tensors missing": ("the same", removed(WEIGHTS)),
    "folder empty": ("the same", emptied),
    "folder missing": ("the same", shutil.rmtree),
    "tensors a folder": ("the same", mutations.replaced_by_a_folder(WEIGHTS)),
}


# --- what becomes of it -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one attempt to use a folder came to.

    Attributes:
        refused: whether an exception came before any logits.
        error: its class and first line.
        warned: the first line of every warning that the sound folder does not cause.
        logits: of what was let through: "as sound", "as base", "not finite" or "other".
        executed: whether a payload ran.
    """

    refused: bool
    error: str | None = None
    warned: tuple[str, ...] = ()
    logits: str | None = None
    executed: bool = False

    @property
    def verdict(self) -> str:
        if self.refused:
            return "refused"
        return ("let through, warned" if self.warned else "let through") + f" ({self.logits})"


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect warnings of the warnings module and of every logger."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in (None, "transformers", "huggingface_hub", "peft")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield heard
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            heard += [str(one.message) for one in caught if not issubclass(one.category, DeprecationWarning)]


def attempt(folder: Path, use: Callable[[Path], Tensor], known: dict[str, Tensor], usual: tuple[str, ...]) -> Outcome:
    """Use a folder.

    Args:
        folder: of an expert or adapter.
        use: returns the logits (b t v) of the model with it.
        known: logits to recognise, by what they are.
        usual: warnings of the sound folder.
    """
    error = logits = None
    with listening() as heard:
        try:
            logits = use(folder)
        except Exception as raised:  # any kind is a refusal, whatever library it comes from
            said = str(raised).replace(str(folder), folder.name).strip()  # the place is another one in every run
            error = f"{type(raised).__name__}: {said.partition(chr(10))[0][:160]}"
    warned = tuple(dict.fromkeys(line for one in heard if (line := one.strip().partition("\n")[0][:160]) not in usual))
    ran = executed(folder).exists()
    if logits is None:
        return Outcome(True, error, warned, executed=ran)
    kind = "other" if logits.isfinite().all() else "not finite"
    kind = next((name for name, one in known.items() if torch.equal(one, logits)), kind)
    return Outcome(False, None, warned, kind, ran)


def with_lora(folder: Path) -> Tensor:
    """Return logits of a fresh base with the adapter, as PEFT's documentation says to load one."""
    model = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    with torch.no_grad():
        return model(input_ids=PROMPTS, use_cache=False).logits


def with_expert(model: SpectralModel) -> Callable[[Path], Tensor]:
    return lambda folder: model.logits(PROMPTS, Expert.load(folder)).detach()


def try_all(sound: Path, attacks: dict[str, Mutate], use: Callable[[Path], Tensor], base: Tensor) -> dict[str, Outcome]:
    """Return the outcome of every attack, each on a fresh copy of the sound folder."""
    plain = attempt(sound, use, {}, ())
    if plain.refused:
        raise SystemExit(f"The sound folder was refused: {plain.error}")
    known = {"as sound": use(sound), "as base": base}
    if torch.equal(known["as sound"], base):
        raise SystemExit("The sound folder changes nothing, so that nothing could be measured.")
    outcomes = {}
    for name, mutate in attacks.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(shutil.copytree(sound, Path(place) / "victim"))
            mutate(folder)
            outcomes[name] = attempt(folder, use, known, plain.warned)
    return outcomes


def figures(ours: dict[str, Outcome], theirs: dict[str, Outcome]) -> dict[str, int]:
    through = [one for one in theirs.values() if not one.refused]
    silent = [one for one in through if not one.warned]
    return {
        "attacks_total": len(ours),
        "attacks_refused_by_svdexpert": sum(one.refused for one in ours.values()),
        "attacks_with_peft_counterpart": len(theirs),
        "attacks_with_peft_counterpart_refused_by_svdexpert": sum(ours[name].refused for name in theirs),
        "attacks_peft_let_through": len(through),
        "attacks_peft_let_through_with_warning": len(through) - len(silent),
        "attacks_peft_let_through_silently": len(silent),
        "attacks_peft_let_through_silently_with_other_logits": sum(one.logits != "as sound" for one in silent),
        "payloads_executed": sum(one.executed for one in (*ours.values(), *theirs.values())),
    }


def show(ours: dict[str, Outcome], theirs: dict[str, Outcome], found: dict[str, int]) -> None:
    table = Table(title="Attacks that have a LoRA counterpart")
    for column in ("attack on an expert", "svdexpert", "for a LoRA", "PEFT", "warning"):
        table.add_column(column)
    for name, outcome in theirs.items():
        warned = "; ".join(outcome.warned)[:40]
        table.add_row(name, ours[name].verdict, COUNTERPARTS[name][0], outcome.verdict, warned)
    console = Console(width=150)
    console.print(table)
    passed = [name for name, one in ours.items() if not one.refused]
    if passed:
        console.print("svdexpert let through:", "; ".join(passed))
    for name, value in found.items():
        console.print(f"{name}: {value}")


def main(output: str = "benchmarks/results/attacks.json") -> None:
    """Try every attack on an expert and its counterpart on a PEFT LoRA; print and write what became of each.

    Args:
        output: JSON file to write.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # those that count are collected by `listening`
    with tempfile.TemporaryDirectory() as place:
        os.environ["SVDEXPERT_CACHE"] = f"{place}/factors"
        with attach(tiny_llama()) as model:
            expert = save_sound(model, Path(place) / "expert")
            base = model.logits(PROMPTS).detach()
            attacks = {name: attack.mutate for name, attack in ATTACKS.items()}
            ours = try_all(expert, attacks, with_expert(model), base)
            if not torch.equal(model.logits(PROMPTS), base):
                raise SystemExit("An attack changed the base.")
        adapter = Path(place) / "adapter"
        save_adapter(tiny_llama(), adapter)
        theirs = try_all(adapter, {name: mutate for name, (_, mutate) in COUNTERPARTS.items()}, with_lora, base)
    found = figures(ours, theirs)
    show(ours, theirs, found)
    document = {
        "figures": found,
        "svdexpert": {name: asdict(one) for name, one in ours.items()},
        "peft": {name: {"counterpart": COUNTERPARTS[name][0]} | asdict(one) for name, one in theirs.items()},
        "versions": versions(PACKAGES),
        "machine": machine(),
        "commit": commit(),
        "command": "python -m " + " ".join(["benchmarks.attacks", *sys.argv[1:]]),
    }
    with whole_file(Path(output)) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main, Path(__file__).name)

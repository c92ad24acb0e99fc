"""What somebody may do to the folder of a sound expert, and the refusal that each of it must meet.

    ATTACKS[name] = Attack(mutate, error, word)      mutate(folder) changes a fresh copy in place
    ATTACKS[name + ", resealed"]                     the same by somebody who recomputes both SHA-256s

An accident (a bad disk, half a download) breaks the seal; somebody determined makes a new one, which leaves only the
checks of what the numbers mean. A seal is no signature: whoever reseals may store any finite offsets for the right
basis, and that is simply another expert.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from svdexpert import Expert, ExpertError, MismatchError, SpectralModel, SvdExpertError

CARD, TENSORS = "expert.json", "expert.safetensors"
BASE, REVISION, OTHER_REVISION = "tiny/llama", "a" * 40, "b" * 40
FIRST = "model.layers.1.mlp.down_proj"  # (32 48), the first matrix of the card
QUERY, KEY = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"  # both (32 32)
BELOW = "model.layers.0.self_attn.q_proj"  # below first_layer: not adapted
K = 8

Card = dict[str, Any]
Tensors = dict[str, Tensor]
Edit = Callable[[Card, Tensors], object]


@dataclass(frozen=True)
class Attack:
    """A mutation of an expert's folder, the error that it must raise and a word that the message must hold."""

    mutate: Callable[[Path], object]
    error: type[SvdExpertError]
    word: str


# --- the base and its experts -------------------------------------------------------------------------------------


def tiny_llama(seed: int = 0, *, hidden: int = 32, revision: str = REVISION) -> LlamaForCausalLM:
    """Return a random Llama of three layers; it claims to be a certain commit of a hub model."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.config._name_or_path, model.config._commit_hash = BASE, revision
    return model.eval()


def other_base() -> LlamaForCausalLM:
    return tiny_llama(1)


def wider_base() -> LlamaForCausalLM:
    return tiny_llama(hidden=40)


def other_architecture() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def rounded_base() -> LlamaForCausalLM:
    """Return the base after a trip through bfloat16."""
    return tiny_llama().bfloat16().float()


def nudged_base() -> LlamaForCausalLM:
    """Return the base with the last bit of one weight changed."""
    model = tiny_llama()
    with torch.no_grad():
        weight = model.get_parameter(f"{QUERY}.weight")
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    return model


def attach(hf: PreTrainedModel, k: int = K) -> SpectralModel:
    return SpectralModel.attach(hf, k=k, progress=False)


def save_sound(model: SpectralModel, folder: Path, *, seed: int = 0, core: str = "diag") -> Path:
    """Write an expert on the model, with a full card."""
    random = Expert.random(model.basis, std=0.3, seed=seed, core=core)
    card = {"skill": "clarify", "objective": "sft", "config": {"steps": 100}, "scores": {"doing": 0.5}, "seed": seed}
    return Expert.from_offsets(model.basis, random.offsets, core=core, **card).save(folder)


def resaved(base: Callable[[], PreTrainedModel], **how: Any) -> Callable[[Path], object]:
    """Return a mutation that puts the expert of another base into the folder; `how` goes to `save_sound`."""

    def mutate(folder: Path) -> None:
        with attach(base()) as model:
            save_sound(model, folder, **how)

    return mutate


# --- the seal -----------------------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[Card, Tensors]:
    return json.loads((folder / CARD).read_text("utf-8")), load((folder / TENSORS).read_bytes())


def dump(card: Card) -> str:
    return json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def seal(folder: Path, card: Card | None = None) -> None:
    """Recompute both digests for the tensors that stand in the folder, as a determined attacker would."""
    card = json.loads((folder / CARD).read_text("utf-8")) if card is None else dict(card)
    card["sha256"] = {TENSORS: hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()}
    card["sha256"] |= {CARD: hashlib.sha256(dump(card).encode("utf-8", "surrogatepass")).hexdigest()}
    (folder / CARD).write_text(json.dumps(card, indent=2, sort_keys=True, ensure_ascii=True) + "\n", "utf-8")


def edited(edit: Edit, *, sealed: bool) -> Callable[[Path], object]:
    """Return a mutation that changes what the folder says, with or without a new seal."""

    def mutate(folder: Path) -> None:
        before, tensors = read(folder)
        card = json.loads(dump(before))
        edit(card, tensors)
        (folder / TENSORS).write_bytes(save(tensors))
        if sealed:
            seal(folder, card)
        elif dump(card) != dump(before):  # as text: 1, 1.0 and True are equal in Python
            (folder / CARD).write_text(dump(card), "utf-8")

    return mutate


def rewritten(
    change: Callable[[bytes], bytes], file: str = TENSORS, *, sealed: bool = False
) -> Callable[[Path], object]:
    """Return a mutation of the bytes of one file."""

    def mutate(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        if sealed:
            seal(folder)

    return mutate


# --- edits of the card and of the tensors -------------------------------------------------------------------------


def field(name: str, value: Any) -> Edit:
    return lambda card, tensors: card.update({name: value})


def without(name: str) -> Edit:
    return lambda card, tensors: card.pop(name)


def matrix(name: str, value: Any) -> Edit:
    """Set one entry of the first matrix of the card."""
    return lambda card, tensors: card["matrices"][FIRST].update({name: value})


def every_k(k: Any) -> Edit:
    def edit(card: Card, tensors: Tensors) -> None:
        card["k"] = k
        for one in card["matrices"].values():
            one["k"] = k

    return edit


def fewer_directions(card: Card, tensors: Tensors) -> None:
    every_k(4)(card, tensors)
    tensors.update({name: one[:4].clone() for name, one in tensors.items()})


def offsets(change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda card, tensors: tensors.update({f"offsets.{FIRST}": change(tensors[f"offsets.{FIRST}"]).contiguous()})


def values(change: Callable[[Tensor], Tensor]) -> Edit:
    name = f"singular_values.{FIRST}"
    return lambda card, tensors: tensors.update({name: change(tensors[name]).contiguous()})


def one_offset(value: float) -> Edit:
    return offsets(lambda d: d.index_fill(0, torch.tensor([3]), value))


def every_tensor(change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda card, tensors: tensors.update({name: change(one) for name, one in tensors.items()})


def drop(*kinds: str) -> Edit:
    """Leave a matrix out of `card`, `offsets` or `singular_values`."""

    def edit(card: Card, tensors: Tensors) -> None:
        for kind in kinds:
            card["matrices"].pop(FIRST) if kind == "card" else tensors.pop(f"{kind}.{FIRST}")

    return edit


def rename(name: str, *kinds: str, keep: bool = False) -> Edit:
    """Move what is stored for the first matrix to another name, or copy it there."""

    def edit(card: Card, tensors: Tensors) -> None:
        for kind in kinds:
            place, prefix = (card["matrices"], "") if kind == "card" else (tensors, f"{kind}.")
            place[prefix + name] = place[prefix + FIRST] if kind == "card" else place[prefix + FIRST].clone()
            if not keep:
                del place[prefix + FIRST]

    return edit


def swap(kind: str) -> Edit:
    """Exchange what is stored for two matrices of equal shape."""

    def edit(card: Card, tensors: Tensors) -> None:
        place, prefix = (card["matrices"], "") if kind == "card" else (tensors, f"{kind}.")
        place[prefix + QUERY], place[prefix + KEY] = place[prefix + KEY], place[prefix + QUERY]

    return edit


def both(*edits: Edit) -> Edit:
    return lambda card, tensors: [edit(card, tensors) for edit in edits]


def values_of_other_base(card: Card, tensors: Tensors) -> None:
    with attach(other_base()) as model:
        tensors.update({f"singular_values.{name}": one.clone() for name, one in model.basis.singular_values.items()})


def expert_of_other_base(card: Card, tensors: Tensors) -> None:
    """Keep the card's fingerprints, so that only the numbers are foreign."""
    values_of_other_base(card, tensors)
    draw = torch.Generator().manual_seed(9)
    tensors.update({name: torch.randn(K, generator=draw) for name in tensors if name.startswith("offsets.")})


_ALL = ("card", "offsets", "singular_values")
_DENSE = "W + U_k (sqrt(s s^T) * D) V_k^T"

# The card describes another expert than the one that was sealed. name: (edit, error and word once it is resealed)
CARDS: dict[str, tuple[Edit, type[SvdExpertError], str]] = {
    "other revision": (field("revision", OTHER_REVISION), MismatchError, "revision"),
    "other support": (field("support", "sensitivity"), MismatchError, "support sensitivity"),
    "other first layer": (field("first_layer", 2), MismatchError, "first_layer 2"),
    "first layer beyond every model": (field("first_layer", 10**30), MismatchError, "first_layer"),
    "dense card over diag offsets": (both(field("core", "dense"), field("operation", _DENSE)), ExpertError, "shape"),
    "k full": (field("k", "full"), MismatchError, "k full, here 8"),
    "fewer directions": (fewer_directions, MismatchError, "k 4, here 8"),
    "other shape on the card": (matrix("shape", [48, 32]), MismatchError, "another shape"),
    "fingerprint of zeros": (matrix("fingerprint", "0" * 64), MismatchError, "other weights"),
    "swapped fingerprints": (swap("card"), MismatchError, "other weights in 2"),
    "matrix missing everywhere": (drop(*_ALL), MismatchError, "no offsets for"),
    "matrix missing on the card": (drop("card"), ExpertError, "left over"),
    "matrix renamed everywhere": (rename("model.layers.9.mlp.down_proj", *_ALL), MismatchError, "not adapted here"),
    "matrix renamed on the card": (rename("down_proj", "card"), ExpertError, "missing"),
    "extra matrix everywhere": (rename(BELOW, *_ALL, keep=True), MismatchError, "not adapted here"),
    "extra matrix on the card": (rename(BELOW, "card", keep=True), ExpertError, "missing"),
}

# The card itself is unsound: refused with the same words, sealed or not.
FIELDS: dict[str, tuple[Edit, str]] = {
    "k 0": (every_k(0), "k is 0"),
    "k negative": (every_k(-8), "k is -8"),
    "k true": (every_k(True), "k is True"),
    "k a float": (every_k(8.0), "k is 8.0"),
    "k text": (every_k("8"), "k is '8'"),
    "k null": (every_k(None), "k is None"),
    "k above the rank": (every_k(33), "matrices"),
    "k with 300 digits": (every_k(10**300), "matrices"),
    "k of one matrix": (matrix("k", 4), "keeps 4"),
    "unknown support": (field("support", "tops"), "support"),
    "support a list": (field("support", ["top"]), "support"),
    "unknown core": (field("core", "Diag"), "core"),
    "core without its operation": (field("core", "dense"), "operation"),
    "unknown operation": (field("operation", "W + 2 U_k diag(s * d) V_k^T"), "operation"),
    "first layer negative": (field("first_layer", -1), "first_layer"),
    "reach negative": (field("reach", -1), "reach"),
    "reach a float": (field("reach", 1.0), "reach"),
    "first layer true": (field("first_layer", True), "first_layer"),
    "first layer a float": (field("first_layer", 1.0), "first_layer"),
    "fingerprint short": (matrix("fingerprint", "0" * 63), "matrices"),
    "fingerprint with a newline": (matrix("fingerprint", "0" * 64 + "\n"), "matrices"),
    "fingerprint in capitals": (matrix("fingerprint", "A" * 64), "matrices"),
    "fingerprint null": (matrix("fingerprint", None), "matrices"),
    "shape with a float": (matrix("shape", [32.0, 48]), "matrices"),
    "shape of three sides": (matrix("shape", [32, 48, 1]), "matrices"),
    "shape negative": (matrix("shape", [-32, -48]), "matrices"),
    "matrix with an unknown entry": (matrix("rank", 8), "matrices"),
    "no matrices": (field("matrices", {}), "matrices"),
    "matrices a list": (field("matrices", []), "matrices"),
    "other format": (field("format", "lora"), "format"),
    "next format version": (field("format_version", 2), "version 2"),
    "format version as text": (field("format_version", "1"), "version '1'"),
    "format version true": (field("format_version", True), "version"),
    "format version a float": (field("format_version", 1.0), "version"),
    "format version null": (field("format_version", None), "version"),
    "without a version": (without("format_version"), "version"),
    "without a base": (without("base"), "base"),
    "without matrices": (without("matrices"), "matrices"),
    "without scores": (without("scores"), "scores"),
    "unknown field": (field("suport", "top"), "Did you mean 'support'"),
    "base null": (field("base", None), "base"),
    "revision a number": (field("revision", 7), "revision"),
    "skill a list": (field("skill", ["clarify"]), "skill"),
    "seed negative": (field("seed", -1), "seed"),
    "seed true": (field("seed", True), "seed"),
    "config null": (field("config", None), "config"),
    "scores a list": (field("scores", [1.0]), "scores"),
}

# The numbers are unsound. name: (edit, error and word once it is resealed)
NUMBERS: dict[str, tuple[Edit, type[SvdExpertError], str]] = {
    "NaN": (one_offset(float("nan")), ExpertError, "NaN"),
    "inf": (one_offset(float("inf")), ExpertError, "infinite"),
    "-inf": (one_offset(float("-inf")), ExpertError, "infinite"),
    "float16 tensors": (every_tensor(Tensor.half), ExpertError, "float16"),
    "bfloat16 tensors": (every_tensor(Tensor.bfloat16), ExpertError, "bfloat16"),
    "float64 tensors": (every_tensor(Tensor.double), ExpertError, "float64"),
    "int tensors": (every_tensor(Tensor.int), ExpertError, "int32"),
    "bool offsets": (offsets(Tensor.bool), ExpertError, "bool"),
    "complex offsets": (offsets(lambda d: d.to(torch.complex64)), ExpertError, "complex64"),
    "dense offsets under a diag card": (offsets(torch.diag), ExpertError, "shape (8, 8)"),
    "one offset too many": (offsets(lambda d: torch.cat([d, d[:1]])), ExpertError, "shape (9,)"),
    "one offset too few": (offsets(lambda d: d[:-1]), ExpertError, "shape (7,)"),
    "offsets as a row": (offsets(lambda d: d[None]), ExpertError, "shape (1, 8)"),
    "offsets a single number": (offsets(lambda d: d[0]), ExpertError, "shape ()"),
    "offsets empty": (offsets(lambda d: d[:0]), ExpertError, "shape (0,)"),
    "offsets missing": (drop("offsets"), ExpertError, "offsets: 1 matrices missing"),
    "offsets left over": (rename(BELOW, "offsets", keep=True), ExpertError, "left over"),
    "offsets renamed": (rename("down_proj", "offsets"), ExpertError, "offsets"),
    "offsets under another kind": (
        lambda card, tensors: tensors.update({f"scales.{FIRST}": torch.ones(K)}),
        ExpertError,
        "scales",
    ),
    "tensor without a name": (lambda card, tensors: tensors.update({"": torch.ones(K)}), ExpertError, "only offsets"),
    "no tensors": (lambda card, tensors: tensors.clear(), ExpertError, "missing"),
    "singular values missing": (drop("singular_values"), ExpertError, "singular_values"),
    "singular values NaN": (values(lambda s: s * float("nan")), ExpertError, "NaN"),
    "singular values too many": (values(lambda s: torch.cat([s, s[:1]])), ExpertError, "shape"),
    "singular values zero": (values(torch.zeros_like), MismatchError, "singular values"),
    "singular values negative": (values(torch.neg), MismatchError, "singular values"),
    "singular values doubled": (values(lambda s: 2 * s), MismatchError, "singular values"),
    "singular values off by a thousandth": (values(lambda s: 1.001 * s), MismatchError, "singular values"),
    "singular values reversed": (values(lambda s: s.flip(0)), MismatchError, "singular values"),
    "singular values swapped": (swap("singular_values"), MismatchError, "singular values"),
    "singular values of another base": (values_of_other_base, MismatchError, "singular values"),
    "expert of another base under our fingerprints": (expert_of_other_base, MismatchError, "singular values"),
}


# --- bytes of the safetensors file --------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Return a change of the parsed safetensors header."""

    def edit(file: bytes) -> bytes:
        length = struct.unpack("<Q", file[:8])[0]
        parsed = json.loads(file[8 : 8 + length])
        change(parsed)
        text = json.dumps(parsed).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + file[8 + length :]

    return edit


def header_text(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Return a change of the safetensors header as text, its length corrected."""

    def edit(file: bytes) -> bytes:
        length = struct.unpack("<Q", file[:8])[0]
        text = change(file[8 : 8 + length])
        return struct.pack("<Q", len(text)) + text + file[8 + length :]

    return edit


def flip(position: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def edit(file: bytes) -> bytes:
        at = position(file)
        return file[:at] + bytes([file[at] ^ 0x01]) + file[at + 1 :]

    return edit


def overlap(parsed: dict[str, Any]) -> None:
    parsed[f"offsets.{QUERY}"]["data_offsets"] = parsed[f"offsets.{KEY}"]["data_offsets"]


def twice(text: bytes) -> bytes:
    """Name one tensor twice in the header: once for each of two stretches of data."""
    return text.replace(f"offsets.{KEY}".encode(), f"offsets.{QUERY}".encode())


def first_twice(text: bytes) -> bytes:
    """Name the first tensor of the header twice, with the same data: which one counts is up to the reader."""
    end = text.index(b"}") + 1
    return b"{" + text[1:end].replace(b"[8]", b"[4, 2]") + b"," + text[1:]


def entry(**changes: Any) -> Callable[[bytes], bytes]:
    return header(lambda parsed: parsed[f"offsets.{FIRST}"].update(changes))


# Not safetensors any more: "not the file" while the card's digest is the old one, "safetensors" once it is resealed.
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda file: b"",
    "cut inside the header length": lambda file: file[:4],
    "cut after the header length": lambda file: file[:8],
    "cut inside the header": lambda file: file[:200],
    "cut inside the data": lambda file: file[:-100],
    "last byte missing": lambda file: file[:-1],
    "garbage appended": lambda file: file + b"garbage",
    "header length huge": lambda file: struct.pack("<Q", 2**63) + file[8:],
    "header length all ones": lambda file: b"\xff" * 8 + file[8:],
    "header length zero": lambda file: struct.pack("<Q", 0) + file[8:],
    "header byte flipped": flip(lambda file: 8),
    "header not UTF-8": header_text(lambda text: text.replace(b"offsets.", b"offset\xff.", 1)),
    "header of nested lists": header_text(lambda text: b"[" * 100_000),
    "overlapping data": header(overlap),
    "data beyond the file": entry(data_offsets=[0, 2**40]),
    "data backwards": entry(data_offsets=[32, 0]),
    "unknown dtype": entry(dtype="F33"),
    "shape that is not the data's": entry(shape=[9]),
    "shape that overflows": entry(shape=[2**62, 2**62]),
    "shape negative in the header": entry(shape=[-8]),
    "random bytes": lambda file: bytes(range(255, -1, -1)) * 8,
    "text": lambda file: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


# --- text of the card ---------------------------------------------------------------------------------------------


def card_text(change: Callable[[str], str | bytes]) -> Callable[[Path], object]:
    def edit(file: bytes) -> bytes:
        text = change(file.decode())
        return text if isinstance(text, bytes) else text.encode()

    return rewritten(edit, CARD)


def score(text: str) -> Callable[[Path], object]:
    """Replace the number of the card's one score."""
    return card_text(lambda card: card.replace('"doing": 0.5', f'"doing": {text}'))


def lone_surrogate(card: Card, tensors: Tensors) -> None:
    card["skill"] = "\ud800"


# --- pickles ------------------------------------------------------------------------------------------------------


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def executed(folder: Path) -> Path:
    """Where the payload of an attack on this folder leaves its mark."""
    return folder.parent / "executed"


def pickled(*, protocol: int = 4, file: str = TENSORS, sealed: bool = False) -> Callable[[Path], object]:
    def mutate(folder: Path) -> None:
        (folder / file).write_bytes(pickle.dumps(Payload(executed(folder)), protocol))
        if sealed:
            seal(folder)

    return mutate


def torch_saved(
    place: Callable[[Path], Path], *, legacy: bool = False, sealed: bool = False
) -> Callable[[Path], object]:
    def mutate(folder: Path) -> None:
        payload = {"offsets": torch.ones(K), "payload": Payload(executed(folder))}
        torch.save(payload, place(folder), _use_new_zipfile_serialization=not legacy)
        if sealed:
            seal(folder)

    return mutate


def as_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    torch.save(Payload(executed(folder)), folder)


def beside(name: str) -> Callable[[Path], object]:
    """Return a mutation that leaves a pickle in place of the tensors, under its usual name."""

    def mutate(folder: Path) -> None:
        (folder / TENSORS).unlink()
        torch.save(Payload(executed(folder)), folder / name)

    return mutate


# --- the files of the folder --------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def replaced_by_a_folder(name: str) -> Callable[[Path], object]:
    def mutate(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return mutate


def replaced_by_a_link(name: str, target: str) -> Callable[[Path], object]:
    def mutate(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return mutate


def mixed_with_another(name: str) -> Callable[[Path], object]:
    """Return a mutation that takes one of the two files from another sound expert of the same base."""

    def mutate(folder: Path) -> None:
        other = folder.parent / "another"
        with attach(tiny_llama()) as model:
            save_sound(model, other, seed=7)
        shutil.copy(other / name, folder / name)
        shutil.rmtree(other)

    return mutate


FOLDERS: dict[str, Attack] = {
    # made for another base
    "other base": Attack(resaved(wider_base), MismatchError, "another shape"),
    "other base of the same shapes": Attack(resaved(other_base), MismatchError, "other weights in 14 of 14"),
    "other architecture": Attack(resaved(other_architecture), MismatchError, "no offsets for"),
    "bf16-rounded base": Attack(resaved(rounded_base), MismatchError, "other weights in 14 of 14"),
    "base with one bit changed": Attack(resaved(nudged_base), MismatchError, "other weights in 1 of 14"),
    "other commit of the base": Attack(
        resaved(lambda: tiny_llama(revision=OTHER_REVISION)), MismatchError, "revision bbbb"
    ),
    # text of the card
    "card empty": Attack(card_text(lambda card: ""), ExpertError, "not JSON"),
    "card cut in the middle": Attack(card_text(lambda card: card[: len(card) // 2]), ExpertError, "not JSON"),
    "card byte flipped": Attack(card_text(lambda card: card.replace("clarify", "clarifx")), ExpertError, "SHA-256"),
    "card digest flipped": Attack(
        edited(lambda card, tensors: card["sha256"].update({CARD: "0" * 64}), sealed=False), ExpertError, "SHA-256"
    ),
    "digest of the tensors removed": Attack(
        edited(lambda card, tensors: card["sha256"].pop(TENSORS), sealed=False), ExpertError, "sha256"
    ),
    "digests removed": Attack(edited(without("sha256"), sealed=False), ExpertError, "sha256"),
    "digests null": Attack(edited(field("sha256", None), sealed=False), ExpertError, "sha256"),
    "digests numbers": Attack(edited(field("sha256", {CARD: 0, TENSORS: 0}), sealed=False), ExpertError, "sha256"),
    "card not JSON": Attack(card_text(lambda card: "svdexpert: clarify\n"), ExpertError, "not JSON"),
    "card with a comment": Attack(card_text(lambda card: "// card\n" + card), ExpertError, "not JSON"),
    "card with text after it": Attack(card_text(lambda card: card + "{}"), ExpertError, "not JSON"),
    "card a list": Attack(card_text(lambda card: f"[{card}]"), ExpertError, "list"),
    "card null": Attack(card_text(lambda card: "null"), ExpertError, "NoneType"),
    "card with NaN": Attack(score("NaN"), ExpertError, "NaN"),
    "card with Infinity": Attack(score("-Infinity"), ExpertError, "Infinity"),
    "card with a number beyond floats": Attack(score("1e999"), ExpertError, CARD),
    "card with a number of 5000 digits": Attack(score("9" * 5000), ExpertError, "not JSON"),
    "card of 100000 nested lists": Attack(card_text(lambda card: "[" * 10**5 + "]" * 10**5), ExpertError, "not JSON"),
    "score of 100000 nested lists": Attack(score("[" * 10**5 + "]" * 10**5), ExpertError, "not JSON"),
    "card naming a key twice": Attack(card_text(lambda card: '{"k": 4,' + card[1:]), ExpertError, "twice"),
    "card naming a matrix twice": Attack(
        card_text(lambda card: card.replace('"matrices": {', f'"matrices": {{"{FIRST}": null,')), ExpertError, "twice"
    ),
    "card with a byte order mark": Attack(card_text(lambda card: b"\xef\xbb\xbf" + card.encode()), ExpertError, "BOM"),
    "card in latin-1": Attack(
        card_text(lambda card: card.replace("clarify", "clärify").encode("latin-1")), ExpertError, "utf-8"
    ),
    "card in UTF-16": Attack(card_text(lambda card: card.encode("utf-16")), ExpertError, "utf-8"),
    "card with a NUL": Attack(card_text(lambda card: card.replace("clarify", "clar\0ify")), ExpertError, "not JSON"),
    "skill half a character": Attack(edited(lone_surrogate, sealed=True), ExpertError, CARD),
    # bytes of the tensors
    "data byte flipped": Attack(rewritten(flip(lambda file: len(file) - 3)), ExpertError, "not the file"),
    "a tensor named twice": Attack(rewritten(header_text(twice)), ExpertError, "not the file"),
    "a tensor named twice, resealed": Attack(rewritten(header_text(twice), sealed=True), ExpertError, "safetensors"),
    "a tensor named twice over the same data": Attack(rewritten(header_text(first_twice)), ExpertError, "not the file"),
    "a tensor named twice over the same data, resealed": Attack(
        rewritten(header_text(first_twice), sealed=True), ExpertError, "safetensors"
    ),
    # numbers that only the seal protects: any finite offsets are an expert
    "offsets of two matrices swapped": Attack(edited(swap("offsets"), sealed=False), ExpertError, "not the file"),
    "offsets doubled": Attack(edited(every_tensor(lambda one: 2 * one), sealed=False), ExpertError, "not the file"),
    # pickles
    "pickle as tensors": Attack(pickled(), ExpertError, "pickle"),
    "pickle as tensors, resealed": Attack(pickled(sealed=True), ExpertError, "pickle"),
    "pickle of protocol 0, resealed": Attack(pickled(protocol=0, sealed=True), ExpertError, "safetensors"),
    "pickle as card": Attack(pickled(file=CARD), ExpertError, "not JSON"),
    "torch.save as tensors": Attack(torch_saved(lambda folder: folder / TENSORS), ExpertError, "pickle"),
    "torch.save as tensors, resealed": Attack(
        torch_saved(lambda folder: folder / TENSORS, sealed=True), ExpertError, "pickle"
    ),
    "torch.save of old as tensors, resealed": Attack(
        torch_saved(lambda folder: folder / TENSORS, legacy=True, sealed=True), ExpertError, "pickle"
    ),
    ".pt file as expert": Attack(as_a_file, ExpertError, "folder"),
    ".pt file instead of tensors": Attack(beside("expert.pt"), ExpertError, "Pickles"),
    ".bin file instead of tensors": Attack(beside("pytorch_model.bin"), ExpertError, "Pickles"),
    # files
    "card missing": Attack(remove(CARD), ExpertError, CARD),
    "tensors missing": Attack(remove(TENSORS), ExpertError, TENSORS),
    "folder empty": Attack(remove(CARD, TENSORS), ExpertError, "holds nothing"),
    "folder missing": Attack(shutil.rmtree, ExpertError, "does not exist"),
    "tensors a folder": Attack(replaced_by_a_folder(TENSORS), ExpertError, TENSORS),
    "card a folder": Attack(replaced_by_a_folder(CARD), ExpertError, CARD),
    "tensors a link to nowhere": Attack(replaced_by_a_link(TENSORS, "gone"), ExpertError, TENSORS),
    "card a link to itself": Attack(replaced_by_a_link(CARD, CARD), ExpertError, CARD),
    "tensors a link to another file": Attack(replaced_by_a_link(TENSORS, __file__), ExpertError, "not the file"),
    "tensors of another expert": Attack(mixed_with_another(TENSORS), ExpertError, "another expert"),
    "card of another expert": Attack(mixed_with_another(CARD), ExpertError, "another expert"),
}


def _table() -> dict[str, Attack]:
    table = dict(FOLDERS)
    for name, (edit, error, word) in CARDS.items():
        table[name] = Attack(edited(edit, sealed=False), ExpertError, "SHA-256")
        table[f"{name}, resealed"] = Attack(edited(edit, sealed=True), error, word)
    for name, (edit, word) in FIELDS.items():
        table[name] = Attack(edited(edit, sealed=False), ExpertError, word)
        table[f"{name}, resealed"] = Attack(edited(edit, sealed=True), ExpertError, word)
    for name, (edit, error, word) in NUMBERS.items():
        table[name] = Attack(edited(edit, sealed=False), ExpertError, "not the file")
        table[f"{name}, resealed"] = Attack(edited(edit, sealed=True), error, word)
    for name, change in BYTES.items():
        table[name] = Attack(rewritten(change), ExpertError, "not the file")
        table[f"{name}, resealed"] = Attack(rewritten(change, sealed=True), ExpertError, "safetensors")
    return table


ATTACKS = _table()

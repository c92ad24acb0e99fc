"""Experts: vectors of offsets to singular values, as values with algebra, and as files.

    W' = U diag(s * (1 + d)) V^T                   core "diag":  d (k), one offset per kept direction
    W' = W + U_k C V_k^T,  C = (s s^T)^1/2 * D     core "dense": D (k k), which also couples directions

Offsets are relative to the singular values and fp32; zero is the base. A diagonal D is the diagonal expert with the
same numbers. All experts of a base share U and V, so that a + b, 0.5 * a and -a mean what they say on the weights, and
the inner product of two changes has a closed form: <dW_a, dW_b> = sum_i s_i^2 a_i b_i.

Method: Transformer^2 (Sun et al. 2025, arXiv:2501.06252) with z = 1 + d. We deviate: no sigmoid and no nuclear-norm
rescaling (both are in the released code, and make every change dense and bounded), fp32 throughout.

An expert on disk is a folder: `expert.safetensors` with the tensors `offsets.<matrix>` and
`singular_values.<matrix>`, and `expert.json`, which says what the numbers mean, what they fit, where they come from,
and the SHA-256 of both files. Pickles are never opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from svdexpert import __version__
from svdexpert.basis import Basis, BasisKey, MatrixKey, Support
from svdexpert.errors import ExpertError, MismatchError, did_you_mean
from svdexpert.storage import whole_folder

Core = Literal["diag", "dense"]

FORMAT_VERSION = 1
_OPERATION = {
    "diag": "W + U_k diag(s * d) V_k^T",
    "dense": "W + U_k (sqrt(s s^T) * D) V_k^T",
}
TENSORS, CARD = "expert.safetensors", "expert.json"


@dataclass(frozen=True, eq=False)
class Expert:
    """One offset per kept singular direction of every adapted matrix, and what they fit.

    Experts add, subtract, negate and scale; the result forgets scores, objective and seed, and its `skill` spells out
    the sum. They compare equal when they fit the same basis and hold the same numbers.

    Attributes:
        key: the basis that the offsets are for.
        offsets: fp32, by matrix name; (k), or (k k) for a dense core.
        singular_values: fp32, by matrix name (k), those of the basis.
        core: "diag" or "dense".
        invocation: ids of the tokens from whose last occurrence on it acts ("activated"): those with which the chat
            template opens a reply; () acts on all tokens.
        reach: tokens of the reply that it decides on, if it is activated; what follows is the base's again. 0 is all.
        skill: what it was trained for.
        objective: how it was trained.
        config: the resolved configuration of the run that made it (JSON values).
        seed: of that run.
        scores: of the validation split (JSON values).
        version: of the library that made it.

    Raises:
        ExpertError: an offset is missing, left over, of a wrong shape or dtype, NaN or infinite.
    """

    key: BasisKey
    offsets: Mapping[str, Tensor]
    singular_values: Mapping[str, Tensor]
    core: Core = "diag"
    invocation: tuple[int, ...] = ()
    reach: int = 0
    skill: str | None = None
    objective: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self) -> None:
        if self.core not in get_args(Core):
            raise ExpertError(f"core is {self.core!r}." + did_you_mean(str(self.core), get_args(Core)))
        if self.reach < 0 or (self.reach and not self.invocation):
            raise ExpertError(
                f"reach is {self.reach}: expected tokens of a reply, of an activated expert, or 0 for all of them."
            )
        for what, tensors, square in (
            ("offsets", self.offsets, self.core == "dense"),
            ("singular_values", self.singular_values, False),
        ):
            missing, extra = self.key.matrices.keys() - tensors.keys(), tensors.keys() - self.key.matrices.keys()
            if missing or extra:
                name = min(missing or extra)
                raise ExpertError(
                    f"{what}: {len(missing)} matrices missing, {len(extra)} left over (first: {name}); "
                    f"the basis has {len(self.key.matrices)}."
                )
            for name, one in self.key.matrices.items():
                shape = (one.k, one.k) if square else (one.k,)
                found = tensors[name]
                if tuple(found.shape) != shape:
                    raise ExpertError(f"{what} of {name} have shape {tuple(found.shape)}, expected {shape}.")
                if found.dtype != torch.float32:
                    raise ExpertError(f"{what} of {name} are {found.dtype}, expected torch.float32.")
                if not torch.isfinite(found).all():
                    raise ExpertError(f"{what} of {name} hold NaN or infinite values: the run that made it diverged.")

    # --- made from a basis

    @classmethod
    def from_offsets(cls, basis: Basis, offsets: Mapping[str, Tensor], *, core: Core = "diag", **card: Any) -> Expert:
        """Return an expert on `basis` with these offsets (copied, fp32, CPU); `card` sets the descriptive attributes.

        Args:
            basis: what the offsets are for.
            offsets: by matrix name; (k), or (k k) for a dense core.
            core: kind of offsets.
            card: any of invocation, reach, skill, objective, config, seed, scores.
        """
        copied = {name: one.detach().to("cpu", torch.float32, copy=True) for name, one in offsets.items()}
        return cls(basis.key, copied, basis.singular_values, core, **card)

    @classmethod
    def zeros(cls, basis: Basis, core: Core = "diag") -> Expert:
        """Return the expert that changes nothing."""
        shapes = offset_shapes(basis.key, core)
        return cls.from_offsets(basis, {name: torch.zeros(shape) for name, shape in shapes.items()}, core=core)

    @classmethod
    def random(cls, basis: Basis, *, std: float = 0.1, seed: int = 0, core: Core = "diag") -> Expert:
        """Return an expert with normally distributed offsets: the control that a trained one has to beat."""
        draw = torch.Generator().manual_seed(seed)
        shapes = offset_shapes(basis.key, core)
        offsets = {name: std * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        return cls.from_offsets(basis, offsets, core=core, skill=f"random {seed}", seed=seed)

    @classmethod
    def from_flat(cls, basis: Basis, flat: Tensor, *, core: Core = "diag", **card: Any) -> Expert:
        """Return the expert whose offsets stand side by side in `flat` (n), the inverse of `flat`."""
        shapes = offset_shapes(basis.key, core)
        parts = flat.detach().split([math.prod(shape) for shape in shapes.values()])
        offsets = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return cls.from_offsets(basis, offsets, core=core, **card)

    def flat(self, basis: Basis) -> Tensor:
        """Return all offsets side by side (n), in the order of the basis."""
        return torch.cat([self.offsets[name].flatten() for name in basis.names])

    # --- algebra

    def _like(self, offsets: dict[str, Tensor], skill: str | None) -> Expert:
        return replace(
            self, offsets=offsets, skill=skill, objective=None, config={}, seed=None, scores={}, version=__version__
        )

    def __add__(self, other: Expert) -> Expert:
        if not isinstance(other, Expert):
            return NotImplemented
        self.check_fits(other.key, like=other, who=f"cannot add {self}", to=f"{other}")
        skill = " + ".join(filter(None, (self.skill, other.skill))) or None
        return self._like({name: self.offsets[name] + other.offsets[name] for name in self.offsets}, skill)

    def __mul__(self, scale: float) -> Expert:
        if not isinstance(scale, int | float):
            return NotImplemented
        if not math.isfinite(scale):
            raise ExpertError(f"An expert cannot be scaled by {scale}.")
        skill = self.skill and f"{scale:g} * ({self.skill})"
        return self._like({name: scale * one for name, one in self.offsets.items()}, skill)

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> Expert:
        if not isinstance(scale, int | float):
            return NotImplemented
        if scale == 0:
            raise ExpertError("An expert cannot be divided by 0.")
        return self * (1 / scale)

    def __neg__(self) -> Expert:
        return -1.0 * self

    def __sub__(self, other: Expert) -> Expert:
        if not isinstance(other, Expert):
            return NotImplemented
        return self + -other

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Expert):
            return NotImplemented
        return (
            self.core == other.core
            and (self.invocation, self.reach) == (other.invocation, other.reach)
            and self.key.matrices == other.key.matrices
            and not self.key.differences(other.key)
            and all(torch.equal(self.offsets[name], other.offsets[name]) for name in self.offsets)
        )

    __hash__ = None  # type: ignore[assignment]

    def change(self, name: str) -> Tensor:
        """Return the change of one matrix in the basis: C of dW = U_k C V_k^T, as (k) for diag, (k k) for dense."""
        return self.offsets[name] * _scale(self.singular_values[name], self.core)

    @property
    def where(self) -> str:
        """On which tokens it acts, in words."""
        if not self.invocation:
            return "on all tokens"
        return f"from the tokens {list(self.invocation)} on" + (f", {self.reach} tokens far" if self.reach else "")

    def norm(self) -> float:
        """Return the Frobenius norm of the change of all weights together: (sum_i (s_i d_i)^2)^1/2."""
        return math.sqrt(self.dot(self))

    def dot(self, other: Expert) -> float:
        """Return the Frobenius inner product of two changes of the weights: sum_i s_i^2 d_i d'_i."""
        self.check_fits(other.key, core=other.core, who=f"cannot compare {self}", to=f"{other}")
        return sum(float((self.change(name).double() * other.change(name).double()).sum()) for name in self.offsets)

    def __repr__(self) -> str:
        numbers = sum(one.numel() for one in self.offsets.values())
        reach = f" for {self.reach} tokens" if self.reach else ""
        activated = f", activated{reach}" if self.invocation else ""
        return f"Expert({self.skill or 'unnamed'}, {numbers} offsets, {self.core}{activated}, for {self.key})"

    # --- does it fit?

    def check_fits(
        self,
        key: BasisKey,
        *,
        core: Core | None = None,
        like: Expert | None = None,
        who: str = "",
        to: str = "this model",
    ) -> None:
        """Raise unless this expert may act on the basis `key`, with this core, and beside another expert.

        Raises:
            MismatchError: another base, revision, support, k, first layer, set of matrices, core, invocation or
                reach; it lists them all.
        """
        found = key.differences(self.key)
        core = like.core if like is not None else core
        if core is not None and core != self.core:
            found.append(f"core {self.core}, here {core}")
        if like is not None and like.where != self.where:
            found.append(f"acts {self.where}, here {like.where}")
        if found:
            raise MismatchError(
                f"{who or self}: made for {self.key}, {to} is {key}.\n"
                + "".join(f"  - {line}\n" for line in found)
                + "Expert vectors only fit the basis they were trained on: train one here, or load its own base "
                "with the same k, support and first_layer."
            )

    def check_on(self, basis: Basis, *, core: Core | None = None, like: Expert | None = None, who: str = "") -> None:
        """Raise unless this expert may act on `basis`: its key fits, and its singular values are those of the basis.

        The values also tell apart two supports chosen on different calibration data.

        Raises:
            MismatchError: it does not fit.
        """
        self.check_fits(basis.key, core=core, like=like, who=who)
        for name, ours in basis.singular_values.items():
            theirs = self.singular_values[name]
            if not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-6 * float(ours.max())):
                worst = int((theirs - ours).abs().argmax())
                raise MismatchError(
                    f"{who or self}: the singular values of {name} are not those of this basis (direction {worst}: "
                    f"{theirs[worst]:.6g}, here {ours[worst]:.6g}).\nThe same weights were decomposed along other "
                    "directions: use the same calibration data, or train an expert here."
                )

    # --- files

    def save(self, folder: str | Path) -> Path:
        """Write the expert as a folder, whole or not at all; other files in an expert's folder are kept.

        Args:
            folder: a new path, or the folder of an expert to replace.

        Returns:
            The folder.

        Raises:
            ExpertError: the path holds something that is not an expert, or the disk refused.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / CARD).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ExpertError(f"{folder} exists and is not an expert: choose another folder. Nothing was written.")
        tensors = {f"offsets.{name}": one.contiguous() for name, one in self.offsets.items()}
        tensors |= {f"singular_values.{name}": one.contiguous() for name, one in self.singular_values.items()}
        weights = save_tensors(tensors)
        try:
            card = _seal(self._card(), weights)
            _checked(_parse(card.encode()), "this expert")  # what could not be read again is not written
        except (TypeError, ValueError) as error:
            raise ExpertError(f"config and scores hold JSON values only ({error}). Nothing was written.") from error
        try:
            with whole_folder(folder) as temporary:
                for other in folder.iterdir() if folder.exists() else ():
                    if other.name not in (TENSORS, CARD):
                        (shutil.copytree if other.is_dir() else shutil.copy2)(other, temporary / other.name)
                (temporary / TENSORS).write_bytes(weights)
                (temporary / CARD).write_text(card, encoding="utf-8")
        except OSError as error:
            raise ExpertError(f"{folder} cannot be written ({error}); what was there before is intact.") from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Expert:
        """Read an expert from its folder; everything is checked before anything is returned.

        Raises:
            ExpertError: not an expert, an unknown format version, a truncated, altered or unsound file, a pickle.
        """
        folder = Path(folder)
        if not folder.exists():
            siblings = [path.parent.name for path in folder.parent.glob(f"*/{CARD}")]
            hint = did_you_mean(folder.name, siblings) if siblings else " An expert is a folder; give its path."
            raise ExpertError(f"{folder} does not exist." + hint)
        if not folder.is_dir():
            raise ExpertError(
                f"{folder} is a file; an expert is a folder with {CARD} and {TENSORS}. "
                "Pickled tensors (.pt, .bin, .ckpt) are never opened, because opening one runs its code."
            )
        card = _read_card(folder)
        weights = _read_bytes(folder / TENSORS)
        if weights[8:9] != b"{" and weights.startswith((b"PK", b"\x80")):  # a header may be 0x80 or "PK" bytes long
            raise ExpertError(f"{folder / TENSORS} is a pickle under another name: it is never opened.")
        if hashlib.sha256(weights).hexdigest() != card["sha256"][TENSORS]:
            raise ExpertError(
                f"{folder / TENSORS} is not the file that {CARD} was written with: it is truncated, corrupted or "
                "from another expert. Copy the whole folder again."
            )
        try:
            tensors = load_tensors(weights)
            header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
            json.loads(header, object_pairs_hook=_refuse_repeats)  # the format forbids them, its reader does not look
        except (SafetensorError, ValueError, KeyError) as error:
            raise ExpertError(f"{folder / TENSORS} is not a safetensors file ({error}). Copy it again.") from error
        kinds: dict[str, dict[str, Tensor]] = {"offsets": {}, "singular_values": {}}
        for name, one in tensors.items():
            kind, _, matrix = name.partition(".")
            if kind not in kinds:
                raise ExpertError(f"{folder / TENSORS} holds {name!r}; only offsets and singular values belong there.")
            kinds[kind][matrix] = one
        try:
            key = BasisKey(
                base=card["base"],
                revision=card["revision"],
                k=card["k"],
                support=card["support"],
                first_layer=card["first_layer"],
                matrices={
                    name: MatrixKey(tuple(one["shape"]), one["k"], one["fingerprint"])
                    for name, one in card["matrices"].items()
                },
            )
            kinds = {kind: {n: one[n] for n in (*key.matrices, *one) if n in one} for kind, one in kinds.items()}
            described = {name: card[name] for name in ("core", "skill", "objective", "config", "seed", "scores")}
            described |= {"invocation": tuple(card["invocation"]), "reach": card["reach"]}
            return cls(key, kinds["offsets"], kinds["singular_values"], **described, version=card["library_version"])
        except ExpertError as error:
            raise ExpertError(f"{folder}: {error}") from None

    def _card(self) -> dict[str, Any]:
        return {
            "format": "svdexpert",
            "format_version": FORMAT_VERSION,
            "library_version": self.version,
            "operation": _OPERATION[self.core],
            "base": self.key.base,
            "revision": self.key.revision,
            "k": self.key.k,
            "support": self.key.support,
            "first_layer": self.key.first_layer,
            "core": self.core,
            "invocation": list(self.invocation),
            "reach": self.reach,
            "matrices": {
                name: {"shape": list(one.shape), "k": one.k, "fingerprint": one.fingerprint}
                for name, one in self.key.matrices.items()
            },
            "skill": self.skill,
            "objective": self.objective,
            "config": dict(self.config),
            "seed": self.seed,
            "scores": dict(self.scores),
        }


def offset_shapes(key: BasisKey, core: Core) -> dict[str, tuple[int, ...]]:
    """Return the shape of every matrix's offsets, in the order of the basis."""
    return {name: (one.k, one.k) if core == "dense" else (one.k,) for name, one in key.matrices.items()}


def _scale(s: Tensor, core: Core) -> Tensor:
    """What turns relative offsets into changes: s (k), or its geometric mean over both directions (k k)."""
    return s if core == "diag" else torch.outer(s.sqrt(), s.sqrt())


def flat_scale(singular_values: Mapping[str, Tensor], core: Core) -> Tensor:
    """Return what flat offsets are multiplied by to become changes in the basis (n)."""
    return torch.cat([_scale(s, core).flatten() for s in singular_values.values()])


# --- conflict -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """How two experts meet in one matrix, or in all of them.

    Attributes:
        dot: inner product of their changes of the weights.
        cosine: the same, by both norms; 0 where one of them is zero.
        opposed: share of sum_i |s_i^2 a_i b_i| where the two have opposite signs, from 0 (agree) to 1 (cancel).
    """

    dot: float
    cosine: float
    opposed: float


@dataclass(frozen=True)
class Conflict:
    """The overlap of two experts in total and by matrix name."""

    total: Overlap
    matrices: Mapping[str, Overlap]


def conflict(a: Expert, b: Expert) -> Conflict:
    """Return where two experts pull the same directions apart: closed form, because they share U and V.

    Small conflict in the weights does not promise that behaviours do not interfere; measure those.

    Raises:
        MismatchError: they are for different bases or have different cores.
    """
    a.check_fits(b.key, core=b.core, who=f"cannot compare {a}", to=f"{b}")
    changes = {name: (a.change(name).double().flatten(), b.change(name).double().flatten()) for name in a.offsets}
    both = tuple(torch.cat(side) for side in zip(*changes.values(), strict=True))
    return Conflict(_overlap(*both), {name: _overlap(*pair) for name, pair in changes.items()})


def _overlap(a: Tensor, b: Tensor) -> Overlap:
    products = a * b
    dot, energy, norms = float(products.sum()), float(products.abs().sum()), float(a.norm() * b.norm())
    opposed = float(products.clamp(max=0).abs().sum())
    return Overlap(dot, dot / norms if norms else 0.0, opposed / energy if energy else 0.0)


# --- the card -----------------------------------------------------------------------------------------------------


def _seal(card: dict[str, Any], weights: bytes) -> str:
    """Return the text of expert.json: the card with the SHA-256 of the tensors and of the card itself."""
    body = card | {"sha256": {TENSORS: hashlib.sha256(weights).hexdigest()}}
    body["sha256"][CARD] = hashlib.sha256(_dump(body).encode()).hexdigest()
    return _dump(body)


def _dump(card: dict[str, Any]) -> str:
    return json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_matrix(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"shape", "k", "fingerprint"}
        and isinstance(value["shape"], list)
        and len(value["shape"]) == 2
        and all(_is_count(side) and side > 0 for side in value["shape"])
        and _is_count(value["k"])
        and 1 <= value["k"] <= min(value["shape"])
        and isinstance(value["fingerprint"], str)
        and re.fullmatch("[0-9a-f]{64}", value["fingerprint"]) is not None
    )


_CARD_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda x: x == "svdexpert", '"svdexpert"'),
    "format_version": (lambda x: _is_count(x) and x == FORMAT_VERSION, str(FORMAT_VERSION)),
    "library_version": (lambda x: isinstance(x, str), "text"),
    "operation": (lambda x: x in _OPERATION.values(), "one of " + "; ".join(_OPERATION.values())),
    "base": (lambda x: isinstance(x, str), "text"),
    "revision": (lambda x: x is None or isinstance(x, str), "text or null"),
    "k": (lambda x: x == "full" or (_is_count(x) and x > 0), 'a whole number from 1, or "full"'),
    "support": (lambda x: x in get_args(Support), " or ".join(get_args(Support))),
    "first_layer": (_is_count, "a whole number from 0"),
    "core": (lambda x: x in get_args(Core), " or ".join(get_args(Core))),
    "invocation": (lambda x: isinstance(x, list) and all(map(_is_count, x)), "a list of token ids"),
    "reach": (_is_count, "a whole number from 0"),
    "matrices": (
        lambda x: isinstance(x, dict) and bool(x) and all(map(_is_matrix, x.values())),
        "shape, k and fingerprint by matrix name",
    ),
    "skill": (lambda x: x is None or isinstance(x, str), "text or null"),
    "objective": (lambda x: x is None or isinstance(x, str), "text or null"),
    "config": (lambda x: isinstance(x, dict), "an object"),
    "seed": (lambda x: x is None or _is_count(x), "a whole number or null"),
    "scores": (lambda x: isinstance(x, dict), "an object"),
    "sha256": (
        lambda x: isinstance(x, dict) and x.keys() == {TENSORS, CARD} and all(isinstance(y, str) for y in x.values()),
        "the digests of both files",
    ),
}


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    try:
        card = _parse(_read_bytes(path))
    except (UnicodeError, ValueError, RecursionError) as error:
        raise ExpertError(f"{path} is not JSON ({error}). Copy the whole folder again.") from None
    card = _checked(card, str(path))
    body = card | {"sha256": {TENSORS: card["sha256"][TENSORS]}}
    if hashlib.sha256(_dump(body).encode()).hexdigest() != card["sha256"][CARD]:
        raise ExpertError(
            f"{path} was changed after it was written: its SHA-256 does not match. Restore it, or load the expert it "
            "came from, change that in Python (dataclasses.replace) and save it again."
        )
    return card


def _parse(text: bytes) -> Any:
    """Return JSON values; stricter than Python's reader: no NaN, no overflow, no name twice, nothing without UTF-8."""
    card = json.loads(
        text.decode("utf-8"),
        parse_constant=_refuse_constant,
        parse_float=_finite,
        object_pairs_hook=_refuse_repeats,
    )
    _dump(card).encode()  # half a surrogate pair has no UTF-8
    return card


def _checked(card: Any, who: str) -> dict[str, Any]:
    """Return a card whose fields are all there, known, and of the right kind."""
    if not isinstance(card, dict):
        raise ExpertError(f"{who} holds a {type(card).__name__}, expected an object.")
    version = card.get("format_version")
    if card.get("format") == "svdexpert" and version != FORMAT_VERSION:
        raise ExpertError(
            f"{who} has format version {version!r}; svdexpert {__version__} reads {FORMAT_VERSION}. Update svdexpert."
        )
    for name, (sound, expected) in _CARD_FIELDS.items():
        if name not in card:
            raise ExpertError(f"{who} lacks {name!r} ({expected}): it is not an expert of this format.")
        if not sound(card[name]):
            raise ExpertError(f"{who}: {name} is {_short(card[name])}, expected {expected}.")
    unknown = card.keys() - _CARD_FIELDS.keys()
    if unknown:
        name = min(unknown)
        raise ExpertError(f"{who} holds an unknown field {name!r}." + did_you_mean(name, _CARD_FIELDS))
    if card["operation"] != _OPERATION[card["core"]]:
        raise ExpertError(f"{who}: operation {card['operation']!r} is not that of a {card['core']} core.")
    wrong_k = [name for name, one in card["matrices"].items() if card["k"] != "full" and one["k"] != card["k"]]
    if wrong_k:
        found = card["matrices"][wrong_k[0]]["k"]
        raise ExpertError(f"{who}: {wrong_k[0]} keeps {found} directions, k is {card['k']}.")
    return card


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait, a device might never end
            raise OSError(errno.EINVAL, "not a regular file")
        return path.read_bytes()
    except OSError as error:
        others = []
        with suppress(OSError):
            others = sorted(one.name for one in path.parent.iterdir())[:6]
        raise ExpertError(
            f"{path} cannot be read ({error.strerror}). An expert is a folder with {CARD} and {TENSORS}; this one "
            f"holds {others or 'nothing'}. Pickles (.pt, .bin, .ckpt) are never opened."
        ) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse_constant(digits)


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers disagree on which of two entries of one name counts."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated = next(name for name in fields if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{repeated!r} is named twice")
    return fields


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

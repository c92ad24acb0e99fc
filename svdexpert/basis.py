"""The basis: U, s, V of the base's weight matrices, decomposed once and cached.

    W = U diag(s) V^T          W (o i), U (o r), s (r), V (i r), r = min(o, i)
    U_k, s_k, V_k              the k directions that experts may act on (the support)

Every expert of a base shares this basis; that is what makes a mixture a vector. It therefore says exactly what it is
made of: the base and its revision, a fingerprint of every matrix, k, how the support was chosen, and the first decoder
layer that experts may touch.

Method: singular value decomposition as in Transformer^2 (Sun et al. 2025, arXiv:2501.06252). We deviate in that only k
directions are kept (default 64, the rest of W stays untouched), that they come from a float64 eigendecomposition of
the Gram matrix of the smaller side (several times faster than an SVD, and as exact wherever s_k is not tiny), and that
the base's own precision is respected: fingerprints are of the values, so the same weights in another dtype match.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import scipy.linalg
import torch
import transformers
from einops import einsum
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdexpert.errors import BasisError, did_you_mean
from svdexpert.storage import whole_file

Support = Literal["top", "sensitivity"]
Rank = int | Literal["full"]

# Raised whenever `factorise` would give other numbers for the same weights: older cache entries are then not found.
_METHOD = 1

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The Gram matrix squares singular values. In float64, directions down to this fraction of the largest one keep a
# relative error below 1e-7 (eps * n / ratio^2 for n = 1e3); below it the matrix itself is decomposed.
_GRAM_RATIO = 2e-3


@dataclass(frozen=True)
class MatrixKey:
    """What one adapted matrix is: its shape (o, i), how many directions are kept, and the SHA-256 of its values."""

    shape: tuple[int, int]
    k: int
    fingerprint: str


@dataclass(frozen=True)
class BasisKey:
    """What a basis is made of, and so what an expert must agree with before it may act.

    Attributes:
        base: name or path that the base was loaded under; for people, the fingerprints decide.
        revision: commit of the base, where it is known.
        k: directions kept in every matrix, or "full".
        support: how they were chosen.
        first_layer: index of the first decoder layer that experts act on.
        matrices: by full module name.
    """

    base: str
    revision: str | None
    k: Rank
    support: Support
    first_layer: int
    matrices: Mapping[str, MatrixKey]

    def differences(self, other: BasisKey) -> list[str]:
        """Return in words where `other` (found) differs from this key (expected); empty if an expert carries over.

        The name of the base is not compared: a base keeps its weights when its folder moves. A revision is compared
        where both are known under the same name, because it also covers what is not adapted.
        """
        found = []
        if self.base == other.base and self.revision and other.revision and self.revision != other.revision:
            found.append(f"revision {other.revision}, here {self.revision}")
        found += [
            f"{what} {getattr(other, what)}, here {getattr(self, what)}"
            for what in ("k", "support", "first_layer")
            if getattr(self, what) != getattr(other, what)
        ]
        missing = sorted(self.matrices.keys() - other.matrices.keys())
        extra = sorted(other.matrices.keys() - self.matrices.keys())
        if missing:
            found.append(f"no offsets for {_some(missing)}")
        if extra:
            found.append(f"offsets for {_some(extra)}, not adapted here")
        shared = [name for name in self.matrices if name in other.matrices]
        shapes = [name for name in shared if self.matrices[name].shape != other.matrices[name].shape]
        if shapes:
            a, b = other.matrices[shapes[0]].shape, self.matrices[shapes[0]].shape
            found.append(f"another shape in {_some(shapes)}: {a}, here {b}")
        weights = [
            name
            for name in shared
            if name not in shapes and self.matrices[name].fingerprint != other.matrices[name].fingerprint
        ]
        if weights:
            theirs, ours = other.matrices[weights[0]].fingerprint, self.matrices[weights[0]].fingerprint
            found.append(
                f"other weights in {len(weights)} of {len(shared)} matrices "
                f"(first {weights[0]}: fingerprint {theirs[:12]}..., here {ours[:12]}...)"
            )
        kept = [name for name in shared if self.matrices[name].k != other.matrices[name].k]
        if kept and self.k == other.k:
            found.append(f"another number of directions in {_some(kept)}")
        return found

    def __str__(self) -> str:
        return self.base + (f"@{self.revision[:12]}" if self.revision else "")


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@dataclass(frozen=True, eq=False)
class Factors:
    """The kept directions of one matrix, fp32, in descending order of s.

    Stored in the orientation in which a batch of rows meets them (x V, then h U^T): on CPUs that is 10 to 15 % faster
    than the transposed layouts at decode time.

    Attributes:
        v: right singular vectors (i k).
        s: singular values (k).
        u_t: left singular vectors, transposed (k o).
    """

    v: Tensor
    s: Tensor
    u_t: Tensor

    @property
    def k(self) -> int:
        return self.s.shape[0]


@dataclass(frozen=True, eq=False)
class Basis:
    """U_k, s_k, V_k of every adapted matrix of one base, and what was left alone.

    Attributes:
        key: what the basis is made of.
        factors: by full module name, in the order of the model's modules.
        skipped: modules and parameters of the decoder that were not adapted, with the reason.
    """

    key: BasisKey
    factors: Mapping[str, Factors]
    skipped: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.factors)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many directions each matrix keeps, in the order of `names`."""
        return tuple(one.k for one in self.factors.values())

    @property
    def singular_values(self) -> dict[str, Tensor]:
        """By matrix name (k)."""
        return {name: one.s for name, one in self.factors.items()}

    def __repr__(self) -> str:
        return (
            f"Basis({self.key}, k={self.key.k}, support={self.key.support!r}, first_layer={self.key.first_layer}, "
            f"{len(self.factors)} matrices, {len(self.skipped)} skipped)"
        )


@torch.inference_mode(False)  # factors outlive the call and take part in training
def decompose(
    model: PreTrainedModel,
    targets: Sequence[str] | None = None,
    k: Rank = 64,
    support: Support = "top",
    first_layer: int | None = None,
    *,
    calibration: Iterable[Tensor] | None = None,
    checkpoint: Path | None = None,
    cache: bool = True,
    progress: bool = True,
) -> Basis:
    """Return the basis of a causal language model, from the cache where it was decomposed before.

    Which matrices: every nn.Linear and Conv1D inside the decoder layers from `first_layer` on, as the loaded model
    has them (a fused qkv_proj is one matrix). Never embeddings, output heads, norms or routers, and never a weight that
    two modules share. Fused expert tensors of mixture-of-experts models are left alone and reported in `skipped`.

    Args:
        model: any Hugging Face causal LM with floating-point weights, on any device or `device_map`.
        targets: shell-style patterns of module names that narrow the choice (`"*.mlp.*"`); all if None.
        k: directions to keep in every matrix, from 1 to the smallest rank, or "full" for all of each.
        support: "top", the largest singular values, or "sensitivity", those with the largest mean over the
            calibration batches of (s dL/ds)^2, L the next-token loss.
        first_layer: first decoder layer that experts may touch; a third of the depth if None.
        calibration: token ids (b t), one tensor a batch; needed by "sensitivity" only.
        checkpoint: the folder that the model was just loaded from, unchanged since: fingerprints recorded for files of
            the same path, size and modification time are then trusted instead of hashing the weights again.
        cache: keep factors on disk, under `SVDEXPERT_CACHE` or `~/.cache/svdexpert`.
        progress: show a progress bar on stderr.

    Raises:
        BasisError: nothing to adapt, a quantised base, k out of range, a pattern without a match, weights that are not
            finite, "sensitivity" without calibration batches.
    """
    modules, skipped, depth = adaptable(model)
    first = depth // 3 if first_layer is None else first_layer
    if not 0 <= first < depth:
        raise BasisError(f"first_layer is {first}; the model has layers 0 to {depth - 1}.")
    chosen = {name: module for name, (module, layer) in modules.items() if layer >= first}
    chosen = _narrow(chosen, targets)
    _check_k(k, {name: matrix_shape(module) for name, module in chosen.items()})
    if support not in ("top", "sensitivity"):
        raise BasisError(f"support is {support!r}." + did_you_mean(str(support), ("top", "sensitivity")))
    batches = list(calibration) if calibration is not None else []
    if support == "sensitivity" and not batches:
        raise BasisError('support="sensitivity" needs calibration batches of token ids: pass calibration=[ids, ...].')

    folder = cache_folder() if cache else None
    trusted = _Trusted(checkpoint, model, folder)
    fingerprints = {}
    for name, module in chosen.items():
        fingerprints[name] = trusted.get(name) or _with_weight(module, fingerprint)
    trusted.remember(fingerprints)

    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svdexpert-")))
        if support == "top":
            keys = {name: (fingerprints[name], matrix_shape(module), k, "top") for name, module in chosen.items()}
            held = {name: _cached(folder, *key) for name, key in keys.items()}
            made = {
                name: _store(folder, keys[name], _with_weight(module, lambda w, name=name: factorise(w, k, name=name)))
                for name, module in _watch({n: chosen[n] for n in chosen if held[n] is None}, "decomposing", progress)
            }
            factors = {name: held[name] or made[name] for name in chosen}
        else:
            factors = _sensitive(model, chosen, fingerprints, k, batches, folder, progress)
        if not cache:  # the files are about to go, so keep the numbers
            factors = {name: Factors(one.v.clone(), one.s.clone(), one.u_t.clone()) for name, one in factors.items()}

    key = BasisKey(
        base=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        revision=getattr(model.config, "_commit_hash", None),
        k=k,
        support=support,
        first_layer=first,
        matrices={
            name: MatrixKey(matrix_shape(module), factors[name].k, fingerprints[name])
            for name, module in chosen.items()
        },
    )
    below = {name: f"below first_layer {first}" for name, (_, layer) in modules.items() if layer < first}
    narrowed = {
        name: "not among targets" for name, (_, layer) in modules.items() if layer >= first and name not in chosen
    }
    return Basis(key, factors, {**skipped, **below, **narrowed})


# --- which matrices -----------------------------------------------------------------------------------------------


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name of the list of decoder layers, and the list.

    Raises:
        BasisError: there is none.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(other + ".") for other, _ in lists)
    ]
    if not outermost:
        raise BasisError(f"{type(model).__name__} has no list of decoder layers, so no adaptable matrix.")
    return max(outermost, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def adaptable(model: PreTrainedModel) -> tuple[dict[str, tuple[nn.Module, int]], dict[str, str], int]:
    """Return the decoder's adaptable modules with their layer, what was skipped and why, and the number of layers.

    Weights are not read, so a model on the meta device will do.

    Raises:
        BasisError: not a PreTrainedModel, quantised, or without an adaptable matrix.
    """
    if not isinstance(model, PreTrainedModel):
        raise BasisError(
            f"decompose takes a Hugging Face PreTrainedModel, not {type(model).__name__}. Unwrap or merge it first "
            "(a PEFT model: merge_and_unload())."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise BasisError(_QUANTISED.format(what=f"{model.config._name_or_path or type(model).__name__}"))
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BasisError("The model carries PEFT adapters: load it without them, or merge them in first.")
    prefix, stack = decoder_layers(model)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    inside = {name: module for name, module in model.named_modules() if name.startswith(prefix + ".")}
    # Lists of modules inside a layer: pairs are two halves of it, more are experts, which see some tokens only, so that
    # a mixture by row would not know its rows.
    parallel = tuple(n + "." for n, module in inside.items() if isinstance(module, nn.ModuleList) and len(module) > 2)
    fused = {
        f"{name}.{part}": tuple(parameter.shape)
        for name, module in inside.items()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for part, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    # A block of experts is what has fused tensors, or a list of parallel modules, as its own or in a module of its own.
    holders = {name.rpartition(".")[0] for name in fused} | {name.rstrip(".") for name in parallel}
    blocks = tuple({f"{one}." for name in holders for one in (name, name.rpartition(".")[0])})

    found: dict[str, tuple[nn.Module, int]] = {}
    skipped = {name: f"fused expert tensor {shape}: left alone for now" for name, shape in fused.items()}
    for name, module in inside.items():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if module.weight.dtype not in _FLOATS:
            raise BasisError(_QUANTISED.format(what=f"{name} holds {module.weight.dtype}"))
        if owners[id(module.weight)] > 1:
            skipped[name] = "weight shared with another module"
        elif name.startswith(parallel):
            skipped[name] = "one of several parallel modules (an expert)"
        elif name.startswith(blocks) and _routes(name, inside, blocks):
            skipped[name] = "router"
        elif min(matrix_shape(module)) < 2:
            skipped[name] = "a single direction (a gate)"
        else:
            found[name] = (module, int(name.removeprefix(prefix + ".").split(".")[0]))
    if not found:
        raise BasisError(
            f"{type(model).__name__} has no adaptable matrix: no nn.Linear or Conv1D of its own inside {prefix!r}."
        )
    return found, skipped, len(stack)


def _routes(name: str, inside: Mapping[str, nn.Module], blocks: tuple[str, ...]) -> bool:
    """Whether a linear module in a block of experts chooses among them: a part of the block itself, or of a router."""
    block = max((one for one in blocks if name.startswith(one)), key=len)
    between = name.removeprefix(block).split(".")[:-1]
    above = [inside[block + ".".join(between[: depth + 1])] for depth in range(len(between))]
    return not above or any(re.search(r"Router|TopK|Gate(?!d)", type(module).__name__) for module in above)


_QUANTISED = (
    "{what}: a quantised base has no singular values worth keeping (4-bit rounding moves a free offset by more than "
    "its size). Decompose its original: load the model it was quantised from in float32, bfloat16 or float16."
)


def _narrow(modules: dict[str, nn.Module], targets: Sequence[str] | None) -> dict[str, nn.Module]:
    if targets is None:
        return modules
    patterns = [targets] if isinstance(targets, str) else list(targets)
    for pattern in patterns:
        if not fnmatch.filter(modules, pattern):
            raise BasisError(f"targets: {pattern!r} matches no adaptable matrix." + did_you_mean(pattern, modules))
    return {name: m for name, m in modules.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def _check_k(k: Rank, shapes: Mapping[str, tuple[int, int]]) -> None:
    if not shapes:
        raise BasisError("No adaptable matrix is left above first_layer: lower it.")
    if k == "full":
        return
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise BasisError(f'k is {k!r}; it is a whole number from 1, or "full".')
    narrow = [name for name, shape in shapes.items() if min(shape) < k]
    if narrow:
        smallest = min(min(shape) for shape in shapes.values())
        raise BasisError(
            f"k is {k}, larger than the rank of {_some(narrow)} (shape {shapes[narrow[0]]}). "
            f'Use k <= {smallest}, k="full", or leave those matrices out with targets.'
        )


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(o, i), also where the module stores its weight transposed."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


@contextmanager
def weight_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield the weight of an adaptable module as W (o i), detached; brought in where accelerate has offloaded it."""
    if cast(Tensor, module.weight).is_meta:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield _oriented(module)
    else:
        yield _oriented(module)


def _oriented(module: nn.Module) -> Tensor:
    weight = cast(Tensor, module.weight).detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _with_weight(module: nn.Module, function: Any) -> Any:
    with weight_of(module) as weight:
        if weight.is_meta:
            raise BasisError("The model has no weights (it is on the meta device): load them before decomposing.")
        return function(weight)


def fingerprint(weight: Tensor) -> str:
    """Return the SHA-256 (hex) of a matrix W (o i): its shape, then its values as little-endian float32, row by row.

    A bf16 matrix loaded as fp32 has the same fingerprint; an fp32 matrix rounded to bf16 has another.
    """
    rows, columns = weight.shape
    digest = hashlib.sha256(f"{rows}x{columns}:".encode())
    for block in _blocks(weight):
        digest.update(np.ascontiguousarray(block.float().cpu().numpy(), dtype="<f4").data)
    return digest.hexdigest()


# --- decomposition ------------------------------------------------------------------------------------------------


def factorise(weight: Tensor, k: Rank, *, name: str = "matrix") -> Factors:
    """Return the k largest singular directions of one matrix, computed in float64, kept in float32 on the CPU.

    Signs are canonical: in every left singular vector the entry of largest magnitude is positive.

    Args:
        weight: W (o i), any floating dtype and device. CUDA matrices are decomposed where they are.
        k: directions to keep, or "full".
        name: of the matrix, for messages.

    Raises:
        BasisError: the matrix holds NaN or infinite values.
    """
    if not all(torch.isfinite(block).all() for block in _blocks(weight)):
        raise BasisError(f"{name} holds NaN or infinite values: the checkpoint is damaged, load a sound one.")
    if weight.device.type not in ("cpu", "cuda"):
        weight = weight.cpu()  # MPS has no float64
    rank = min(weight.shape)
    keep = rank if k == "full" else k
    u, s, v = _from_gram(weight, keep) or _from_svd(weight, keep)
    peaks = u.gather(0, u.abs().argmax(0, keepdim=True))  # (1 k)
    signs = torch.where(peaks < 0, -1.0, 1.0)
    u_t = (u * signs).T.float().contiguous().cpu()
    return Factors(v=(v * signs).float().contiguous().cpu(), s=s.float().cpu(), u_t=u_t)


def _from_gram(weight: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Decompose by the Gram matrix of the smaller side; None where that would cost the small directions digits."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T  # (long short)
    short = tall.shape[1]
    gram = torch.zeros(short, short, dtype=torch.float64, device=weight.device)
    blocks = _blocks(tall)
    # One float64 buffer for all blocks: a new one each would fragment the heap until it holds all of W in float64.
    buffer = torch.empty_like(blocks[0], dtype=torch.float64, memory_format=torch.contiguous_format)
    for block in blocks:
        double = buffer[: block.shape[0]].copy_(block)
        gram.addmm_(double.T, double)
    if gram.is_cuda:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[-keep:], vectors[:, -keep:]
    else:  # only the k wanted eigenvectors are formed
        # scipy's BLAS has its own threads, which spin on a busy machine: one 512 x 512 matrix took up to 7 s beside two
        # other processes, 0.07 s with one thread. Alone, one thread costs a tenth.
        with _blas().limit(limits=1):
            low, high = scipy.linalg.eigh(
                gram.numpy().T,  # symmetric; the transposed view is what LAPACK can overwrite without a copy
                overwrite_a=True,
                check_finite=False,
                driver="evr",
                subset_by_index=(short - keep, short - 1),
            )
        values, vectors = torch.from_numpy(low), torch.from_numpy(high)
    values, vectors = values.flip(0), vectors.flip(1)
    if values[-1] <= values[0] * _GRAM_RATIO**2:
        return None
    other = torch.empty(tall.shape[0], keep, dtype=torch.float64, device=weight.device)
    for block, rows in zip(blocks, other.split(blocks[0].shape[0]), strict=True):
        torch.mm(buffer[: block.shape[0]].copy_(block), vectors, out=rows)
    s = other.norm(dim=0)
    other /= s
    order = s.argsort(descending=True, stable=True)
    s, other, vectors = s[order], other[:, order], vectors[:, order]
    return (other, s, vectors) if tall is weight else (vectors, s, other)


@cache
def _blas() -> ThreadpoolController:
    """Return the control of the BLAS libraries in this process; looking for them takes some milliseconds."""
    return ThreadpoolController().select(user_api="blas")


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Split a matrix by rows into parts of about 2^19 values, for what should not be done to all of W at once."""
    return cast(tuple[Tensor, ...], matrix.split(max(1, 2**19 // matrix.shape[1])))


def _from_svd(weight: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :keep], s[:keep], vh[:keep].T


# --- sensitivity --------------------------------------------------------------------------------------------------


def _sensitive(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    fingerprints: dict[str, str],
    k: Rank,
    batches: list[Tensor],
    folder: Path,
    progress: bool,
) -> dict[str, Factors]:
    """Keep the k directions with the largest (s dL/ds)^2, summed over the batches, of every matrix.

    The gradient of the singular values is diag(U^T G V), with G the gradient of the weight. One backward pass a batch
    visits all matrices: as soon as a weight's gradient is there it is projected on that matrix's full factors (read
    from disk) and dropped, so that never more than one matrix is held.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise BasisError('support="sensitivity" needs all weights in memory: load the model without offloading.')
    for ids in batches:
        if ids.dim() != 2 or ids.shape[1] < 2 or ids.is_floating_point():
            raise BasisError(
                f"A calibration batch has shape {tuple(ids.shape)}; it is token ids (b t), t at least 2, so that there "
                "is a next token to predict."
            )
    # The gradient depends on every weight of the model, and on how it is built.
    digest = hashlib.sha256(json.dumps([fingerprints, model.config.to_dict()], default=str, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}:{fingerprint(parameter.detach().reshape(1, -1))}".encode())
    for ids in batches:
        digest.update(ids.cpu().numpy().tobytes() + str(tuple(ids.shape)).encode())
    rule = f"sensitivity:{digest.hexdigest()}"
    done = {
        name: _cached(folder, fingerprints[name], matrix_shape(module), k, rule) for name, module in modules.items()
    }
    if all(done.values()):
        return cast(dict[str, Factors], done)

    # Full factors are large: gone when we are done, and what a killed run left is gone after a day.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".full-*"):
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)
        spool = Path(tempfile.mkdtemp(dir=folder, prefix=".full-"))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        full = {
            name: _store(
                spool,
                (fingerprints[name], matrix_shape(module), "full", "top"),
                _with_weight(module, lambda w, name=name: factorise(w, "full", name=name)),
            )
            for name, module in _watch(modules, "decomposing", progress)
        }
        scores = _sensitivity(model, modules, full, _watch(batches, "calibrating", progress))
        factors = {}
        for name, one in full.items():
            keep = one.k if k == "full" else k
            chosen = scores[name].topk(keep).indices.sort().values
            kept = Factors(one.v[:, chosen].contiguous(), one.s[chosen], one.u_t[chosen].contiguous())
            factors[name] = _store(folder, (fingerprints[name], matrix_shape(modules[name]), k, rule), kept)
        return factors
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _sensitivity(
    model: PreTrainedModel, modules: dict[str, nn.Module], full: dict[str, Factors], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    scores = {name: torch.zeros(one.k) for name, one in full.items()}
    names = {id(module.weight): name for name, module in modules.items()}
    transposed = {name for name, module in modules.items() if isinstance(module, Conv1D)}

    def project(parameter: Tensor) -> None:
        name = names[id(parameter)]
        gradient, parameter.grad = cast(Tensor, parameter.grad).float(), None
        gradient = gradient.T if name in transposed else gradient
        one = full[name]
        v, u_t = one.v.to(gradient.device), one.u_t.to(gradient.device)
        of_s = einsum(gradient @ v, u_t, "o k, k o -> k").cpu()  # diag(U^T G V)
        scores[name] += (one.s * of_s) ** 2

    training = model.training
    needed_gradient = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = []
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in names)
            if id(parameter) in names:
                hooks.append(parameter.register_post_accumulate_grad_hook(project))
        for ids in batches:
            ids = ids.to(model.device)
            with torch.enable_grad():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if not torch.isfinite(loss):
                raise BasisError("The loss on the calibration data is not finite: the base cannot be calibrated on it.")
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, needed in needed_gradient:
            parameter.requires_grad_(needed)
        model.train(training)
    silent = [name for name, score in scores.items() if not (score.isfinite().all() and score.sum() > 0)]
    if silent:
        raise BasisError(f"The calibration data does not move {_some(silent)}: use more of it, or leave those out.")
    return scores


# --- disk cache ---------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return where factors are kept: `SVDEXPERT_CACHE`, else `svdexpert` in the user's cache folder."""
    place = os.environ.get("SVDEXPERT_CACHE")
    if place:
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svdexpert"


def _cache_path(folder: Path, print_: str, shape: tuple[int, int], k: Rank, rule: str) -> Path:
    name = hashlib.sha256(json.dumps([_METHOD, print_, shape, k, rule]).encode()).hexdigest()
    return folder / "factors" / name[:2] / f"{name}.safetensors"


def _cached(folder: Path, print_: str, shape: tuple[int, int], k: Rank, rule: str) -> Factors | None:
    """Return memory-mapped factors, or None where there is no sound entry (it will be made again)."""
    path = _cache_path(folder, print_, shape, k, rule)
    keep = min(shape) if k == "full" else k
    try:
        with safe_open(path, framework="pt") as file:
            factors = Factors(*(file.get_tensor(part) for part in ("v", "s", "u_t")))
            written = (file.metadata() or {}).get("sha256")
    except (FileNotFoundError, NotADirectoryError, SafetensorError):
        return None
    shapes = factors.v.shape == (shape[1], keep) and factors.u_t.shape == (keep, shape[0])
    return factors if shapes and written == _digest(factors) else None


def _digest(factors: Factors) -> str:
    digest = hashlib.sha256()
    for part in (factors.v, factors.s, factors.u_t):
        digest.update(part.numpy().data)
    return digest.hexdigest()


def _store(folder: Path, key: tuple[str, tuple[int, int], Rank, str], factors: Factors) -> Factors:
    """Write factors and return them memory-mapped, so that they cost page cache instead of memory."""
    path = _cache_path(folder, *key)
    try:
        with whole_file(path) as temporary:
            tensors = {"v": factors.v, "s": factors.s, "u_t": factors.u_t}
            save_file(tensors, temporary, {"sha256": _digest(factors)})
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error
    return _cached(folder, *key) or factors


def _unwritable(folder: Path, error: Exception) -> BasisError:
    return BasisError(
        f"The factor cache at {folder} cannot be written ({error}). Free some space, set SVDEXPERT_CACHE to another "
        "folder, or pass cache=False. Nothing half-written is left."
    )


class _Trusted:
    """Fingerprints recorded for the files of a checkpoint, valid while path, size and modification time stay."""

    def __init__(self, checkpoint: Path | None, model: PreTrainedModel, folder: Path | None) -> None:
        self.path: Path | None = None
        self.known: dict[str, str] = {}
        if checkpoint is None or folder is None:
            return
        kinds = (".safetensors", ".bin", ".json", ".py")
        files = sorted(path for path in checkpoint.rglob("*") if path.suffix in kinds)
        stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        how = [str(model.dtype), type(model).__name__, transformers.__version__]  # loading may convert what files hold
        digest = hashlib.sha256(json.dumps([stamps, how]).encode()).hexdigest()
        self.path = folder / "checkpoints" / f"{digest}.json"
        with suppress(OSError, ValueError):
            known = json.loads(self.path.read_text())
            self.known = known if isinstance(known, dict) else {}

    def get(self, name: str) -> str | None:
        return self.known.get(name)

    def remember(self, fingerprints: Mapping[str, str]) -> None:
        if self.path is None or fingerprints.items() <= self.known.items():
            return
        try:
            with whole_file(self.path) as temporary:
                temporary.write_text(json.dumps({**self.known, **fingerprints}, indent=1))
        except OSError as error:
            raise _unwritable(self.path.parent.parent, error) from error


def _watch(what: Any, doing: str, progress: bool) -> Iterator[Any]:
    items = list(what.items()) if isinstance(what, dict) else what
    idle = not progress or not items
    yield from track(items, doing, console=Console(stderr=True), disable=idle, transient=True)

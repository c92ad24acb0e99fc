"""Out of the library: an expert or a mixture as a merged checkpoint, or as a LoRA folder for PEFT and vLLM.

    W' = W + U_k C V_k^T = W + B A        B = U_k C (o r), A = V_k^T (r i), alpha = r

A mixture is an expert (`0.7 * a + 0.3 * b`), so it exports as one LoRA of the same rank. The product is exact: the
change is in singular form already, and keeping its largest |s d| is the best approximation of lower rank there is
(Eckart and Young 1936). Other adapters need an SVD of every dense change for that.

An activated expert becomes an activated LoRA (aLoRA, Greenewald et al. 2025), which PEFT applies from the invocation
tokens on; a server that does not know `alora_invocation_tokens` applies it to all tokens.

The rules that a folder must keep to be served are those of vLLM 0.33: one of its ranks, no bias, no DoRA, no
modules_to_save; we add alpha = r and a single rank for all modules, and names exactly as the loaded model has them,
because PEFT drops unknown names without a word.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdexpert import __version__
from svdexpert.basis import weight_of
from svdexpert.errors import ExportError
from svdexpert.expert import Expert
from svdexpert.model import HARBOR, SpectralModel, check_base
from svdexpert.storage import whole_folder

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_PREFIX = "base_model.model."
_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MARK = "svdexpert_export.json"  # says what was exported, and that the folder is ours to replace


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Attributes:
        folder: where.
        rank: of every module.
        modules: how many.
        retained: share of the squared Frobenius norm of the change that the LoRA keeps; 1 is exact.
    """

    folder: Path
    rank: int
    modules: int
    retained: float


def export_lora(
    expert: Expert,
    model: SpectralModel,
    folder: str | Path,
    *,
    rank: int | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> LoraExport:
    """Write an expert, or a mixture of experts, as a LoRA folder that PEFT and vLLM load.

    Args:
        expert: any expert on this model's basis, sums and multiples included.
        model: the model that it is for.
        folder: a new or empty folder, unless `overwrite`.
        rank: one of `VLLM_RANKS`; if None, the smallest that holds every direction the expert uses.
        allow_lossy: also write where less than 0.99 of the change is kept.
        overwrite: replace a folder that holds an earlier export, with all that is in it.

    Returns:
        What was written, with the share of the change that was kept.

    Raises:
        ExportError: an unknown rank, a lossy export that was not allowed, a folder in use, a disk that refused.
        MismatchError: the expert does not fit the model.
    """
    expert.check_on(model.basis)
    changes = {name: expert.change(name) for name in model.basis.names}
    if rank is None:
        used = max(one.count_nonzero().item() if one.dim() == 1 else one.shape[0] for one in changes.values())
        fitting = [one for one in VLLM_RANKS if one >= used]
        if not fitting:
            raise ExportError(
                f"The expert uses {used} directions of a matrix; vLLM's largest rank is {VLLM_RANKS[-1]}. Give rank=, "
                "with allow_lossy=True if need be, or write a merged checkpoint."
            )
        rank = fitting[0]
    elif rank not in VLLM_RANKS:
        raise ExportError(f"rank is {rank}; vLLM accepts {', '.join(map(str, VLLM_RANKS))}.")

    tensors: dict[str, Tensor] = {}
    kept = total = 0.0
    for name, change in changes.items():
        factors = model.basis.factors[name]
        left, right, retained = _low_rank(change, rank)
        kept, total = kept + retained, total + float(change.double().square().sum())
        a = torch.zeros(rank, factors.v.shape[0])  # (r i)
        b = torch.zeros(factors.u_t.shape[1], rank)  # (o r)
        used = left.shape[-1]
        if left.dim() == 1:
            a[:used] = factors.v.T[right]
            torch.mul(factors.u_t[right].T, left, out=b[:, :used])
        else:
            a[:used] = cast(Tensor, right) @ factors.v.T
            b[:, :used] = factors.u_t.T @ left
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b
    share = kept / total if total else 1.0
    if share < 0.99 and not allow_lossy:
        raise ExportError(
            f"Rank {rank} keeps {share:.4f} of the expert's change, less than 0.99. Use a higher rank, or "
            "allow_lossy=True if that is enough. Nothing was written."
        )
    if expert.reach and not allow_lossy:
        raise ExportError(
            f"This expert decides on the first {expert.reach} tokens of a reply, and a LoRA acts to its end: use "
            "allow_lossy=True if that is near enough. Nothing was written."
        )
    config = _lora_config(model, rank, expert.invocation)
    with _new_folder(Path(folder), overwrite, expert) as temporary:
        save_file(tensors, temporary / _TENSORS, {"format": "pt"})
        (temporary / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_lora_readme(expert, rank, share), encoding="utf-8")
    return LoraExport(Path(folder), rank, len(changes), share)


def _low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor | slice, float]:
    """Split a change in the basis by its largest parts; also returns their squared Frobenius norm.

    A diagonal change gives the values (r) and positions (r) of its largest entries, a dense one C ~ L R with L (k r),
    R (r k).
    """
    if change.dim() == 1:
        if rank >= change.shape[0]:
            return change, slice(None), float(change.double().square().sum())
        positions = change.abs().topk(rank).indices.sort().values
        return change[positions], positions, float(change[positions].double().square().sum())
    u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
    keep = min(rank, s.shape[0])
    return (u[:, :keep] * s[:keep]).float(), vh[:keep].float(), float(s[:keep].square().sum())


def _lora_config(model: SpectralModel, rank: int, invocation: tuple[int, ...]) -> dict[str, Any]:
    modules = [model.hf.get_submodule(name) for name in model.basis.names]
    activated = {"alora_invocation_tokens": list(invocation)} if invocation else {}
    return activated | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": check_base(HARBOR) if model.basis.key.base == HARBOR else model.basis.key.base,
        "revision": model.basis.key.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in modules),
        "target_modules": list(model.basis.names),
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _lora_readme(expert: Expert, rank: int, share: float) -> str:
    base = f"base_model: {expert.key.base}\n" if "/" in expert.key.base and not Path(expert.key.base).exists() else ""
    return (
        f"---\nlibrary_name: peft\n{base}---\n\n"
        f"LoRA of rank {rank}, exported by svdexpert from the expert `{expert.skill or 'unnamed'}` "
        f"for `{expert.key}` (retained energy {share:.6f}).\n"
    )


def merge(expert: Expert, model: SpectralModel, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the base with an expert, or a mixture, merged into its weights, as a plain Hugging Face checkpoint.

    Args:
        expert: any expert on this model's basis, sums and multiples included.
        model: the model that it is for; its own weights stay as they are.
        folder: a new or empty folder, unless `overwrite`.
        overwrite: replace a folder that holds an earlier export, with all that is in it.

    Returns:
        The folder: sharded safetensors, configuration, tokenizer and chat template.

    Raises:
        ExportError: a folder in use, a disk that refused, weights offloaded by accelerate.
        ExportError: the expert is activated: merged weights act on all tokens.
        MismatchError: the expert does not fit the model.
        BasisError: the model was cast after it was attached.
    """
    expert.check_on(model.basis)
    if expert.invocation:
        raise ExportError(
            "This expert is activated: it acts from the reply on, merged weights act on all tokens. Write a LoRA, "
            "which can say so, or train with activated=False. (dataclasses.replace(expert, invocation=(), reach=0) "
            "merges.)"
        )
    model.check_cast()
    state = model.hf.state_dict()
    if any(one.is_meta for one in state.values()):
        raise ExportError("Some weights are offloaded: load the model without offloading to merge into it.")
    for name, factors in model.basis.factors.items():
        module = model.hf.get_submodule(name)
        with weight_of(module) as weight:
            change = expert.change(name)
            core = change.diag() if change.dim() == 1 else change
            delta = (factors.u_t.T @ core @ factors.v.T).to(weight.device)  # (o i)
            merged = (weight.float() + delta).to(weight.dtype)
        state[f"{name}.weight"] = merged.T.contiguous() if isinstance(module, Conv1D) else merged
    with _new_folder(Path(folder), overwrite, expert) as temporary:
        model.hf.save_pretrained(temporary, state_dict=state)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
    return Path(folder)


@contextmanager
def _new_folder(folder: Path, overwrite: bool, expert: Expert) -> Iterator[Path]:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file: choose another place.")
    if folder.exists() and folder.resolve() == Path(expert.key.base).resolve():
        raise ExportError(f"{folder} is the base itself: choose another folder.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ExportError(f"{folder} exists and is not empty: choose another folder, or pass overwrite=True.")
        if not (folder / _MARK).is_file():
            raise ExportError(
                f"{folder} holds something else than an export of svdexpert (there is no {_MARK}): it is not replaced. "
                "Choose another folder."
            )
    try:
        with whole_folder(folder) as temporary:
            yield temporary
            mark = {"library_version": __version__, "base": str(expert.key), "expert": expert.skill}
            (temporary / _MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder} cannot be written ({error}); what was there before is intact.") from error


def check_lora(folder: str | Path, model: PreTrainedModel | None = None) -> str:
    """Check that a LoRA folder will be served whole, and return what was checked, in words.

    Applies vLLM's rules to the configuration and every tensor; with `model`, and where PEFT is installed, also has PEFT
    load the folder and fails unless it used every tensor.

    Args:
        folder: as `export_lora` writes it.
        model: the base that it is for; only its architecture is used.

    Raises:
        ExportError: a rule is broken, a tensor is missing, left over, of a wrong shape, or not used by PEFT.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / _TENSORS, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            broken = [name for name in shapes if not torch.isfinite(file.get_tensor(name)).all()]
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} is not a readable LoRA folder: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("target_modules"), list):
        raise ExportError(f"{folder}: {_CONFIG} has no list of target_modules, each by its full name.")
    rank = config.get("r")
    rules = {
        f"r is {rank!r}; vLLM accepts {VLLM_RANKS}": rank in VLLM_RANKS,
        f"lora_alpha is {config.get('lora_alpha')!r}, not r": config.get("lora_alpha") == rank,
        "bias must be none": config.get("bias") == "none" and not config.get("lora_bias"),
        "DoRA is not served": not config.get("use_dora"),
        "rsLoRA would change the scale": not config.get("use_rslora"),
        "modules_to_save is not served": not config.get("modules_to_save"),
        "a single rank, so no rank_pattern or alpha_pattern": not config.get("rank_pattern")
        and not config.get("alpha_pattern"),
        f"NaN or infinite values in {broken[:1]}": not broken,
        "there are no tensors": bool(shapes),
    }
    for message, kept in rules.items():
        if not kept:
            raise ExportError(f"{folder}: {message}.")
    wanted = {f"{_PREFIX}{name}.lora_{side}.weight" for name in config["target_modules"] for side in "AB"}
    if wanted != shapes.keys():
        odd = min(wanted ^ shapes.keys())
        raise ExportError(f"{folder}: {odd} is {'missing' if odd in wanted else 'not of a target module'}.")
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0 if ".lora_A." in name else 1] != rank:
            raise ExportError(f"{folder}: {name} has shape {shape}, which is not of rank {rank}.")
    checked = f"{len(shapes)} tensors of rank {rank} keep vLLM's rules"
    if model is None:
        return checked
    try:
        import peft
    except ImportError:
        return f"{checked}; PEFT is not installed, so it was not asked"
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers; not the reader's concern
            empty = AutoModelForCausalLM.from_config(model.config)
            wrapped = peft.PeftModel(empty, peft.PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
            result = wrapped.load_adapter(str(folder), "default", low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ExportError(f"{folder}: PEFT does not load it into {type(model).__name__}: {error}") from error
    unused, lacking = list(result.unexpected_keys), [name for name in result.missing_keys if "lora_" in name]
    if unused or lacking:
        raise ExportError(f"{folder}: PEFT did not use {unused[:3]} and did not find {lacking[:3]}.")
    return f"{checked}; PEFT {cast(Any, peft).__version__} used every one"

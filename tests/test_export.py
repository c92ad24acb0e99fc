"""Exports: exactness, ranks, vLLM's rules, PEFT's silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdexpert import (
    BasisError,
    Expert,
    ExportError,
    MismatchError,
    SpectralModel,
    check_lora,
    decompose,
    export_lora,
    merge,
)

Experts = dict[str, Expert]
Attach = Callable[..., SpectralModel]


def product(folder: Path) -> dict[str, Tensor]:
    """B A of every module."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


def change(expert: Expert, model: SpectralModel, name: str) -> Tensor:
    one, core = model.basis.factors[name], expert.change(name)
    return one.u_t.T @ (core.diag() if core.dim() == 1 else core) @ one.v.T


@pytest.mark.parametrize("core", ["diag", "dense"])
def test_a_mixture_is_one_lora_of_the_same_rank(model: SpectralModel, tmp_path: Path, core: str) -> None:
    a, b = (Expert.random(model.basis, std=0.3, seed=seed, core=core) for seed in (1, 2))
    mixed = 0.7 * a - 0.3 * b
    done = export_lora(mixed, model, tmp_path / "lora")
    assert (done.rank, done.modules, done.retained) == (8, 14, pytest.approx(1))
    for name, weight in product(tmp_path / "lora").items():
        torch.testing.assert_close(weight, change(mixed, model, name), atol=1e-6, rtol=1e-5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert config["target_modules"] == list(model.basis.names)
    assert "rank_pattern" not in config
    assert check_lora(tmp_path / "lora").startswith("28 tensors of rank 8 keep vLLM's rules")


def test_ranks_are_padded_to_what_vllm_accepts(attached: Attach, tmp_path: Path) -> None:
    model = attached(k=10)
    expert = Expert.random(model.basis, std=0.3)
    assert export_lora(expert, model, tmp_path / "ten").rank == 16
    few = Expert.from_offsets(model.basis, {n: o * (torch.arange(10) < 3) for n, o in expert.offsets.items()})
    done = export_lora(few, model, tmp_path / "three")
    assert (done.rank, done.retained) == (8, 1)
    assert export_lora(Expert.zeros(model.basis), model, tmp_path / "zero").rank == 1
    for name, weight in product(tmp_path / "three").items():
        torch.testing.assert_close(weight, change(few, model, name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("core", ["diag", "dense"])
def test_a_lower_rank_is_the_best_one_and_is_declared(attached: Attach, tmp_path: Path, core: str) -> None:
    model = attached(k=16)
    expert = Expert.random(model.basis, std=0.3, core=core)
    with pytest.raises(ExportError, match=r"keeps 0\.\d+ of the expert's change.*allow_lossy"):
        export_lora(expert, model, tmp_path / "lora", rank=8)
    assert not (tmp_path / "lora").exists()
    done = export_lora(expert, model, tmp_path / "lora", rank=8, allow_lossy=True)
    kept = total = 0.0
    for name, weight in product(tmp_path / "lora").items():
        dense = change(expert, model, name).double()
        best = torch.linalg.svdvals(dense)[8:].norm()  # Eckart and Young: nothing of rank 8 is closer
        assert float((dense - weight).norm()) == pytest.approx(float(best), rel=1e-3, abs=1e-5)
        kept, total = kept + float(weight.double().square().sum()), total + float(dense.square().sum())
    assert done.retained == pytest.approx(kept / total, rel=1e-4)
    with pytest.raises(ExportError, match="rank is 10; vLLM accepts 1, 8, 16"):
        export_lora(expert, model, tmp_path / "other", rank=10)


def test_a_folder_in_use_is_kept(model: SpectralModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    usual = (tmp_path / "thesis.tex").stat().st_mode & 0o777
    expert = Expert.random(model.basis)
    for write in (export_lora, merge):
        with pytest.raises(ExportError, match="not empty"):
            write(expert, model, tmp_path)
        with pytest.raises(ExportError, match="is a file"):
            write(expert, model, tmp_path / "thesis.tex")
        with pytest.raises(ExportError, match="something else than an export"):
            write(expert, model, tmp_path, overwrite=True)
        write(expert, model, tmp_path / write.__name__)
        write(expert, model, tmp_path / write.__name__, overwrite=True)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / write.__name__).iterdir()} == {usual}
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "export_lora", "merge"}


def test_a_base_is_not_replaced_even_if_it_was_an_export(attached: Attach, tmp_path: Path) -> None:
    first = attached()
    merge(Expert.random(first.basis), first, tmp_path / "merged")
    model = SpectralModel.from_pretrained(tmp_path / "merged", k=8, progress=False)
    for write in (merge, export_lora):
        with pytest.raises(ExportError, match="is the base itself"):
            write(Expert.random(model.basis), model, tmp_path / "merged", overwrite=True)


def test_a_model_that_was_cast_is_not_merged(model: SpectralModel, tmp_path: Path) -> None:
    model.hf.to(torch.bfloat16)
    with pytest.raises(BasisError, match="after it was attached"):
        merge(Expert.random(model.basis), model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_experts_of_another_base_are_not_exported(model: SpectralModel, tmp_path: Path) -> None:
    other = Expert.random(decompose(tiny("llama", seed=1), k=8, progress=False))
    for write in (export_lora, merge):
        with pytest.raises(MismatchError, match="other weights"):
            write(other, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merged_checkpoint_is_whole(attached: Attach, tmp_path: Path, dtype: torch.dtype, ids: Tensor) -> None:
    model = attached(dtype=dtype)
    before = {name: one.clone() for name, one in model.hf.state_dict().items()}
    expert = Expert.random(model.basis, std=0.3)
    merge(expert, model, tmp_path / "merged")
    assert all(torch.equal(one, before[name]) for name, one in model.hf.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(loaded(ids).logits, model.logits(ids, expert), atol=tolerance, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == model.tokenizer.chat_template
    assert tokenizer("hello")["input_ids"] == model.tokenizer("hello")["input_ids"]


def mutate(folder: Path, config: dict[str, object] | None = None, **tensors: Tensor | None) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    held = load_file(folder / "adapter_model.safetensors") | tensors
    save_file({name: one for name, one in held.items() if one is not None}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 10, "lora_alpha": 10}, "vLLM accepts"),
        ({"lora_alpha": 16}, "not r"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, "not of a target module"),
    ],
)
def test_the_checker_applies_the_rules(model: SpectralModel, tmp_path: Path, config: dict, message: str) -> None:
    export_lora(Expert.random(model.basis), model, tmp_path / "lora")
    mutate(tmp_path / "lora", config)
    with pytest.raises(ExportError, match=message):
        check_lora(tmp_path / "lora")


def test_the_checker_reads_the_tensors(model: SpectralModel, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    expert = Expert.random(model.basis)
    name = f"base_model.model.{model.basis.names[0]}.lora_A.weight"
    for one, message in (
        (None, "is missing"),
        (torch.zeros(4, 32), "not of rank 8"),
        (torch.full((8, 32), float("nan")), "NaN"),
    ):
        export_lora(expert, model, folder, overwrite=True)
        mutate(folder, **{name: one})
        with pytest.raises(ExportError, match=message):
            check_lora(folder)
    for text in ("[]", "{}", '{"target_modules": "all-linear"}'):
        export_lora(expert, model, folder, overwrite=True)
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ExportError, match="no list of target_modules"):
            check_lora(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ExportError, match="not a readable LoRA folder"):
        check_lora(folder)


def test_names_that_peft_would_drop_are_found(model: SpectralModel, tmp_path: Path) -> None:
    """PEFT loads such a folder without a word; its tensors act on nothing."""
    pytest.importorskip("peft")
    folder = tmp_path / "lora"
    export_lora(Expert.random(model.basis), model, folder)
    wrong = "model.layers.9.self_attn.q_proj"
    mutate(
        folder,
        {"target_modules": [*model.basis.names, wrong]},
        **{
            f"base_model.model.{wrong}.lora_A.weight": torch.zeros(8, 32),
            f"base_model.model.{wrong}.lora_B.weight": torch.zeros(32, 8),
        },
    )
    check_lora(folder)
    with pytest.raises(ExportError, match=r"PEFT did not use .*layers\.9"):
        check_lora(folder, model.hf)

"""The laws that hold in every architecture: zero is the base, all four forms agree, rows are independent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from svdexpert import Expert, SpectralModel, check_lora, export_lora, merge

Attach = Callable[..., SpectralModel]

MIXTURES_OF_EXPERTS = ("mixtral", "qwen3_moe")
everywhere = pytest.mark.parametrize("name", ARCHITECTURES)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_is_the_base_bit_for_bit(name: str, dtype: torch.dtype, ids: Tensor) -> None:
    hf = tiny(name).to(dtype)
    with torch.no_grad():
        before = hf(ids).logits
        model = SpectralModel.attach(hf, k=8, progress=False)
        expert = Expert.random(model.basis, std=0.3)
        assert torch.equal(model.logits(ids), before)
        assert torch.equal(model.logits(ids, 0 * expert), before)
        assert torch.equal(model.logits(ids, expert - expert), before)
        rows = model.logits(ids, [None, 0 * expert, expert, None])
        if name in MIXTURES_OF_EXPERTS:
            # The base itself groups tokens of all rows by MoE expert, so a row's rounding depends on its neighbours.
            torch.testing.assert_close(rows[[0, 1, 3]], before[[0, 1, 3]])
        else:
            assert torch.equal(rows[[0, 1, 3]], before[[0, 1, 3]])
        assert not torch.equal(rows[2], before[2])
        assert torch.equal(model.logits(ids), before)
        assert torch.equal(model.detach()(ids).logits, before)


@everywhere
def test_factored_form_is_the_base_within_rounding(name: str, ids: Tensor) -> None:
    hf = tiny(name)
    with torch.no_grad():
        before = hf(ids).logits
        model = SpectralModel.attach(hf, k="full", form="factored", progress=False)
        torch.testing.assert_close(model.logits(ids, Expert.zeros(model.basis)), before, atol=1e-5, rtol=0)


@everywhere
def test_delta_factored_merged_and_lora_agree(name: str, ids: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        model = SpectralModel.attach(tiny(name), k="full", progress=False)
        expert = Expert.random(model.basis, std=0.3)
        delta = model.logits(ids, expert)
        merge(expert, model, tmp_path / "merged")
        export_lora(expert, model, tmp_path / "lora")
        assert "used every one" in check_lora(tmp_path / "lora", model.hf)
        factored = SpectralModel.attach(tiny(name), k="full", form="factored", progress=False)
        assert factored.basis.key == model.basis.key
        torch.testing.assert_close(factored.logits(ids, expert), delta, atol=1e-5, rtol=0)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(ids).logits, delta, atol=1e-5, rtol=0)
        lora = peft.PeftModel.from_pretrained(model.detach(), tmp_path / "lora").eval()
        torch.testing.assert_close(lora(ids).logits, delta, atol=1e-5, rtol=0)


@everywhere
def test_a_batch_of_mixtures_is_its_rows(name: str, attached: Attach, ids: Tensor) -> None:
    model = attached(name)
    a, b = (Expert.random(model.basis, std=0.3, seed=seed) for seed in (1, 2))
    rows = [a, 0.5 * a - b, None, -a]
    with torch.no_grad():
        batch = model.logits(ids, rows)
        for row, expert in enumerate(rows):
            alone = model.logits(ids[row : row + 1], expert)[0]
            torch.testing.assert_close(batch[row], alone, atol=1e-5, rtol=0)
            best, second = alone.topk(2).values.unbind(-1)
            clear = best - second > 1e-4
            assert torch.equal(batch[row].argmax(-1)[clear], alone.argmax(-1)[clear])


@everywhere
def test_detach_returns_the_same_model(name: str, ids: Tensor) -> None:
    hf = tiny(name)
    kinds = {path: type(module) for path, module in hf.named_modules()}
    places = {path: parameter.data_ptr() for path, parameter in hf.named_parameters()}
    values = {path: one.clone() for path, one in hf.state_dict().items()}
    needed = {path: parameter.requires_grad for path, parameter in hf.named_parameters()}
    buffers = [path for path, _ in hf.named_buffers()]
    with pytest.raises(RuntimeError, match="user"), SpectralModel.attach(hf, k=4, progress=False) as model:
        assert model.hf.state_dict().keys() == values.keys()
        model.generate(ids, Expert.random(model.basis), max_new_tokens=2)
        raise RuntimeError("user")
    assert {path: type(module) for path, module in hf.named_modules()} == kinds
    assert {path: parameter.data_ptr() for path, parameter in hf.named_parameters()} == places
    assert {path: parameter.requires_grad for path, parameter in hf.named_parameters()} == needed
    assert [path for path, _ in hf.named_buffers()] == buffers
    assert all(torch.equal(one, values[path]) for path, one in hf.state_dict().items())


@everywhere
def test_gradient_of_offsets_is_that_of_the_weight_in_the_basis(name: str, attached: Attach, ids: Tensor) -> None:
    """dL/dd = s * diag(U^T G V), with G the gradient of the dense weight."""
    from svdexpert import Mixture

    model = attached(name)
    offsets = torch.zeros(sum(model.basis.sizes), requires_grad=True)
    with model.using(Mixture(offsets)):
        model.hf(ids, labels=ids).loss.backward()
    ours = dict(zip(model.basis.names, offsets.grad.split(model.basis.sizes), strict=True))
    factors = model.basis.factors
    dense = tiny(name)
    dense(ids, labels=ids).loss.backward()
    for path, one in factors.items():
        module = dense.get_submodule(path)
        gradient = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
        expected = one.s * (one.u_t @ gradient @ one.v).diagonal()
        torch.testing.assert_close(ours[path], expected, atol=1e-6, rtol=1e-3)


@everywhere
def test_only_matrices_of_the_decoder_are_adapted(name: str, attached: Attach) -> None:
    model = attached(name)
    hf = model.hf
    excluded = {id(hf.get_input_embeddings()), id(hf.get_output_embeddings())}
    for path in model.basis.names:
        module = hf.get_submodule(path)
        assert isinstance(module, nn.Linear | Conv1D)
        assert id(module) not in excluded
    assert model.basis.key.first_layer == 1
    per_layer = len(model.basis.names) // 2
    below = [path for path, why in model.basis.skipped.items() if why == "below first_layer 1"]
    assert len(below) == per_layer
    if name in MIXTURES_OF_EXPERTS:
        assert per_layer == 4
        assert sum("fused expert tensor" in why for why in model.basis.skipped.values()) == 6
        assert not any("gate" in path.split(".")[-1] or "router" in path for path in model.basis.names)


def test_fused_modules_are_one_matrix(attached: Attach) -> None:
    fused = {"phi3": "self_attn.qkv_proj", "gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}
    for name, path in fused.items():
        basis = attached(name).basis
        match = [one for one in basis.names if one.endswith(path)]
        assert len(match) == 2
        assert basis.key.matrices[match[0]].shape == ((64 if name == "phi3" else 96), 32)

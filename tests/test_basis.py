"""Decomposition, supports, fingerprints, the cache, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdexpert import BasisError, SpectralModel, basis, decompose
from svdexpert.basis import factorise, fingerprint

# --- one matrix


def check_factors(weight: Tensor, k: int) -> None:
    one = factorise(weight, k)
    eye = torch.eye(k)
    torch.testing.assert_close(one.v.T @ one.v, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.u_t @ one.u_t.T, eye, atol=1e-5, rtol=0)
    exact = torch.linalg.svdvals(weight.double())[:k]
    torch.testing.assert_close(one.s.double(), exact, rtol=1e-5, atol=1e-7 * float(exact.max()))
    assert (one.s.diff() <= 0).all()
    torch.testing.assert_close((weight @ one.v).T, one.s[:, None] * one.u_t, atol=1e-5 * float(one.s[0]), rtol=0)
    assert (one.u_t.gather(1, one.u_t.abs().argmax(1, keepdim=True)) > 0).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 1000), data=st.data())
def test_factors_are_the_singular_value_decomposition(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(rows, columns)))
    check_factors(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), k)


def test_ill_conditioned_matrices_keep_their_small_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(30, 20, generator=draw, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(20, 20, generator=draw, dtype=torch.float64))
    s = torch.logspace(0, -6, 20, dtype=torch.float64)
    weight = ((u * s) @ v.T).float()
    one = factorise(weight, "full")
    exact = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(one.s.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.u_t @ one.u_t.T, torch.eye(20), atol=1e-5, rtol=0)


def test_a_matrix_of_lower_rank_has_zero_directions() -> None:
    one = factorise(torch.ones(6, 4), "full")
    torch.testing.assert_close(one.s, torch.tensor([24**0.5, 0, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.u_t @ one.u_t.T, torch.eye(4), atol=1e-5, rtol=0)


def test_signs_do_not_depend_on_the_route() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    few, all_ = factorise(weight, 3), factorise(weight, "full")
    torch.testing.assert_close(few.v, all_.v[:, :3], atol=1e-5, rtol=0)
    turned = factorise(weight.T.contiguous(), 3)
    torch.testing.assert_close(
        (few.u_t.T * few.s) @ few.v.T, turned.v @ (turned.s[:, None] * turned.u_t), atol=1e-5, rtol=0
    )


def test_damaged_weights_are_named() -> None:
    hf = tiny("llama")
    hf.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BasisError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN"):
        decompose(hf, k=4, progress=False)


# --- fingerprints


def test_fingerprints_are_of_values() -> None:
    rounded = torch.randn(5, 3).bfloat16()
    assert fingerprint(rounded) == fingerprint(rounded.float()) == fingerprint(rounded.double())
    weight = torch.randn(5, 3)
    assert fingerprint(weight) != fingerprint(weight.bfloat16())
    assert fingerprint(weight) != fingerprint(weight.view(3, 5))
    assert fingerprint(weight.T) == fingerprint(weight.T.contiguous())


def test_a_fingerprint_is_written_down() -> None:
    """Experts on disk rely on it: this number never changes."""
    want = "c9fd654fb2fcf270a72db055e208a32dccfd05541a312f4ac773bcf06143914d"
    assert fingerprint(torch.arange(6.0).view(2, 3)) == want


# --- which matrices


def test_first_layer_and_targets_narrow_the_choice() -> None:
    hf = tiny("llama")
    assert decompose(hf, k=4, progress=False).key.first_layer == 1
    every = decompose(hf, k=4, first_layer=0, progress=False)
    assert len(every.names) == 21
    assert every.skipped == {}
    only = decompose(hf, ["*.mlp.*", "*.q_proj"], k=4, first_layer=2, progress=False)
    assert [name.split(".")[-1] for name in only.names] == ["q_proj", "gate_proj", "up_proj", "down_proj"]
    assert only.skipped["model.layers.2.self_attn.k_proj"] == "not among targets"
    with pytest.raises(BasisError, match=r"'\*\.mpl\.\*' matches no adaptable matrix"):
        decompose(hf, ["*.mpl.*"], k=4, progress=False)
    for wrong in (-1, 3):
        with pytest.raises(BasisError, match="layers 0 to 2"):
            decompose(hf, k=4, first_layer=wrong, progress=False)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "all"])
def test_k_is_a_whole_number(k: object) -> None:
    with pytest.raises(BasisError, match="k is"):
        decompose(tiny("llama"), k=k, progress=False)


def test_k_is_at_most_the_rank() -> None:
    with pytest.raises(BasisError, match=r"larger than the rank of .*k_proj.*\(shape \(16, 32\)\).*k <= 16"):
        decompose(tiny("llama"), k=17, progress=False)
    full = decompose(tiny("llama"), k="full", progress=False)
    assert set(full.sizes) == {16, 32}


def test_tied_weights_and_gates_are_left_alone() -> None:
    hf = tiny("llama")
    layers = hf.model.layers
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    layers[1].gate = nn.Linear(32, 1)
    basis = decompose(hf, k=4, progress=False)
    assert basis.skipped["model.layers.1.mlp.up_proj"] == "weight shared with another module"
    assert basis.skipped["model.layers.2.mlp.up_proj"] == "weight shared with another module"
    assert basis.skipped["model.layers.1.gate"] == "a single direction (a gate)"


def test_routers_are_known_by_where_they_stand() -> None:
    """Not by their width: with 16 experts, k_proj and v_proj are as wide as the router."""
    hf = tiny("mixtral", num_experts=16, num_local_experts=16)
    block = hf.model.layers[1].mlp
    block.router = nn.Linear(32, 16, bias=False)
    block.shared = nn.ModuleDict({"up_proj": nn.Linear(32, 16)})
    basis = decompose(hf, k=4, progress=False)
    assert basis.skipped["model.layers.1.mlp.router"] == "router"
    adapted = {name.removeprefix("model.layers.1.") for name in basis.names if ".1." in name}
    assert adapted == {f"self_attn.{one}_proj" for one in "qkvo"} | {"mlp.shared.up_proj"}


def test_lists_of_experts_are_left_alone() -> None:
    """They see the tokens that were routed to them, so a mixture by row would not know its rows."""
    hf = tiny("llama")
    hf.model.layers[1].mlp.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    hf.model.layers[1].mlp.gate = nn.Linear(32, 4)
    basis = decompose(hf, k=4, progress=False)
    assert basis.skipped["model.layers.1.mlp.experts.3"] == "one of several parallel modules (an expert)"
    assert basis.skipped["model.layers.1.mlp.gate"] == "router"


def test_models_with_peft_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    hf = tiny("llama")
    hf.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(BasisError, match="carries PEFT adapters"):
        decompose(hf, k=4, progress=False)


def test_quantised_bases_are_refused() -> None:
    hf = tiny("llama")
    hf.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(BasisError, match="Decompose its original"):
        decompose(hf, k=4, progress=False)
    hf = tiny("llama")
    packed = hf.model.layers[1].mlp.up_proj
    packed.weight = nn.Parameter(packed.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(BasisError, match=r"torch\.int8: a quantised base"):
        decompose(hf, k=4, progress=False)


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(BasisError, match="not Linear"):
        decompose(nn.Linear(3, 3))

    class Bare(PreTrainedModel):
        _supports_sdpa = True

    hf = tiny("llama")
    with pytest.raises(BasisError, match="no list of decoder layers"):
        decompose(Bare(hf.config), progress=False)
    with torch.device("meta"):
        empty = type(hf)(hf.config)
    with pytest.raises(BasisError, match="meta device"):
        decompose(empty, k=4, progress=False)


# --- sensitivity


def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (2, 9), generator=draw) for _ in range(3)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sensitivity_keeps_the_directions_that_matter(name: str, attached: Callable[..., SpectralModel]) -> None:
    """The scores equal the squared gradients of full-spectrum offsets, batch by batch."""
    from svdexpert import Mixture

    full = attached(name, k="full")
    scores = torch.zeros(sum(full.basis.sizes))
    for ids in batches():
        offsets = torch.zeros_like(scores, requires_grad=True)
        with full.using(Mixture(offsets)):
            full.hf(ids, labels=ids).loss.backward()
        scores += offsets.grad**2
    hf = tiny(name)
    needed = [p.requires_grad for p in hf.parameters()]
    hf.train()
    sensitive = decompose(hf, k=5, support="sensitivity", calibration=batches(), progress=False)
    assert hf.training
    assert [p.requires_grad for p in hf.parameters()] == needed
    assert all(p.grad is None for p in hf.parameters())
    for path, part in zip(full.basis.names, scores.split(full.basis.sizes), strict=True):
        chosen = part.topk(5).indices.sort().values
        torch.testing.assert_close(sensitive.factors[path].s, full.basis.factors[path].s[chosen])


def test_sensitivity_is_cached_by_its_calibration_data(monkeypatch: pytest.MonkeyPatch) -> None:
    first = decompose(tiny("llama"), k=4, support="sensitivity", calibration=batches(), progress=False)
    monkeypatch.setattr(basis, "factorise", None)
    again = decompose(tiny("llama"), k=4, support="sensitivity", calibration=batches(), progress=False)
    assert all(torch.equal(first.factors[n].v, again.factors[n].v) for n in first.names)
    with pytest.raises(TypeError):
        decompose(tiny("llama"), k=4, support="sensitivity", calibration=batches()[:1], progress=False)
    with pytest.raises(BasisError, match="calibration"):
        decompose(tiny("llama"), k=4, support="sensitivity", progress=False)


def test_sensitivity_depends_on_all_weights_and_so_does_its_cache() -> None:
    settings = {"k": 4, "support": "sensitivity", "calibration": batches(), "progress": False}
    first = decompose(tiny("llama"), **settings)
    hf = tiny("llama")
    with torch.no_grad():
        hf.lm_head.weight.copy_(hf.lm_head.weight.flip(0))
    kept = decompose(hf, **settings)
    fresh = decompose(hf, **settings, cache=False)
    assert all(torch.equal(kept.factors[n].s, fresh.factors[n].s) for n in kept.names)
    assert any(not torch.equal(kept.factors[n].s, first.factors[n].s) for n in kept.names)


@pytest.mark.parametrize("ids", [torch.tensor([[5]]), torch.tensor([5, 6]), torch.rand(2, 4)])
def test_calibration_needs_a_next_token(ids: Tensor) -> None:
    with pytest.raises(BasisError, match=r"token ids \(b t\), t at least 2"):
        decompose(tiny("llama"), k=4, support="sensitivity", calibration=[ids], progress=False)


def test_calibration_that_moves_nothing_is_refused() -> None:
    hf = tiny("llama")
    hf.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(BasisError, match=r"does not move model\.layers\.1\.mlp"):
        decompose(hf, k=4, support="sensitivity", calibration=batches(), progress=False)


# --- the cache


def test_the_second_start_does_not_decompose(folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of()
    SpectralModel.from_pretrained(folder, k=8, progress=False)
    monkeypatch.setattr(basis, "factorise", None)
    monkeypatch.setattr(basis, "fingerprint", None)  # path, size and mtime of the files are trusted
    SpectralModel.from_pretrained(folder, k=8, progress=False)
    os.utime(next(folder.glob("*.safetensors")))
    with pytest.raises(TypeError):
        SpectralModel.from_pretrained(folder, k=8, progress=False)


def test_a_second_process_finds_the_cache(folder_of: Callable[..., Path], own_cache: Path) -> None:
    folder = folder_of(seed=5)
    script = (
        "import sys, torch; from svdexpert import SpectralModel, basis\n"
        "if sys.argv[2] == 'second': basis.factorise = None\n"
        "model = SpectralModel.from_pretrained(sys.argv[1], k=8, progress=False)\n"
        "print(sum(float(f.v.double().abs().sum()) for f in model.basis.factors.values()))\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    runs = [subprocess.run([*command, turn], capture_output=True, text=True) for turn in ("first", "second")]
    assert runs[0].returncode == runs[1].returncode == 0, runs[1].stderr
    assert runs[0].stdout == runs[1].stdout


def test_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDEXPERT_CACHE", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        sums = pool.map(decomposed_sum, range(2))
    assert sums[0] == sums[1]
    assert not list(tmp_path.rglob("*.tmp"))


def decomposed_sum(_: int) -> float:
    return sum(float(one.v.abs().sum()) for one in decompose(tiny("llama"), k=8, progress=False).factors.values())


def test_damaged_cache_entries_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDEXPERT_CACHE", str(tmp_path))
    first = decompose(tiny("llama"), k=8, progress=False)
    want = {name: one.u_t.clone() for name, one in first.factors.items()}
    del first  # its tensors are mapped from the files that are about to be damaged
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 14
    files[0].write_bytes(files[0].read_bytes()[:50])
    files[1].write_bytes(b"")
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:-4] + bytes(byte ^ 1 for byte in whole[-4:]))
    got = decompose(tiny("llama"), k=8, progress=False)
    assert all(torch.equal(want[name], got.factors[name].u_t) for name in want)


def test_without_a_cache_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDEXPERT_CACHE", str(tmp_path / "none"))
    free = decompose(tiny("llama"), k=8, cache=False, progress=False)
    assert not (tmp_path / "none").exists()
    assert free.factors[free.names[0]].v.isfinite().all()


def test_a_cache_that_cannot_be_written_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_of: Callable[..., Path]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SVDEXPERT_CACHE", str(tmp_path / "file"))
    folder = folder_of()
    with pytest.raises(BasisError, match="SVDEXPERT_CACHE"):
        decompose(tiny("llama"), k=8, progress=False)
    with pytest.raises(BasisError, match="SVDEXPERT_CACHE"):
        SpectralModel.from_pretrained(folder, k=8, progress=False)
    with pytest.raises(BasisError, match="SVDEXPERT_CACHE"):
        decompose(tiny("llama"), k=8, support="sensitivity", calibration=batches(), progress=False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_that_of_two_matrices(tmp_path: Path) -> None:
    """Beyond the model and what is kept, at most the full factors of two matrices (fp32) are held at a time."""
    script = Path(__file__).with_name("peak_memory.py")
    environment = os.environ | {"SVDEXPERT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["beyond_mib"] <= found["two_full_factors_mib"]

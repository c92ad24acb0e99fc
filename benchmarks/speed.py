"""What does a mixture in every row cost, beside the alternatives?

    python -m benchmarks.speed                          everything; benchmarks/results/speed.json
    python -m benchmarks.speed --quick                  every figure, few repetitions, under 50 s; writes nothing
    python -m benchmarks.speed --only='[decode]'        measure again what begins with `decode`, keep the rest

Every figure is printed beside its bar, met or missed. Figures of time are ratios of two ways to do the same thing,
taken in one process: in every round each way runs once, the first one rotating, and the figure is the median over the
rounds of that round's ratio. All ways of a cell share the storages of one set of random weights, so that they differ in
method only. Cells:

    512x8           Llama, hidden 512, 8 layers, 34 M parameters, 56 matrices, fp32; one thread, CPU time of the thread
    qwen05_bf16_t2  shape of Qwen2.5-0.5B, 168 matrices, bf16; two threads, wall time; names end in __qwen05_bf16_t2

Experts act on every layer in both. What touches the disk is in wall time everywhere.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # torch.set_num_threads does not reach scipy's own BLAS

import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from peft import (
    ArrowConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    XLoraConfig,
    create_arrow_model,
    get_peft_model,
    save_as_lora,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from benchmarks.provenance import commit, machine, versions
from svdexpert import Bank, Expert, Mixture, SpectralModel, decompose, export_lora
from svdexpert.basis import Rank
from svdexpert.cli import run_command
from svdexpert.layers import Form
from svdexpert.storage import whole_file

OUTPUT = "benchmarks/results/speed.json"
KS = (16, 64)
SEEDS = {"weights": 0, "adapters": 1, "tokens": 2, "mixtures": 3, "experts": "0 and up"}
PACKAGES = ("torch", "transformers", "peft", "svdexpert", "numpy", "scipy", "safetensors", "accelerate")

Step = Callable[[], object]


# --- cells: the models that are measured --------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One model, and how it is run."""

    config: PretrainedConfig
    dtype: torch.dtype
    threads: int
    prefill_rows: int
    train_rows: int


def _sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "bos_token_id": None,
        "eos_token_id": None,  # every generation has its full length
    }


_LLAMA = LlamaConfig(**_sizes(8192, 512, 1408, 8, 8, 8))
_QWEN = Qwen2Config(tie_word_embeddings=True, **_sizes(151936, 896, 4864, 24, 14, 2))
SHAPES = {
    "512x8": Shape(_LLAMA, torch.float32, threads=1, prefill_rows=16, train_rows=4),
    "qwen05_bf16_t2": Shape(_QWEN, torch.bfloat16, threads=2, prefill_rows=4, train_rows=2),
}
MAIN = "512x8"


class Cell:
    """The random weights of one shape, and the ways to adapt them; each way is a twin that shares the storages."""

    def __init__(self, name: str, quick: bool) -> None:
        self.name = name
        self.shape = SHAPES[name]
        self.quick = quick
        self._spectral: dict[tuple[Rank, Form], SpectralModel] = {}

    @cached_property
    def base(self) -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(self.shape.config, dtype=self.shape.dtype)
        model.eval()
        return model

    def twin(self) -> PreTrainedModel:
        """Return a copy of the base with its own modules and parameters on the same storages."""
        shared = {id(one): nn.Parameter(one.detach()) for one in self.base.parameters()}
        return deepcopy(self.base, shared)

    def spectral(self, k: Rank, form: Form = "delta") -> SpectralModel:
        if (k, form) not in self._spectral:
            # A quarter of the layers of a full decomposition is enough to see that it works.
            first = self.shape.config.num_hidden_layers * 3 // 4 if self.quick and k == "full" else 0
            self._spectral[k, form] = SpectralModel.attach(
                self.twin(), k=k, first_layer=first, form=form, progress=False
            )
        return self._spectral[k, form]

    def lora(self, adapters: int, *, like_weights: bool = True) -> PeftModel:
        """Return a PEFT model with random LoRAs "0", "1", ... of rank 16 on all matrices.

        Args:
            adapters: how many.
            like_weights: in the dtype of the weights, as our factors are; else fp32, PEFT's choice for training.
        """
        torch.manual_seed(1)
        lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(self.twin(), lora, "0", autocast_adapter_dtype=not like_weights)
        for one in range(1, adapters):
            model.add_adapter(str(one), lora, autocast_adapter_dtype=not like_weights)
        return model.eval()

    def tokens(self, rows: int, length: int) -> Tensor:
        draw = torch.Generator().manual_seed(2)
        return torch.randint(self.shape.config.vocab_size, (rows, length), generator=draw)  # (b t)

    def rounds(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def clock(self) -> Callable[[], float]:
        return time.thread_time if self.shape.threads == 1 else time.perf_counter


def bank_of(model: SpectralModel, experts: int) -> Bank:
    return model.bank({str(seed): Expert.random(model.basis, std=0.05, seed=seed) for seed in range(experts)})


def random_weights(*shape: int) -> Tensor:
    """Return weights over experts, (b e) or (b t e), that sum to 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)).log().neg().softmax(-1)


# --- clocks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """Seconds of every way, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def ratio(self, one: str, other: str) -> float:
        """Return the median over the rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(self.seconds[one], self.seconds[other], strict=True))

    def ms(self, one: str) -> float:
        return 1e3 * statistics.median(self.seconds[one])

    def details(self) -> dict[str, Any]:
        return {
            "rounds": len(next(iter(self.seconds.values()))),
            "median_ms": {name: self.ms(name) for name in self.seconds},
            "least_ms": {name: 1e3 * min(series) for name, series in self.seconds.items()},
            "most_ms": {name: 1e3 * max(series) for name, series in self.seconds.items()},
        }


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    clock: Callable[[], float],
    *,
    warm_up: int = 2,
    repeats: Mapping[str, int] | None = None,
) -> Timings:
    """Time ways to do the same thing, in turn.

    Args:
        steps: one call each.
        rounds: how often every way runs.
        clock: in seconds.
        warm_up: calls of each way before the first round.
        repeats: calls of a way in one round, where one is too short for the clock.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for one in range(rounds):
        first = one % len(names)
        for name in names[first:] + names[:first]:
            times = (repeats or {}).get(name, 1)
            step, start = steps[name], clock()
            for _ in range(times):
                step()
            seconds[name].append((clock() - start) / times)
    return Timings(seconds)


# --- sections -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    op: str
    value: float

    def met(self, figure: float) -> bool:
        return figure <= self.value if self.op == "<=" else figure >= self.value


at_most, at_least = partial(Bar, "<="), partial(Bar, ">=")

Figures = dict[str, float]
Details = dict[str, Any]
Measure = Callable[["Cell"], tuple[Figures, Details]]


@dataclass(frozen=True)
class Section:
    """Figures that are measured together. Bars hold in the first cell; in the others figures are stated."""

    name: str
    measure: Measure
    bars: Mapping[str, Bar | None]
    cells: Sequence[str] = (MAIN,)


SECTIONS: list[Section] = []


def section(cells: Sequence[str] = (MAIN,), **bars: Bar | None) -> Callable[[Measure], Measure]:
    """Register a function from a cell to its figures and details."""

    def register(measure: Measure) -> Measure:
        SECTIONS.append(Section(measure.__name__, measure, bars, cells))
        return measure

    return register


def decoding(forward: Callable[..., Any], prompts: Tensor) -> Step:
    """Return one decode step: a new token in every row on the cache of the prompts, which it leaves as it was."""
    cached = forward(input_ids=prompts, use_cache=True).past_key_values
    token = prompts[:, :1]

    def step() -> None:
        forward(input_ids=token, past_key_values=cached, use_cache=True)
        cached.crop(-1)

    return step


@section(
    cells=tuple(SHAPES),
    decode_mixed16_over_base_k16=at_most(1.10),
    decode_mixed16_over_base_k64=at_most(1.20),
    decode_peft16_over_ours_k16=at_least(2.5),
    decode_peft16_over_ours_k64=at_least(2.2),
    decode_bank64_over_bank2=at_most(1.02),
)
def decode(cell: Cell) -> tuple[Figures, Details]:
    """One new token in 16 rows, on 32 tokens of cache: 16 mixtures of 8 experts beside 16 LoRAs of PEFT."""
    prompts = cell.tokens(16, 32)
    peft = cell.lora(16)
    names = [str(one) for one in range(16)]
    with torch.inference_mode(), ExitStack() as stack:
        steps = {"base": decoding(cell.base, prompts)}
        for k in KS:
            model = cell.spectral(k)
            stack.enter_context(model.using(bank_of(model, 8).mix(random_weights(16, 8))))
            steps[f"ours_k{k}"] = decoding(model.hf, prompts)
        steps["peft"] = decoding(lambda **inputs: peft(adapter_names=names, **inputs), prompts)
        timings = interleaved(steps, cell.rounds(41, 3), cell.clock, warm_up=1)

        mixing = {str(n): mixing_each_step(model, steps["ours_k64"], n) for n in (2, 64)}
        # One round's ratio has an interquartile range of 0.1: the median of 81 came out between 0.998 and 1.025.
        banks = interleaved(mixing, cell.rounds(401 if cell.name == MAIN else 81, 3), cell.clock)
    figures = {f"decode_mixed16_over_base_k{k}": timings.ratio(f"ours_k{k}", "base") for k in KS}
    figures |= {f"decode_peft16_over_ours_k{k}": timings.ratio("peft", f"ours_k{k}") for k in KS}
    figures["decode_bank64_over_bank2"] = banks.ratio("64", "2")
    return figures, {"steps": timings.details(), "experts in the bank": banks.details()}


def mixing_each_step(model: SpectralModel, step: Step, experts: int) -> Step:
    bank, weights = bank_of(model, experts), random_weights(16, experts)

    def mixed() -> None:
        with model.using(bank.mix(weights)):
            step()

    return mixed


@section(
    cells=tuple(SHAPES),
    prefill_rows_over_base_k16=None,
    prefill_rows_over_base_k64=at_most(1.20),
    prefill_tokens_over_base_k16=None,
    prefill_tokens_over_base_k64=at_most(1.25),
)
def prefill(cell: Cell) -> tuple[Figures, Details]:
    """A prompt of 128 tokens a row, a mixture of 8 experts for every row or every token; mixing them is in the time.

    Only the last token's logits are computed, as generation does: a smaller base to compare with than all of them.
    """
    rows = 2 if cell.quick else cell.shape.prefill_rows
    inputs = {"input_ids": cell.tokens(rows, 128), "use_cache": True, "logits_to_keep": 1}
    by_row, by_token = random_weights(rows, 8), random_weights(rows, 128, 8)
    steps: dict[str, Step] = {"base": lambda: cell.base(**inputs)}
    for k in KS:
        steps[f"rows_k{k}"] = prefilling(cell.spectral(k), inputs, by_row)
        steps[f"tokens_k{k}"] = prefilling(cell.spectral(k), inputs, by_token)
    with torch.inference_mode():
        timings = interleaved(steps, cell.rounds(9, 2), cell.clock, warm_up=1)
    figures = {
        f"prefill_{w}_over_base_k{k}": timings.ratio(f"{w}_k{k}", "base") for w in ("rows", "tokens") for k in KS
    }
    return figures, {"batch": f"{rows} x 128 tokens"} | timings.details()


def prefilling(model: SpectralModel, inputs: Mapping[str, Any], weights: Tensor) -> Step:
    bank = bank_of(model, 8)

    def step() -> None:
        with model.using(bank.mix(weights)):
            model.hf(**inputs)

    return step


# --- training -----------------------------------------------------------------------------------------------------


def training(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Step:
    """Return one step of AdamW on a loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def training_ours(model: SpectralModel, batch: Mapping[str, Any]) -> Step:
    offsets = torch.zeros(sum(model.basis.sizes), requires_grad=True)  # (n)
    model.hf.train()

    def loss() -> Tensor:
        with model.using(Mixture(offsets)):
            return model.hf(**batch).loss  # type: ignore[no-any-return]

    return training(loss, [offsets])


def training_lora(model: PeftModel, batch: Mapping[str, Any]) -> Step:
    model.train()
    return training(lambda: model(**batch).loss, [one for one in model.parameters() if one.requires_grad])


def training_recomposed(cell: Cell, batch: Mapping[str, Any], *, dense: bool) -> Step:
    """Return a step that recomposes every W = U diag(s z) V^T, with gradients to z only.

    Args:
        cell: of the model.
        batch: inputs and labels.
        dense: multiply by diag(s z) as a dense matrix, as the released Transformer^2 does; else scale the columns of U.
    """
    model = cell.twin().requires_grad_(False).train()
    factors = {
        f"{name}.weight": (one.u_t.T.contiguous(), one.s.clone(), one.v.T.contiguous())
        for name, one in cell.spectral("full", "factored").basis.factors.items()
    }
    scales = {name: torch.ones_like(s, requires_grad=True) for name, (_, s, _) in factors.items()}

    def loss() -> Tensor:
        weights = {}
        for name, (u, s, vt) in factors.items():
            c = s * scales[name]  # (k)
            weights[name] = (u @ c.diag() if dense else u * c) @ vt  # (o i)
        return functional_call(model, weights, args=(), kwargs=dict(batch)).loss  # type: ignore[no-any-return]

    return training(loss, list(scales.values()))


def batch_of(cell: Cell, rows: int) -> dict[str, Any]:
    ids = cell.tokens(rows, 64)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


@section(
    cells=tuple(SHAPES),
    train_over_lora16_k16=at_most(1.00),
    train_over_lora16_k64=at_most(1.10),
    train_recompose_over_full=at_least(1.6),
)
def train(cell: Cell) -> tuple[Figures, Details]:
    """Forward, loss, backward and AdamW: our offsets beside PEFT's LoRA r16, and beside recomposing W each step.

    Recomposing is charged at its cheapest, the columns of U scaled; the released code's dense diagonal is in details.
    """
    rows = 1 if cell.quick else cell.shape.train_rows
    batch = batch_of(cell, rows)
    steps = {f"ours_k{k}": training_ours(cell.spectral(k), batch) for k in KS}
    steps["lora16"] = training_lora(cell.lora(1, like_weights=False), batch)
    timings = interleaved(steps, cell.rounds(15, 1), cell.clock, warm_up=1)
    figures = {f"train_over_lora16_k{k}": timings.ratio(f"ours_k{k}", "lora16") for k in KS}
    details: dict[str, Any] = {"batch": f"{rows} x 64 tokens", "steps": timings.details()}
    if cell.name != MAIN:
        details["left out"] = "train_recompose_over_full: minutes of full decomposition, and all factors in memory"
    else:
        full: dict[str, Step] = {
            "full": training_ours(cell.spectral("full", "factored"), batch),
            "recompose": training_recomposed(cell, batch, dense=False),
        }
        if not cell.quick:
            full["recompose, dense diagonal"] = training_recomposed(cell, batch, dense=True)
        recompose = interleaved(full, cell.rounds(9, 1), cell.clock, warm_up=1)
        figures["train_recompose_over_full"] = recompose.ratio("recompose", "full")
        details["full spectrum"] = recompose.details()
    for k in KS:
        cell.spectral(k).hf.eval()
    return figures, details


@section(train_peak_over_lora16_k64=at_most(1.00))
def train_peak(cell: Cell) -> tuple[Figures, Details]:
    """Peak resident memory of training, in a fresh process each; both import the same packages."""
    cell.spectral(64)  # decomposed before: its factors are on disk
    ways = ("ours_k64", "lora16")
    calls = [(cell.name, way) for way in ways] * cell.rounds(3, 1)
    memory = in_fresh_processes(memory_of_training, calls, threads=cell.shape.threads, quick=cell.quick)
    runs = {way: memory[position :: len(ways)] for position, way in enumerate(ways)}
    peaks = [[one["peak_mb"] for one in runs[way]] for way in ways]
    ratio = statistics.median(ours / lora for ours, lora in zip(*peaks, strict=True))
    return {"train_peak_over_lora16_k64": ratio}, {"processes": runs}


def memory_of_training(name: str, way: str) -> dict[str, float]:
    """Train a few steps in this process and return its memory, in MB."""
    torch.set_num_threads(SHAPES[name].threads)
    cell = Cell(name, quick=True)
    batch = batch_of(cell, cell.shape.train_rows)
    if way == "ours_k64":
        step = training_ours(cell.spectral(64), batch)
    else:
        step = training_lora(cell.lora(1, like_weights=False), batch)
    loaded = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for _ in range(3):  # the state of AdamW is there from the second on
        step()
    peak = status("VmHWM")
    return {"loaded_mb": loaded, "peak_mb": peak, "peak_minus_loaded_mb": peak - loaded}


def status(field_: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field_))


def in_fresh_processes(
    function: Callable[..., Any], calls: Sequence[tuple[object, ...]], *, threads: int, quick: bool
) -> list[Any]:
    """Return the result of every call, each made in a process of its own; as many at a time as there are cores."""
    # Quick runs fork from one process that has done the imports, which are most of a short process's time.
    start = multiprocessing.get_context("forkserver" if quick else "spawn")
    start.set_forkserver_preload(["torch", "transformers", "peft", "svdexpert.model"])
    with (
        patch.dict(os.environ, OPENBLAS_NUM_THREADS=str(threads)),
        ProcessPoolExecutor(os.cpu_count(), start, max_tasks_per_child=1) as pool,
    ):
        return [one.result() for one in [pool.submit(function, *call) for call in calls]]


# --- switching, exporting, storing, decomposing ---------------------------------------------------------------------


@section(cells=tuple(SHAPES), switch_ms=at_most(0.25), switch_peft_over_ours=at_least(50))
def switch(cell: Cell) -> tuple[Figures, Details]:
    """Another mixture of 8 experts in force, and out again, beside PEFT's set_adapter among 32 LoRAs."""
    model, peft = cell.spectral(64), cell.lora(32)
    bank = bank_of(model, 8)
    mixtures = itertools.cycle([dict(zip(bank.names, row.tolist(), strict=True)) for row in random_weights(4, 8)])
    adapters = itertools.cycle([str(one) for one in range(32)])

    def ours() -> None:
        with model.using(bank.mix(next(mixtures))):
            pass

    steps = {"ours": ours, "peft": lambda: peft.set_adapter(next(adapters))}
    timings = interleaved(steps, cell.rounds(21, 5), cell.clock, repeats={"ours": 100})
    figures = {"switch_ms": timings.ms("ours"), "switch_peft_over_ours": timings.ratio("peft", "ours")}
    return figures, timings.details()


@section(cells=tuple(SHAPES), export_ms=at_most(50), export_ms_k16=None, export_peft_over_ours=at_least(50))
def export(cell: Cell) -> tuple[Figures, Details]:
    """A mixture as a LoRA folder on disk, beside PEFT's conversion of a LoHa r16 to the same rank; wall time."""
    mixtures = {}
    for k in KS:
        basis = cell.spectral(k).basis
        mixtures[k] = 0.7 * Expert.random(basis, seed=0) + 0.3 * Expert.random(basis, seed=1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        free = (Path(folder) / str(one) for one in itertools.count())

        def exporting(k: int) -> None:
            export_lora(mixtures[k], cell.spectral(k), next(free))

        ours: dict[str, Step] = {f"ours_k{k}": partial(exporting, k) for k in KS}
        alone = interleaved(ours, cell.rounds(15, 3), time.perf_counter)
        figures = {"export_ms": alone.ms("ours_k64"), "export_ms_k16": alone.ms("ours_k16")}
        if cell.name != MAIN:
            return figures, alone.details() | {"left out": "export_peft_over_ours: one conversion takes minutes"}
        loha = get_peft_model(cell.twin(), LoHaConfig(r=16, alpha=16, target_modules="all-linear", init_weights=False))
        steps = {"ours_k64": ours["ours_k64"], "peft": lambda: save_as_lora(next(free), loha, rank=64)}
        both = interleaved(steps, cell.rounds(7, 1), time.perf_counter, warm_up=cell.rounds(1, 0))
    figures["export_peft_over_ours"] = both.ratio("peft", "ours_k64")
    return figures, {"ours": alone.details(), "beside PEFT": both.details()}


@section(cells=tuple(SHAPES), lora_bytes_over_expert_k16=at_least(100), lora_bytes_over_expert_k64=at_least(50))
def size(cell: Cell) -> tuple[Figures, Details]:
    """Bytes on disk: the tensors of a PEFT LoRA r16 beside the whole folder of an expert."""
    with tempfile.TemporaryDirectory() as folder:
        cell.lora(1).save_pretrained(f"{folder}/lora", selected_adapters=["0"])
        details = {"lora16_bytes": sum(one.stat().st_size for one in Path(folder).rglob("adapter_model.safetensors"))}
        for k in KS:
            saved = Expert.random(cell.spectral(k).basis).save(f"{folder}/k{k}")
            details[f"k{k}_bytes"] = sum(one.stat().st_size for one in saved.iterdir())
    return {f"lora_bytes_over_expert_k{k}": details["lora16_bytes"] / details[f"k{k}_bytes"] for k in KS}, details


@section(decompose_first_s=None, decompose_cached_s=at_most(2))
def decomposing(cell: Cell) -> tuple[Figures, Details]:
    """decompose() of the shape of Qwen2.5-0.5B in bf16, all layers, k = 64: into an empty cache, then out of it.

    Two threads, wall time, a fresh process each; loading the model is not in the time, hashing its weights is.
    """
    name = MAIN if cell.quick else "qwen05_bf16_t2"
    threads = SHAPES[name].threads
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(1 + cell.rounds(7, 1)):  # one after the other
            calls = [(name, folder)]
            seconds += in_fresh_processes(seconds_of_decomposing, calls, threads=threads, quick=cell.quick)
    first, *cached = seconds
    figures = {"decompose_first_s": first, "decompose_cached_s": statistics.median(cached)}
    return figures, {"shape": name, "threads": threads, "first_s": first, "cached_s": cached}


def seconds_of_decomposing(name: str, folder: str) -> float:
    torch.set_num_threads(SHAPES[name].threads)
    model = Cell(name, quick=True).base
    with patch.dict(os.environ, SVDEXPERT_CACHE=folder):
        start = time.perf_counter()
        decompose(model, k=64, first_layer=0, progress=False)
        return time.perf_counter() - start


# --- generation ---------------------------------------------------------------------------------------------------


@section(generate_xlora_over_ours_k64=at_least(12), generate_arrow_over_ours_k64=at_least(1.4))
def generate(cell: Cell) -> tuple[Figures, Details]:
    """128 greedy tokens in 4 rows, 4 experts mixed in every row, beside routed LoRAs of PEFT: X-LoRA and Arrow."""
    prompts = cell.tokens(4, 16)
    length = 2 if cell.quick else 128
    model = cell.spectral(64)
    mixture = bank_of(model, 4).mix(random_weights(4, 4))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        with torch.inference_mode(False):
            cell.lora(4).save_pretrained(folder)
            places = [f"{folder}/{one}" for one in range(4)]
            arrow = create_arrow_model(cell.twin(), places, ArrowConfig(top_k=2)).eval()
            xlora = xlora_model(cell, places)
        settings: dict[str, Any] = {
            "attention_mask": torch.ones_like(prompts),
            "max_new_tokens": length,
            "do_sample": False,
        }
        bare: Any = cell.base
        steps: dict[str, Callable[[], Any]] = {
            "base": lambda: bare.generate(input_ids=prompts, **settings),
            "ours_k64": lambda: model.generate(prompts, mixture, **settings),
            "arrow": lambda: arrow.generate(input_ids=prompts, **settings),
            "xlora": lambda: xlora.generate(input_ids=prompts, **settings),
        }
        for name, step in steps.items():  # warm-up, too
            made = tuple(step().shape)
            if made != (4, 16 + length):
                raise RuntimeError(f"{name} generated {made}, not {(4, 16 + length)}: the times would not compare.")
        timings = interleaved(steps, cell.rounds(7, 1), cell.clock, warm_up=0)
    figures = {f"generate_{peer}_over_ours_k64": timings.ratio(peer, "ours_k64") for peer in ("xlora", "arrow")}
    return figures, {"new tokens": length, "ours_over_base": timings.ratio("ours_k64", "base")} | timings.details()


def xlora_model(cell: Cell, places: Sequence[str]) -> PeftModel:
    """Return X-LoRA over saved LoRAs; it refuses a model with a KV cache."""
    base = cell.twin()
    base.config.use_cache = False
    adapters = {str(one): place for one, place in enumerate(places)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters)
    return get_peft_model(base, config).eval()


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """What is known so far; figures that are not measured again keep their value, details say when they were taken."""

    figures: Figures = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Results:
        if path is None or not path.exists():
            return cls()
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["figures"], found["details"])

    def write(self, path: Path) -> None:
        document = {
            "figures": {name: self.figures[name] for name in known_figures() if name in self.figures},
            "bars": {name: {"op": bar.op, "value": bar.value} for name, bar in known_figures().items() if bar},
            "details": self.details,
            "versions": versions(PACKAGES),
            "machine": machine() | {"threads": {name: shape.threads for name, shape in SHAPES.items()}},
            "seeds": SEEDS,
            "commit": commit(),
            "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@cache
def known_figures() -> dict[str, Bar | None]:
    """Return the bar of every figure, in the order of measuring."""
    return {
        figure_name(figure, cell): bar if cell == MAIN else None
        for cell in SHAPES
        for one in SECTIONS
        if cell in one.cells
        for figure, bar in one.bars.items()
    }


def figure_name(figure: str, cell: str) -> str:
    return figure if cell == MAIN else f"{figure}__{cell}"


def show(results: Results, quick: bool) -> None:
    table = Table(title="What a mixture in every row costs" + (", quick: not for quoting" if quick else ""))
    for column in ("figure", "value", "bar", "met?"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, bar in known_figures().items():
        value = results.figures.get(name)
        if value is None and (quick or name.partition("__")[2]):
            continue
        met = "" if bar is None or value is None else "yes" if bar.met(value) else "[bold red]no"
        limit = f"{bar.op} {bar.value:g}" if bar else "stated"
        table.add_row(name, "not measured" if value is None else f"{value:.4g}", limit, met)
    Console(width=100).print(table)


def main(
    quick: bool = False, cells: list[str] | None = None, only: list[str] | None = None, output: str = OUTPUT
) -> None:
    """Measure, print and store what mixtures cost.

    Args:
        quick: few repetitions of the first cell; the file at the default output is left alone.
        cells: names of cells; all if None.
        only: beginnings of figure names; their sections are measured, other figures stay as they are in the file.
        output: JSON file, completed after every section.
    """
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    console = Console(stderr=True)
    path = None if quick and output == OUTPUT else Path(output)
    results = Results.read(path)
    failed = []
    with (
        tempfile.TemporaryDirectory() as factors,
        patch.dict(os.environ, SVDEXPERT_CACHE=factors, PYTHONWARNINGS="ignore"),
    ):
        for name in cells or ([MAIN] if quick else list(SHAPES)):
            cell = Cell(name, quick)
            torch.set_num_threads(cell.shape.threads)
            for one in SECTIONS:
                wanted = not only or any(figure.startswith(tuple(only)) for figure in one.bars)
                if not wanted or name not in one.cells:
                    continue
                start = time.perf_counter()
                try:
                    figures, details = one.measure(cell)
                except Exception as error:  # the other sections of a long run are still worth having
                    console.print_exception()
                    failed.append(f"{one.name} in {name}")
                    figures, details = {}, {"failed": f"{type(error).__name__}: {error}"}
                taken = {"commit": commit(), "took_s": round(time.perf_counter() - start, 1)}
                for figure in one.bars:
                    results.figures.pop(figure_name(figure, name), None)
                results.figures |= {figure_name(figure, name): value for figure, value in figures.items()}
                results.details[figure_name(one.name, name)] = details | taken
                console.print(f"{one.name} in {name}: {taken['took_s']} s")
                if path is not None:
                    results.write(path)
    show(results, quick)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    run_command(main, Path(__file__).name)

"""What training costs beside the alternatives; `benchmarks.peers` writes these figures.

batch4_lora_over_ours   a step of four experts in one batch on harbor, 16 tokens a row: four steps of PEFT LoRA r16,
                        each on its own rows, over one of ours; medians of interleaved rounds
dpo_peak_over_trl       DPO on the shape of Qwen2.5-0.5B, fp32, 2 pairs of 64 tokens: our peak memory above the
                        level before loading, over that of TRL's DPOTrainer, which trains the same offsets of the
                        same basis beside an explicit reference copy; each in a process of its own
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from benchmarks.speed import SHAPES, Step, in_fresh_processes, interleaved, status, training
from svdexpert import Mixture, Recipe, SpectralModel
from svdexpert.examples import Example, Examples
from svdexpert.model import check_base
from svdexpert.training import ExpertModule, Task, fit, trainer_of

EXPERTS, TOKENS = 4, 16
ROWS = (1, 4, 16)  # of an expert in a step
HALF = 32  # tokens of a prompt, and of a completion: pairs of 64
STEPS = 3
SHAPE = "qwen05_bf16_t2"


# --- four experts in one batch


def four_in_one_batch(rounds: int = 40) -> dict[str, Any]:
    """Return four steps of PEFT over one of ours, for ROWS rows of every expert, and the times."""
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    for rows in ROWS:
        ours, lora = SpectralModel.from_pretrained("harbor", progress=False), lora_like_ours(16)
        ids = torch.randint(ours.hf.config.vocab_size, (EXPERTS * rows, TOKENS))
        steps = {"ours": of_ours(ours, ids), "lora": of_lora(lora, ids)}
        timings = interleaved(steps, rounds, time.perf_counter)
        found[str(rows)] = {"lora_over_ours": timings.ratio("lora", "ours"), **timings.details()}
    return found


def of_ours(model: SpectralModel, ids: Tensor) -> Step:
    """Return a step of all experts, each on its own rows."""
    offsets = torch.zeros(EXPERTS, sum(model.basis.sizes), requires_grad=True)  # (e n)
    mine = torch.eye(EXPERTS).repeat_interleave(len(ids) // EXPERTS, 0)  # (b e)

    def loss() -> Tensor:
        with model.using(Mixture(mine @ offsets)):
            return model.hf(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return training(loss, [offsets])


def of_lora(models: list[Any], ids: Tensor) -> Step:
    """Return a step of every adapter on its own rows, one after the other."""
    steps = []
    for model, own in zip(models, ids.chunk(EXPERTS), strict=True):
        parameters = [one for one in model.parameters() if one.requires_grad]
        steps.append(training(lambda model=model, own=own: model(input_ids=own, labels=own).loss, parameters))

    def step() -> None:
        for one in steps:
            one()

    return step


def lora_like_ours(rank: int) -> list[Any]:
    """Return harbor with a LoRA on the matrices that our experts touch, once an expert."""
    basis = SpectralModel.from_pretrained("harbor", progress=False).basis
    base = AutoModelForCausalLM.from_pretrained(check_base("harbor"), dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(basis.names))
    return [get_peft_model(deepcopy(base), config) for _ in range(EXPERTS)]


# --- memory of DPO


def dpo_memory(rounds: int = 3) -> dict[str, Any]:
    """Return our peak over TRL's, and those of every process."""
    SpectralModel.attach(base(), k=64, progress=False)  # its factors are on disk from here on
    ways = ("ours", "trl")
    calls = [(way,) for _ in range(rounds) for way in ways]
    peaks = [in_fresh_processes(dpo_peak, [call], threads=2, quick=False)[0] for call in calls]  # one at a time
    by_way = {way: peaks[place :: len(ways)] for place, way in enumerate(ways)}
    ratio = statistics.median(one / other for one, other in zip(by_way["ours"], by_way["trl"], strict=True))
    return {"ours_over_trl": ratio, "peak_mb": by_way}


def base() -> Any:
    """Return random weights of the shape, always the same."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SHAPES[SHAPE].config, dtype=torch.float32).eval()


def dpo_peak(way: str) -> float:
    """Train offsets by DPO in this process; return its peak above the level before loading, in MB."""
    before = status("VmRSS")
    {"ours": train_ours, "trl": train_with_trl}[way]()
    return status("VmHWM") - before


def pairs() -> list[Mapping[str, list[int]]]:
    draw = torch.Generator().manual_seed(1)
    keys = ("prompt", "chosen", "rejected")
    return [{key: torch.randint(1, 1000, (HALF,), generator=draw).tolist() for key in keys} for _ in range(2)]


def train_ours() -> None:
    model = SpectralModel.attach(base(), k=64, progress=False)
    rows = tuple(
        Example(
            id=str(place),
            positive=None,
            context="",
            prompt=one["prompt"],
            chosen=["chosen"],
            chosen_ids=[one["chosen"]],
            rejected=["rejected"],
            rejected_ids=[one["rejected"]],
            errors=[""],
            own_ids=[],
        )
        for place, one in enumerate(pairs())
    )
    task = Task("pairs", "pairs.jsonl", None, Examples("pairs", rows))
    recipe = Recipe(steps=STEPS, warmup=0, batch_size=2, neutral=0.0, validation_cases=0)
    with TemporaryDirectory() as folder:
        module = ExpertModule(model, [task], {}, "dpo", recipe, [], Path(folder))
        fit(module, trainer_of(Path(folder), recipe, {"accelerator": "cpu"}, progress=False), Path(folder))


class OffsetTrainer(DPOTrainer):
    """TRL's trainer, with an expert in force in the policy."""

    spectral: SpectralModel
    offsets: nn.Parameter

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self.spectral.using(Mixture(self.offsets)):
            return super().compute_loss(*args, **kwargs)


def train_with_trl() -> None:
    reference, policy = base(), base()
    model = SpectralModel.attach(policy, k=64, progress=False)
    policy.requires_grad_(False)
    policy.register_parameter("offsets", nn.Parameter(torch.zeros(sum(model.basis.sizes))))
    words = {f"w{number}": number for number in range(1000)}
    level = Tokenizer(models.WordLevel(words, unk_token="w0"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, pad_token="w0", eos_token="w0")
    texts = [{key: " ".join(f"w{number}" for number in ids) for key, ids in one.items()} for one in pairs()]
    with TemporaryDirectory() as folder:
        trainer = OffsetTrainer(
            policy,
            reference,
            DPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=2,
                max_steps=STEPS,
                gradient_checkpointing=False,
                max_length=2 * HALF,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
        )
        trainer.spectral, trainer.offsets = model, policy.offsets
        trainer.train()

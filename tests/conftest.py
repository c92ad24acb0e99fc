"""Tiny random models, one an architecture, and what tests do with them. Nothing here needs a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# No hub; and one thread, because tiny models gain nothing from two and spin where the machine is busy. Both are read
# when huggingface_hub and torch are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from svdexpert import Expert, SpectralModel

settings.register_profile("no-deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no-deadline")

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "mixtral": _MOE,
    "qwen3_moe": _MOE | {"head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
}


def tiny(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model of three layers, width 32, with weights large enough that directions matter."""
    config = AutoConfig.for_model(name, **(_SMALL | ARCHITECTURES[name] | changes))
    transformers.set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def byte_tokenizer(size: int = 96) -> PreTrainedTokenizerFast:
    """Return a tokenizer of printable ASCII characters with a chat template that knows tools."""
    special = ["<pad>", "<bos>", "<eos>"]
    letters = [chr(code) for code in range(32, 126)][: size - len(special)]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="?"
    )
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
        "{% for message in messages %}{{ message['role'][0] }}: {{ message['content'] }}{{ ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    return tokenizer


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep factors in a folder of this test run."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("SVDEXPERT_CACHE")
    os.environ["SVDEXPERT_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SVDEXPERT_CACHE")
    if before is not None:
        os.environ["SVDEXPERT_CACHE"] = before


@pytest.fixture(autouse=True)
def seeded() -> None:
    transformers.set_seed(0)


@pytest.fixture
def attached() -> Iterator[Callable[..., SpectralModel]]:
    """Return a function that makes a tiny model of an architecture and attaches it; all are detached at the end."""
    models: list[SpectralModel] = []

    def make(name: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any) -> SpectralModel:
        settings = {"k": 8, "progress": False} | options
        model = SpectralModel.attach(tiny(name).to(dtype), byte_tokenizer(), **settings)
        models.append(model)
        return model

    yield make
    for model in models:
        model.detach()


@pytest.fixture
def model(attached: Callable[..., SpectralModel]) -> SpectralModel:
    return attached()


@pytest.fixture
def experts(model: SpectralModel) -> dict[str, Expert]:
    return {name: Expert.random(model.basis, std=0.3, seed=seed) for seed, name in enumerate(("ask", "doubt", "call"))}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 96, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a tiny model with its tokenizer and returns the folder."""

    def make(name: str = "llama", **changes: Any) -> Path:
        folder = tmp_path / name
        tiny(name, **changes).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make

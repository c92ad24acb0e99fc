"""One tiny base for all attacks, and a sound expert of it to copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from attacks.mutations import attach, save_sound, tiny_llama
from svdexpert import SpectralModel


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDEXPERT_CACHE", str(tmp_path_factory.mktemp("factors")))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(fresh_cache: None) -> Iterator[SpectralModel]:
    with attach(tiny_llama()) as model:
        yield model


@pytest.fixture(scope="module")
def sound(base: SpectralModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sound(base, tmp_path_factory.mktemp("sound") / "expert")


@pytest.fixture
def victim(sound: Path, tmp_path: Path) -> Path:
    """A fresh copy of the sound expert, alone in a folder."""
    return Path(shutil.copytree(sound, tmp_path / "library" / "victim"))


@pytest.fixture
def untouched(base: SpectralModel) -> Iterator[Callable[[], torch.Tensor]]:
    """Hold the test to leaving every weight and every logit as it was; gives the logits now."""
    prompts = torch.arange(12).view(2, 6)
    weights = {name: one.clone() for name, one in base.hf.state_dict().items()}
    before = base.logits(prompts)
    yield lambda: base.logits(prompts)
    after = base.hf.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], one) for name, one in weights.items())
    assert torch.equal(base.logits(prompts), before)

"""What the benchmarks of training are built of: the grid of runs, peers, parts of skills, choosing an objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from peft import LoraConfig, get_peft_model

from benchmarks import compose, grid, objectives
from benchmarks.grid import Grid
from benchmarks.lora_bank import LoraBank, LoraMixture
from svdexpert import SpectralModel, skills, worlds


def test_a_run_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"doing": 0.5}

    for _ in range(2):
        opened = Grid.open("some", {"doing": (">=", 0.9)})
        assert opened.once({"skill": "call", "seed": 0}, make)["doing"] == 0.5
    assert len(made) == 1
    assert opened.find(skill="call")
    assert not opened.find(skill="call", seed=1)
    monkeypatch.setattr(grid, "weights", lambda: "others")
    assert not Grid.open("some", {}).rows  # a run on other weights of harbor says nothing about these


def test_a_bank_of_adapters_is_what_peft_computes() -> None:
    """Rows of the bank: an adapter, another, their sum at weights; PEFT one after the other, merged by hand."""
    base = tiny("llama")
    model = SpectralModel.attach(tiny("llama"), k=4, progress=False)
    bank = LoraBank(model, rank=2)
    numbers = torch.randn(2, bank.size, generator=torch.Generator().manual_seed(0)) * 0.1
    lora = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=list(model.basis.names))).eval()
    ids = torch.arange(6)[None] + 3

    def of_peft(flat: torch.Tensor) -> torch.Tensor:
        for name, (o, i) in bank.shapes.items():
            part = flat[bank.places[name]]
            layer = lora.base_model.model.get_submodule(name)
            layer.lora_A.default.weight.data = part[: 2 * i].view(2, i)
            layer.lora_B.default.weight.data = part[2 * i :].view(o, 2)
        with torch.no_grad():
            return lora(ids).logits

    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    with torch.no_grad(), bank.using(LoraMixture(weights, numbers)):
        found = model.hf(ids.repeat(3, 1)).logits
    torch.testing.assert_close(found[:1], of_peft(numbers[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:2], of_peft(numbers[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2:], of_peft(torch.zeros(bank.size)), rtol=1e-4, atol=1e-5)
    bank.close()


def test_parts_of_skills_are_even_and_of_their_kind() -> None:
    town = worlds.load("town")
    families: set[str] = set()
    for name in compose.PARTS:
        cases = skills.load(name).cases(town, "train", 24, seed=0)
        assert [case.positive for case in cases] == [True, False] * (len(cases) // 2)
        assert len(cases) == 24
        called = {case.truth["call"]["name"] for case in cases if case.positive and case.skill == "call"}
        assert not called & families
        families |= called


def test_the_best_objective_is_chosen_in_validation() -> None:
    def row(objective: str, validation: float, doing: float) -> dict[str, Any]:
        run = {"skill": "clarify", "objective": objective, "seed": 0, "n": 2, "explores": ""}
        same = dict.fromkeys(("controls", "knowing_change", "drift", "seconds"), 1.0)
        return {
            "run": run,
            "validation": validation,
            "doing": doing,
            "off_skill": {"doing_call": 0.0, "max": 0.0},
            "numbers": 4,
            "checkpoint_bytes": 8,
            **same,
        }

    found = objectives.figures([row("sft", 0.9, 0.6), row("dpo", 0.8, 0.7)])
    assert found["best_doing_clarify"] == 0.6
    assert found["doing_clarify_dpo"] == 0.7

"""What the benchmarks of training are built of: the grid of runs, peers, parts of skills, choosing an objective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from peft import LoraConfig, get_peft_model

from benchmarks import compose, grid, interference, objectives, register, sgd, suite
from benchmarks.grid import Grid, Job, losses
from benchmarks.lora_bank import LoraBank, LoraMixture
from svdexpert import SpectralModel, skills, worlds
from svdexpert.decision import Asked, Context
from svdexpert.dispatch import Example


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


def square(value: int) -> dict[str, Any]:
    if value < 0:
        raise ValueError("no square")
    return {"square": value * value}


def test_runs_are_shared_out_and_kept_as_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    opened = Grid.open("some", {})
    opened.once({"value": 2}, square, value=2)
    with pytest.raises(ValueError, match="no square"):
        opened.all([Job({"value": value}, square, {"value": value}) for value in (2, 3, -1)], workers=1)
    again = Grid.open("some", {})
    assert sorted(row["square"] for row in again.rows) == [4, 9]


def test_a_loss_is_the_largest_fall() -> None:
    before = {"call": {"doing": 0.9, "controls": 1.0, "knowing": 0.5}}
    after = {"call": {"doing": 0.8, "controls": 1.0, "knowing": 0.6}}
    found = losses(before, after, ["call"])
    assert found == {"doing_call": 0.1, "controls_call": 0.0, "knowing_call": -0.1, "max": 0.1}


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


def test_the_best_objective_is_chosen_in_validation(tmp_path: Path) -> None:
    def row(objective: str, validation: float, doing: float) -> dict[str, Any]:
        run = {"skill": "clarify", "objective": objective, "seed": 0, "n": 2, "explores": ""}
        same = dict.fromkeys(("controls", "knowing_change", "drift"), 1.0)
        return {
            "run": run,
            "validation": validation,
            "doing": doing,
            "off_skill": {"doing_call": 0.0, "max": 0.0},
            "numbers": 4,
            "checkpoint_bytes": 8,
            **same,
        }

    found = objectives.figures(Grid(tmp_path / "some.json", [row("sft", 0.9, 0.6), row("dpo", 0.8, 0.7)], {}, {}))
    assert found["best_doing_clarify"] == 0.6
    assert found["doing_clarify_dpo"] == 0.7


def test_a_suite_has_equal_parts_and_knows_what_is_right() -> None:
    items = suite.suite(worlds.load("town"), "validation", 4)
    assert [one.kind for one in items] == [kind for kind in suite.KINDS for _ in range(4)]
    for one in items:
        gold = one.case.knowing.answer if one.kind == "plain question" else one.case.gold[0]
        assert one.right(gold), (one.kind, gold)
        assert not one.right("Hm" if one.kind == "plain question" else one.case.bad[0].reply)


def test_a_bag_of_words_reads_words_alone() -> None:
    def example(words: str, *wanted: str) -> Example:
        return Example(Context(({"role": "user", "content": words},)), frozenset(wanted))

    rows = [
        example(f"{word} {place}", *who) for place in range(4) for word, *who in (("taxi", "call"), ("moon", "ask"))
    ]
    rows += [example(f"tea {place}") for place in range(4)]
    bag = register.bag_of_words(rows, ("call", "ask"))
    ids = torch.zeros(3, 1, dtype=torch.long)
    contexts = [example(words).context for words in ("taxi 9", "moon 9", "tea 9")]
    chosen = [one.chosen for one in bag.decide(None, Asked(contexts, ids, ids + 1))]
    assert chosen == [{"call"}, {"ask"}, frozenset()]


def test_figures_of_the_register_are_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    opened = Grid.open("register", register.BARS)
    for seed, accuracy in ((0, 0.8), (1, 0.9)):
        same = {"regret": 0.1, "worst_loss": 0.0, "calibration_error": 0.1, "decision_ms": 1.0, "abstain_exact": 1.0}
        row = {"accuracy": accuracy, "success": dict.fromkeys(suite.KINDS, accuracy), "confusion": [], **same}
        row["in_turn"] = {"composite": accuracy}
        opened.once({"strategy": "router", "seed": seed, "n": 2}, lambda row=row: row)
    for peer, at_once, in_turn in (("Arrow", 0.1, 0.3), ("linear", 0.2, 0.0), ("multi-task LoRA", 0.5, 0.4)):
        made = {"success": dict.fromkeys(suite.KINDS, at_once), "in_turn": in_turn}
        opened.once({"peer": peer, "seed": 0}, lambda made=made: made)
    opened.once({"what": "told", "seed": 0}, lambda: {"composite": 0.6})
    opened.once({"what": "next token", "tokens": 512}, lambda: {"refill": 2.0, "reuse": 1.0, "reread": 8.0})
    found = register.figures(opened)
    assert found["router_accuracy"] == pytest.approx(0.85)
    assert found["composite_router"] == pytest.approx(0.85)
    assert found["composite_margin"] == pytest.approx(0.85 - 0.2)
    assert found["composite_over_multitask"] == pytest.approx(0.85 / 0.5)
    assert found["composite_margin_told"] == pytest.approx(0.6 - 0.3)
    assert found["composite_over_multitask_told"] == pytest.approx(0.6 / 0.4)
    assert (found["reuse_speedup"], found["reread_over_refill"]) == (2.0, 4.0)


SAME = {"doing": 0.9, "controls": 1.0, "knowing": 0.9}


def test_interference_is_the_largest_fall_of_the_means() -> None:
    names = interference.FAMILIES
    base = {name: {"doing": 0.1, "controls": 1.0, "knowing": 0.9} for name in names}
    tables = []
    for controls in (0.9, 0.8):  # of disagree under clarify, in two seeds
        table = {name: {other: dict(SAME if other == name else base[other]) for other in names} for name in names}
        table["clarify"]["disagree"]["controls"] = controls
        table[interference.ALL] = {name: SAME | {"doing": 0.8} for name in names}
        tables.append(table)
    found = interference.figures({"library": tables}, base)
    assert found["off_skill_library"] == pytest.approx(0.15)
    assert found["sum_loss_library"] == pytest.approx(0.1)
    assert found["doing_library"] == pytest.approx(0.8)
    assert found["alone_doing_library"] == pytest.approx(0.9)


def test_a_rise_is_seen_by_services_and_beside_stage_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "harbor_gate.json").write_text(
        json.dumps(
            {
                "figures": {f"sgd_doing_{name}": 0.1 for name in sgd.FAMILIES}
                | {f"sgd_natural_doing_{name}": 0.6 for name in sgd.FAMILIES}
            }
        )
    )
    for module in (grid, sgd):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    opened = Grid.open("sgd", sgd.BARS)
    low = {name: {"doing": 0.1, "controls": 1.0, "knowing": 0.9, "doing_seen": 0.2} for name in sgd.FAMILIES}
    high = {name: {"doing": 0.5, "controls": 0.9, "knowing": 0.9, "doing_seen": 0.7} for name in sgd.FAMILIES}
    opened.once({"what": "base"}, lambda: {"scores": low, "composite": 0.0})
    switch = {"decided": 1.0, "success": 0.5}
    row = {"dispatched": high, "alone": high, "sum": high, "composite": 0.25, "switch": switch}
    opened.once({"what": "ours", "seed": 0}, lambda: row)
    found = sgd.figures(opened)
    assert found["sgd_rise"] == pytest.approx(0.4)
    assert found["sgd_rise_seen"] == pytest.approx(0.5)
    assert found["sgd_control_change"] == pytest.approx(-0.1)
    assert found["sgd_gap_closed"] == pytest.approx(0.8)
    assert found["switch_success"] == 0.5

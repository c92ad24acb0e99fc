"""Training laws: one batch of experts is several runs, parts and kills change nothing, bad runs stop and say why."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny

from svdexpert import Expert, SpectralModel, examples, skills, training
from svdexpert.batches import Neutral
from svdexpert.conversation import invocation_of
from svdexpert.errors import TrainingError
from svdexpert.examples import Examples, of_file, of_skill
from svdexpert.forward import Contexts
from svdexpert.skills import Bad, Case, Knowing, Verdict
from svdexpert.training import ExpertModule, Recipe, Run, train, train_library
from svdexpert.worlds import user

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}: {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


NOWHERE: Any = types.SimpleNamespace(name="nowhere", requests=lambda *_, **__: [])


def speaker(name: str = "llama") -> SpectralModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return SpectralModel.attach(tiny(name, max_position_embeddings=256), tokenizer, k=4, progress=False)


def fake_skill(name: str, letter: str) -> types.ModuleType:
    """Return a skill whose positives are answered by a letter."""
    module = types.ModuleType(name)

    def cases(world: Any, split: str, n: int, *, seed: int = 0) -> list[Case]:
        return [
            Case(
                id=f"{name}/{split}/{place}",
                skill=name,
                world="none",
                split=split,  # type: ignore[arg-type]
                cluster=str(place),
                positive=place % 2 == 0,
                messages=(user(f"{'please' if place % 2 == 0 else 'no'} {split} {place}"),),
                tools=(),
                knowing=Knowing((user(f"well {place}"),), (), ("yes", "no"), "yes"),
                gold=(letter if place % 2 == 0 else "ok",),
                bad=(Bad("never" if place % 2 == 0 else letter, "wrong"),),
            )
            for place in range(n)
        ]

    def verify(case: Case, reply: str) -> Verdict:
        asks = letter in reply
        return Verdict(1 if asks == case.positive else -1, "ask" if asks else "tell", "" if asks else "wrong")

    module.cases, module.verify, module.MOVE = cases, verify, "ask"  # type: ignore[attr-defined]
    module.OPENINGS = skills.Openings((letter,), ("ok",))  # type: ignore[attr-defined]
    module.DEGENERATE = {}  # type: ignore[attr-defined]
    return module


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, letter in (("fake.ask", "x"), ("fake.doubt", "y"), ("fake.third", "z")):
        monkeypatch.setitem(sys.modules, name, fake_skill(name, letter))
    monkeypatch.setitem(sys.modules, "fake", types.ModuleType("fake"))


SMALL = {
    "cases": 12,
    "batch_size": 4,
    "steps": 6,
    "warmup": 1,
    "validation_cases": 0,
    "score_cases": 0,
    "max_new_tokens": 4,
    "save_every": 2,
    "neutral": 0.0,
}


def small(**changes: Any) -> Recipe:
    return Recipe(**(SMALL | changes))


def random_expert(model: SpectralModel, std: float) -> Expert:
    return replace(Expert.random(model.basis, std=std), invocation=invocation_of(model))


def module_of(
    model: SpectralModel,
    skills: Sequence[str],
    objective: str,
    against: Mapping[str, Expert] = MappingProxyType({}),
    **changes: Any,
) -> ExpertModule:
    """Return a module as a run would make it, without a run."""
    run = Run(
        model=model,
        skills=skills,
        objective=objective,
        recipe=small(**changes),
        world=NOWHERE,
        against=against,
        out=None,
        progress=False,
    )
    contexts = Contexts(model, run.invocation)
    module = run._module(run.tasks(contexts), Path(), contexts)
    module.note = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    return module


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("objective", ["sft", "dpo", "rloo"])
def test_experts_in_one_batch_are_separate_runs(objective: str, activated: bool) -> None:
    model = speaker()
    names = ("fake.ask", "fake.doubt")
    together = module_of(model, names, objective, mixing=0.0, activated=activated)
    start = 0.1 * torch.randn(together.offsets.shape)
    together.offsets.data.copy_(start)
    together.loss(together.plan.rows(0)).backward()
    for place, name in enumerate(names):
        alone = module_of(model, (name,), objective, activated=activated)
        alone.offsets.data.copy_(start[place : place + 1])
        alone.loss(alone.plan.rows(0)).backward()
        assert alone.offsets.grad is not None
        assert together.offsets.grad is not None
        torch.testing.assert_close(together.offsets.grad[place], alone.offsets.grad[0], atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("fakes")
def test_parts_of_a_step_add_up_to_it() -> None:
    module = module_of(speaker(), ("fake.ask", "fake.doubt"), "dpo", penalty=0.1, neutral=0.5)
    module.offsets.data.normal_(std=0.1)
    rows = module.plan.rows(1)
    (whole,) = torch.autograd.grad(module.loss(rows), module.offsets)
    parts = [torch.autograd.grad(module.loss(rows[place::3]), module.offsets)[0] for place in range(3)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("fakes")
def test_frozen_experts_and_weights_of_zero_get_no_gradient() -> None:
    model = speaker()
    frozen = random_expert(model, 0.2)
    module = module_of(model, ("fake.ask", "fake.doubt"), "sft", {"old": frozen}, mixing=1.0)
    module.offsets.data.normal_(std=0.1)
    assert "frozen" not in module.state_dict()
    positive = {one.id for one in module.tasks[0].examples.rows if one.positive}
    rows = [row for row in module.plan.rows(0) if row.expert == 0 and row.case in positive]
    assert rows
    assert all(row.weights[1] > 0 for row in rows)
    (both,) = torch.autograd.grad(module.loss(rows), module.offsets)
    assert (both != 0).any(-1).all()
    for row in rows:
        row.weights[1] = 0.0
    (one,) = torch.autograd.grad(module.loss(rows), module.offsets)
    assert (one[1] == 0).all()


@pytest.mark.usefixtures("fakes")
def test_a_constant_reward_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(speaker(), ("fake.ask",), "rloo")
    monkeypatch.setattr(module.tasks[0].skill, "verify", lambda case, reply: Verdict(0.3, "tell"))
    module.loss(module.plan.rows(0)).backward()
    assert module.offsets.grad is not None
    assert (module.offsets.grad == 0).all()
    monkeypatch.setattr(training, "SAME_REWARDS", 3)
    module.loss(module.plan.rows(1))
    with pytest.raises(TrainingError, match=r"(?s)nothing to learn from.*\+0.3"):
        module.loss(module.plan.rows(2))


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_run_in_which_no_sample_is_right_ends_with_an_error(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last part of a step holds neutral rows alone."""
    monkeypatch.setattr(training, "SAME_REWARDS", 2)
    monkeypatch.setattr(skills.load("fake.ask"), "verify", lambda case, reply: Verdict(-1.0, "tell"))
    recipe = small(accumulate=accumulate, batch_size=8, neutral=0.5)
    with pytest.raises(TrainingError, match=r"(?s)nothing to learn from.*-1\.0"):
        train(speaker(), "fake.ask", "rloo", recipe=recipe, world=NOWHERE, progress=False)


def test_one_file_has_no_neutral_rows_and_nobody_replies_for_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps({'prompt': 'x', 'completion': 'y'})}\n" * 4)
    module = module_of(speaker(), (str(path),), "sft", neutral=0.5, activated=False)
    assert module.plan.neutrals == []
    assert module.plan.neutral_rows == 0


def test_parquet_invents_no_arguments(tmp_path: Path) -> None:
    from datasets import Dataset

    def row(**arguments: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "book", "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]}

    path, rows = tmp_path / "mine.parquet", [row(place="here"), row(day="now")]
    Dataset.from_list(rows).to_parquet(path)
    assert [one for _, one in examples._read(path)] == rows


@pytest.mark.usefixtures("fakes")
def test_a_run_in_which_all_samples_are_right_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAME_REWARDS", 2)
    for skill in (skills.load("fake.ask"),):
        monkeypatch.setattr(skill, "verify", lambda case, reply: Verdict(1.0, "ask"))
    expert = train(speaker(), "fake.ask", "rloo", recipe=small(), world=NOWHERE, progress=False)
    assert expert.norm() == 0


@pytest.mark.usefixtures("fakes")
def test_neutral_rows_ask_for_the_base_where_an_expert_is_not_due() -> None:
    model = speaker()
    module = module_of(model, ("fake.ask", "fake.doubt"), "sft", mixing=1.0, neutral=0.5)
    opening = list(invocation_of(model))
    assert {one.owner for one in module.plan.neutrals} >= {""}
    module.plan = replace(
        module.plan,
        neutrals=[Neutral("ask", [5, *opening], [7, 2]), Neutral("doubt", opening, [9, 2])],
        moves=["ask", "doubt"],  # the fakes make the same one
    )
    rows = [row for row in module.plan.rows(0) if row.target is not None and row.expert == 0]
    assert module.loss(rows).item() == pytest.approx(0.0, abs=1e-6)  # zero offsets are the base
    module.offsets.data.normal_(std=0.1)
    (found,) = torch.autograd.grad(module.loss(rows), module.offsets)
    assert (found[0] != 0).any()
    assert (found[1] == 0).all()  # whose context it is


@pytest.mark.usefixtures("fakes")
def test_a_new_expert_is_measured_from_the_frozen_ones() -> None:
    model = speaker()
    module = module_of(model, ("fake.ask",), "sft", {"old": random_expert(model, 0.3)}, mixing=1.0, neutral=0.5)
    rows = [row for row in module.plan.rows(0) if row.target is not None]
    assert any(row.target[1] > 0 for row in rows if row.target)
    assert module.loss(rows).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.usefixtures("fakes")
def test_experts_that_act_on_other_tokens_are_not_trained_together() -> None:
    model = speaker()
    with pytest.raises(TrainingError, match=r"old is not activated.*set activated to False"):
        module_of(model, ("fake.ask",), "sft", {"old": Expert.random(model.basis)})
    with pytest.raises(TrainingError, match=r"old decides on all tokens of a reply.*set reach to 0"):
        module_of(model, ("fake.ask",), "sft", {"old": random_expert(model, 0.1)}, reach=3)
    with pytest.raises(TrainingError, match=r"old acts from the tokens \[5, 6\] on; this chat template opens"):
        module_of(model, ("fake.ask",), "sft", {"old": replace(Expert.random(model.basis), invocation=(5, 6))})


@pytest.mark.usefixtures("fakes")
def test_a_new_expert_leaves_the_frozen_ones_their_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "skill_names", lambda: ["fake.third"])
    model = speaker()
    old = replace(random_expert(model, 0.3), skill="fake.third")
    stranger = replace(old, skill="fake.doubt")  # does not ship: nothing is imported by the name in a file
    module = module_of(model, ("fake.ask",), "sft", {"old": old, "other": stranger}, neutral=0.5, cases=16)
    assert Counter(one.owner for one in module.plan.neutrals)["old"] == 2  # positives: in others somebody may be due
    assert {one.owner for one in module.plan.neutrals} <= {"ask", "", "old"}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("objective", ["sft", "dpo", "rloo"])
def test_with_a_reach_nothing_is_learnt_of_what_follows_but_through_it(objective: str) -> None:
    """One token far, the logits of the second token on depend on the expert through its first tokens' cache alone."""
    module = module_of(speaker(), ("fake.ask",), objective, reach=1)
    module.offsets.data.normal_(std=0.1)
    module.loss(module.plan.rows(0)).backward()
    assert module.offsets.grad is not None
    assert (module.offsets.grad != 0).any()
    expert = module.expert(0)
    assert expert.reach == 1
    assert module.model.mixture(expert).reach == 1


# --- whole runs


@pytest.mark.usefixtures("fakes")
def test_a_run_learns_and_keeps_what_it_did(tmp_path: Path) -> None:
    model = speaker()
    recipe = small(steps=30, batch_size=8, validation_cases=4, score_cases=8, validate_every=10, learning_rate=0.1)
    library = train_library(
        model, ["fake.ask", "fake.doubt"], "sft", recipe=recipe, world=NOWHERE, out=tmp_path / "run", progress=False
    )
    assert list(library) == ["ask", "doubt"]
    assert library["ask"].objective == "sft"
    assert library["ask"].norm() > 0
    kept = training.Library(tmp_path / "run" / "experts")
    assert kept["ask"] == library["ask"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == ["offsets"]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size < 100_000
    assert (tmp_path / "run" / "examples" / "ask.parquet").is_file()
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    assert set(training.metrics(tmp_path / "run")) >= {"loss", "loss/ask", "doing/ask", "controls/doubt"}
    assert kept["ask"].scores["split"] == "validation"
    assert set(kept["ask"].scores) >= {"knowing", "doing", "controls"}
    again = train_library(
        model, ["fake.ask", "fake.doubt"], "sft", recipe=recipe, world=NOWHERE, out=tmp_path / "run", progress=False
    )
    assert again["doubt"] == library["doubt"]


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(("objective", "parts"), [("dpo", 1), ("dpo", 2), ("rloo", 1)])
def test_a_run_interrupted_twice_ends_where_it_would_have(
    objective: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(steps=8, accumulate=parts, validation_cases=4, validate_every=1, patience=5)

    def go(folder: str) -> Expert:
        model = speaker()
        return train(model, "fake.ask", objective, recipe=recipe, world=NOWHERE, out=tmp_path / folder, progress=False)

    whole = go("whole")
    step = ExpertModule.training_step
    for dies_at in (4 * parts, 3 * parts + parts - 1):
        left = dies_at

        def dies(self: ExpertModule, rows: Any) -> torch.Tensor:
            nonlocal left
            left -= 1
            if not left:
                raise MemoryError
            return step(self, rows)

        monkeypatch.setattr(ExpertModule, "training_step", dies)
        with pytest.raises(MemoryError):
            go("cut")
    monkeypatch.setattr(ExpertModule, "training_step", step)
    assert go("cut") == whole
    assert len(list((tmp_path / "cut" / "metrics").iterdir())) == 3  # it did not begin again
    assert training.metrics(tmp_path / "cut") == training.metrics(tmp_path / "whole")


@pytest.mark.usefixtures("fakes")
def test_patience_ends_a_run_with_the_best_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([0.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(training, "act", lambda model, cases, **_: ["x"] * len(cases))
    skill = skills.load("fake.ask")
    values: list[float] = []

    def verify(case: Case, reply: str) -> Verdict:
        if case.id.endswith("/0"):
            values.append(next(said))
        return Verdict(values[-1] - 0.4, "ask")

    monkeypatch.setattr(skill, "verify", lambda case, reply: Verdict(0.0, "ask"))
    recipe = small(steps=40, validation_cases=4, validate_every=1, patience=2, save_every=1)
    run: dict[str, Any] = {"recipe": recipe, "world": NOWHERE, "progress": False}
    monkeypatch.setattr(skill, "verify", verify)
    stopped = train(speaker(), "fake.ask", "sft", out=tmp_path, **run)
    assert len(values) == 4  # 0, 1, then two that are no better
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(kept["svdexpert"]["best"][1][0], stopped.flat(speaker().basis))


@pytest.mark.usefixtures("fakes")
def test_accumulation_follows_the_same_trajectory(tmp_path: Path) -> None:
    found = [
        train(
            speaker(),
            "fake.ask",
            "dpo",
            recipe=small(accumulate=parts, optimizer="sgd", steps=20),
            world=NOWHERE,
            progress=False,
        ).flat(speaker().basis)
        for parts in (1, 2)
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


@pytest.mark.usefixtures("fakes")
def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    train(speaker(), "fake.ask", "sft", recipe=small(), world=NOWHERE, out=tmp_path / "run", progress=False)
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(TrainingError, match="seed 0, now 1"):
        train(speaker(), "fake.ask", "sft", recipe=small(seed=1), world=NOWHERE, out=tmp_path / "run", progress=False)
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(TrainingError, match="is no run"):
        train(speaker(), "fake.ask", "sft", recipe=small(), world=NOWHERE, out=tmp_path / "other", progress=False)


@pytest.mark.usefixtures("fakes")
def test_a_finished_run_is_read_on_any_machine(tmp_path: Path) -> None:
    run: dict[str, Any] = {"recipe": small(), "world": NOWHERE, "out": tmp_path / "run", "progress": False}
    first = train_library(speaker(), ["fake.ask"], "sft", **run)
    again = train_library(speaker(), ["fake.ask"], "sft", trainer={"accelerator": "cuda", "devices": 99}, **run)
    assert again == first


@pytest.mark.usefixtures("fakes")
def test_nan_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertModule, "loss", lambda self, rows: self.offsets.sum() * torch.nan)
    with pytest.raises(TrainingError, match="The loss is nan at step 0"):
        train(speaker(), "fake.ask", "sft", recipe=small(), world=NOWHERE, out=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 3}, "half positives"),
        ({"neutral": 1.5}, "share"),
        ({"seed": -1}, "seed is -1"),
        ({"warmup": 100}, "fewer than the 100 steps"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": 2, "validation_cases": 0}, "set validation_cases"),
        ({"reach": -1}, "reach is -1"),
        ({"reach": 4, "activated": False}, "only activated experts"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        Recipe(**changes)


# --- examples


@pytest.mark.usefixtures("fakes")
def test_on_controls_the_base_is_preferred_where_it_is_right() -> None:
    model, skill = speaker(), skills.load("fake.ask")
    cases = skill.cases(None, "train", 8)  # type: ignore[arg-type]
    with torch.no_grad():
        model.hf.get_output_embeddings().weight[2] *= 3  # so that some replies come to an end
    found = of_skill(model, "ask", skill, cases, max_new_tokens=12, progress=False)
    assert any(one.own_ids for one in found.rows)
    for one, case in zip(found.rows, cases, strict=True):
        own = model.tokenizer.decode(one.own_ids, skip_special_tokens=True)  # type: ignore[union-attr]
        if not case.positive and own and skill.verify(case, own).right:
            assert one.chosen_ids == [one.own_ids]
        elif own and own not in case.gold:
            assert own in one.rejected
        if case.positive:
            assert one.chosen == list(case.gold)
        assert all(ids[-1] == 2 for ids in one.chosen_ids + one.rejected_ids)


ROWS = {
    "messages": {"messages": [user("hi"), {"role": "assistant", "content": "hello"}]},
    "completion": {"prompt": "hi ", "completion": "hello"},
    "pairs": {
        "prompt": [user("hi")],
        "chosen": [{"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ROWS)
def test_files_in_trl_formats_are_examples(form: str, ending: str, tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / f"mine.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(ROWS[form]) + "\n\n" + json.dumps(ROWS[form]) + "\n")
    else:
        Dataset.from_list([ROWS[form]] * 2).to_parquet(path)
    model = speaker()
    found = of_file(model, path)
    assert isinstance(found, Examples)
    assert len(found.rows) == 2
    assert found.rows[0].chosen == ["hello"]
    assert model.tokenizer is not None
    assert model.tokenizer.decode(found.rows[0].chosen_ids[0]) == "hello<eos>"
    assert found.rows[0].rejected == (["no"] if form == "pairs" else [])
    if form != "pairs":
        with pytest.raises(TrainingError, match="It supports: sft"):
            found.fitting("dpo")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "mine.jsonl:2: no JSON"),
        ('{"messages": "hello"}', "messages is a text"),
        (
            '{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "x"}], '
            '"tools": [{"name": "x"}]}',
            "mine.jsonl:2: A tool schema does not parse",
        ),
        ("[]", "mine.jsonl:2: found list"),
        ('{"text": "hi"}', "mine.jsonl:2: found the fields"),
        ('{"prompt": "", "completion": "x"}', "mine.jsonl:2: prompt is empty"),
        ('{"prompt": "hi", "completion": 3}', "completion is '3'"),
        ('{"prompt": "hi", "completion": [{"role": "assistant", "content": "x"}]}', "all texts or all lists"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "must end with an assistant"),
        ('{"messages": [{"role": "user"}]}', "without content"),
    ],
)
def test_malformed_rows_are_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ROWS["completion"]) + "\n" + line + "\n")
    with pytest.raises(TrainingError, match=said):
        of_file(speaker(), path)


def test_what_is_too_long_is_counted_and_never_cut(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [ROWS["completion"], {"prompt": "hi " * 200, "completion": "hello"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = of_file(speaker(), path)
    assert (len(found.rows), found.left_out) == (1, 1)


def test_a_run_learns_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"hi {place} ", "completion": "hello"}) for place in range(8)))
    with pytest.raises(TrainingError, match=r"(?s)mine.jsonl:1: the prompt does not hold.*activated=False"):
        train(speaker(), str(path), "sft", recipe=small(), progress=False)
    expert = train(speaker(), str(path), "sft", recipe=small(activated=False), progress=False)
    assert expert.skill == "mine"
    assert expert.norm() > 0
    assert expert.invocation == ()


# --- as commands


def command(out: Path, *more: str) -> list[str]:
    settings = {key: value for key, value in SMALL.items() if key != "save_every"}
    recipe = [f"--recipe.{key}={value}" for key, value in settings.items()]
    words = ["train", "clarify", "--objective=dpo", f"--out={out}", "--dtype=float32", "--k=4", *recipe, *more]
    return [sys.executable, "-m", "svdexpert.cli", *words]


def here(out: Path, **changes: Any) -> Expert:
    """Return what the command trains, by a call in this process."""
    model = SpectralModel.from_pretrained("harbor", k=4, progress=False)
    settings = {key: value for key, value in SMALL.items() if key != "save_every"} | changes
    return train(model, "clarify", "dpo", recipe=Recipe(**settings), out=out, progress=False)  # type: ignore[arg-type]


def test_a_killed_run_ends_bit_for_bit_where_it_would_have(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    here(whole, save_every=1)
    running = subprocess.Popen(command(cut, "--recipe.save_every=1"), stderr=subprocess.DEVNULL)
    while not (cut / "checkpoints" / "last.ckpt").is_file() and running.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5 * random.random())
    running.kill()
    running.wait()
    subprocess.run(command(cut, "--recipe.save_every=1"), check=True, capture_output=True)
    files = [folder / "experts" / "clarify" / "expert.safetensors" for folder in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_processes_follow_one(tmp_path: Path) -> None:
    two = tmp_path / "two"
    sgd = ["--accelerator=cpu", "--recipe.optimizer=sgd", "--recipe.learning_rate=1", "--recipe.steps=20"]
    one = here(tmp_path / "one", optimizer="sgd", learning_rate=1.0, steps=20)
    both = command(two, *sgd, "--devices=2", "--strategy=ddp")
    subprocess.run(both, check=True, capture_output=True, timeout=300)
    found = Expert.load(two / "experts" / "clarify")
    assert one.norm() > 1e-2
    for name, offsets in one.offsets.items():
        torch.testing.assert_close(found.offsets[name], offsets, atol=1e-4, rtol=0)

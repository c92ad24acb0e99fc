"""The chat in the terminal: commands do what they say, and an error ends a turn alone."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import byte_tokenizer, tiny
from rich.console import Console
from test_dispatch import OPENS, Halves

from svdexpert import DispatchError, Expert, SpectralModel
from svdexpert.chat import run, weights_in
from svdexpert.dialogue import Conversation


@pytest.fixture
def conversation() -> Conversation:
    hf = tiny("llama", max_position_embeddings=256)
    model = SpectralModel.attach(hf, byte_tokenizer(), k=8, progress=False)
    experts = {
        name: replace(Expert.random(model.basis, std=0.3, seed=seed), invocation=OPENS)
        for seed, name in enumerate(("ask", "doubt"))
    }
    return Conversation(model, experts, Halves(tuple(experts)), max_new_tokens=8)


def shown(conversation: Conversation, *lines: str, history: Path | None = None) -> str:
    screen = io.StringIO()
    run(conversation, history, console=Console(file=screen, width=200), lines=iter(lines))
    return screen.getvalue()


def test_a_history_that_cannot_be_written_ends_no_conversation(conversation: Conversation, tmp_path: Path) -> None:
    said = shown(conversation, "hello there", "and now", history=tmp_path)
    assert said.count("cannot be written") == 2
    assert len(conversation.turns) == 2


def test_commands_change_who_speaks(conversation: Conversation, tmp_path: Path) -> None:
    history, saved = tmp_path / "history.json", tmp_path / "saved.json"
    said = shown(
        conversation,
        "hello there",
        "/mix ask=0.7 doubt",
        "what?",
        "/why",
        "/base",
        "/mix",
        "and now",
        "/auto",
        "more",
        f"/save {saved}",
        "/quit",
        "not any more",
        history=history,
    )
    weights = [dict(one.decision.weights) for one in conversation.turns]
    assert weights[1:3] == [{"ask": 0.7, "doubt": 1.0}, {}]
    assert conversation.turns[3].decision.because.startswith("sums")
    assert "[ask 0.7, doubt 1; read" in said
    assert "ask 0.7, doubt 1, confidence 1.00: given by hand" in said
    assert conversation.turns[1].text in said
    assert "not any more" not in json.dumps(conversation.messages)
    assert json.loads(saved.read_text()) == json.loads(history.read_text())
    assert json.loads(saved.read_text())["messages"] == conversation.messages


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/mix asks=1", "Did you mean 'ask'"),
        ("/mix ask=much", "expected NAME=WEIGHT"),
        ("/mixx", "There is no /mixx"),
        ("/why", "Nobody has replied"),
        ("/base", "Nobody has replied"),
        ("/save", "Say where"),
        ("/save /proc/nowhere/at.json", "cannot be written"),
        ("x" * 300, "does not fit"),
    ],
)
def test_an_error_ends_a_turn_alone(line: str, complaint: str, conversation: Conversation) -> None:
    said = shown(conversation, line, "", "/help", "hello")
    assert complaint in said
    assert len(conversation.turns) == 1


def test_auto_needs_a_dispatcher(conversation: Conversation) -> None:
    conversation.dispatcher = None
    assert "No dispatcher was given" in shown(conversation, "/auto")


def test_weights_are_numbers() -> None:
    assert weights_in([]) == {}
    with pytest.raises(DispatchError, match="NAME=WEIGHT"):
        weights_in(["a=b"])

"""The chat in the terminal: commands do what they say, and an error ends a turn alone."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny
from rich.console import Console
from test_dispatch import OPENS, Halves

from svdexpert import DispatchError, Expert, SpectralModel
from svdexpert.chat import COMMANDS, _Chat, run, weights_in
from svdexpert.decision import Decision
from svdexpert.dialogue import Conversation, Turn, read_saved
from svdexpert.worlds import assistant, user


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
    (tmp_path / "file").touch()
    said = shown(conversation, "hello there", "and now", history=tmp_path / "file" / "talk.json")
    assert said.count("cannot be written") == 2
    assert len(conversation.turns) == 2
    assert "not saved: 2 of 2 turns" in said


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
    assert "from now on: ask 0.7, doubt 1" in said
    assert "from now on: base" in said
    assert "from now on the dispatcher decides" in said
    assert f"saved in {saved}: 8 messages" in said
    assert "not any more" not in json.dumps(conversation.messages)
    assert json.loads(saved.read_text()) == json.loads(history.read_text())
    assert json.loads(saved.read_text())["messages"] == conversation.messages


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/mix asks=1", "There is no expert 'asks' here. Did you mean 'ask'?"),
        ("/mix nobody", "There is no expert 'nobody' here. There are: ask, doubt."),
        ("/mix ask=much", "'ask=much': expected NAME=WEIGHT"),
        ("/mix ask=", "'ask=': expected NAME=WEIGHT"),
        ("/mix =1", "'=1': expected NAME=WEIGHT"),
        ("/mix ask=nan", "The weight of 'ask' is nan: expected a finite number"),
        ("/mix ask=1 ask=2", "'ask' stands twice"),
        ("/mixx", "There is no /mixx. Did you mean '/mix'?"),
        ("/why", "Nobody has replied"),
        ("/base", "Nobody has replied"),
        ("/result done", "Nobody has replied"),
        ("/save", "Say where"),
        ('/save ""', "Say where"),
        ("/save ~nobody-of-that-name/talk.json", "is in nobody's home folder"),
        ("caf\udce9", "That line is no text"),
        ("/mix \udce9", "That line is no text"),
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
    assert weights_in("") == {}
    assert weights_in("ask = 0.7  doubt= -1 call") == {"ask": 0.7, "doubt": -1.0, "call": 1.0}


def test_a_history_goes_on_where_it_was(conversation: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    said = shown(conversation, "hello there", "/mix ask", "and now", history=file)
    assert said.endswith(f"the conversation is in {file}\n")
    other = Conversation(conversation.model, conversation.library, max_new_tokens=8)
    said = shown(other, "/why", "/base", "what?", history=file)
    assert f"goes on with the conversation in {file}: 4 messages" in said
    assert "ask 1, confidence 1.00: given by hand" in said
    assert other.messages[:4] == conversation.messages
    assert read_saved(file) == (other.messages, other.turns)
    assert len(other.turns) == 3
    assert "goes on" not in shown(other, "once more", history=file)  # it is the same one
    before = file.read_bytes()
    with pytest.raises(DispatchError, match="has begun"):
        shown(conversation, "hello", history=file)
    assert file.read_bytes() == before


def test_nothing_but_a_conversation_is_written_over(conversation: Conversation, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(DispatchError, match="is no saved conversation"):
        shown(conversation, "hello there", history=notes)
    said = shown(conversation, "hello there", f"/save {notes}", f"/save {tmp_path}")
    assert said.count("is no saved conversation") == said.count("Nothing was written.") == 2
    assert "not saved: 1 of 1 turns" in said
    assert notes.read_text() == "mine"


def test_an_interrupt_ends_a_reply_alone(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = Halves.decide
    calls = iter([True, False, True, False])

    def interrupted(self: Halves, *asked: Any) -> list[Decision]:
        if next(calls):
            raise KeyboardInterrupt
        return decide(self, *asked)

    monkeypatch.setattr(Halves, "decide", interrupted)
    said = shown(conversation, "hello there", "hello again", "and?", "and now?")
    assert said.count("stopped: the message is taken back, and nothing of the reply is kept") == 2
    assert [one["content"] for one in conversation.messages if one["role"] == "user"] == ["hello again", "and now?"]

    def interrupting(self: Conversation) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "base_reply", interrupting)
    assert "stopped\n" in shown(conversation, "/base", "/why")

    def at_the_prompt() -> Iterator[str]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(at_the_prompt()))
    screen = io.StringIO()
    run(conversation, console=Console(file=screen, width=200))
    assert screen.getvalue().count("Ctrl-C once more") == 1
    assert screen.getvalue().endswith(
        "\n\nnot saved: 2 of 2 turns; /save FILE or --history FILE would have kept them\n"
    )


def test_one_interrupt_at_the_prompt_clears_the_line(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter([KeyboardInterrupt, "hello", KeyboardInterrupt, "/base", KeyboardInterrupt, KeyboardInterrupt, "no"])

    def answer(self: Console, prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    shows = _Chat._show

    def interrupted(self: _Chat, text: str) -> None:
        shows(self, text)
        if text == "stopped" or text.startswith("/quit"):  # while it says what came of the one before
            raise KeyboardInterrupt

    def interrupting(self: Conversation) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.console.Console.input", answer)
    monkeypatch.setattr(_Chat, "_show", interrupted)
    monkeypatch.setattr(Conversation, "base_reply", interrupting)
    screen = io.StringIO()
    run(conversation, console=Console(file=screen, width=200))
    assert screen.getvalue().count("ends the conversation; so does Ctrl-C once more") == 4
    assert [one["content"] for one in conversation.messages if one["role"] == "user"] == ["hello"]
    assert next(typed) == "no"


def test_a_line_that_breaks_off_is_ended(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Conversation, *messages: Any, streamer: Any) -> Turn:
        streamer.on_finalized_text("half a")
        raise DispatchError("no more") if messages[0]["content"] == "hello" else KeyboardInterrupt

    monkeypatch.setattr(Conversation, "reply_to", broken)
    said = shown(conversation, "hello", "and now")
    assert "half a\nno more\n" in said
    assert "half a\nstopped: the message is taken back" in said


def test_the_end_is_the_end_whatever_else_is_said(conversation: Conversation) -> None:
    assert "There is no" not in shown(conversation, "/quit now", "hello")
    assert not conversation.turns


def test_a_file_is_where_a_shell_would_have_it(
    conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = ("~/a.json", "'b c.json'", '"~/d.json"', "e f.json", "it's.json")
    assert shown(conversation, *(f"/save {one}" for one in names)).count("saved in") == 5
    assert {one.name for one in tmp_path.iterdir()} == {"a.json", "b c.json", "d.json", "e f.json", "it's.json"}


def test_no_other_conversation_is_written_over(
    conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, two = tmp_path / "talk.json", tmp_path / "two.json"
    other = Conversation(conversation.model, conversation.library, max_new_tokens=8)
    shown(other, "something else", f"/save {two}")

    def lines() -> Iterator[str]:
        yield "hello"
        beside = Conversation(conversation.model, conversation.library, max_new_tokens=8)
        assert f"the conversation is in {file}" in shown(beside, "from beside", history=file)
        yield "and now"
        yield f"/save {two}"
        yield f"/save {tmp_path / 'three.json'}"

    before = two.read_bytes()
    screen = io.StringIO()
    run(conversation, file, console=Console(file=screen, width=400), lines=lines())
    assert screen.getvalue().count("write this one elsewhere with /save OTHER. Nothing was written.") == 2
    assert two.read_bytes() == before
    assert [one["content"] for one in read_saved(file)[0] if one["role"] == "user"] == ["hello", "from beside"]
    assert read_saved(tmp_path / "three.json")[0] == conversation.messages
    assert "write this one elsewhere" not in shown(other, f"/save {two}", f"/save {two}")
    read: list[Path] = []
    monkeypatch.setattr("svdexpert.chat.read_saved", lambda path: read.append(path) or read_saved(path))
    assert "saved in" in shown(other, f"/save {two}", f"/save {two}", "more", f"/save {two}")
    assert read == [two]  # what it has written itself is not read again
    assert f"the conversation is in {two}" in shown(other, history=two)  # nothing was said, and nothing is lost


def test_bytes_that_are_no_text_cost_their_line_alone(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n"), encoding="utf-8"))
    screen = io.StringIO()
    run(conversation, console=Console(file=screen, width=200))
    assert screen.getvalue().count("That line is no text") == 1
    assert [one["content"] for one in conversation.messages if one["role"] == "user"] == ["hello"]


def test_help_says_what_every_command_does(conversation: Conversation) -> None:
    said = shown(conversation, "/help", "//etc is a folder")
    assert all(usage in said and does in said for usage, does in COMMANDS.items())
    for usage in COMMANDS:
        assert "There is no" not in shown(conversation, usage.partition(" ")[0])
    assert conversation.messages[0] == user("/etc is a folder")


def test_a_function_that_is_called_returns_something(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = '<tool_call>{"name": "book", "arguments": {"place": "Blue Heron", "people": 4}}</tool_call>'
    texts = iter([call, "Done.", call, "It is."])
    monkeypatch.setattr("svdexpert.dialogue.text_of", lambda *_: next(texts))
    lines = ("hello", "/result", '/result {"ok":true}', "/result again", "more", "/result  it is full")
    said = shown(conversation, *lines)
    assert 'calls book(place="Blue Heron", people=4)' in said
    assert "Say what book returns" in said
    assert "The last reply calls no function" in said
    told = [one for one in conversation.messages if one["role"] == "tool"]
    assert told == [
        {"role": "tool", "name": "book", "content": '{"ok":true}'},
        {"role": "tool", "name": "book", "content": "it is full"},
    ]
    assert len(conversation.turns) == 4


def test_two_calls_return_something_each(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    both = "".join(f'<tool_call>{{"name": "{one}", "arguments": {{}}}}</tool_call>' for one in ("book", "ring"))
    texts = iter([both, "Done.", both, "Well."])
    monkeypatch.setattr("svdexpert.dialogue.text_of", lambda *_: next(texts))
    said = shown(conversation, "hello", "/result", "/result 1.10", "/result", '/result {"a":  1e2}', "/result again")
    for one in ("Say what book returns", "next: /result TEXT says what ring() returns", "Say what ring returns"):
        assert said.count(one) == 1
    assert conversation.messages[2:4] == [
        {"role": "tool", "name": "book", "content": "1.10"},
        {"role": "tool", "name": "ring", "content": '{"a":  1e2}'},
    ]
    assert "The last reply calls no function" in said
    said = shown(conversation, "more", "/result one", "/result " + "x" * 300, "/result", "/result 1", "never mind")
    assert "no result is kept: /result begins with book again" in said
    assert said.count("Say what book returns") == 1
    assert [one["content"] for one in conversation.messages[-3:-1]] == ["1", "never mind"]


def test_a_history_in_which_nothing_was_said_is_saved(conversation: Conversation, tmp_path: Path) -> None:
    shown(conversation, "hello", f"/save {tmp_path / 'talk.json'}")
    other = Conversation(conversation.model, conversation.library)
    assert "not saved" not in shown(other, history=tmp_path / "talk.json")


def test_what_was_left_out_is_said(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Turn(assistant("yes"), "yes", Decision({}, 1.0, ""), 1, 0, dropped=3)
    monkeypatch.setattr(Conversation, "reply_to", lambda *_, **__: turn)
    assert "its first 3 turns were left out" in shown(conversation, "hello")

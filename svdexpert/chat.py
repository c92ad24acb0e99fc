"""A conversation in the terminal: what is said, who speaks, and why.

What begins with "/" is a command (`COMMANDS`, or /help), everything else is said. An error ends a turn, never the
conversation: the message is taken back. So does Ctrl-C while a reply is being written; at the prompt it ends the
conversation where it comes twice in a row.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from svdexpert.conversation import tokenizer_of
from svdexpert.decision import Decision, Dispatcher
from svdexpert.dialogue import Conversation, Turn, begins_with, read_saved
from svdexpert.errors import DispatchError, SvdExpertError, did_you_mean
from svdexpert.reply import Call, read
from svdexpert.worlds import Message, user

COMMANDS = {
    "/mix NAME=WEIGHT ...": "these experts speak from now on, as clarify=0.7 disagree=0.3; /mix alone is the base",
    "/auto": "the dispatcher decides again",
    "/why": "what the last reply was based on",
    "/base": "the last turn once more, answered by the base, side by side",
    "/result TEXT": "what the function returns that the last reply has called; of several, the next one in order",
    "/save FILE": "write the conversation as JSON",
    "/help": "this list",
    "/quit": "the end, as Ctrl-D is, or Ctrl-C twice; while a reply is written, Ctrl-C takes the message back",
    "//...": "say what begins with a single /",
}
"""What can be typed, and what it does."""


class _Printer(TextStreamer):
    """Writes a reply to a console as it comes."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.within = False  # a line

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain so far."""
        self.console.print(Text(text), end="\n" if stream_end else "", soft_wrap=True)
        self.within = not stream_end

    def break_off(self) -> None:
        """End the line of a reply that goes on no longer."""
        if self.within:
            self.console.print()


def spoken(decision: Decision) -> str:
    """Return who spoke, in words.

    >>> spoken(Decision({"ask": 0.7, "doubt": 0.0}, 1.0, ""))
    'ask 0.7'
    """
    return ", ".join(f"{name} {weight:g}" for name, weight in decision.weights.items() if weight) or "base"


def called(call: Call) -> str:
    """Return a call as people read it.

    >>> called(Call("book_table", {"place": "Blue Heron", "people": 4}))
    'book_table(place="Blue Heron", people=4)'
    """
    arguments = ", ".join(f"{name}={json.dumps(one, ensure_ascii=False)}" for name, one in call.arguments.items())
    return f"{call.name}({arguments})"


def weights_in(text: str) -> dict[str, float]:
    """Return weights out of NAME=WEIGHT, or a name alone for 1.

    >>> weights_in("ask=0.7 doubt")
    {'ask': 0.7, 'doubt': 1.0}

    Raises:
        DispatchError: no name, a weight that is no number, a name that stands twice.
    """
    found: dict[str, float] = {}
    for word in re.sub(r"\s*=\s*", "=", text).split():
        name, given, weight = word.partition("=")
        try:
            value = float(weight) if given else 1.0
        except ValueError:
            name = ""
        if not name:
            raise DispatchError(f"{word!r}: expected NAME=WEIGHT, e.g. clarify=0.7.")
        if name in found:
            raise DispatchError(f"{name!r} stands twice: give it one weight.")
        found[name] = value
    return found


def run(
    conversation: Conversation,
    history: Path | None = None,
    *,
    console: Console | None = None,
    lines: Iterator[str] | None = None,
) -> None:
    """Talk until the input ends or somebody says /quit; an error ends a turn, never the conversation.

    Args:
        conversation: what is talked in; its dispatcher is the one that /auto goes back to.
        history: JSON file that it is written to after every turn; where it exists, the conversation in it goes on.
        console: where it is shown; the terminal if None.
        lines: what is typed; asked for in the terminal if None.

    Raises:
        DispatchError: the history is a file that holds no conversation, or another one than this, which has begun.
    """
    console = console or Console()
    chat = _Chat(conversation, console, history, conversation.dispatcher)
    chat.begin()
    typed = lines if lines is not None else _Typed(console)
    interrupted = False  # at the prompt, and nothing was typed since
    while True:
        line = None
        try:
            line = next(typed, "/quit")
            if line.split()[:1] == ["/quit"]:
                break
            interrupted = False
            if line.strip():
                chat.take(line)
        except KeyboardInterrupt:
            if line is None and interrupted:
                console.print()
                break
            interrupted = line is None
            with contextlib.suppress(KeyboardInterrupt):
                chat.interrupted()
    chat.end()


@dataclass(frozen=True)
class _Saved:
    """Where the conversation stands on the disk.

    Attributes:
        path: of its file, None where there is none.
        turns: how many it holds.
        stamp: what tells the file from one that somebody else has written there since.
    """

    path: Path | None = None
    turns: int = 0
    stamp: tuple[int, ...] = ()


@dataclass
class _Chat:
    """A conversation, and what is typed in it."""

    conversation: Conversation
    console: Console
    history: Path | None
    auto: Dispatcher | None
    saved: _Saved = field(default=_Saved(), init=False)
    results: list[Message] = field(default_factory=list, init=False)  # of the last reply's calls, while others are due

    def begin(self) -> None:
        """Go on with the history, and say what there is."""
        verbs = ", ".join(one.partition(" ")[0] for one in COMMANDS)
        self._show(f"experts: {', '.join(self.conversation.library) or 'none'}; {verbs}")
        if self.history is None or not self.history.exists():
            return
        stamp = _stamp(self.history)
        messages, turns = read_saved(self.history)
        if not begins_with(self.conversation.messages, messages):
            self.conversation.resume(self.history)
            self._show(f"this goes on with the conversation in {self.history}: {len(messages)} messages")
        self.saved = _Saved(self.history, len(turns), stamp)

    def take(self, line: str) -> None:
        """Do, or say, what was typed."""
        verb, rest = (*line.split(None, 1), "")[:2]
        before = len(self.conversation.turns)
        try:
            _check_text(line)
            if verb.startswith("//"):
                self._say(line.strip()[1:])
            elif verb.startswith("/"):
                self._command(verb, rest.strip())
            else:
                self._say(line)
        except SvdExpertError as error:
            self._show(str(error))
        except KeyboardInterrupt:
            self.console.print()
            self._show("stopped" + ("; the reply stands" if len(self.conversation.turns) > before else ""))

    def interrupted(self) -> None:
        """Say how a conversation ends."""
        self.console.print()
        self._show("/quit or the end of the input (Ctrl-D) ends the conversation; so does Ctrl-C once more")

    def end(self) -> None:
        """Say where the conversation is."""
        lost = len(self.conversation.turns) - self.saved.turns
        if lost:
            all_of_them = len(self.conversation.turns)
            self._show(f"not saved: {lost} of {all_of_them} turns; /save FILE or --history FILE would have kept them")
        elif self.saved.path is not None:
            self._show(f"the conversation is in {self.saved.path}")

    def _command(self, verb: str, rest: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/mix": self._mix,
            "/auto": self._automatic,
            "/why": self._why,
            "/base": self._beside,
            "/result": self._result,
            "/save": self._save_as,
            "/help": self._help,
        }
        if verb not in commands:
            raise DispatchError(f"There is no {verb}.{did_you_mean(verb, [*commands, '/quit'])} /help says more.")
        commands[verb](rest)

    def _say(self, text: str) -> None:
        self._answer(user(text))

    def _answer(self, message: Message) -> None:
        """Say something, behind results that waited for others; show the reply as it comes, and who spoke."""
        waiting, self.results = self.results, []
        printer = _Printer(tokenizer_of(self.conversation.model), self.console)
        before = len(self.conversation.turns)
        try:
            turn = self.conversation.reply_to(*waiting, message, streamer=printer)
        except (SvdExpertError, KeyboardInterrupt) as error:
            if len(self.conversation.turns) > before:
                raise
            printer.break_off()
            if waiting:
                self._show(f"no result is kept: /result begins with {waiting[0]['name']} again")
            if isinstance(error, SvdExpertError):
                raise
            self._show("stopped: the message is taken back, and nothing of the reply is kept")
            return
        for one in read(turn.text).calls:
            self._show(f"calls {called(one)}; /result TEXT says what it returns")
        self._show(f"[{spoken(turn.decision)}; read {turn.read} tokens, {turn.kept} were known]")
        if turn.dropped:
            self._show(
                f"the conversation is longer than the model's context: its first {turn.dropped} turns were left out"
            )
        if self.history is not None:
            self._save(self.history)

    def _mix(self, rest: str) -> None:
        weights = weights_in(rest)
        self.conversation.mix(weights)
        self._show(f"from now on: {spoken(Decision(weights, 1.0, ''))}")

    def _automatic(self, rest: str) -> None:
        if self.auto is None:
            raise DispatchError(
                "No dispatcher was given: start with --dispatcher FILE (svdexpert dispatch fit makes one)."
            )
        self.conversation.dispatcher = self.auto
        self._show("from now on the dispatcher decides")

    def _why(self, rest: str) -> None:
        decision = self._last().decision
        self._show(f"{spoken(decision)}, confidence {decision.confidence:.2f}: {decision.because}")

    def _beside(self, rest: str) -> None:
        turn = self._last()
        base = self.conversation.base_reply()
        table = Table()
        table.add_column("base", overflow="fold")
        table.add_column(Text(spoken(turn.decision)), overflow="fold")
        table.add_row(Text(base), Text(turn.text))
        self.console.print(table)

    def _result(self, rest: str) -> None:
        calls = read(self._last().text).calls
        if not calls:
            raise DispatchError("The last reply calls no function: there is nothing that could return something.")
        name, due = calls[len(self.results)].name, calls[len(self.results) + 1 :]
        if not rest:
            raise DispatchError(f'Say what {name} returns, as text or JSON: /result {{"status": "done"}}.')
        told = {"role": "tool", "name": name, "content": rest}
        if not due:
            self._answer(told)
            return
        self.results.append(told)
        self._show(f"{name} has returned that; next: /result TEXT says what {called(due[0])} returns")

    def _save_as(self, rest: str) -> None:
        path = _path(rest)
        self._save(path)
        self._show(f"saved in {path}: {len(self.conversation.messages)} messages")

    def _save(self, path: Path) -> None:
        """Write the conversation, over nothing but its own beginning."""
        try:
            if path.exists() and (self.saved.path, self.saved.stamp) != (path, _stamp(path)):
                messages, _ = read_saved(path)
                if not begins_with(self.conversation.messages, messages):
                    raise DispatchError(
                        f"The conversation in {path} is another one, or goes on otherwise than this: write this one "
                        "elsewhere with /save OTHER."
                    )
            self.conversation.save(path)
            self.saved = _Saved(path, len(self.conversation.turns), _stamp(path))
        except DispatchError as error:
            raise DispatchError(f"{error} Nothing was written.") from error
        except (OSError, ValueError) as error:
            raise DispatchError(f"{path} cannot be written ({error}).") from error

    def _help(self, rest: str) -> None:
        width = max(map(len, COMMANDS))
        self._show("\n".join(f"{usage:{width}}  {does}" for usage, does in COMMANDS.items()))

    def _last(self) -> Turn:
        if not self.conversation.turns:
            raise DispatchError("Nobody has replied yet.")
        return self.conversation.turns[-1]

    def _show(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))


def _check_text(line: str) -> None:
    """Raise a DispatchError where a line holds bytes that were no text."""
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DispatchError("That line is no text in UTF-8, so that nothing was said.") from error


def _path(typed: str) -> Path:
    """Return the file that somebody means, with or without quotation marks, which its name may also hold itself."""
    words = []
    with contextlib.suppress(ValueError):
        words = shlex.split(typed)
    name = words[0] if len(words) == 1 else typed
    if not name:
        raise DispatchError("Say where: /save FILE.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DispatchError(f"{name} is in nobody's home folder ({error}).") from error


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes where a file is written anew."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


class _Typed:
    """What is typed, line by line; bytes that are no text come as what cannot be encoded, and are refused by line."""

    def __init__(self, console: Console) -> None:
        self.console = console
        if isinstance(sys.stdin, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # something was read from it already
                sys.stdin.reconfigure(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return self.console.input("> ")
        except EOFError:
            self.console.print()
            raise StopIteration from None

"""A conversation in the terminal: what is said, who speaks, and why.

/mix clarify=0.7 disagree=0.3   these experts speak from now on; /mix alone is the base
/auto                           the dispatcher decides again
/why                            what the last reply was based on
/base                           the last turn once more, answered by the base, side by side
/save FILE                      write the conversation as JSON
/help, /quit
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from svdexpert.conversation import tokenizer_of
from svdexpert.decision import Decision
from svdexpert.dialogue import Conversation
from svdexpert.errors import DispatchError, SvdExpertError

COMMANDS = "/mix NAME=WEIGHT ..., /auto, /why, /base, /save FILE, /help, /quit"


class _Printer(TextStreamer):
    """Writes a reply to a console as it comes."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain so far."""
        self.console.print(Text(text), end="\n" if stream_end else "")


def spoken(decision: Decision) -> str:
    """Return who spoke, in words.

    >>> spoken(Decision({"ask": 0.7, "doubt": 0.0}, 1.0, ""))
    'ask 0.7'
    """
    return ", ".join(f"{name} {weight:g}" for name, weight in decision.weights.items() if weight) or "base"


def weights_in(words: list[str]) -> dict[str, float]:
    """Return weights out of NAME=WEIGHT.

    >>> weights_in(["ask=0.7", "doubt"])
    {'ask': 0.7, 'doubt': 1.0}

    Raises:
        DispatchError: a weight that is no number.
    """
    found = {}
    for word in words:
        name, _, weight = word.partition("=")
        try:
            found[name] = float(weight or 1)
        except ValueError as error:
            raise DispatchError(f"{word!r}: expected NAME=WEIGHT, e.g. clarify=0.7.") from error
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
        history: JSON file that it is written to after every turn.
        console: where it is shown; the terminal if None.
        lines: what is typed; asked for in the terminal if None.
    """
    console = console or Console()
    typed = lines if lines is not None else _typed(console)
    auto = conversation.dispatcher
    _say(console, f"experts: {', '.join(conversation.library) or 'none'}; {COMMANDS}")
    for line in typed:
        words = line.split()
        if not words:
            continue
        if words[0] == "/quit":
            break
        try:
            if words[0].startswith("/"):
                _command(conversation, auto, console, words)
            else:
                turn = conversation.say(line, streamer=cast(Any, _Printer(tokenizer_of(conversation.model), console)))
                _say(console, f"[{spoken(turn.decision)}; read {turn.read} tokens, {turn.kept} were known]")
                if history is not None:
                    _save(conversation, history)
        except SvdExpertError as error:
            _say(console, str(error))


def _command(conversation: Conversation, auto: Any, console: Console, words: list[str]) -> None:
    verb, rest = words[0], words[1:]
    commands: dict[str, Callable[[], None]] = {
        "/mix": lambda: conversation.mix(weights_in(rest)),
        "/auto": lambda: _automatic(conversation, auto),
        "/why": lambda: _why(conversation, console),
        "/base": lambda: _beside(conversation, console),
        "/save": lambda: _save(conversation, _named(rest)),
        "/help": lambda: _say(console, COMMANDS),
    }
    if verb not in commands:
        raise DispatchError(f"There is no {verb}; there are: {COMMANDS}.")
    commands[verb]()


def _automatic(conversation: Conversation, auto: Any) -> None:
    if auto is None:
        raise DispatchError("No dispatcher was given: start with --dispatcher FILE (svdexpert dispatch fit makes one).")
    conversation.dispatcher = auto


def _why(conversation: Conversation, console: Console) -> None:
    if not conversation.turns:
        raise DispatchError("Nobody has replied yet.")
    decision = conversation.turns[-1].decision
    _say(console, f"{spoken(decision)}, confidence {decision.confidence:.2f}: {decision.because}")


def _beside(conversation: Conversation, console: Console) -> None:
    base = conversation.base_reply()
    table = Table()
    table.add_column("base", overflow="fold")
    table.add_column(spoken(conversation.turns[-1].decision), overflow="fold")
    table.add_row(Text(base), Text(conversation.turns[-1].text))
    console.print(table)


def _named(rest: list[str]) -> Path:
    if len(rest) != 1:
        raise DispatchError("Say where: /save FILE.")
    return Path(rest[0])


def _save(conversation: Conversation, path: Path) -> None:
    try:
        conversation.save(path)
    except OSError as error:
        raise DispatchError(f"{path} cannot be written ({error}).") from error


def _typed(console: Console) -> Iterator[str]:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield console.input("> ")


def _say(console: Console, text: str) -> None:
    console.print(Text(text, style="dim"))

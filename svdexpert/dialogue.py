"""A conversation that goes on: messages, who spoke in each turn, and the cache of what was read.

    turn  -> decision -> mixture of this turn -> reply
    cache    `refill`: what another mixture has computed is computed again: the same as a fresh conversation
             `reuse`:  what was computed stays, whoever spoke: faster, and no longer exact

Activated experts touch nothing but their own reply, so that `refill` reads one reply again. Experts that act on all
tokens leave their mark on all of them: where the mixture changes, `refill` reads everything again.

Where a dispatcher chooses several experts they speak at once, as their sum, or one after another (`in_turn`): a base
that was never shown a reply of two sentences makes none, whoever moves it, and switched in the middle it does.

    prompt, first expert -> "No, it is at nine."
    prompt, "No, it is at nine.", NOD, second expert -> "Which day?"        the reply: "No, it is at nine. Which day?"

What a conversation has outgrown the model's context by is left out from its beginning, and every turn says how much.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from svdexpert.conversation import (
    as_message,
    context_of,
    fit,
    invocation_of,
    opened_at,
    prompt_of,
    text_of,
    tokenizer_of,
    turn_ends,
)
from svdexpert.decision import Asked, Context, Decision, Dispatcher
from svdexpert.dispatch import decide
from svdexpert.dispatch.fixed import Fixed
from svdexpert.errors import DispatchError, MixtureError, TooLongError, did_you_mean
from svdexpert.expert import Expert
from svdexpert.mixture import Bank
from svdexpert.model import SpectralModel
from svdexpert.reply import read as read_reply
from svdexpert.storage import whole_file
from svdexpert.worlds import Message, Tool, system, user

Policy = Literal["refill", "reuse"]
NOD = "All right."
"""What a user would say to the first part of a reply; it stands between two experts, and in no conversation."""


@dataclass(frozen=True, eq=False)
class Around:
    """A dispatcher that changes what another one decides.

    Attributes:
        inner: the other one.
    """

    inner: Dispatcher

    @property
    def reads(self) -> bool:
        """Whether the inner one needs the state of the prompt."""
        return self.inner.reads

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that it may let speak."""
        return self.inner.experts

    def check(self, model: SpectralModel, library: Mapping[str, Expert] | Bank) -> None:
        """Raise a DispatchError unless the inner one can decide here."""
        self.inner.check(model, library)


@runtime_checkable
class ByHalves(Dispatcher, Protocol):
    """A dispatcher whose experts speak where their own scores are at least one half, as a router's do."""

    @property
    def abstain_below(self) -> float:
        """The confidence under which it lets nobody speak."""

    def weights_of(self, names: Sequence[str]) -> dict[str, float]:
        """Return how loudly experts speak where they are all that do."""


@dataclass(frozen=True, eq=False)
class Sticky(Around):
    """A dispatcher with hysteresis: who speaks goes on, and who does not stays silent, until it is clearly otherwise.

    A score that is near one half counts as if it stood as far on the other side. That leaves the confidence as it is,
    so that a set which is too unsure to speak stays silent, whoever spoke before.

    Attributes:
        before: weights of its last decision.
        margin: by how much a score must pass one half to change who speaks, in [0, 0.5).
    """

    inner: ByHalves
    before: Mapping[str, float]
    margin: float

    def decide(self, model: SpectralModel, asked: Asked) -> list[Decision]:
        """Return the inner decisions, with those scores that are near one half left as they were."""
        return [self._kept(one) for one in self.inner.decide(model, asked)]

    def _kept(self, one: Decision) -> Decision:
        if one.confidence < self.inner.abstain_below:
            return one
        near = {name for name, score in one.scores.items() if abs(score - 0.5) < self.margin}
        spoken = {name for name, weight in one.weights.items() if weight}
        kept = (spoken - near) | {name for name in near if self.before.get(name)}
        if kept == spoken:
            return one
        because = f"{one.because}; as in the turn before: {', '.join(sorted(near))}"
        return replace(one, weights=self.inner.weights_of(sorted(kept)), because=because)


@dataclass(frozen=True, eq=False)
class First(Around):
    """A dispatcher whose reply begins with one expert, where the inner one chooses several.

    Attributes:
        order: of experts, who speak one after another; the others speak with the first of them.
        due: of the last decision, the mixtures that speak next.
        whole: the last decision as the inner one took it.
    """

    order: Sequence[str]
    due: list[dict[str, float]] = field(default_factory=list)
    whole: list[Decision] = field(default_factory=list)

    def decide(self, model: SpectralModel, asked: Asked) -> list[Decision]:
        """Return the inner decision of the one row, without those who speak next."""
        (whole,) = self.inner.decide(model, asked)
        self.whole[:], self.due[:] = [whole], self._parts(whole)
        return [replace(whole, weights=self.due.pop(0)) if self.due else whole]

    def _parts(self, whole: Decision) -> list[dict[str, float]]:
        """Return the mixtures of a reply in parts; none where it is one."""
        spoken = {name: weight for name, weight in whole.weights.items() if weight}
        ordered = [name for name in self.order if name in spoken]
        if len(ordered) < 2:
            return []
        beside = {name: weight for name, weight in spoken.items() if name not in ordered}
        parts = [{name: whole.alone.get(name, spoken[name])} for name in ordered]
        return [parts[0] | beside, *parts[1:]]


@dataclass(frozen=True)
class Turn:
    """One reply, and how it came about.

    Attributes:
        reply: the assistant's message.
        text: the same as text, calls in the neutral written form.
        decision: who spoke, and why; where a reply in parts ended early, those alone whose parts were written.
        read: tokens of the prompt that were computed for it (of all its prompts, where it has parts).
        kept: tokens of the prompt that stood in the cache.
        parts: what each expert said, where they spoke one after another. A call ends a reply, and so does a context in
            which the next expert would no longer see what the user said.
        dropped: turns at the beginning of the conversation that no longer fit the model's context and were left out; a
            turn is a user's message and all that follows up to the next one.
        dispatched: weights as the dispatcher has given them, whatever of the reply was written: from there hysteresis
            goes on; None where they were given by hand.
    """

    reply: Message
    text: str
    decision: Decision
    read: int
    kept: int
    parts: tuple[str, ...] = ()
    dropped: int = 0
    dispatched: Mapping[str, float] | None = None


class _Finite(LogitsProcessor):
    """Ends a reply whose numbers are not finite: NaN in one token is NaN in all that are cached with it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (b v)."""
        if not bool(scores.amax().isfinite()):
            raise MixtureError(
                "The model's numbers are not finite under this mixture, so that there is no reply: give smaller "
                "weights."
            )
        return scores


@dataclass
class Conversation:
    """A conversation with a model, one at a time.

    Args:
        model: attached, with a tokenizer that has a chat template.
        library: the experts that may speak.
        dispatcher: decides in every turn; None is the base, until `mix` says otherwise.
        tools: JSON schemas of functions.
        instructions: a system message.
        policy: what becomes of the cache where the mixture changes.
        hysteresis: margin around one half in which scores do not change who speaks, in [0, 0.5). It acts where a
            dispatcher decides by that boundary (`ByHalves`), as routers do, from one of its turns to the next.
        max_new_tokens: of a reply, or of a part of one.
        in_turn: names of experts in the order in which they speak one after another where the dispatcher chooses
            several of them; empty: at once. What `mix` was told is always at once.

    Raises:
        DispatchError: a setting out of range.
    """

    model: SpectralModel
    library: Mapping[str, Expert] = field(default_factory=dict)
    dispatcher: Dispatcher | None = None
    tools: Sequence[Tool] = ()
    instructions: str = ""
    policy: Policy = "refill"
    hysteresis: float = 0.1
    max_new_tokens: int = 128
    in_turn: Sequence[str] = ()
    messages: list[Message] = field(default_factory=list, init=False)
    turns: list[Turn] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise DispatchError(f"policy is {self.policy!r}." + did_you_mean(self.policy, get_args(Policy)))
        if not 0 <= self.hysteresis < 0.5:
            raise DispatchError(f"hysteresis is {self.hysteresis}: expected 0 or more, and less than 0.5.")
        self._named(self.in_turn)
        if self.instructions:
            self.messages.append(system(self.instructions))
        self._cache: DynamicCache | None = None
        self._held: list[int] = []  # ids that the cache holds
        self._exact = 0  # of them, those that are what the base, or the mixture of all turns so far, makes of them
        self._spoke: Mapping[str, float] = {}
        self._decided: Dispatcher | None = None  # who did in the last turn

    def mix(self, weights: Mapping[str, float]) -> None:
        """Let these experts speak from now on.

        Raises:
            DispatchError: an expert that the library lacks, a weight that is no finite number in fp32; what held before
                still holds.
        """
        self._named(tuple(weights))
        for name, weight in weights.items():
            if not isinstance(weight, Real) or not abs(weight) <= torch.finfo(torch.float32).max:
                raise DispatchError(f"The weight of {name!r} is {weight!r}: expected a finite number, as 0.7.")
        given = {name: float(weight) for name, weight in weights.items()}
        self.dispatcher = Fixed(given, "given by hand") if given else None

    def say(self, text: str, *, streamer: BaseStreamer | None = None) -> Turn:
        """Add a user's message, and return the reply to it.

        Args:
            text: what the user says.
            streamer: gets the tokens of the reply as they come.

        Raises:
            DispatchError: nothing is said, or no text; the dispatcher cannot decide here.
            TooLongError: the message does not fit the model.
            MixtureError: the model's numbers overflow under the mixture.

        Whatever is raised, the message is taken back, and the conversation is as it was.
        """
        if not isinstance(text, str):
            raise DispatchError(f"A user says a text, and this is {text!r}.")
        return self.reply_to(user(text), streamer=streamer)

    def reply_to(self, *messages: Message, streamer: BaseStreamer | None = None) -> Turn:
        """Add messages, as a function's result, and return the reply to them; see `say`."""
        _check(messages)
        if all(one["role"] in ("system", "developer") for one in (*self.messages, *messages)):
            raise DispatchError("The conversation is empty: there is nothing to reply to.")
        said, replied, decided = len(self.messages), len(self.turns), self._decided
        try:  # an interrupt at any line takes all of it back
            self.messages.extend(messages)
            turn = self._turn(streamer)
            self.messages.append(turn.reply)
            self.turns.append(turn)
            self._decided = self.dispatcher
        except BaseException:
            del self.messages[said:], self.turns[replied:]
            self._cache, self._decided = None, decided
            raise
        return turn

    def base_reply(self) -> str:
        """Return what the base would have said in the last turn; the conversation stays as it is.

        Raises:
            DispatchError: there was no turn yet.
        """
        if not self.turns:
            raise DispatchError("Nobody has replied yet: say something first.")
        asked = Conversation(self.model, tools=self.tools, max_new_tokens=self.max_new_tokens)
        last = max(place for place, one in enumerate(self.messages) if one is self.turns[-1].reply)
        return asked.reply_to(*self.messages[:last]).text

    def save(self, path: str | Path) -> None:
        """Write messages and decisions as JSON.

        Raises:
            DispatchError: a message that is no text.
            OSError: the disk refused; what was there before is intact.
        """
        _check(self.messages)
        turns = [asdict(one) | {"decision": one.decision.as_json()} for one in self.turns]
        text = json.dumps({"messages": self.messages, "turns": turns}, indent=2, ensure_ascii=False)
        with whole_file(Path(path)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def resume(self, path: str | Path) -> None:
        """Go on with a conversation that `save` wrote; the next turn reads all of it.

        The dispatcher that is there now counts as the one that decided in it.

        Raises:
            DispatchError: the file holds no conversation, or one with other instructions; this one has begun.
        """
        if len(self.messages) > bool(self.instructions):
            raise DispatchError(f"This conversation has begun: {path} goes on in a new one.")
        messages, turns = read_saved(path)
        told = next((one.get("content") for one in messages[:1] if one["role"] == "system"), "")
        if self.instructions not in ("", told):
            raise DispatchError(
                f"The conversation in {path} has the instructions {told!r}: give the same, or none, or another file."
            )
        self.messages, self.turns, self._decided = messages, turns, self.dispatcher

    # --- one turn

    def _turn(self, streamer: BaseStreamer | None) -> Turn:
        dispatcher = self._dispatcher()
        if not self.in_turn or isinstance(dispatcher, Fixed):
            turn = self._part(self.messages, dispatcher, streamer)
            return turn if isinstance(dispatcher, Fixed) else replace(turn, dispatched=dict(turn.decision.weights))
        first = First(dispatcher, self.in_turn)
        parts, behind = [self._part(self.messages, first, streamer)], list(self.messages)
        (whole,), ended = first.whole, ""
        for mixture in first.due:
            if read_reply(parts[-1].text).calls:
                ended = "a call ends a reply"
                break
            behind += [parts[-1].reply, user(NOD)]
            try:
                parts.append(self._part(behind, Fixed(mixture, whole.because), streamer))
            except TooLongError:
                ended = "the context has no room for another part"
                break
        said = " ".join(one.text for one in parts)
        decision = _of_parts(whole, parts, ended) if ended else whole
        read, kept = sum(one.read for one in parts), sum(one.kept for one in parts)
        texts = tuple(one.text for one in parts) if first.due else ()
        dropped = max(one.dropped for one in parts)
        return Turn(as_message(said), said, decision, read, kept, texts, dropped, dict(whole.weights))

    def _part(self, messages: Sequence[Message], dispatcher: Dispatcher, streamer: BaseStreamer | None) -> Turn:
        """Return what is said behind messages: all of a reply, or a part of one.

        Raises:
            TooLongError: the last turn of the conversation does not fit.
        """
        model, tools = self.model, list(self.tools)
        fitted = prompt_of(model, messages, tools, [], self.max_new_tokens)
        if fitted.dropped:  # who decides sees what is replied to
            how_long = context_of(model)
            messages, _ = fit(tokenizer_of(model), messages, tools, self.max_new_tokens, context=how_long)
            asked = next((one for one in reversed(self.messages) if one["role"] == "user"), self.messages[-1])
            if not any(one is asked for one in messages):  # behind a part of a reply the last turn is another
                raise TooLongError("The model's context has no room for another part of this reply.")
        prompt = fitted.ids
        decisions = list[Decision]()
        activated = self._activated()
        first = not activated and self.policy == "refill" and self._held  # who speaks decides what is read again
        if self._asks(dispatcher) and (first or not dispatcher.reads):
            decisions = decide(dispatcher, model, [Context(tuple(messages), tuple(tools))], self.library)
            dispatcher = Fixed(decisions[0].weights, decisions[0].because)
        cache, kept = self._kept(prompt, dispatcher, activated)
        _, ends = turn_ends(model)
        ids = torch.tensor([prompt])
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "streamer": streamer}
        how |= {"return_dict_in_generate": True, "past_key_values": cache, "eos_token_id": sorted(ends)}
        how["logits_processor"] = LogitsProcessorList([_Finite()])
        if self._asks(dispatcher):
            note = None if decisions else decisions.extend
            output = model.generate(ids, library=self.library, dispatcher=dispatcher, on_decision=note, **how)
        else:
            output = model.generate(ids, None, **how)
        decisions = decisions or [Decision({}, 1.0, "nobody was asked to speak")]
        self._remember(output, prompt, activated, decisions[0])
        written = cast(Any, output).sequences[0, len(prompt) :].tolist()
        text = text_of(tokenizer_of(model), [one for one in written if one not in ends])
        return Turn(as_message(text), text, decisions[0], len(prompt) - kept, kept, dropped=fitted.dropped)

    def _dispatcher(self) -> Dispatcher:
        """Return what decides on the next turn."""
        given = self.dispatcher or Fixed({})
        before = self.turns[-1].dispatched if self.turns and self._decided is given else None
        if before is None or not self.hysteresis or not isinstance(given, ByHalves):
            return given
        return Sticky(given, before, self.hysteresis)

    def _asks(self, dispatcher: Dispatcher) -> bool:
        """Return whether somebody may speak; a dispatcher that names nobody is asked all the same, as in `generate`."""
        return bool(dispatcher.experts or (self.library and not isinstance(dispatcher, Fixed)))

    def _named(self, names: Sequence[str]) -> None:
        """Raise a DispatchError unless the library holds these experts."""
        for name in names:
            if name not in self.library:
                raise DispatchError(f"There is no expert {name!r} here." + did_you_mean(str(name), self.library))

    def _activated(self) -> bool:
        """Return whether the experts act from where the reply begins."""
        return all(one.invocation for one in self.library.values())

    def _kept(self, prompt: list[int], dispatcher: Dispatcher, activated: bool) -> tuple[DynamicCache, int]:
        """Return the cache that this turn goes on from, and how many tokens it holds."""
        same = 0
        for one, other in zip(prompt[:-1], self._held, strict=False):
            if one != other:
                break
            same += 1
        if self.policy == "refill":
            speaks = dispatcher.weights if isinstance(dispatcher, Fixed) else None
            unchanged = not activated and speaks is not None and dict(speaks) == dict(self._spoke)
            same = same if unchanged else min(same, self._exact)
        if activated and self.library:  # who speaks must see where the reply begins
            same = min(same, self._opening(prompt))
        cache = self._cache
        if cache is None or not same or not all(type(one) is DynamicLayer for one in cache.layers):
            return DynamicCache(config=self.model.hf.config), 0
        if same < cache.get_seq_length():
            cache.crop(same - cache.get_seq_length())
        return cache, same

    def _remember(self, output: Any, prompt: list[int], activated: bool, decision: Decision) -> None:
        """Note what the cache holds, and how much of it is exact."""
        self._cache = output.past_key_values
        held = output.sequences[0].tolist()[: self._cache.get_seq_length() if self._cache is not None else 0]
        untouched = decision.abstained or not self.library
        if activated and self.library:
            exact = len(held) if untouched else self._opening(prompt)
        else:  # experts that act on all tokens make something else of what the base has read
            exact = 0 if self.library else len(held)
        self._held, self._exact = held, exact
        self._spoke = {name: weight for name, weight in decision.weights.items() if weight}

    def _opening(self, prompt: list[int]) -> int:
        """Return where the reply is opened, before which all is the base's."""
        return opened_at(prompt, invocation_of(self.model)) or 0


def _of_parts(whole: Decision, parts: Sequence[Turn], ended: str) -> Decision:
    """Return who spoke in a reply that ended before all did whom a decision lets speak."""
    weights = {name: weight for one in parts for name, weight in one.decision.weights.items()}
    silent = ", ".join(name for name, weight in whole.weights.items() if weight and name not in weights)
    return replace(whole, weights=weights, because=f"{whole.because}; without {silent}: {ended}")


def _check(messages: Sequence[Message]) -> None:
    """Raise a DispatchError unless these are messages, in text that can be written, and users say something."""
    for one in messages:
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise DispatchError(f"{one!r} is no message: expected its role and its content.")
        said = one.get("content")
        if one["role"] == "user" and not (said.strip() if isinstance(said, str) else isinstance(said, list) and said):
            raise DispatchError(f"The user's message is {said!r}: there is nothing to reply to.")
        try:
            json.dumps(one, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DispatchError(f"A message is no text: {error}. Write it in UTF-8.") from error
        except (TypeError, ValueError) as error:
            raise DispatchError(f"A message holds what JSON has not: {error}.") from error


def read_saved(path: str | Path) -> tuple[list[Message], list[Turn]]:
    """Return messages and turns of a conversation that `Conversation.save` wrote.

    Raises:
        DispatchError: it is no such file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        messages, turns = list(found["messages"]), [_turn_of(row) for row in found["turns"]]
        _check(messages)
        rest = reversed(messages)
        for place in reversed(range(len(turns))):  # the reply of a turn is the message itself, not one that is equal
            reply = next(one for one in rest if begins_with([one], [turns[place].reply]))
            turns[place] = replace(turns[place], reply=reply)
    except (
        OSError,
        ArithmeticError,  # what JSON calls Infinity is no integer, and its integers know no limit
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        DispatchError,
    ) as error:
        raise DispatchError(f"{path} is no saved conversation ({type(error).__name__}: {error}).") from error
    except StopIteration:
        raise DispatchError(f"{path} is no saved conversation: a turn's reply is not among its messages.") from None
    return messages, turns


def begins_with(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    """Return whether a conversation begins with other messages, as they are written: a NaN there is the same NaN."""
    first, second = (json.dumps(list(some), default=repr) for some in (messages[: len(others)], others))
    return first == second


def _turn_of(row: Mapping[str, Any]) -> Turn:
    """Return a turn as `save` has written it."""
    told = row["decision"]
    weights, scores, alone = (
        {str(name): float(one) for name, one in told[key].items()} for key in ("weights", "scores", "alone")
    )
    decision = Decision(weights, float(told["confidence"]), str(told["because"]), scores, alone)
    parts = tuple(map(str, row["parts"]))
    given = row.get("dispatched")  # older files have neither this nor the next
    dispatched = None if given is None else {str(name): float(one) for name, one in given.items()}
    how = (int(row["read"]), int(row["kept"]), parts, int(row.get("dropped", 0)), dispatched)
    return Turn(dict(row["reply"]), str(row["text"]), decision, *how)


def next_token_divergence(refilled: Tensor, reused: Tensor) -> Tensor:
    """Return KL(refill || reuse) at every token, in nats (t), from their logits (t v)."""
    first, second = refilled.float().log_softmax(-1), reused.float().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)

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
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from svdexpert.conversation import as_message, invocation_of, opened_at, prompt_of, text_of, tokenizer_of, turn_ends
from svdexpert.decision import Asked, Context, Decision, Dispatcher, present
from svdexpert.dispatch import decide
from svdexpert.dispatch.fixed import Fixed
from svdexpert.errors import DispatchError, did_you_mean
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


@dataclass(frozen=True, eq=False)
class Sticky(Around):
    """A dispatcher with hysteresis: who speaks goes on, and who does not stays silent, until it is clearly otherwise.

    Attributes:
        before: its last decision; None at the beginning.
        margin: by how much a score must pass one half to change who speaks, in [0, 0.5).
    """

    before: Decision | None
    margin: float

    def decide(self, model: SpectralModel, asked: Asked) -> list[Decision]:
        """Return the inner decisions, with those scores that are near one half left as they were."""
        found = self.inner.decide(model, asked)
        before = self.before
        if before is None:
            return list(found)
        return [self._kept(one, before) if one.scores else one for one in found]

    def _kept(self, one: Decision, before: Decision) -> Decision:
        near = {name for name, score in one.scores.items() if abs(score - 0.5) < self.margin}
        spoken = {name for name, weight in one.weights.items() if weight}
        kept = (spoken - near) | {name for name in near if before.weights.get(name)}
        if kept == spoken:
            return one
        because = f"{one.because}; as in the turn before: {', '.join(sorted(near))}"
        return replace(one, weights=self._weights(kept, one, before), because=because)

    def _weights(self, names: set[str], one: Decision, before: Decision) -> dict[str, float]:
        """Return how loudly these speak: as the inner one lets them, which may depend on how many they are."""
        of_set = getattr(self.inner, "weights_of", None)
        if of_set is not None:
            return dict(of_set(sorted(names)))
        return {name: one.weights.get(name) or before.weights[name] for name in sorted(names)}


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
        decision: who spoke.
        read: tokens of the prompt that were computed for it (of all its prompts, where it has parts).
        kept: tokens of the prompt that stood in the cache.
        parts: what each expert said, where they spoke one after another; a call ends a reply.
    """

    reply: Message
    text: str
    decision: Decision
    read: int
    kept: int
    parts: tuple[str, ...] = ()


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
        hysteresis: margin around one half in which scores do not change who speaks, in [0, 0.5).
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
        if self.in_turn:
            present(self.in_turn, self.library)
        if self.instructions:
            self.messages.append(system(self.instructions))
        self._cache: DynamicCache | None = None
        self._held: list[int] = []  # ids that the cache holds
        self._exact = 0  # of them, those that are what the base, or the mixture of all turns so far, makes of them
        self._spoke: Mapping[str, float] = {}

    def mix(self, weights: Mapping[str, float]) -> None:
        """Let these experts speak from now on.

        Raises:
            DispatchError: an expert that the library lacks; what held before still holds.
        """
        fixed = Fixed(dict(weights), "given by hand")
        if weights:
            fixed.check(self.model, self.library)
        self.dispatcher = fixed if weights else None

    def say(self, text: str, *, streamer: BaseStreamer | None = None) -> Turn:
        """Add a user's message, and return the reply to it.

        Args:
            text: what the user says.
            streamer: gets the tokens of the reply as they come.

        Raises:
            DispatchError: the dispatcher cannot decide here; the message is taken back.
            TooLongError: it does not fit the model; it is taken back.
        """
        return self.reply_to(user(text), streamer=streamer)

    def reply_to(self, *messages: Message, streamer: BaseStreamer | None = None) -> Turn:
        """Add messages, as a function's result, and return the reply to them; see `say`."""
        before = len(self.messages)
        self.messages.extend(messages)
        try:
            turn = self._turn(streamer)
        except BaseException:
            del self.messages[before:]
            self._cache = None
            raise
        self.messages.append(turn.reply)
        self.turns.append(turn)
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
        """Write messages and decisions as JSON."""
        turns = [asdict(one) | {"decision": one.decision.as_json()} for one in self.turns]
        text = json.dumps({"messages": self.messages, "turns": turns}, indent=2, ensure_ascii=False)
        with whole_file(Path(path)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    # --- one turn

    def _turn(self, streamer: BaseStreamer | None) -> Turn:
        dispatcher = self._dispatcher()
        if not self.in_turn or isinstance(dispatcher, Fixed):
            text, decision, read, kept = self._part(self.messages, dispatcher, streamer)
            return Turn(as_message(text), text, decision, read, kept)
        first = First(dispatcher, self.in_turn)
        text, _, read, kept = self._part(self.messages, first, streamer)
        parts, behind = [text], list(self.messages)
        for mixture in first.due:
            if read_reply(text).calls:
                break
            behind += [as_message(text), user(NOD)]
            text, _, more, known = self._part(behind, Fixed(mixture, first.whole[0].because), streamer)
            parts, read, kept = [*parts, text], read + more, kept + known
        said = " ".join(parts)
        return Turn(as_message(said), said, first.whole[0], read, kept, tuple(parts) if first.due else ())

    def _part(
        self, messages: Sequence[Message], dispatcher: Dispatcher, streamer: BaseStreamer | None
    ) -> tuple[str, Decision, int, int]:
        """Return what is said behind messages, who said it, and how many tokens were read and known."""
        model = self.model
        prompt = prompt_of(model, messages, list(self.tools), [], self.max_new_tokens).ids
        decisions = list[Decision]()
        activated = self._activated()
        first = not activated and self.policy == "refill" and self._held  # who speaks decides what is read again
        if dispatcher.experts and (first or not dispatcher.reads):
            decisions = decide(dispatcher, model, [Context(tuple(messages), tuple(self.tools))], self.library)
            dispatcher = Fixed(decisions[0].weights, decisions[0].because)
        cache, kept = self._kept(prompt, dispatcher, activated)
        _, ends = turn_ends(model)
        ids = torch.tensor([prompt])
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "streamer": streamer}
        how |= {"return_dict_in_generate": True, "past_key_values": cache, "eos_token_id": sorted(ends)}
        if dispatcher.experts:
            note = None if decisions else decisions.extend
            output = model.generate(ids, library=self.library, dispatcher=dispatcher, on_decision=note, **how)
        else:
            output = model.generate(ids, None, **how)
        decisions = decisions or [Decision({}, 1.0, "nobody was asked to speak")]
        self._remember(output, prompt, activated, decisions[0])
        written = cast(Any, output).sequences[0, len(prompt) :].tolist()
        text = text_of(tokenizer_of(model), [one for one in written if one not in ends])
        return text, decisions[0], len(prompt) - kept, kept

    def _dispatcher(self) -> Dispatcher:
        if self.dispatcher is None:
            return Fixed({})
        if not self.turns or not self.hysteresis or isinstance(self.dispatcher, Fixed):
            return self.dispatcher
        return Sticky(self.dispatcher, self.turns[-1].decision, self.hysteresis)

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


def next_token_divergence(refilled: Tensor, reused: Tensor) -> Tensor:
    """Return KL(refill || reuse) at every token, in nats (t), from their logits (t v)."""
    first, second = refilled.float().log_softmax(-1), reused.float().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)

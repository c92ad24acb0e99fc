"""Who speaks when. A dispatcher is one file of this folder: it reads a conversation and says which experts speak.

    examples (a context, and who should speak in it) --fit--> dispatcher --decide--> a Decision a context

A module here offers

    def fit(model, library, examples, validation, **settings) -> Dispatcher
    def restored(card, tensors) -> Dispatcher                    the inverse of the dispatcher's `stored()`
    CHOOSES = False                                              where it chooses nothing on validation examples

and its dispatcher what `svdexpert.decision.Dispatcher` asks for. The folder is the registry, and
`load("my_package.my_strategy")` or `load("folder/my_strategy.py")` takes a strategy from anywhere. A dispatcher is one
safetensors file that names its strategy, its base and its experts; it is refused where it does not fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdexpert.conversation import (
    Prompt,
    answers,
    continuation,
    prompt_of,
    tokenizer_of,
    turn_ends,
    watch,
)
from svdexpert.decision import Asked, Context, Decision, Dispatcher, present
from svdexpert.errors import DispatchError, SkillError, SvdExpertError, TooLongError, did_you_mean
from svdexpert.expert import Expert
from svdexpert.forward import Forward, left_padded
from svdexpert.mixture import Bank
from svdexpert.model import SpectralModel
from svdexpert.registry import member, members, stem
from svdexpert.skills import Case, Skill, check_tool
from svdexpert.skills import load as load_skill
from svdexpert.storage import json_rows, whole_file
from svdexpert.template import check_messages
from svdexpert.worlds import Dialogue, Message, Split, World, user

__all__ = ["Asked", "Context", "Decision", "Dispatcher", "Example", "decide", "examples_of", "fit", "load", "open_file"]


@dataclass(frozen=True)
class Example:
    """A context, and who should speak in it.

    Attributes:
        context: the conversation.
        wanted: names of experts; none where the base should be left alone.
        skill: whose case it is, "" where nobody knows. A control of one skill that wants another says that the two do
            not speak together.
        reply: a right one, "" where there is none.
    """

    context: Context
    wanted: frozenset[str]
    skill: str = ""
    reply: str = ""


FIT_ARGUMENTS: set[str | int] = {"model", "library", "examples", "validation"}
"""Arguments of a strategy's `fit` that every one has."""


class Strategy(Protocol):
    """What a module of this folder offers; see the top of this file."""

    def fit(
        self,
        model: SpectralModel,
        library: Mapping[str, Expert],
        examples: Sequence[Example],
        validation: Sequence[Example],
        **settings: Any,
    ) -> Any:
        """Return a dispatcher."""

    def restored(self, card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """Return the dispatcher that was stored."""


def names() -> list[str]:
    """Return the names of the strategies that ship."""
    return members(sys.modules[__name__])


def load(name: str) -> Strategy:
    """Return a strategy by the name of its file here, or one's own by the path of a file or by import path.

    Raises:
        DispatchError: there is none of that name, or the module lacks a part of one.
    """
    module = member(sys.modules[__name__], "strategy", name, ("fit", "restored"), DispatchError)
    return cast(Strategy, module)


def fit(
    strategy: str,
    model: SpectralModel,
    library: Mapping[str, Expert],
    examples: Sequence[Example],
    validation: Sequence[Example] = (),
    **settings: Any,
) -> Dispatcher:
    """Make a dispatcher out of examples.

    Args:
        strategy: name of a file in this folder, or an import path.
        model: attached, with a tokenizer that has a chat template.
        library: the experts, by name.
        examples: what it learns from; those that do not fit the model are left out, with a warning that counts them.
        validation: what its settings are chosen on; a fifth of the examples if there is none.
        settings: of the strategy.

    Raises:
        DispatchError: no experts, fewer examples than experts, an example that wants an expert nobody has, a setting
            that is unknown or of another type.
    """
    module, settings = load(strategy), typed_settings(strategy, settings)
    present((), library)
    check_wanted((*examples, *validation), library)
    given = len(examples) + len(validation)
    examples, validation = fitting(model, examples), fitting(model, validation)
    if left_out := given - len(examples) - len(validation):
        warnings.warn(f"{left_out} of {given} examples were left out: {TOO_LONG}", stacklevel=2)
    if len(examples) <= len(library):
        raise DispatchError(
            f"There are {len(examples)} examples for {len(library)} experts and the base: give several of each, and of "
            "contexts in which no expert should speak."
        )
    if not validation and getattr(module, "CHOOSES", True):
        examples, validation = with_validation(examples)
    return cast(Dispatcher, module.fit(model, library, examples, validation, **settings))


def typed_settings(strategy: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a strategy as the types that its `fit` names, from what JSON and YAML hold.

    Raises:
        DispatchError: a setting that it does not have, or a value of another type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    offered = load(strategy).fit
    if strategy not in names():
        return _taken_as_given(strategy, offered, settings)
    parser = ArgumentParser(exit_on_error=False)
    known = parser.add_function_arguments(offered, as_positional=False, skip=FIT_ARGUMENTS)
    plain = {name: one.item() if isinstance(one, np.generic) else one for name, one in settings.items()}
    try:
        return dict(parser.instantiate(parser.parse_object(plain, defaults=False)))
    except ArgumentError as error:
        said = " ".join(str(error).split())
        has = ", ".join(known) or "none"
        raise DispatchError(f"{strategy} does not take {dict(settings)}: {said}. Its settings: {has}.") from error


def _taken_as_given(strategy: str, offered: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a strategy of one's own, whose types are its own business.

    Raises:
        DispatchError: one that it does not have.
    """
    parameters = list(signature(offered).parameters.values())
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        known = [one.name for one in parameters[len(FIT_ARGUMENTS) :]]
        for name in settings:
            if name not in known:
                raise DispatchError(f"{strategy} has no setting {name!r}. There are: {', '.join(known) or 'none'}.")
    return dict(settings)


def check_wanted(examples: Sequence[Example], library: Mapping[str, Expert] | Bank) -> None:
    """Check that a library holds whoever examples want.

    Raises:
        DispatchError: it does not; the first such example is named.
    """
    names = library.names if isinstance(library, Bank) else tuple(library)
    for place, one in enumerate(examples, 1):
        for name in sorted(one.wanted):
            if name not in names:
                raise DispatchError(
                    f"Example {place} wants {name!r}, which the library lacks." + did_you_mean(name, names)
                )


def with_validation(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Return what is learnt from, and what settings are chosen on.

    Of those that want the same experts every fifth is kept to choose on, of fewer than five the last one, and of one
    none.
    """
    many = Counter(one.wanted for one in examples)
    seen: Counter[frozenset[str]] = Counter()
    parts: tuple[list[Example], list[Example]] = ([], [])
    for one in examples:
        seen[one.wanted] += 1
        parts[seen[one.wanted] % min(5, max(2, many[one.wanted])) == 0].append(one)
    return parts


# --- examples


TOO_LONG = "their last turn alone is longer than the model's context."


def fitting(model: SpectralModel, examples: Sequence[Example]) -> list[Example]:
    """Return the examples whose last turn fits the model's context, in their order; empty ones are refused later."""
    found = []
    for one in examples:
        with suppress(TooLongError):
            if one.context.messages:
                _ids(model, one.context)
            found.append(one)
    return found


def examples_of(
    skills: Sequence[str], world: World, split: Split, n: int, *, seed: int = 0, plain: float = 0.5
) -> list[Example]:
    """Return contexts of skills, and who should speak in each: the skill whose move the demonstration makes.

    Nobody should in knowing questions, and nobody where a function has just replied.

    Args:
        skills: names of skills, which are names of experts, or paths of one's own.
        world: where cases come from.
        split: the split.
        n: cases of each skill, even.
        seed: of the world's draws.
        plain: knowing questions, as a share of the cases; of functions' replies at most as many as of one skill's.

    Raises:
        SkillError: an unknown skill, n is odd.
    """
    loaded = {stem(name): load_skill(name) for name in skills}
    found = []
    for name, skill in loaded.items():
        cases = skill.cases(world, split, n, seed=seed)
        found += [
            Example(Context(one.messages, one.tools), _wanted(name, one, skill, loaded), name, one.gold[0])
            for one in cases
        ]
        asked = cases[: round(plain * n)]
        found += [Example(Context(one.knowing.messages, one.knowing.tools), frozenset()) for one in asked]
    told = world.dialogues(split, round(plain * n), seed=seed)
    return found + [Example(one, frozenset()) for one in map(_told, told) if one is not None]


def _told(dialogue: Dialogue) -> Context | None:
    """Return a dialogue up to the first reply of a function, None where there is none."""
    for place, one in enumerate(dialogue.messages):
        if one["role"] == "tool":
            return Context(dialogue.messages[: place + 1], dialogue.tools)
    return None


def _wanted(name: str, case: Case, skill: Skill, loaded: Mapping[str, Skill]) -> frozenset[str]:
    if case.positive:
        return frozenset([name])
    made = skill.verify(case, case.gold[0]).move
    return frozenset(other for other, one in loaded.items() if made == one.MOVE)


def read_examples(path: str | Path) -> list[Example]:
    """Return the examples in a JSONL file: `messages`, `experts` (a list of names, maybe empty), and maybe `tools`.

    Raises:
        DispatchError: no such file, no rows, or a row that is not of that form; it names the row.
    """
    path = Path(path)
    if not path.is_file():
        raise DispatchError(f"{path} is no file of examples (JSONL).")
    return list(_read(path))


def _read(path: Path) -> Iterator[Example]:
    form = 'expected {"messages": [...], "experts": ["name", ...], "tools": [...]}'
    empty = True
    for place, row in json_rows(path, DispatchError):
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise DispatchError(f"{path.name}:{place}: found {str(row)[:80]!r}, {form}.")
        if messages[-1]["role"] in ("assistant", "system", "developer"):
            raise DispatchError(
                f"{path.name}:{place}: the last message is of the role {messages[-1]['role']!r}, expected user or "
                "tool, to which the assistant replies."
            )
        wanted = row.get("experts")
        if not isinstance(wanted, list) or not all(isinstance(one, str) for one in wanted):
            raise DispatchError(f"{path.name}:{place}: experts is {wanted!r}, {form}.")
        tools = row.get("tools") or []
        if not isinstance(tools, list):
            raise DispatchError(f"{path.name}:{place}: tools is {tools!r}, {form}.")
        try:
            for tool in tools:
                check_tool(tool)
        except SkillError as error:
            raise DispatchError(f"{path.name}:{place}: {error}") from error
        reply = row.get("reply") or ""
        if not isinstance(reply, str):
            raise DispatchError(f"{path.name}:{place}: reply is {str(reply)[:80]!r}, expected a text.")
        yield Example(Context(tuple(messages), tuple(tools)), frozenset(wanted), reply=reply)
        empty = False
    if empty:
        raise DispatchError(f"{path} holds no examples, {form}.")


def _is_message(one: Any) -> bool:
    """Return whether this is a message: a role, and a content, calls or both."""
    try:
        check_messages([one])
    except SvdExpertError:
        return False
    return isinstance(one.get("content"), str | list | dict) or bool(one.get("tool_calls"))


# --- asking the base what a context needs


NOBODY = "none"
"""The label of a context in which no expert should speak."""


def meanings(library: Mapping[str, Expert], labels: Mapping[str, str] | None) -> dict[str, str]:
    """Return what each expert is for, by name; its name says it where nobody does.

    Raises:
        DispatchError: a label for an expert that is not there, an expert without one.
    """
    if labels is not None and labels.keys() != library.keys():
        raise DispatchError(f"There are labels for {sorted(labels)} and experts {sorted(library)}: give one for each.")
    return {name: (labels or {}).get(name) or f"an answer of the kind {name}" for name in library}


def quoted(context: Context) -> str:
    """Return a conversation as text."""
    return "\n".join(f"{one['role']}: {one.get('content') or one.get('tool_calls') or ''}" for one in context.messages)


def question(said: str, labels: Mapping[str, str]) -> Message:
    """Return the message that asks which label fits a conversation.

    Args:
        said: the conversation as text.
        labels: what each means, by label.
    """
    kinds = "\n".join(f"{label}: {meaning}" for label, meaning in labels.items())
    return user(f"{said}\n\nWhat does this conversation need next? Answer with one word.\n{kinds}")


def label_scores(
    model: SpectralModel,
    contexts: Sequence[Context],
    labels: Mapping[str, str],
    *,
    batch_size: int = 32,
) -> Tensor:
    """Return the log-probability of every label as the answer to `question` (b l), under the mixture in force.

    Args:
        model: with a tokenizer that has a chat template.
        contexts: conversations; what does not fit the model with the question loses its beginning.
        labels: what each means, by label; they are the answers.
        batch_size: rows of a forward pass.
    """
    tokenizer, (end, ends) = tokenizer_of(model), turn_ends(model)
    options = [[*continuation(tokenizer, label), end] for label in labels]  # one label may begin like another
    prompts = [_about(model, one, labels, options) for one in contexts]
    found = answers(model, prompts, ends, "labelling", batch_size=batch_size, progress=False)
    return torch.tensor([[sum(tokens) for tokens in answer.scores] for answer in found])


def _about(model: SpectralModel, context: Context, labels: Mapping[str, str], options: list[list[int]]) -> Prompt:
    """Return the question about a conversation; of one that is too long, about as much of its end as fits."""
    said = quoted(context)
    while True:
        try:
            return prompt_of(model, [question(said, labels)], list(context.tools), options, 0)
        except TooLongError:
            if not said:
                raise
            said = said[max(1, len(said) // 8) :]


@dataclass(frozen=True, eq=False)
class Labelling:
    """What dispatchers that have contexts labelled share.

    Attributes:
        labels: what each expert is for, by name; they are the answers.
        nobody: what the answer means that no expert should speak.
        made_for: the base and the experts, by digest.
    """

    labels: Mapping[str, str]
    nobody: str
    made_for: Mapping[str, Any]
    reads: ClassVar[bool] = False

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that it may let speak."""
        return tuple(self.labels)

    def check(self, model: SpectralModel, library: Mapping[str, Expert] | Bank) -> None:
        """Raise a DispatchError unless base and experts are those that it was made for."""
        check(self.made_for, model, library)

    def scores(self, model: SpectralModel, asked: Asked) -> Tensor:
        """Return the log-probability of every label (b l), under the mixture in force; `NOBODY` is the last one."""
        if asked.contexts is None:
            raise DispatchError("This dispatcher asks about conversations: pass chats instead of texts or token ids.")
        return label_scores(model, asked.contexts, {**self.labels, NOBODY: self.nobody})

    def card(self) -> dict[str, Any]:
        """Return what a file says of it."""
        return {"labels": dict(self.labels), "nobody": self.nobody, "made_for": dict(self.made_for)}


def labelling(card: Mapping[str, Any]) -> tuple[dict[str, str], str, Mapping[str, Any]]:
    """Return labels, what the answer `none` means, and what it was made for, as a file says them.

    Raises:
        ValueError: the labels are not those of its experts.
    """
    labels = {str(name): str(meaning) for name, meaning in card["labels"].items()}
    if labels.keys() != card["made_for"]["experts"].keys():
        raise ValueError(f"labels {list(labels)}")
    return labels, str(card["nobody"]), card["made_for"]


def labelled(names: Sequence[str], table: Tensor, why: str, abstain_below: float = 0.0) -> list[Decision]:
    """Return a decision for every row of log-probabilities of labels (b l): the likeliest one speaks.

    Args:
        names: of the experts, then `NOBODY` is the last label.
        table: log-probabilities, or any logits.
        why: what they were based on.
        abstain_below: probability under which nobody speaks.
    """
    found = []
    for row in table.softmax(-1).tolist():
        scores = dict(zip(names, row, strict=False))
        best = max(scores, key=lambda name: scores[name])
        speaks = scores[best] > row[-1] and scores[best] >= abstain_below
        because = ", ".join(f"{name} {one:.2f}" for name, one in [*scores.items(), (NOBODY, row[-1])])
        found.append(Decision({best: 1.0} if speaks else {}, max(row), f"{why}: {because}", scores))
    return found


# --- reading and deciding


def decide(
    dispatcher: Dispatcher,
    model: SpectralModel,
    contexts: Sequence[Context],
    library: Mapping[str, Expert] | Bank,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Decision]:
    """Return the decision on every context, without a reply.

    Args:
        dispatcher: takes them.
        model: attached, with a tokenizer that has a chat template.
        contexts: at least one message each.
        library: the experts that may speak.
        batch_size: rows of a forward pass.
        progress: show a progress bar on stderr.

    Raises:
        DispatchError: the dispatcher is for another base or other experts, an empty conversation.
        TooLongError: a last turn that does not fit the model.
    """
    for place, one in enumerate(contexts):
        if not isinstance(one, Context):
            raise DispatchError(f"Conversation {place} is a {type(one).__name__}; expected Context(messages, tools).")
    dispatcher.check(model, library)
    found: dict[int, Decision] = {}
    for places, ids, seen in _batches(model, contexts, batch_size, progress):
        some = [contexts[place] for place in places]
        state = read(model, ids, seen) if dispatcher.reads else None
        decisions = dispatcher.decide(model, Asked(some, ids, seen, state))
        if len(decisions) != len(places):
            raise DispatchError(f"The dispatcher took {len(decisions)} decisions for {len(places)} conversations.")
        found.update(zip(places, decisions, strict=True))
    return [found[place] for place in range(len(contexts))]


def chooser(
    dispatcher: Dispatcher, model: SpectralModel, library: Mapping[str, Expert] | Bank, *, batch_size: int = 32
) -> Callable[[Sequence[Context]], list[Mapping[str, float]]]:
    """Return a function from contexts to the weights that a dispatcher gives: `experts=` of `svdexpert.evaluate`."""

    def choose(contexts: Sequence[Context]) -> list[Mapping[str, float]]:
        decisions = decide(dispatcher, model, contexts, library, batch_size=batch_size)
        return [one.weights for one in decisions]

    return choose


def states_of(
    model: SpectralModel, contexts: Sequence[Context], *, batch_size: int = 32, progress: bool = False
) -> Tensor:
    """Return what `read` makes of contexts (n d)."""
    found: dict[int, Tensor] = {}
    for places, ids, seen in _batches(model, contexts, batch_size, progress):
        found.update(zip(places, read(model, ids, seen).cpu(), strict=True))
    return torch.stack([found[place] for place in range(len(contexts))])


@torch.no_grad()
def read(model: SpectralModel, ids: Tensor, seen: Tensor) -> Tensor:
    """Return what the base has in mind at the end of prompts.

    Args:
        model: attached.
        ids: (b t), padded on the left.
        seen: 1 where a token stands (b t).

    Returns:
        The hidden states of the last token as they enter the last layer and the output head, side by side (b d), fp32.
    """
    found: list[Tensor] = []

    def keep(state: Tensor, kwargs: dict[str, Any], output: Any) -> Any:
        found.append(state)
        return output

    with model.using(None):
        model._scope.pending = keep
        Forward(model.hf).logits(ids, seen, 1, use_cache=False)
    return found[0]


def _ids(model: SpectralModel, context: Context) -> list[int]:
    return prompt_of(model, list(context.messages), list(context.tools), [], 0).ids


def _batches(
    model: SpectralModel, contexts: Sequence[Context], batch_size: int, progress: bool
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield places of contexts of similar length, with their ids and mask."""
    for place, one in enumerate(contexts):
        if not one.messages:
            raise DispatchError(f"Conversation {place} is empty: there is nothing to decide on.")
    rows = [_ids(model, one) for one in contexts]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    device = Forward(model.hf).device
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in watch(batches, "reading", progress):
        yield batch, *left_padded([rows[place] for place in batch], device)


# --- files


def stamp(model: SpectralModel, experts: Sequence[str], library: Mapping[str, Expert] | Bank) -> dict[str, Any]:
    """Return what a dispatcher was made for: the base and the experts, by digest."""
    return {"base": model.basis.key.base, "weights": _base(model), "experts": _experts(model, experts, library)}


def check(made_for: Mapping[str, Any], model: SpectralModel, library: Mapping[str, Expert] | Bank) -> None:
    """Check that a base and a library are those that a dispatcher was made for.

    Raises:
        DispatchError: they are not.
    """
    present(tuple(made_for["experts"]), library)
    if _base(model) != made_for["weights"]:
        raise DispatchError(
            f"The dispatcher was fitted on {made_for['base']}, whose weights are not those of {model.basis.key.base} "
            "here: what it reads means something else. Fit one on this base."
        )
    now = _experts(model, tuple(made_for["experts"]), library)
    for name, digest in made_for["experts"].items():
        if now[name] != digest:
            raise DispatchError(
                f"The expert {name!r} of the library is another version than the one the dispatcher was fitted with. "
                "Fit it again, or give the library of that time."
            )


def _base(model: SpectralModel) -> str:
    prints = {name: one.fingerprint for name, one in model.basis.key.matrices.items()}
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()


def _experts(model: SpectralModel, experts: Sequence[str], library: Mapping[str, Expert] | Bank) -> dict[str, str]:
    rows = (
        {name: library.offsets[library.names.index(name)] for name in experts}
        if isinstance(library, Bank)
        else {name: library[name].flat(model.basis) for name in experts}
    )
    return {name: hashlib.sha256(one.cpu().contiguous().numpy().data).hexdigest() for name, one in rows.items()}


def _check_made_for(made_for: Any) -> None:
    """Check what a file says of base and experts.

    Raises:
        ValueError: it is not of the form that `stamp` returns.
    """
    digests = made_for["experts"]
    said = (made_for["base"], made_for["weights"], *digests, *digests.values())
    if not digests or not all(isinstance(one, str) for one in said):
        raise ValueError(f"made_for {made_for}")


def finite_weights(card: Any) -> dict[str, float]:
    """Return weights by name, as a file holds them.

    Raises:
        ValueError: one is not finite.
    """
    found = {str(name): float(one) for name, one in card.items()}
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"weights {found}")
    return found


KIND = "svdexpert.dispatcher"
VERSION = 1


def save_dispatcher(dispatcher: Any, path: str | Path) -> Path:
    """Write a dispatcher as one safetensors file.

    Args:
        dispatcher: of a strategy of this folder, or one that has `strategy` and `stored()` as they do.
        path: of the file; its folder is made.

    Raises:
        DispatchError: the file cannot be written; what was there before is intact.
    """
    path = Path(path)
    card, tensors = dispatcher.stored()
    text = json.dumps({"version": VERSION, "strategy": dispatcher.strategy, **card}, allow_nan=False)
    try:
        with whole_file(path) as temporary:
            save_file({name: one.contiguous() for name, one in tensors.items()}, temporary, {KIND: text})
    except (OSError, SafetensorError) as error:
        raise DispatchError(f"{path} cannot be written ({error}); what was there before is intact.") from error
    return path


DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)
"""What reading a file raises that is not as it was written."""


def open_file(path: str | Path, strategy: str | None = None) -> Dispatcher:
    """Return the dispatcher in a file.

    Args:
        path: of the file.
        strategy: that made it, where it is one of one's own, as for `load`. A file runs no code that it names itself.

    Raises:
        DispatchError: no such file, not one of ours, damaged, of a later version, or of another strategy.
    """
    path = Path(path)
    if path.is_dir():
        raise DispatchError(f"{path} is a folder; a dispatcher is one file, which svdexpert dispatch fit makes.")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KIND)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise DispatchError(f"{path} is no dispatcher ({error}): svdexpert dispatch fit makes one.") from error
    if text is None:
        raise DispatchError(f"{path} is a safetensors file, and no dispatcher: svdexpert dispatch fit makes one.")
    try:
        card = json.loads(text)
        if card["version"] != VERSION:
            raise DispatchError(f"{path} has version {card['version']}, this library reads {VERSION}: fit it again.")
        if not all(bool(torch.isfinite(one).all()) for one in tensors.values()):
            raise DispatchError(f"{path} holds NaN or infinite values: fit it again.")
        made_by = str(card["strategy"])
        if "made_for" in card:
            _check_made_for(card["made_for"])
    except DAMAGE as error:
        raise DispatchError(f"{path} is damaged ({type(error).__name__}: {error}): fit it again.") from error
    if strategy is not None and stem(strategy) != stem(made_by):
        raise DispatchError(f"{path} was made by the strategy {made_by!r}, and not by {strategy!r}.")
    if strategy is None and made_by not in names():
        raise DispatchError(
            f"{path} was made by {made_by!r}, a strategy of somebody's own, whose code would run here: if you trust "
            "it, give its file or import path as `strategy` (--strategy)."
        )
    module = load(strategy or made_by)
    try:
        return cast(Dispatcher, module.restored(card, tensors))
    except DAMAGE as error:
        raise DispatchError(f"{path} is damaged ({type(error).__name__}: {error}): fit it again.") from error

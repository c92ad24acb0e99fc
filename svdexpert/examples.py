"""What a run learns from: contexts as token ids, with replies to prefer and replies to reject.

    of a skill    its cases: gold replies are preferred, wrong ones of every error class rejected, the base's own where
                  it is wrong among them; on controls the base's own reply is preferred where it is right, so that an
                  expert changes its positives alone
    of a file     rows in TRL's formats (JSONL or Parquet): `messages`; `prompt` and `completion`; `prompt`, `chosen`
                  and `rejected`. Nothing judges a reply there, so there are no controls

The examples of a run are a `datasets.Dataset`, kept as Parquet beside it, so that a run can be read afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from pyarrow import ArrowException
from pyarrow.parquet import read_table, write_table

from svdexpert.conversation import (
    Prompt,
    answers,
    as_message,
    completion,
    completions,
    context_of,
    continuation,
    prompt_of,
    text_of,
    tokenizer_of,
    turn_ends,
)
from svdexpert.errors import SvdExpertError, TooLongError, TrainingError
from svdexpert.forward import Contexts
from svdexpert.model import SpectralModel
from svdexpert.objectives import Completions, load, names
from svdexpert.skills import Case, Skill, check_tool
from svdexpert.storage import json_rows, whole_file
from svdexpert.worlds import Message, Tool


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context, and replies to it as text and as ids; ids hold the token that ends a turn.

    Attributes:
        id: of the case, or file and row.
        positive: True where the skill's move is due, False for a control, None where nobody knows.
        context: the conversation as the model reads it, up to where the assistant speaks.
        prompt: the same.
        chosen: replies to prefer.
        chosen_ids: the same.
        rejected: replies to reject.
        rejected_ids: the same; none for an objective that does not read them.
        errors: what is wrong with each rejected reply, "" where nobody knows.
        own_ids: the base's own reply, empty where it came to no end.
    """

    id: str
    positive: bool | None
    context: str
    prompt: list[int]
    chosen: list[str]
    chosen_ids: list[list[int]]
    rejected: list[str]
    rejected_ids: list[list[int]]
    errors: list[str]
    own_ids: list[int]


_NEEDED: dict[Completions, str] = {
    "chosen": "replies to prefer",
    "pair": "replies to reject",
    "samples": "rule that judges replies",
}


@dataclass(frozen=True)
class Examples:
    """The examples of a skill, and what could not become one.

    Attributes:
        skill: its name.
        rows: at least one.
        cases: by id, for objectives that judge samples; none for a file.
        shortened: how many lost their oldest turns, because the context is too short for them.
        left_out: how many are longer than the context even so.
    """

    skill: str
    rows: tuple[Example, ...]
    cases: Mapping[str, Case] = field(default_factory=dict)
    shortened: int = 0
    left_out: int = 0

    def fitting(self, objective: str) -> Examples:
        """Return those that an objective can learn from.

        Raises:
            TrainingError: there are none; it says which objectives have some.
        """
        rows = {
            "chosen": tuple(one for one in self.rows if one.chosen),
            "pair": tuple(one for one in self.rows if one.chosen and one.rejected),
            "samples": self.rows if self.cases else (),
        }
        kind = load(objective).COMPLETIONS
        if not rows[kind]:
            able = [name for name in names() if rows[load(name).COMPLETIONS]]
            raise TrainingError(
                f"{self.skill} has no {_NEEDED[kind]}, which {objective} learns from. It supports: {', '.join(able)}."
            )
        return replace(self, rows=rows[kind])

    def save(self, path: Path) -> None:
        """Write the rows as Parquet, one column an attribute."""
        table = Dataset.from_list([{"skill": self.skill, **asdict(one)} for one in self.rows])
        with whole_file(path) as temporary:
            write_table(table.data.table, temporary)  # what to_parquet does, without its progress bar

    @classmethod
    def load(cls, path: Path, skill: str, cases: Sequence[Case] = ()) -> Examples:
        """Return what `save` wrote; `cases` are those that they were made of."""
        names = [one.name for one in fields(Example)]
        rows = [Example(**{name: row[name] for name in names}) for row in Dataset(read_table(path))]
        wanted = {one.id for one in rows}
        return cls(skill, tuple(rows), {case.id: case for case in cases if case.id in wanted})


# --- of a skill


def of_skill(
    model: SpectralModel,
    name: str,
    skill: Skill,
    cases: Sequence[Case],
    *,
    rejected: bool = True,
    max_new_tokens: int = 96,
    batch_size: int = 64,
    progress: bool = True,
    contexts: Contexts | None = None,
) -> Examples:
    """Return the examples of a skill's cases; the base replies to each of them once.

    Args:
        model: with a tokenizer that has a chat template; no mixture in force.
        name: of the skill.
        skill: it.
        cases: positives and controls.
        rejected: write the replies to reject as ids too; otherwise they stand there as text alone.
        max_new_tokens: of the base's own replies.
        batch_size: rows of a forward pass.
        progress: show a progress bar on stderr.
        contexts: keeps what the base makes of contexts.

    Raises:
        TrainingError: no case fits the model's context.
        SvdExpertError: there is no chat template.
    """
    tokenizer, (end, ends) = tokenizer_of(model), turn_ends(model)

    fitting: list[tuple[Case, Prompt, dict[str, list[int]]]] = []
    for case in cases:
        # gold replies to controls are seldom read, and writing a reply costs a pass of the chat template
        texts = [*(case.gold if case.positive else ()), *(one.reply for one in case.bad if rejected)]
        with suppress(TooLongError):
            fitting.append((case, *_written(model, case, texts, max_new_tokens, end)))
    if not fitting:
        raise TrainingError(f"{name}: none of {len(cases)} cases fits the model's {context_of(model)} tokens.")
    prompts = [Prompt(prompt.ids, [], max_new_tokens, prompt.dropped) for _, prompt, _ in fitting]
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "contexts": contexts}
    with model.using(None):
        said = answers(model, prompts, ends, f"{name}: the base replies", **how)
    rows = []
    for (case, prompt, replies), answer in zip(fitting, said, strict=True):
        own = text_of(tokenizer, answer.reply)
        finished = len(answer.reply) < max_new_tokens
        verdict = skill.verify(case, own)
        chosen, bad = list(case.gold), {one.reply: one.error for one in case.bad}
        if finished and own:
            replies[own] = [*answer.reply, end]
            if not case.positive and verdict.right:
                chosen = [own]
            elif verdict.score < 0:
                bad = {own: verdict.error} | bad
        if missing := [text for text in chosen if text not in replies]:
            try:
                prompt, more = _written(model, case, missing, max_new_tokens, end)
            except TooLongError:
                continue
            replies |= more
        rows.append(
            Example(
                id=case.id,
                positive=case.positive,
                context=str(tokenizer.decode(prompt.ids)),
                prompt=prompt.ids,
                chosen=chosen,
                chosen_ids=[replies[text] for text in chosen],
                rejected=list(bad),
                rejected_ids=[replies[text] for text in bad if text in replies],
                errors=list(bad.values()),
                own_ids=[*answer.reply, end] if finished else [],
            )
        )
    shortened = sum(prompt.dropped > 0 for _, prompt, _ in fitting)
    return Examples(name, tuple(rows), {case.id: case for case, _, _ in fitting}, shortened, len(cases) - len(rows))


def _written(
    model: SpectralModel, case: Case, texts: Sequence[str], room: int, end: int
) -> tuple[Prompt, dict[str, list[int]]]:
    """Return a case as a prompt that leaves room for all, and replies to it as ids; `room` is that of other replies."""
    prompt = prompt_of(model, case.messages, case.tools, [], room)
    before = None if prompt.dropped else prompt.ids
    said = [as_message(one) for one in texts]
    ids = completions(tokenizer_of(model), case.messages, case.tools, said, end, before)
    if (longest := max(map(len, ids), default=0)) > room:
        prompt = prompt_of(model, case.messages, case.tools, [], longest)
    return prompt, dict(zip(texts, ids, strict=True))


# --- of a file


FORMATS = ({"messages"}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"})
_WANTED = "expected messages, or prompt and completion, or prompt, chosen and rejected"


def is_file(name: str) -> bool:
    """Return whether a skill's name is the path of a file of examples."""
    return not name.endswith(".py") and ("/" in name or Path(name).suffix in (".jsonl", ".json", ".parquet", ".csv"))


def of_file(model: SpectralModel, path: str | Path) -> Examples:
    """Return the examples in a JSONL or Parquet file in one of TRL's formats.

    Texts are taken as they are, chats go through the chat template. A row of `messages` teaches its last message.

    Args:
        model: with a tokenizer.
        path: of the file.

    Raises:
        TrainingError: no such file, no rows, or a row that is not one of the formats; it names file, row and field.
        SvdExpertError: there is no chat template.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise TrainingError(f"{path} is no JSONL or Parquet file (.jsonl, .parquet) of examples.")
    rows, left_out, shortened = [], 0, 0
    for place, row in _read(path):
        where = f"{path.name}:{place}"
        try:
            example, dropped = _example(model, where, row)
        except TooLongError:
            left_out += 1
        except TrainingError:
            raise
        except SvdExpertError as error:  # a tool that is none, a conversation that the chat template refuses
            raise TrainingError(f"{where}: {error}") from error
        else:
            rows.append(example)
            shortened += dropped > 0
    if not rows:
        found = f"{left_out} rows, all longer than the model's context" if left_out else "no rows"
        raise TrainingError(f"{path} holds {found}: {_WANTED}.")
    return Examples(path.stem, tuple(rows), {}, shortened, left_out)


def _read(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield rows and their place in the file, from 1."""
    if path.suffix == ".parquet":
        try:
            table = Dataset(read_table(path))
        except ArrowException as error:
            raise TrainingError(f"{path} cannot be read as Parquet: {error}") from error
        yield from enumerate(map(_without_nulls, table), 1)
        return
    yield from json_rows(path, TrainingError)


def _without_nulls(value: Any) -> Any:
    """Return a value of a Parquet file without keys that hold nothing: its columns give every row the keys of all."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _example(model: SpectralModel, where: str, row: Any) -> tuple[Example, int]:
    """Return the example of a row, and how many turns did not fit."""
    if not isinstance(row, Mapping):
        raise TrainingError(f"{where}: found {type(row).__name__}, {_WANTED}.")
    present = {key for key, value in row.items() if value is not None}
    form = next((one for one in FORMATS if one <= present), None)
    if form is None:
        raise TrainingError(f"{where}: found the fields {sorted(present)}, {_WANTED}.")
    for key in form:
        _check(where, key, row[key])
    if form == {"messages"}:
        if isinstance(row["messages"], str):
            raise TrainingError(f"{where}: messages is a text; expected a list of messages.")
        prompt, texts = row["messages"][:-1], {"chosen": row["messages"][-1:]}
        if not prompt or texts["chosen"][0]["role"] != "assistant":
            raise TrainingError(f"{where}: messages must end with an assistant's message that replies to something.")
    else:
        prompt = row["prompt"]
        texts = {
            key: row["completion" if key == "chosen" and "completion" in form else key]
            for key in (("chosen",) if "completion" in form else ("chosen", "rejected"))
        }
    kinds = {isinstance(one, str) for one in (prompt, *texts.values())}
    if len(kinds) > 1:
        raise TrainingError(f"{where}: {', '.join(sorted(form))} are all texts or all lists of messages, not both.")
    tools = tuple(row.get("tools") or ())
    for tool in tools:
        check_tool(tool)
    ids, dropped, replies = _tokenised(model, prompt, tools, texts)
    written = {key: text if isinstance(text, str) else str(text[0].get("content") or "") for key, text in texts.items()}
    rejected = [key for key in texts if key == "rejected"]
    return Example(
        id=where,
        positive=None,
        context=str(tokenizer_of(model).decode(ids)),
        prompt=ids,
        chosen=[written["chosen"]],
        chosen_ids=[replies["chosen"]],
        rejected=[written[key] for key in rejected],
        rejected_ids=[replies[key] for key in rejected],
        errors=["" for _ in rejected],
        own_ids=[],
    ), dropped


def _tokenised(
    model: SpectralModel, prompt: str | list[Message], tools: Sequence[Tool], texts: Mapping[str, Any]
) -> tuple[list[int], int, dict[str, list[int]]]:
    tokenizer = tokenizer_of(model)
    if isinstance(prompt, str):
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise TrainingError("The tokenizer has no token that ends a text: set tokenizer.eos_token.")
        replies = {key: [*continuation(tokenizer, text), end] for key, text in texts.items()}
        ids = list(tokenizer(prompt)["input_ids"])
        ids = ids[:-1] if ids[-1:] == [end] else ids  # some tokenizers end every text
        context, wanted = context_of(model), len(ids) + max(map(len, replies.values()))
        if context is not None and wanted > context:
            raise TooLongError(f"{wanted} tokens, the model has {context}.")
        return ids, 0, replies
    end, _ = turn_ends(model)
    replies = {key: completion(tokenizer, prompt, tools, messages[0], end) for key, messages in texts.items()}
    fitted = prompt_of(model, prompt, tools, [], max(map(len, replies.values())))
    return fitted.ids, fitted.dropped, replies


def _check(where: str, key: str, value: Any) -> None:
    """Raise unless a field is a text that is not empty, or a list of messages."""
    if isinstance(value, str):
        if not value.strip():
            raise TrainingError(f"{where}: {key} is empty.")
        return
    if not isinstance(value, list) or not value:
        raise TrainingError(f"{where}: {key} is {str(value)[:80]!r}; expected a text or a list of messages.")
    for one in value:
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
            raise TrainingError(f"{where}: {key} holds {str(one)[:80]!r}; a message has a role and a content.")
        if not isinstance(one.get("content"), str) and not one.get("tool_calls"):
            raise TrainingError(f"{where}: {key} holds a message of the role {one['role']} without content.")
    if key in ("completion", "chosen", "rejected") and (len(value) != 1 or value[0]["role"] != "assistant"):
        raise TrainingError(f"{where}: {key} must be one assistant's message, found {len(value)}.")


def counts(examples: Examples) -> str:
    """Return in words what a run learns from."""
    kinds = Counter(one.positive for one in examples.rows)
    if kinds[None]:
        found = f"{kinds[None]} examples from a file; nothing judges replies, so no controls are measured"
    else:
        found = f"{kinds[True]} positives, {kinds[False]} controls"
    found += f", {examples.shortened} without their oldest turns" if examples.shortened else ""
    return found + (f", {examples.left_out} longer than the context left out" if examples.left_out else "")

"""Conversations as the chat template writes them: the same text in training, in measuring and in generating."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from svdexpert.errors import SvdExpertError
from svdexpert.reply import Call, write_call
from svdexpert.worlds import Message, Tool, calling, result, tool, user


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Return the prompt's token ids, up to where the assistant speaks; templates that can think are told not to.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        tools: JSON schemas.

    Raises:
        SvdExpertError: there is no chat template, or it refuses the conversation.

    For templates that know no functions see `spelled_out`.
    """
    encoded = templated(tokenizer, messages, tools, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def templated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool], **how: Any
) -> Any:
    """Return what `apply_chat_template` makes of a conversation; templates that can think are told not to.

    Args:
        tokenizer: with a chat template.
        messages: the conversation; for templates that know no functions see `spelled_out`.
        tools: JSON schemas.
        how: arguments of `apply_chat_template`.

    Raises:
        SvdExpertError: there is no chat template, it refuses the conversation, or a message has no role.
    """
    if tokenizer.chat_template is None:
        raise SvdExpertError(
            "The tokenizer has no chat template, so conversations cannot be written. Pass one: set "
            "model.tokenizer.chat_template to the Jinja text that the model was trained with (on the hub it is "
            "chat_template.jinja, or a field of tokenizer_config.json)."
        )
    check_messages(messages)
    uses_functions = tools or any(one["role"] == "tool" or one.get("tool_calls") for one in messages)
    try:
        if uses_functions and not _knows_functions(tokenizer, str(tokenizer.chat_template)):
            messages, tools = spelled_out(messages, tools), ()
        return tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, enable_thinking=False, **how)
    except Exception as error:  # a template is a program of somebody's
        roles = ", ".join(str(one["role"]) for one in messages)
        raise SvdExpertError(
            f"The chat template refuses a conversation of the roles {roles}: {type(error).__name__}: {error}"
        ) from error


def check_messages(messages: Sequence[Message]) -> None:
    """Raise an SvdExpertError unless every message is a dict with a role, and with calls that can be read, if any."""
    for place, one in enumerate(messages):
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
            raise SvdExpertError(f"Message {place} is {str(one)[:80]!r}; expected a dict with a role and a content.")
        try:
            well = all(isinstance(call.name, str) and isinstance(call.arguments, dict) for call in calls_of(one))
        except (AttributeError, KeyError, TypeError, ValueError):
            well = False
        if not well:
            raise SvdExpertError(
                f"Message {place} has tool_calls {str(one['tool_calls'])[:80]}; expected a list of "
                '{"type": "function", "function": {"name": ..., "arguments": {...}}}.'
            )


@lru_cache(maxsize=8)
def _knows_functions(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether a template writes functions, calls and results; many leave them out without a word."""
    talk = [user("Hi"), calling(Call("zebra_call", {})), result("zebra_call", {"zebra": "found"}), user("Well?")]
    listed = tool("zebra_tool", {"stripes": "string"}, required=[])
    try:
        with_calls = tokenizer.apply_chat_template(talk, tokenize=False)
        with_tools = tokenizer.apply_chat_template([user("Hi")], tools=[listed], tokenize=False)
    except Exception:
        return False
    return all(word in str(with_calls) for word in ("zebra_call", "found")) and "zebra_tool" in str(with_tools)


def spelled_out(messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[Message, ...]:
    """Return a conversation for a template that knows no functions: all of them as text.

    The functions stand before the user's first message, as JSON schemas, with the form of a call; calls are written in
    that form; what a function returned is a message of the user's.

    Args:
        messages: the conversation.
        tools: JSON schemas.
    """
    listed = "\n".join(json.dumps(one["function"], ensure_ascii=False) for one in tools)
    form = write_call(Call("name", {"parameter": "value"}))
    ahead = f"You can call these functions:\n{listed}\nTo call one, reply with nothing but {form}\n\n" if tools else ""
    found: list[Message] = []
    for one in messages:
        text = str(one.get("content") or "")
        role = "user" if one["role"] == "tool" else one["role"]
        text = f"Result: {text}" if one["role"] == "tool" else "".join([text, *map(write_call, calls_of(one))])
        if role == "user":
            text, ahead = ahead + text, ""
        if found and found[-1]["role"] == role:
            text = f"{found.pop()['content']}\n{text}"
        found.append({"role": role, "content": text})
    return tuple(found)


def calls_of(message: Message) -> list[Call]:
    """Return the calls that a message makes; arguments may stand as JSON in a string, as on the wire."""
    found = []
    for one in message.get("tool_calls") or ():
        made = one.get("function", one)
        arguments = made["arguments"]
        found.append(Call(made["name"], json.loads(arguments) if isinstance(arguments, str) else arguments))
    return found

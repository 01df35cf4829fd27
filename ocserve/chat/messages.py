"""Messages as the plain data that chat templates of the Hugging Face convention read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from ocserve.errors import InvalidRequest
from ocserve.generation import Message, ToolCall

_MAX_ARGUMENT_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Convention:
    """What a template expects where the convention leaves room; found by trying at load."""

    knows_developer: bool = True
    arguments_as_object: bool = True
    null_content_of_calls: bool = False


# What a template is tried with at load.
PROBE = (Message(role="user", content="probe"),)
PROBE_NAME = (Message(role="user", content="probe", name="probe_name"),)
PROBE_CALL = (
    *PROBE,
    Message(
        role="assistant",
        tool_calls=(ToolCall(id="probe0001", name="probe_name", arguments='{"probe_key": "probe_value"}'),),
    ),
    Message(role="tool", content="probe", tool_call_id="probe0001", name="probe_name"),
)


def unread(messages: tuple[Message, ...], reads: frozenset[str]) -> tuple[str, ...]:
    """Paths of the fields that a template which reads only `reads` passes over.

    A name or an id is a label, and the answer does without it. Tool calls are what the assistant said: raises
    InvalidRequest rather than lose them.
    """
    paths = []
    for index, message in enumerate(messages):
        if message.tool_calls and "tool_calls" not in reads:
            raise InvalidRequest(
                "This model's chat template has no place for tool calls.",
                param=f"messages[{index}].tool_calls",
                code="unsupported_parameter",
            )
        if message.name is not None and "name" not in reads and message.role != "tool":
            paths.append(f"messages[{index}].name")
        if message.tool_call_id is not None and "tool_call_id" not in reads:
            paths.append(f"messages[{index}].tool_call_id")
    return tuple(paths)


def template_messages(
    messages: tuple[Message, ...], convention: Convention, rewrite: Callable[[str], str]
) -> list[dict[str, object]]:
    """One dict per message, with every string that a client wrote passed through `rewrite`."""
    return [_message(message, convention, rewrite) for message in messages]


def _message(message: Message, convention: Convention, rewrite: Callable[[str], str]) -> dict[str, object]:
    role = message.role
    if role == "developer" and not convention.knows_developer:
        role = "system"
    fields: dict[str, object] = {"role": role, "content": rewrite(message.content)}
    if message.name is not None:
        fields["name"] = rewrite(message.name)
    if message.tool_call_id is not None:
        fields["tool_call_id"] = rewrite(message.tool_call_id)
    if message.tool_calls:
        if convention.null_content_of_calls and not message.content:
            fields["content"] = None
        fields["tool_calls"] = [
            {
                "type": "function",
                "id": rewrite(call.id),
                "function": {
                    "name": rewrite(call.name),
                    "arguments": _arguments(call.arguments, convention, rewrite),
                },
            }
            for call in message.tool_calls
        ]
    return fields


def _arguments(text: str, convention: Convention, rewrite: Callable[[str], str]) -> object:
    # What does not survive a round trip (NaN, lone surrogates, absurd depth) stays the text that the client sent.
    if not convention.arguments_as_object:
        return rewrite(text)
    try:
        parsed = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if not isinstance(parsed, dict):
            return rewrite(text)
        if "\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()
        return _rewrite_all(parsed, rewrite, _MAX_ARGUMENT_DEPTH)
    except (ValueError, RecursionError):
        return rewrite(text)


def _rewrite_all(value: object, rewrite: Callable[[str], str], depth: int) -> object:
    if depth == 0:
        raise ValueError("arguments are nested too deeply")
    if isinstance(value, str):
        return rewrite(value)
    if isinstance(value, dict):
        return {rewrite(key): _rewrite_all(item, rewrite, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_rewrite_all(item, rewrite, depth - 1) for item in value]
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")

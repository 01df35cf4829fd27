"""Messages and tools as the plain data that chat templates of the Hugging Face convention read.

What a template has no place for (tools, calls, their results) is written into messages that it has one for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from ocserve.chat.tool_formats import GENERIC, ToolFormat
from ocserve.chat.tool_formats.generic import description, response
from ocserve.errors import InvalidRequest
from ocserve.generation import Message, Role, Tool, ToolCall, joined

Rewrite = Callable[[str], str]

_MAX_DEPTH = 64
_SYSTEM: tuple[Role, ...] = ("system", "developer")
# Mistral's templates want ids of nine letters and digits.
_SHORT_ID_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_SHORT_ID_LENGTH = 9


@dataclass(frozen=True, slots=True)
class Convention:
    """What a template expects where the convention leaves room, and what it has a place for; found by trying at load.

    `form` is how this model writes calls. Where the template does not `describe_tools`, a system message does, or the
    first user's where it does not `know_system`. Where it refuses or loses system messages behind the first turn, they
    are part of the user's turn beside them. `content_in_parts` are the roles whose content it loses as text and reads
    as a list of parts.
    """

    knows_developer: bool = True
    content_in_parts: frozenset[str] = frozenset()
    arguments_as_object: bool = True
    null_content_of_calls: bool = False
    short_ids: bool = False
    knows_system: bool = True
    knows_later_system: bool = True
    describes_tools: bool = False
    writes_calls: bool = False
    writes_results: bool = False
    form: ToolFormat = GENERIC


# What a template is tried with at load.
PROBE = (Message(role="user", content="probe"),)
PROBE_NAME = (Message(role="user", content="probe", name="probe_name"),)
PROBE_SYSTEM = (Message(role="system", content="probe_system"), *PROBE)
PROBES_CONTENT = {  # of each role a content, and messages with it
    "user": ("probe", PROBE),
    "assistant": ("probe_answer", (*PROBE, Message(role="assistant", content="probe_answer"), *PROBE)),
    "system": ("probe_system", PROBE_SYSTEM),
}
PROBES_LATER_SYSTEM = tuple(
    (*before, Message(role=role, content="probe_later"), *after)
    for role in _SYSTEM
    for before, after in ((PROBE_SYSTEM, ()), ((*PROBE_SYSTEM, Message(role="assistant", content="probe")), PROBE))
)
PROBE_TOOL = Tool(
    name="probe_tool",
    description="probe_about",
    parameters='{"type":"object","properties":{"probe_key":{"type":"string","description":"probe_what"}}}',
)


def probe_call(call_id: str) -> tuple[Message, ...]:
    """A conversation with one call and its result."""
    call = ToolCall(id=call_id, name="probe_name", arguments='{"probe_key": "probe_value"}')
    return (
        *PROBE,
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="probe_result", tool_call_id=call_id, name="probe_name"),
    )


def unread(messages: tuple[Message, ...], reads: frozenset[str]) -> tuple[str, ...]:
    """Paths of the labels (names and ids) that a template which reads only `reads` passes over."""
    paths = []
    for index, message in enumerate(messages):
        if message.name is not None and "name" not in reads and message.role != "tool":
            paths.append(f"messages[{index}].name")
        if message.tool_call_id is not None and "tool_call_id" not in reads:
            paths.append(f"messages[{index}].tool_call_id")
    return tuple(paths)


def template_tools(tools: tuple[Tool, ...], rewrite: Rewrite) -> list[dict[str, object]]:
    """The tools as templates read them, with every string that a client wrote passed through `rewrite`."""
    return [{"type": "function", "function": _function(index, tool, rewrite)} for index, tool in enumerate(tools)]


def _function(index: int, tool: Tool, rewrite: Rewrite) -> dict[str, object]:
    try:
        parameters = _plain_json(tool.parameters or '{"type": "object", "properties": {}}', rewrite)
    except (ValueError, RecursionError):
        field = f"tools[{index}].function.parameters"
        raise InvalidRequest(f"Invalid '{field}': this schema cannot be written into a prompt.", param=field) from None
    return {"name": rewrite(tool.name), "description": rewrite(tool.description), "parameters": parameters}


def template_messages(
    messages: tuple[Message, ...],
    tools: tuple[Tool, ...],
    convention: Convention,
    rewrite: Rewrite,
    image_mark: str = "",
) -> list[dict[str, object]]:
    """One dict per message that the template is given, with every string of a client's passed through `rewrite`.

    `image_mark` is what stands for an image.
    """
    if any(message.images for message in messages):
        messages = tuple(_with_marks(message, image_mark) for message in messages)
    if not convention.knows_later_system:
        messages = _without_later_system(messages)
    turns = list(_turns(messages, convention, rewrite))
    if not tools or convention.describes_tools:
        return turns
    texts = [json.dumps(tool["function"], ensure_ascii=False) for tool in template_tools(tools, rewrite)]
    text = description(texts, convention.form)
    if turns[0]["role"] == "system":
        turns[0] = {**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}
    elif not convention.knows_system and turns[0]["role"] == "user":
        turns[0] = {**turns[0], "content": f"{text}\n\n{turns[0]['content']}"}
    else:
        turns.insert(0, {"role": "system", "content": text})
    return turns


def _with_marks(message: Message, mark: str) -> Message:
    """The message with its images as marks in its content."""
    edges = [0, *(image.at for image in message.images), len(message.content)]
    content = mark.join(message.content[start:end] for start, end in itertools.pairwise(edges))
    return replace(message, content=content, images=())


def _without_later_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """System messages behind the first turn as parts of the user's turn beside them."""
    runs: list[list[Message]] = []
    mixed = False  # the last turn is the user's with a system message in it: the user's next words join it
    for message in messages:
        system = message.role in _SYSTEM
        joins = system or (mixed and message.role == "user")
        if runs and joins and runs[-1][0].role in ("user", *_SYSTEM):
            runs[-1].append(message)
        else:
            runs.append([replace(message, role="user") if runs and system else message])
        mixed = joins and runs[-1][0].role == "user"
    return tuple(joined(run) for run in runs)


def _turns(messages: tuple[Message, ...], convention: Convention, rewrite: Rewrite) -> Iterator[dict[str, object]]:
    results: list[str] = []
    for message in messages:
        if message.role == "tool" and not convention.writes_results:
            results.append(rewrite(message.content))
            continue
        if results:
            yield {"role": "user", "content": response(results)}
            results = []
        yield _message(message, convention, rewrite)
    if results:
        yield {"role": "user", "content": response(results)}


def _message(message: Message, convention: Convention, rewrite: Rewrite) -> dict[str, object]:
    role = message.role
    if role == "developer" and not convention.knows_developer:
        role = "system"
    content = rewrite(message.content)
    fields: dict[str, object] = {"role": role, "content": content}
    if message.name is not None:
        fields["name"] = rewrite(message.name)
    if message.tool_call_id is not None:
        fields["tool_call_id"] = rewrite(_id(message.tool_call_id, convention))
    if message.reasoning:
        fields["reasoning_content"] = rewrite(message.reasoning)
        if not (message.tool_calls and message.content):  # harmony's template takes one or the other
            fields["thinking"] = rewrite(message.reasoning)
    if not message.tool_calls:
        return fields
    if not convention.writes_calls:
        calls = [(rewrite(call.name), rewrite(call.arguments)) for call in message.tool_calls]
        fields["content"] = "\n".join(filter(None, (content, _written(convention.form, calls))))
        return fields
    if convention.null_content_of_calls and not message.content:
        fields["content"] = None
    fields["tool_calls"] = [
        {
            "type": "function",
            "id": rewrite(_id(call.id, convention)),
            "function": {"name": rewrite(call.name), "arguments": _arguments(call.arguments, convention, rewrite)},
        }
        for call in message.tool_calls
    ]
    return fields


def _written(form: ToolFormat, calls: list[tuple[str, str]]) -> str:
    try:
        return form.write(calls)
    except ValueError:  # arguments that are no JSON object cannot be written one by one
        return GENERIC.write(calls)


def _id(call_id: str, convention: Convention) -> str:
    """The id in the form that the template demands: always the same one for the same id."""
    if not convention.short_ids or (
        len(call_id) == _SHORT_ID_LENGTH and all(character in _SHORT_ID_CHARACTERS for character in call_id.lower())
    ):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest()[:8])
    digits = ""
    for _ in range(_SHORT_ID_LENGTH):
        number, digit = divmod(number, len(_SHORT_ID_CHARACTERS))
        digits += _SHORT_ID_CHARACTERS[digit]
    return digits


def _arguments(text: str, convention: Convention, rewrite: Rewrite) -> object:
    # What does not survive a round trip (NaN, lone surrogates, absurd depth) stays the text that the client sent.
    if not convention.arguments_as_object:
        return rewrite(text)
    try:
        parsed = _plain_json(text, rewrite)
    except (ValueError, RecursionError):
        return rewrite(text)
    return parsed if isinstance(parsed, dict) else rewrite(text)


def _plain_json(text: str, rewrite: Rewrite) -> object:
    """JSON text as data; raises ValueError or RecursionError for what would not survive a round trip."""
    parsed = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    if "\\u" in text:
        json.dumps(parsed, ensure_ascii=False).encode()
    return _rewrite_all(parsed, rewrite, _MAX_DEPTH)


def _rewrite_all(value: object, rewrite: Rewrite, depth: int) -> object:
    if depth == 0:
        raise ValueError("nested too deeply")
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

"""OpenAI's `messages` array: from JSON to the vocabulary's turns, with the exact path of whatever is wrong."""

from __future__ import annotations

from typing import get_args

from ocserve.api import fields
from ocserve.api.fields import Field, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import Message, Role, ToolCall

MAX_MESSAGES = 2048
_MAX_PARTS = 1024
_MAX_CALLS = 128
_MAX_NAME = 256
_TEXT = 64 * 1024 * 1024  # the body's own limit is far below

_ROLES = get_args(Role)
MESSAGE = {
    field.name: field
    for field in (
        Field("role", "effective", fields.string(64)),
        Field("content", "effective"),
        Field("name", "effective", fields.string(_MAX_NAME, empty=False)),
        Field("tool_call_id", "effective", fields.string(_MAX_NAME, empty=False)),
        Field("tool_calls", "effective", fields.items(_MAX_CALLS)),
        Field("annotations", "advisory", fields.items(_MAX_PARTS)),
        Field("cache_control", "advisory", fields.pairs(8)),
        Field("reasoning", "advisory", fields.string(_TEXT)),
        Field("reasoning_content", "advisory", fields.string(_TEXT)),
        Field("reasoning_details", "advisory", fields.items(_MAX_PARTS)),
        Field("refusal", "unsupported", fields.string(_TEXT), neutral=("",)),
        Field("audio", "unsupported"),
        Field("function_call", "unsupported"),
    )
}
PART = {
    field.name: field
    for field in (
        Field("type", "effective", fields.string(64)),
        Field("text", "effective", fields.string(_TEXT)),
        Field("cache_control", "advisory", fields.pairs(8)),
    )
}
_CALL = {
    field.name: field
    for field in (
        Field("id", "effective", fields.string(_MAX_NAME, empty=False)),
        Field("type", "effective", fields.string(64)),
        Field("function", "effective", fields.pairs(8)),
        Field("index", "advisory", fields.integer(0, _MAX_CALLS)),
    )
}
_FUNCTION = {
    field.name: field
    for field in (
        Field("name", "effective", fields.string(_MAX_NAME, empty=False)),
        Field("arguments", "effective", fields.string(_TEXT)),
    )
}


class MessageReader:
    """Reads one request's messages and gathers the names of what it ignored in them."""

    def __init__(self, *, refuse_unknown: bool) -> None:
        self._refuse_unknown = refuse_unknown
        self.ignored: list[str] = []

    def read(self, value: object) -> tuple[Message, ...]:
        """The turns of `value`, the request's `messages`."""
        return tuple(
            self._message(item, f"messages[{index}]")
            for index, item in enumerate(fields.array(value, "messages", 1, MAX_MESSAGES))
        )

    def _fields(self, value: object, table: dict[str, Field], path: str) -> Values:
        values = fields.read(fields.mapping(value, path), table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values

    def _message(self, value: object, path: str) -> Message:
        values = self._fields(value, MESSAGE, path)
        role = values.get("role", str)
        if role is None:
            raise fields.missing(f"{path}.role")
        if role == "function":
            raise fields.unsupported(
                f"{path}.role", "the role 'function' is deprecated; use 'tool' with 'tool_call_id'."
            )
        if role not in _ROLES:
            raise InvalidRequest(
                f"Invalid value for '{path}.role'. Supported values are: {', '.join(_ROLES)}.", param=f"{path}.role"
            )
        calls = self._tool_calls(values, role, path)
        call_id = values.get("tool_call_id", str)
        if role == "tool" and call_id is None:
            raise fields.missing(f"{path}.tool_call_id")
        if role != "tool" and call_id is not None:
            raise InvalidRequest(f"'{path}.tool_call_id' belongs to role 'tool'.", param=f"{path}.tool_call_id")
        content = values.get("content", object)
        if content is None and not calls:
            raise fields.missing(f"{path}.content")
        return Message(
            role=role,  # type: ignore[arg-type]  # one of get_args(Role)
            content="" if content is None else self._content(content, f"{path}.content"),
            name=values.get("name", str),
            tool_call_id=call_id,
            tool_calls=calls,
        )

    def _content(self, value: object, path: str) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise fields.wrong_type(path, "a string or an array of parts", value)
        return "".join(
            self._part(item, f"{path}[{index}]") for index, item in enumerate(fields.array(value, path, 1, _MAX_PARTS))
        )

    def _part(self, value: object, path: str) -> str:
        kind = fields.mapping(value, path).get("type")
        if kind is None:
            raise fields.missing(f"{path}.type")
        if not isinstance(kind, str):
            raise fields.wrong_type(f"{path}.type", "a string", kind)
        if kind in ("image_url", "input_audio", "file", "video_url", "refusal"):
            raise fields.unsupported(f"{path}.type", f"content of type '{kind}' is not supported by this model.")
        if kind != "text":
            raise InvalidRequest(f"Invalid value for '{path}.type'. Supported values are: text.", param=f"{path}.type")
        text = self._fields(value, PART, path).get("text", str)
        if text is None:
            raise fields.missing(f"{path}.text")
        return text

    def _tool_calls(self, values: Values, role: str, path: str) -> tuple[ToolCall, ...]:
        given: list[object] = values.get("tool_calls", list) or []
        if given and role != "assistant":
            raise InvalidRequest(f"'{path}.tool_calls' belongs to role 'assistant'.", param=f"{path}.tool_calls")
        return tuple(self._tool_call(item, f"{path}.tool_calls[{index}]") for index, item in enumerate(given))

    def _tool_call(self, value: object, path: str) -> ToolCall:
        values = self._fields(value, _CALL, path)
        kind = values.get("type", str)
        if kind not in (None, "function"):
            raise fields.unsupported(f"{path}.type", "only calls of type 'function' are supported.")
        if (call_id := values.get("id", str)) is None:
            raise fields.missing(f"{path}.id")
        if (function := values.get("function", dict)) is None:
            raise fields.missing(f"{path}.function")
        inner = self._fields(function, _FUNCTION, f"{path}.function")
        if (name := inner.get("name", str)) is None:
            raise fields.missing(f"{path}.function.name")
        if (arguments := inner.get("arguments", str)) is None:
            raise fields.missing(f"{path}.function.arguments")
        return ToolCall(id=call_id, name=name, arguments=arguments)

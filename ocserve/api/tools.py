"""Tools and the choice among them: what every dialect reads alike, and the shape that OpenAI's dialects share.

A schema is only looked at for being one of an object; what it says is for the engine's grammar compiler to judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from ocserve.api import fields
from ocserve.api.fields import Field, Reader, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import Tool, ToolChoice

Mode = Literal["none", "auto", "required"]
_MODE: Reader[Mode] = fields.word("none", "auto", "required")
MAX_TOOLS = 256
MAX_DESCRIPTION = 64 * 1024
# Vendors differ: OpenAI takes 64 letters, digits, underscores and dashes, Anthropic 128, Google dots and colons too.
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def tool_name() -> Reader[str]:
    """What a tool may be called."""
    text = fields.string(1024, empty=False)

    def reader(value: object, where: str) -> str:
        name = text(value, where)
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"Invalid '{where}': expected 1 to 128 letters, digits, underscores, dashes, dots and colons.",
                param=where,
            )
        return name

    return Reader(reader, {"type": "string", "pattern": f"^{_NAME.pattern}$"})


def parameters_schema() -> Reader[str | None]:
    """A JSON Schema of an object, as JSON text; None for `{}`, which clients send for a tool without parameters."""

    def reader(value: object, where: str) -> str | None:
        schema = fields.mapping(value, where)
        kind = schema.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise InvalidRequest(f"Invalid '{where}': the schema's type must be 'object'.", param=f"{where}.type")
        return json.dumps(schema, ensure_ascii=False) if schema else None

    kinds = [{"const": "object"}, {"type": "array", "contains": {"const": "object"}}]
    return Reader(reader, {"type": "object", "properties": {"type": {"anyOf": kinds}}})


# What OpenAI calls a function: inside `function` in chat completions, beside `type` in responses.
FUNCTION: tuple[Field, ...] = (
    Field("name", "effective", tool_name(), required=True),
    Field("description", "effective", fields.string(MAX_DESCRIPTION)),
    Field("parameters", "effective", parameters_schema()),
    Field("strict", "effective", fields.boolean()),
)


def function(values: Values) -> Tool:
    """The tool that was read by the fields of `FUNCTION`."""
    name = values.get("name", str)
    assert name is not None
    return Tool(
        name=name,
        description=values.get("description", str) or "",
        parameters=values.get("parameters", str),
        strict=values.get("strict", bool) or False,
    )


def distinct(tools: Sequence[Tool], where: Callable[[int], str]) -> tuple[Tool, ...]:
    """`tools` if no two have one name; `where` is the path of the n-th tool's name."""
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            raise InvalidRequest(f"Invalid '{where(index)}': two tools have this name.", param=where(index))
        seen.add(tool.name)
    return tuple(tools)


def named(name: object, tools: Sequence[Tool], where: str) -> str:
    """`name` if it is a string and one of the tools has it."""
    if name is None:
        raise fields.missing(where)
    if not isinstance(name, str):
        raise fields.wrong_type(where, "a string", name)
    if all(tool.name != name for tool in tools):
        raise InvalidRequest(f"Invalid '{where}': no tool of the request has this name.", param=where)
    return name


def choice(mode: Mode, tools: Sequence[Tool], where: str, *, names: tuple[str, ...] = (), parallel: bool) -> ToolChoice:
    """The choice among `tools`; a call can only be demanded where there is something to call."""
    if mode == "required" and not tools:
        raise InvalidRequest(f"'{where}' demands a tool call, but the request has no tools.", param=where)
    return ToolChoice(mode=mode, names=names, parallel=parallel)


class ToolReader:
    """Reads OpenAI's `tools` and `tool_choice` and gathers the names of what it ignored in them.

    `nested`: a function stands inside an object `function` of the tool or choice (chat completions), else beside
    `type` (responses).
    """

    def __init__(self, *, refuse_unknown: bool, nested: bool) -> None:
        self._refuse_unknown = refuse_unknown
        self._nested = nested
        self.ignored: list[str] = []

    def tools(self, given: Sequence[object]) -> tuple[Tool, ...]:
        """The tools of `given`, the request's `tools`; one of another type than `function` is refused."""
        found = [self.tool(value, f"tools[{index}]") for index, value in enumerate(given)]
        return distinct(found, lambda index: f"{self._inner(f'tools[{index}]')}.name")

    def tool(self, value: object, path: str) -> Tool:
        """One tool."""
        kind(value, path, ("function",), refused=("custom", "web_search", "file_search", "code_interpreter", "mcp"))
        if not self._nested:
            return function(self._read(value, FLAT, path))
        inner = self._read(value, NESTED, path).get("function", dict)
        return function(self._read(inner, _FUNCTION, f"{path}.function"))

    def choice(self, value: object, tools: Sequence[Tool], *, parallel: bool) -> ToolChoice:
        """What `value`, the request's `tool_choice` (None: absent), makes of `tools`."""
        path = "tool_choice"
        if value is None:
            return ToolChoice(parallel=parallel)
        if isinstance(value, str):
            return choice(_MODE(value, path), tools, path, parallel=parallel)
        if not isinstance(value, dict):
            raise fields.wrong_type(path, "a string or an object", value)
        if kind(value, path, ("function", "allowed_tools"), refused=("custom",)) == "allowed_tools":
            return self._allowed(value, tools, parallel=parallel)
        names = (self._name(value, tools, path),)
        return choice("required", tools, path, names=names, parallel=parallel)

    def _allowed(self, value: object, tools: Sequence[Tool], *, parallel: bool) -> ToolChoice:
        path = "tool_choice"
        if self._nested:
            inner = self._read(value, _ALLOWED_NESTED, path).get("allowed_tools", dict)
            path = f"{path}.allowed_tools"
            values = self._read(inner, _ALLOWED, path)
        else:
            values = self._read(value, _ALLOWED_FLAT, path)
        mode = values.made("mode", _ALLOWED_MODE)
        assert mode is not None
        names = []
        for index, item in enumerate(fields.array(values.get("tools", list), f"{path}.tools", 1, MAX_TOOLS)):
            where = f"{path}.tools[{index}]"
            kind(item, where, ("function",), refused=("custom",))
            names.append(self._name(item, tools, where))
        return choice(mode, tools, path, names=tuple(dict.fromkeys(names)), parallel=parallel)

    def _name(self, value: object, tools: Sequence[Tool], path: str) -> str:
        """The tool that a reference names."""
        if not self._nested:
            return named(self._read(value, _REFERENCE_FLAT, path).get("name", str), tools, f"{path}.name")
        inner = self._read(value, _REFERENCE_NESTED, path).get("function", dict)
        return named(self._read(inner, _NAMED, f"{path}.function").get("name", str), tools, f"{path}.function.name")

    def _inner(self, path: str) -> str:
        return f"{path}.function" if self._nested else path

    def _read(self, value: object, table: dict[str, Field], path: str) -> Values:
        values = fields.read(fields.mapping(value, path), table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values


def kind(value: object, path: str, known: tuple[str, ...], *, refused: tuple[str, ...] = ()) -> str:
    """The `type` of the object `value`: one of `known`; one of `refused` is understood and not offered."""
    where = f"{path}.type"
    found = fields.mapping(value, path).get("type")
    if found is None:
        raise fields.missing(where)
    if not isinstance(found, str):
        raise fields.wrong_type(where, "a string", found)
    if found in refused:
        raise fields.unsupported(where, f"'{found}' is not supported by this server.")
    return fields.word(*known)(found, where)


_CACHE = Field("cache_control", "advisory", fields.pairs(8))
_FUNCTION = fields.table(*FUNCTION)
_TYPE = Field("type", "effective", fields.word("function"), required=True)
NESTED = fields.table(_TYPE, Field("function", "effective", fields.pairs(8), required=True, of=_FUNCTION), _CACHE)
FLAT = fields.table(_TYPE, *FUNCTION, _CACHE)

_NAME_ONLY = Field("name", "effective", fields.string(1024, empty=False), required=True)
_NAMED = fields.table(_NAME_ONLY)
_REFERENCE_NESTED = fields.table(_TYPE, Field("function", "effective", fields.pairs(8), required=True, of=_NAMED))
_REFERENCE_FLAT = fields.table(_TYPE, _NAME_ONLY)

_ALLOWED_MODE: Reader[Mode] = fields.word("auto", "required")
_ALLOWED_TYPE = Field("type", "effective", fields.word("allowed_tools"), required=True)


def _allowed(reference: dict[str, Field]) -> tuple[Field, ...]:
    return (
        Field("mode", "effective", _ALLOWED_MODE, required=True),
        Field("tools", "effective", fields.items(MAX_TOOLS), required=True, of=reference),
    )


_ALLOWED = fields.table(*_allowed(_REFERENCE_NESTED))
_ALLOWED_NESTED = fields.table(
    _ALLOWED_TYPE, Field("allowed_tools", "effective", fields.pairs(8), required=True, of=_ALLOWED)
)
_ALLOWED_FLAT = fields.table(_ALLOWED_TYPE, *_allowed(_REFERENCE_FLAT))

TOOL_CHOICE: fields.Schema = {"anyOf": [{"type": "string", "enum": list(get_args(Mode))}, {"type": "object"}]}

"""What a tool's parameters say about how a call may be written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ocserve.generation import Tool

NO_PARAMETERS = '{"type":"object","properties":{},"additionalProperties":false}'

# Surrogates and NUL stand for control tokens in answers (`marks`).
_KEY = re.compile(r"[^\s<>\"\0\ud800-\udfff]+")
_CHOICE = re.compile(r"[^<\n\0\ud800-\udfff]*")
_SHARED = ("#/$defs/", "#/definitions/")
_ROOT_KEYWORDS = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "title", "description"),
        *("$schema", "$id", "$defs", "definitions", "examples", "default"),
    }
)
_TEXT_KEYWORDS = frozenset({"type", "title", "description", "default", "examples", "enum"})
# Where a schema has schemas, lists of them, and schemas by name.
_SCHEMAS = frozenset({"items", "prefixItems", "additionalItems", "additionalProperties", "allOf", "anyOf", "oneOf"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_UPPER, _LOWER = frozenset({"maximum", "exclusiveMaximum"}), frozenset({"minimum", "exclusiveMinimum"})
_MOST = 9_000_000_000_000_000_000  # llguidance counts in 64 bits itself and does not take their very last number
_ARRAY_KEYWORDS = frozenset({"items", "minItems", "maxItems"})
_JSON_TYPES = frozenset({"integer", "number", "boolean", "object", "array", "null"})


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument that may be written on its own: any text, one of some texts, or JSON under a schema."""

    key: str
    kind: Literal["text", "choice", "json"]
    required: bool
    choices: tuple[str, ...] = ()
    schema: str = ""


def arguments_schema(tool: Tool) -> str:
    """The JSON Schema of a tool's arguments, as JSON text.

    They are an object even where it does not say so. Neither they nor objects within have names but those that it
    lists, unless it says what others are like: a model that is held to a schema which allows anything makes them up.
    Integers without bounds fit 64 bits: a small model that may go on writes zeros without end.
    """
    if tool.parameters is None:
        return NO_PARAMETERS
    try:
        schema = json.loads(tool.parameters)
    except (ValueError, RecursionError):
        return tool.parameters  # for the schema's own check to refuse
    if not isinstance(schema, dict):
        return tool.parameters if schema is not True else '{"type":"object"}'
    _bound_integers(schema)
    if schema.get("type", "object") == "object":
        closed = {"additionalProperties": False} if _lists_all(schema) else {}
        _close_listed(schema)
        return json.dumps({**schema, "type": "object", **closed}, ensure_ascii=False)
    conditions = schema.get("allOf", [])
    both = [*conditions, {"type": "object"}] if isinstance(conditions, list) else conditions
    return json.dumps({**schema, "allOf": both}, ensure_ascii=False)


def _lists_all(schema: dict[str, object]) -> bool:
    """Whether an object's schema lists properties and is silent about others, of which it requires none."""
    listed, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(listed, dict)
        and isinstance(required, list)
        and schema.keys() <= _ROOT_KEYWORDS - {"additionalProperties"}
        and all(isinstance(name, str) and name in listed for name in required)
    )


def _close_listed(schema: dict[str, object]) -> None:
    """Close the objects within that list their names, in place, where nothing but their own schema tells of them."""
    waiting: list[object] = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict) or not part.keys() <= _ROOT_KEYWORDS | _ARRAY_KEYWORDS:
            continue
        waiting.append(part.get("items"))
        properties = part.get("properties")
        if isinstance(properties, dict):
            waiting += properties.values()
            if part is not schema and properties and part.get("type") == "object" and _lists_all(part):
                part["additionalProperties"] = False


def _bound_integers(schema: dict[str, object]) -> None:
    """Give every integer of a schema that has no bound of its own one, in place."""
    waiting: list[object] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        if not isinstance(part, dict):
            continue
        kind = part.get("type")
        if kind == "integer" or (isinstance(kind, list) and "integer" in kind and "number" not in kind):
            upper, lower = part.keys() & _UPPER, part.keys() & _LOWER
            if all(_is_within(part[name]) for name in upper | lower):
                part |= ({} if upper else {"maximum": _MOST}) | ({} if lower else {"minimum": -_MOST})
        waiting += (part[key] for key in _SCHEMAS & part.keys())
        for key in _NAMED_SCHEMAS & part.keys():
            waiting += named.values() if isinstance(named := part[key], dict) else ()


def _is_within(bound: object) -> bool:
    return isinstance(bound, int | float) and abs(bound) < _MOST


def separate(tool: Tool) -> tuple[Argument, ...] | None:
    """The arguments, in order, if they can be written one by one and still be held to the schema; else None."""
    try:
        schema = json.loads(arguments_schema(tool))
    except (ValueError, RecursionError):
        return None
    if not isinstance(schema, dict) or not schema.keys() <= _ROOT_KEYWORDS or schema.get("type") != "object":
        return None
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return None
    if not all(isinstance(name, str) and name in properties for name in required):
        return None
    if not all(isinstance(target, str) and target.startswith(_SHARED) for target in _references(schema)):
        return None  # it points into the whole, of which a property is lifted out
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    found = []
    for key, value in properties.items():
        argument = _argument(key, value, key in required, shared)
        if argument is None:
            return None
        found.append(argument)
    return tuple(found)


def bare_texts(tool: Tool) -> frozenset[str]:
    """The keys of arguments that are written as bare text where arguments are written one by one."""
    return frozenset(argument.key for argument in separate(tool) or () if argument.kind != "json")


def _argument(key: str, schema: object, required: bool, shared: dict[str, object]) -> Argument | None:
    if not _KEY.fullmatch(key) or not isinstance(schema, dict):
        return None
    kind = schema.get("type")
    if isinstance(kind, str) and kind in _JSON_TYPES:
        return Argument(key, "json", required, schema=json.dumps({**shared, **schema}, ensure_ascii=False))
    if kind != "string" or not schema.keys() <= _TEXT_KEYWORDS:
        return None
    if "enum" not in schema:
        return Argument(key, "text", required)
    choices = schema["enum"]
    if not choices or not isinstance(choices, list) or not all(map(_is_plain, choices)):
        return None
    return Argument(key, "choice", required, choices=tuple(choices))


def _is_plain(choice: object) -> bool:
    return isinstance(choice, str) and _CHOICE.fullmatch(choice) is not None and choice == choice.strip()


def _references(schema: object) -> Iterator[object]:
    """Every value of a `$ref`, at any depth; a property of that name counts too."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value

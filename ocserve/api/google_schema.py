"""Google's `Schema`, a subset of OpenAPI's, as JSON Schema.

Differences: types are written in capitals, `nullable` stands for a second type, `propertyOrdering` says in what order
properties are generated, counts may be strings of digits, and `format` has words of its own that bound nothing.
"""

from __future__ import annotations

import re
from typing import Any

from ocserve.api import fields, protojson
from ocserve.api.json_body import NAME
from ocserve.errors import InvalidRequest

_TYPES = ("STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL")
_UNSPECIFIED = "TYPE_UNSPECIFIED"
_KEPT = ("title", "description", "default", "enum", "pattern", "minimum", "maximum", "required")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# They say how a value is stored, not which values there are; JSON Schema does not have them.
_STORAGE = ("enum", "int32", "int64", "float", "double", "byte")
_RENAMED = {"ref": "$ref", "defs": "$defs", "$ref": "$ref", "$defs": "$defs"}
_KNOWN = (
    "type", "format", "nullable", "items", "properties", "propertyOrdering", "anyOf", "additionalProperties", "example",
    *_KEPT, *_COUNTS, *_RENAMED,
)  # fmt: skip
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")
_SPELLINGS = {spelling: name for name in _KNOWN for spelling in (name, protojson.snake(name))}


def json_schema(value: object, where: str) -> dict[str, Any]:
    """The JSON Schema that says what `value` says; raises for what it does not know, by its path."""
    given: dict[str, Any] = {}
    for key, item in fields.mapping(value, where).items():
        name = _SPELLINGS.get(key)
        if name is None:
            raise fields.unknown(key, where, _SPELLINGS)
        if item is not None:
            given[name] = (item, f"{where}.{key}")
    schema: dict[str, Any] = {}
    for name, (item, at) in given.items():
        _read(schema, name, item, at)
    _order(schema, given)
    _nullable(schema, given)
    return schema


def _read(schema: dict[str, Any], name: str, item: object, at: str) -> None:
    """Put one keyword into `schema`."""
    if name == "type":
        word = protojson.enum(*_TYPES, _UNSPECIFIED)(item, at)
        if word != _UNSPECIFIED:
            schema["type"] = word.lower()
    elif name == "format":
        if fields.string(64)(item, at) not in _STORAGE:
            schema["format"] = item
    elif name in _COUNTS:
        schema[name] = _count(item, at)
    elif name in ("properties", "defs", "$defs"):
        entries = fields.mapping(item, at)
        schema[_RENAMED.get(name, name)] = {
            key: json_schema(inner, _inside(at, key, index)) for index, (key, inner) in enumerate(entries.items())
        }
    elif name == "items":
        schema["items"] = json_schema(item, at)
    elif name == "anyOf":
        options = fields.array(item, at, 1, 1024)
        schema["anyOf"] = [json_schema(inner, f"{at}[{index}]") for index, inner in enumerate(options)]
    elif name == "additionalProperties":
        schema[name] = item if isinstance(item, bool) else json_schema(item, at)
    elif name in _RENAMED:
        schema["$ref"] = fields.string(1024)(item, at)
    elif name in _KEPT:
        schema[name] = item


def _inside(at: str, key: str, index: int) -> str:
    """The path of a property: errors repeat no name that is more than one."""
    return f"{at}.{key}" if NAME.fullmatch(key) else f"{at}[{index}]"


def _count(item: object, at: str) -> int:
    """A count: protocol buffers write 64-bit integers as strings."""
    digits = isinstance(item, str) and item.isascii() and item.isdigit() and len(item) <= 18
    return fields.integer(0, 2**53)(int(item) if digits and isinstance(item, str) else item, at)


def _order(schema: dict[str, Any], given: dict[str, Any]) -> None:
    """Let properties stand in the order that was asked for: they are generated as they stand."""
    if "propertyOrdering" not in given:
        return
    item, at = given["propertyOrdering"]
    properties = schema.get("properties", {})
    order = [fields.string(1024)(name, f"{at}[{index}]") for index, name in enumerate(fields.array(item, at, 0, 4096))]
    first = {name: properties[name] for name in order if name in properties}
    schema["properties"] = first | properties


def _nullable(schema: dict[str, Any], given: dict[str, Any]) -> None:
    if "nullable" not in given or not fields.boolean()(*given["nullable"]):
        return
    if "anyOf" in schema:
        schema["anyOf"] = [*schema["anyOf"], {"type": "null"}]
    if "type" in schema:
        schema["type"] = [schema["type"], "null"]
    if isinstance(schema.get("enum"), list):
        schema["enum"] = [*schema["enum"], None]


def alternatives(value: object, where: str) -> str:
    """A regular expression of the words that a schema with `enum` allows."""
    words = json_schema(value, where).get("enum")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise InvalidRequest(f"'{where}.enum' must be a list of words for 'text/x.enum'.", param=f"{where}.enum")
    return "|".join(_SPECIAL.sub(r"\\\g<0>", word) for word in words)

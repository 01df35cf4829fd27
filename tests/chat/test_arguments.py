"""What a tool's parameters say about how a call may be written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ocserve.chat.arguments import arguments_schema, bare_texts, separate
from ocserve.generation import Tool

ONE = {"a": {"type": "boolean"}}


@pytest.mark.parametrize(
    ("given", "closed"),
    [
        ({"type": "object", "properties": {}}, True),  # how clients write a function without arguments
        ({"properties": ONE, "required": ["a"]}, True),
        ({"type": "object", "properties": ONE, "additionalProperties": True}, False),
        ({"type": "object", "properties": ONE, "required": ["b"]}, False),  # nothing could be called otherwise
        ({"type": "object", "properties": ONE, "patternProperties": {"^x": {}}}, False),
        ({"type": "object", "properties": ONE, "anyOf": [{"required": ["b"]}]}, False),
        ({"type": "object"}, False),
    ],
)
def test_names_that_a_tool_does_not_list_are_not_made_up(given: dict[str, Any], closed: bool) -> None:
    schema = json.loads(arguments_schema(Tool(name="f", parameters=json.dumps(given))))
    assert (schema.get("additionalProperties") is False) == closed
    assert {key: schema[key] for key in given} == given


@pytest.mark.parametrize(
    "given",
    [
        {"properties": {"a": {"type": ["string", "null"]}}},  # what SDKs write for an optional value
        {"properties": {"a": {"type": "string"}}, "required": [{}]},
        {"properties": {"a": {"type": "string", "enum": 5}}},
        {"properties": {"a": {"type": "string", "enum": ["x\0y"]}}},  # NUL and surrogates mean control tokens
        {"properties": {"a": {"type": "string", "enum": ["\ud800"]}}},
        {"properties": {"a\0": {"type": "string"}}},
        {"properties": {'a"b': {"type": "string"}}},  # some formats write names between quotes
        {"properties": {"a": {"type": "object", "properties": {"b": {"$ref": "#"}}}}},
        {"properties": {"a": {"type": "array", "items": {"$ref": "#/properties/b"}}, "b": {"type": "string"}}},
    ],
)
def test_arguments_that_cannot_be_written_one_by_one_are_written_together(given: dict[str, Any]) -> None:
    tool = Tool(name="f", parameters=json.dumps({"type": "object", **given}))
    assert separate(tool) is None
    assert bare_texts(tool) == frozenset()


def test_arguments_that_share_definitions_are_written_one_by_one() -> None:
    given = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/x"}}},
        "$defs": {"x": {}},
    }
    assert separate(Tool(name="f", parameters=json.dumps(given))) is not None


def test_integers_without_bounds_fit_64_bits() -> None:
    bounds = {"minimum": -9 * 10**18, "maximum": 9 * 10**18}
    integer = {"type": "integer"}
    given = {
        "type": "object",
        "properties": {
            "plain": integer,
            "optional": {"type": ["integer", "null"]},
            "own": {"type": "integer", "minimum": 1, "exclusiveMaximum": 5},
            "half": {"type": "integer", "minimum": 0},
            "huge": {"type": "integer", "minimum": 10**19},
            "number": {"type": "number", "default": integer},
            "type": {"anyOf": [{"type": "array", "items": integer}, {"$ref": "#/$defs/x"}], "examples": [integer]},
        },
        "$defs": {"x": {"additionalProperties": integer, "enum": [integer]}},
    }
    schema = json.loads(arguments_schema(Tool(name="f", parameters=json.dumps(given))))
    properties, wanted = schema["properties"], given["properties"]
    assert isinstance(wanted, dict)
    assert properties["plain"] == {**integer, **bounds}
    assert properties["optional"] == {**wanted["optional"], **bounds}
    assert properties["half"] == {**wanted["half"], "maximum": bounds["maximum"]}
    assert {name: properties[name] for name in ("own", "number")} == {name: wanted[name] for name in ("own", "number")}
    assert properties["huge"]["minimum"] == 10**19
    assert "maximum" not in properties["huge"]
    assert properties["type"]["anyOf"][0]["items"] == {**integer, **bounds}
    assert properties["type"]["examples"] == [integer]
    assert schema["$defs"]["x"] == {"additionalProperties": {**integer, **bounds}, "enum": [integer]}


def test_names_that_objects_within_do_not_list_are_not_made_up_either() -> None:
    inner = {"type": "object", "properties": ONE}
    closed = {**inner, "additionalProperties": False}
    given = {
        "type": "object",
        "properties": {
            "a": inner,
            "b": {"type": "array", "items": {"type": "object", "properties": {"c": inner}}},
            "any": {"type": "object", "properties": {}},
            "open": {**inner, "additionalProperties": {"type": "string"}},
            "either": {"oneOf": [inner, {"type": "string"}]},
        },
    }
    properties = json.loads(arguments_schema(Tool(name="f", parameters=json.dumps(given))))["properties"]
    wanted: Any = given["properties"]
    assert properties["a"] == closed
    assert properties["b"]["items"] == {"type": "object", "properties": {"c": closed}, "additionalProperties": False}
    assert {name: properties[name] for name in ("any", "open", "either")} == {
        name: wanted[name] for name in ("any", "open", "either")
    }
    beside = {**given, "allOf": [{"properties": {"a": {"required": ["x"]}}}]}
    assert json.loads(arguments_schema(Tool(name="f", parameters=json.dumps(beside))))["properties"]["a"] == inner

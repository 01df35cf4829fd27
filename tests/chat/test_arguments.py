"""What a tool's parameters say about how a call may be written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ocserve.chat.arguments import arguments_schema, bare_texts, separate
from ocserve.generation import Tool

ONE = {"a": {"type": "integer"}}


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

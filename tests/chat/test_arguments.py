"""What a tool's parameters say about how a call may be written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ocserve.chat.arguments import arguments_schema
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

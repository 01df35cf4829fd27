"""Google's schemas as JSON Schema, and what is wrong in them by its path."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ocserve.api.google_schema import alternatives, json_schema
from ocserve.errors import InvalidRequest


def test_types_are_lowered_and_everything_nested_is_converted() -> None:
    given = {
        "type": "OBJECT",
        "description": "A person.",
        "properties": {
            "name": {"type": "STRING", "minLength": "1", "max_length": 5},
            "age": {"type": "INTEGER", "format": "int32", "minimum": 0, "nullable": True},
            "tags": {"type": "ARRAY", "items": {"type": "string", "enum": ["a", "b"], "format": "enum"}, "minItems": 1},
            "when": {"type": "STRING", "format": "date-time", "example": "now"},
            "either": {"anyOf": [{"type": "NUMBER"}, {"type": "BOOLEAN"}], "nullable": True},
            "kind": {"type": "STRING", "enum": ["x"], "nullable": True},
            "any": {"type": "TYPE_UNSPECIFIED"},
        },
        "required": ["name"],
        "propertyOrdering": ["age", "name", "absent"],
        "additionalProperties": False,
    }
    expected = {
        "type": "object",
        "description": "A person.",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 5},
            "age": {"type": ["integer", "null"], "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}, "minItems": 1},
            "when": {"type": "string", "format": "date-time"},
            "either": {"anyOf": [{"type": "number"}, {"type": "boolean"}, {"type": "null"}]},
            "kind": {"type": ["string", "null"], "enum": ["x", None]},
            "any": {},
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    found = json_schema(given, "s")
    assert found == expected
    assert list(found["properties"])[:3] == ["age", "name", "tags"]


def test_references() -> None:
    given = {"defs": {"node": {"type": "OBJECT"}}, "properties": {"a": {"ref": "#/$defs/node"}}}
    expected = {"$defs": {"node": {"type": "object"}}, "properties": {"a": {"$ref": "#/$defs/node"}}}
    assert json_schema(given, "s") == expected


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "s"),
        ({"type": "TEXT"}, "s.type"),
        ({"type": 1}, "s.type"),
        ({"tipe": "STRING"}, "s.tipe"),
        ({"properties": []}, "s.properties"),
        ({"properties": {"a": 1}}, "s.properties.a"),
        ({"properties": {"a": {"type": "X"}}}, "s.properties.a.type"),
        ({"items": [{}]}, "s.items"),
        ({"anyOf": {}}, "s.anyOf"),
        ({"any_of": [{}, {"type": "X"}]}, "s.any_of[1].type"),
        ({"minItems": "many"}, "s.minItems"),
        ({"min_items": -1}, "s.min_items"),
        ({"additionalProperties": 1}, "s.additionalProperties"),
        ({"nullable": "yes"}, "s.nullable"),
        ({"propertyOrdering": "a"}, "s.propertyOrdering"),
        ({"propertyOrdering": [1]}, "s.propertyOrdering[0]"),
        ({"format": 1}, "s.format"),
        ({"properties": {"a": {}, "my secret": {"type": "X"}}}, "s.properties[1].type"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(given: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        json_schema(given, "s")
    assert caught.value.param == param


def test_an_enumeration_is_the_expression_of_its_words() -> None:
    words = ["a.b", "(c)", "d|e", "f g", "\\", "ü"]
    expression = re.compile(alternatives({"type": "STRING", "enum": words}, "s"))
    assert all(expression.fullmatch(word) for word in words)
    assert not any(expression.fullmatch(word) for word in ("aXb", "d", "c", "e", ""))
    for given in ({}, {"enum": []}, {"enum": [1]}, {"enum": "a"}):
        with pytest.raises(InvalidRequest) as caught:
            alternatives(given, "s")
        assert caught.value.param == "s.enum"

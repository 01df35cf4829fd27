"""`response_format`: the three forms, and every malformed one refused by its exact path."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ocserve.api import openai_chat
from ocserve.generation import GrammarConstraint, JsonConstraint
from tests.api.test_fields import CHAT, models, parse, refused

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}, "a": {}}, "required": ["é"]}
PATH = "response_format.json_schema"


def form(**json_schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": json_schema}


def test_text_is_no_constraint() -> None:
    for value in (None, {"type": "text"}, {"type": "text", "json_schema": None}):
        assert parse(response_format=value).request.constraint is None


def test_json_object_is_any_object() -> None:
    assert parse(response_format={"type": "json_object"}).request.constraint.schema is None


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema_is_held_to_with_and_without_strict(strict: bool | None) -> None:
    constraint = parse(response_format=form(name="answer_1-A", schema=SCHEMA, strict=strict)).request.constraint
    assert json.loads(constraint.schema) == SCHEMA
    assert list(json.loads(constraint.schema)["properties"]) == ["é", "a"]


def test_a_schema_may_be_absent_or_a_boolean() -> None:
    assert parse(response_format=form(name="x")).request.constraint.schema is None
    assert parse(response_format=form(name="x", schema=True)).request.constraint.schema == "true"
    assert parse(response_format=form(name="x", schema=False)).request.constraint.schema == "false"


def test_a_description_is_reported_as_ignored() -> None:
    parsed = parse(response_format=form(name="x", schema={}, description="What it is."))
    assert parsed.ignored == (f"{PATH}.description",)


@pytest.mark.parametrize(
    ("value", "param", "code"),
    [
        ("json", "response_format", "invalid_type"),
        ([], "response_format", "invalid_type"),
        ({}, "response_format.type", "missing_required_parameter"),
        ({"type": None}, "response_format.type", "missing_required_parameter"),
        ({"type": 1}, "response_format.type", "invalid_type"),
        ({"type": "canary"}, "response_format.type", "invalid_value"),
        ({"type": "grammar"}, "response_format.grammar", "missing_required_parameter"),
        ({"type": "grammar", "grammar": "x", "syntax": "gbnf"}, "response_format.syntax", "invalid_value"),
        ({"type": "json_object", "grammar": "canary"}, "response_format.grammar", "invalid_value"),
        ({"type": "text", "syntax": "lark"}, "response_format.syntax", "invalid_value"),
        ({"type": "python"}, "response_format.type", "invalid_value"),
        ({"type": "json_schema"}, PATH, "missing_required_parameter"),
        ({"type": "json_schema", "json_schema": None}, PATH, "missing_required_parameter"),
        ({"type": "json_schema", "json_schema": []}, PATH, "invalid_type"),
        ({"type": "json_schema", "schema": {}}, "response_format.schema", "unknown_parameter"),
        ({"type": "json_object", "json_schema": {"name": "canary"}}, PATH, "invalid_value"),
        ({"type": "text", "json_schema": {"name": "canary"}}, PATH, "invalid_value"),
        (form(schema={}), f"{PATH}.name", "missing_required_parameter"),
        (form(name="", schema={}), f"{PATH}.name", "empty_string"),
        (form(name=5, schema={}), f"{PATH}.name", "invalid_type"),
        (form(name="canary!", schema={}), f"{PATH}.name", "invalid_value"),
        (form(name="x" * 65, schema={}), f"{PATH}.name", "string_above_max_length"),
        (form(name="x", schema="canary"), f"{PATH}.schema", "invalid_type"),
        (form(name="x", schema=[]), f"{PATH}.schema", "invalid_type"),
        (form(name="x", schema={}, strict="true"), f"{PATH}.strict", "invalid_type"),
        (form(name="x", schema={}, description=1), f"{PATH}.description", "invalid_type"),
        (form(name="x", schema={}, strickt=True), f"{PATH}.strickt", "unknown_parameter"),
    ],
)
def test_a_malformed_form_is_refused_by_its_path(value: Any, param: str, code: str) -> None:
    error = refused(response_format=value)
    assert (error.param, error.code, error.status) == (param, code, 400)
    assert "canary" not in error.message


def test_unknown_names_inside_may_be_made_advisory() -> None:
    body = json.dumps({**CHAT, "response_format": form(name="x", schema={}, hint=1)}).encode()
    assert openai_chat.parse(body, models, refuse_unknown=False).ignored == (f"{PATH}.hint",)


def test_a_grammar_is_lark_or_a_regular_expression() -> None:
    for given, syntax in (({}, "lark"), ({"syntax": "regex"}, "regex")):
        constraint = parse(response_format={"type": "grammar", "grammar": "a", **given}).request.constraint
        assert constraint == GrammarConstraint(text="a", syntax=syntax)


@pytest.mark.parametrize(
    ("name", "value", "constraint"),
    [
        ("json", SCHEMA, JsonConstraint(schema=json.dumps(SCHEMA, ensure_ascii=False))),
        ("json", "{}", JsonConstraint(schema="{}")),
        ("regex", "[ab]+", GrammarConstraint(text="[ab]+", syntax="regex")),
        ("grammar", "start: A", GrammarConstraint(text="start: A", syntax="lark")),
        ("choice", ["yes", "no"], GrammarConstraint(text="yes|no", syntax="regex")),
    ],
)
def test_vllms_names_for_a_constraint(name: str, value: Any, constraint: Any) -> None:
    for given, path in (
        ({f"guided_{name}": value}, f"guided_{name}"),
        ({"structured_outputs": {name: value}}, f"structured_outputs.{name}"),
    ):
        parsed = parse(**given)
        assert parsed.request.constraint == constraint
        assert set(parsed.paths.values()) == {path}


def test_a_choice_means_its_words_and_nothing_else() -> None:
    words = ["a.b", "x|y", "(c)*", "é\n", "\\d"]
    pattern = parse(guided_choice=words).request.constraint.text
    pattern = re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: re.escape(chr(int(found[1], 16))), pattern)
    assert all(re.fullmatch(pattern, word) for word in words)
    assert not any(re.fullmatch(pattern, other) for other in ("axb", "x", "y", "c", "cc", "1", ""))


def test_two_constraints_are_one_too_many() -> None:
    error = refused(response_format={"type": "json_object"}, guided_regex="a")
    assert error.param == "guided_regex"
    assert refused(structured_outputs={"json": {}, "regex": "a"}).param == "structured_outputs.regex"
    assert parse(response_format={"type": "text"}, guided_regex="a").request.constraint is not None
    assert parse(structured_outputs=True, response_format={"type": "json_object"}).request.constraint is not None

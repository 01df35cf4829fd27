"""Which schemas are refused before or by the grammar compiler, and that a refusal names keywords and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ocserve.engine import schema
from ocserve.engine.constraint import GrammarCompiler
from ocserve.engine.llama import LoadLog, Model
from ocserve.errors import InvalidRequest
from ocserve.generation import JsonConstraint

CANARY = "canary-7f3a"


@pytest.fixture(scope="module")
def compiler(tiny_model: Any) -> GrammarCompiler:
    log = LoadLog()
    vocab = Model(str(tiny_model), gpu_layers=0, log=log).vocab
    log.close()
    return GrammarCompiler(vocab, lambda text: vocab.tokenize(text, parse_special=False))


REFUSED: list[tuple[Any, str]] = [
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    ({"not": {"const": CANARY}}, "'not'"),
    ({"if": {"const": CANARY}, "then": {"minLength": 2}}, "'if', 'then'"),
    ({"type": "array", "contains": {"const": CANARY}}, "'contains'"),
    ({"type": "object", "propertyNames": {"pattern": CANARY}}, "'propertyNames'"),
    ({"type": "object", "dependentRequired": {CANARY: ["b"]}}, "'dependentRequired'"),
    ({"type": "object", "unevaluatedProperties": False}, "'unevaluatedProperties'"),
    ({"$dynamicRef": f"#{CANARY}"}, "'$dynamicRef'"),
    ({"$ref": f"https://{CANARY}.example/schema"}, "'$ref'"),
    ({"$ref": f"#/$defs/{CANARY}"}, "'$ref'"),
    ({"type": "string", "pattern": f"(?={CANARY})a"}, "'pattern'"),
    ({"type": "string", "pattern": f"({CANARY})\\1"}, "'pattern'"),
    ({"type": "string", "format": "uri-template"}, "'format'"),
    ({"type": CANARY}, "'type'"),
    ({"oneOf": [{"type": "string", "minLength": 2}, {"type": "string", "maxLength": 5}]}, "'oneOf'"),
    ({"patternProperties": {f"{CANARY}.*": {}, ".*a": {}}}, "'patternProperties'"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "'x-guidance'"),
    ({"properties": {"a": {"x-guidance": {"whitespace_flexible": True}}}}, "'x-guidance'"),
    ({"allOf": [{"pattern": f"{CANARY}.{{{n}}}"} for n in range(4)]}, "'allOf'"),
    ({"enum": []}, "no value"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "no value"),
    ({"type": "object", "properties": {CANARY: False}, "required": [CANARY]}, "no value"),
    (False, "no value"),
    ({"type": "integer", "minimum": CANARY}, "'minimum'"),
    ({"type": "object", "minProperties": 2}, "'minProperties'"),
    ({"patternProperties": {"^a": {}}, "additionalProperties": False, "minProperties": 2}, "'minProperties'"),
    ({"type": {CANARY: 1}}, "'type'"),
    ({"properties": {CANARY: 7}}, "'properties'"),
    ({"anyOf": [{}, CANARY]}, "'anyOf'"),
    ({"multipleOf": True}, "'multipleOf'"),
    ({"$ref": f"#{CANARY}"}, "'$ref'"),
    ({"$schema": CANARY}, "'$schema'"),
    ({"type": "number", "maximum": 18446744073709551615}, "'maximum'"),
    ({"type": "object", "properties": {CANARY: {}}, "maxProperties": 3}, "'maxProperties'"),
    ([CANARY], "an object or a boolean"),
    (CANARY, "an object or a boolean"),
    (None, "an object or a boolean"),
    ({"const": CANARY * 7000}, "65536 bytes"),
]


@pytest.mark.parametrize(("document", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_refusal_names_the_keyword_and_repeats_nothing_of_the_schema(
    compiler: GrammarCompiler, document: Any, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.guide(JsonConstraint(schema=json.dumps(document)))
    assert words in caught.value.message
    assert CANARY not in caught.value.message
    assert (caught.value.param, caught.value.status) == (schema.FIELD, 400)


@pytest.mark.parametrize("text", ["", "{", "nul", '{"maximum":1e400}', '{"maximum":NaN}', "9" * 5000, "[" * 50_000])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        schema.checked(text)


@pytest.mark.parametrize(
    "document",
    [
        True,
        {},
        {"title": "T", "description": "D", "examples": [1], "default": 2, "nullable": True, "x-order": 3},
        {"properties": {"not": {"type": "string"}, "uniqueItems": {}, "multipleOf": {"type": "number"}}},
        {"enum": ["not", "uniqueItems", {"if": 1}]},
        {"type": "integer", "multipleOf": 60},
        {"allOf": [{"type": "number", "multipleOf": 0.5}, {"multipleOf": 0.2}]},
    ],
)
def test_annotations_and_data_that_look_like_keywords_are_accepted(compiler: GrammarCompiler, document: Any) -> None:
    compiler.guide(JsonConstraint(schema=json.dumps(document)))


def test_the_joint_multiple_counts_units_of_the_finest_decimal() -> None:
    def both(one: float, other: float) -> str:
        return json.dumps({"allOf": [{"multipleOf": one}, {"items": {"multipleOf": other}}]})

    schema.checked(both(100, 0.01))
    schema.checked(both(99, 101))
    for one, other in ((100, 0.001), (101, 103), (0.01, 103)):
        with pytest.raises(InvalidRequest, match="multipleOf"):
            schema.checked(both(one, other))


def test_multiples_that_never_hold_together_count_by_their_sum() -> None:
    def separate(*multiples: float) -> str:
        return json.dumps({"properties": {str(each): {"multipleOf": each} for each in multiples}})

    assert schema.checked(separate(7, 11, 13, 17, 19, 0.25)).multiples == 7 + 11 + 13 + 17 + 19 + 25
    schema.checked(separate(4999, 5001))
    with pytest.raises(InvalidRequest, match="multipleOf"):
        schema.checked(separate(4999, 5002))
    beside = {"multipleOf": 101, "anyOf": [{"multipleOf": 103}]}
    with pytest.raises(InvalidRequest, match="multipleOf"):
        schema.checked(json.dumps(beside))


def test_nesting_is_bounded_at_its_stated_depth() -> None:
    def deep(levels: int) -> str:
        return '{"items":' * (levels - 1) + "{}" + "}" * (levels - 1)

    schema.checked(deep(schema.MAX_DEPTH))
    with pytest.raises(InvalidRequest, match="deeper"):
        schema.checked(deep(schema.MAX_DEPTH + 1))


HARMLESS: list[Any] = [
    {"type": "object", "propertyNames": {"type": "string"}},
    {"type": "array", "items": {"type": "array", "uniqueItems": False}},
    {"type": "array", "uniqueItems": True, "maxItems": 1},
    {"anyOf": [{"type": "integer", "if": {"const": 1}}, {"then": {"const": 2}, "type": "null"}]},
    {"$defs": {"a": {"type": "array", "minContains": 2}}, "$ref": "#/$defs/a"},
    {"type": "object", "properties": {"not": {"type": "object", "unevaluatedProperties": True, "not": False}}},
    {"type": "object", "properties": {"a": {}}, "required": ["a"], "minProperties": 2},
    {"type": "object", "minProperties": 1},
    {"type": "object", "dependentRequired": {}, "properties": {"if": {"type": "integer"}}},
]


@pytest.mark.parametrize("document", HARMLESS, ids=[str(index) for index in range(len(HARMLESS))])
def test_keywords_that_forbid_nothing_are_no_reason_to_refuse(compiler: GrammarCompiler, document: Any) -> None:
    compiler.guide(JsonConstraint(schema=json.dumps(document)))
    kept = json.loads(schema.checked(json.dumps(document)).text)
    assert kept.get("properties", {}).keys() == document.get("properties", {}).keys()

"""The API reference says what the server does: every route, every parameter, every bound."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import openapi_spec_validator

from ocserve import config
from ocserve.api import field_schema, fields, glossary, openapi
from ocserve.api.fields import Field, Reader
from ocserve.api.operations import OPERATIONS, Operation
from ocserve.api.response_schemas import SCHEMAS
from ocserve.errors import ApiError
from ocserve.http.edge.current import Edge
from ocserve.http.metrics import meter
from ocserve.http.route_table import SOCKET
from ocserve.http.routes import routes
from ocserve.pages.publication import Published
from tests.api.models import EMBEDDING, TOOLS
from tests.http.harness import MODEL, Control
from tests.scripted import ScriptedEngine, alone

DOCUMENT = openapi.document((MODEL,), "1")


def test_the_document_is_valid() -> None:
    openapi_spec_validator.validate(json.loads(json.dumps(DOCUMENT)))


def test_every_route_is_in_the_reference_and_the_other_way_round() -> None:
    service = alone(ScriptedEngine(), MODEL, config.Limits())
    listed = {
        (each.method, each.path)
        for each in routes(service, Edge(config.Server()), meter(service), Control(), Published())
        if each.method != SOCKET
    }
    assert {operation.route for operation in OPERATIONS} == listed
    public = {
        (route.method, route.path)
        for route in routes(service, Edge(config.Server()), meter(service), Control(), Published())
        if route.public
    }
    assert {operation.route for operation in OPERATIONS if operation.public} == public


def test_operations_have_names_of_their_own_and_answers_that_exist() -> None:
    names = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names)) == len(OPERATIONS)
    for operation in OPERATIONS:
        assert {operation.answer, operation.error, *([operation.streamed[1]] if operation.streamed else [])} <= {
            *SCHEMAS
        }


def tables() -> Iterator[tuple[str, str, Field]]:
    """Every parameter of every operation, those of inner objects too: (operation, path, field)."""
    for operation in OPERATIONS:
        yield from _fields(operation.path, "", operation.reads or {})


def _fields(operation: str, prefix: str, declared: Any) -> Iterator[tuple[str, str, Field]]:
    for name, field in declared.items():
        yield operation, prefix + name, field
        if field.of is not None:
            yield from _fields(operation, f"{prefix}{name}.", field.of)


def test_every_parameter_says_which_values_it_takes() -> None:
    silent = [
        (operation, path)
        for operation, path, field in tables()
        if field.kind == "effective" and not isinstance(field.reader, Reader) and field.shape is None
    ]
    assert silent == []


def test_no_word_of_the_glossary_is_about_nothing() -> None:
    names = {name for _, path, field in tables() for name in (path.removeprefix(glossary.SAMPLING), field.name)}
    assert set(glossary.MEANINGS) <= names


def test_samplers_and_limits_are_explained() -> None:
    chat = next(operation for operation in OPERATIONS if operation.path == "/v1/chat/completions")
    assert chat.reads is not None
    effective = {name for name, field in chat.reads.items() if field.kind == "effective"}
    assert len(effective & set(glossary.MEANINGS)) >= 0.8 * len(effective)


# How far a class of value can be pushed beyond each bound that a schema may state.
BEYOND: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "minimum": lambda bound, schema: bound - (1 if "integer" in _types(schema) else 0.001),
    "exclusiveMinimum": lambda bound, schema: bound,
    "maximum": lambda bound, schema: bound + (1 if "integer" in _types(schema) else 0.001),
    "minLength": lambda bound, schema: "x" * (bound - 1),
    "maxLength": lambda bound, schema: "x" * (bound + 1),
    "minItems": lambda bound, schema: [_item(schema)] * (bound - 1),
    "maxItems": lambda bound, schema: [_item(schema)] * (bound + 1),
    "maxProperties": lambda bound, schema: {f"k{number}": 0 for number in range(bound + 1)},
    "enum": lambda bound, schema: "certainly not one of these",
}
_LARGE = 2**21  # a value of this many bytes or items is not made


def _types(schema: dict[str, Any]) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else kind


def _item(schema: dict[str, Any]) -> Any:
    kinds = _types(schema.get("items") or {})
    return 1 if "integer" in kinds else {} if "object" in kinds else "x"


def bounds() -> Iterator[tuple[Operation, str, str, Any]]:
    """(operation, parameter, word of the schema, a value just beyond what it allows)."""
    for operation in OPERATIONS:
        for name, field in (operation.reads or {}).items():
            if field.kind == "unsupported" or not isinstance(field.reader, Reader):
                continue  # what is refused anyway, and what the dialect itself checks
            schema = field_schema.values(field)
            for word, beyond in BEYOND.items():
                bound = schema.get(word)
                if bound is None or (isinstance(bound, int) and abs(bound) > _LARGE and "Length" in word):
                    continue
                if isinstance(bound, int) and word in ("maxItems", "minItems") and not 0 < bound < _LARGE:
                    continue
                yield operation, name, word, beyond(bound, schema)


def refused(operation: Operation, name: str, value: Any) -> str | None:
    """What a refusal of `value` names; None if it passes."""
    others = {other: replace(field, required=False) for other, field in (operation.reads or {}).items()}
    try:
        fields.read({name: value}, others, refuse_unknown=True)
    except ApiError as error:
        return error.param
    return None


def test_every_documented_bound_is_enforced() -> None:
    """One step beyond each bound is refused, and the refusal names the parameter."""
    tried = 0
    for operation, name, word, value in bounds():
        assert (refused(operation, name, value) or "").startswith(name), (operation.path, name, word, f"{value!r:.60}")
        tried += 1
    print(f"{tried} bounds")
    assert tried > 400


def test_every_documented_type_is_enforced() -> None:
    wrong = {"string": 1, "integer": "1", "number": "1", "boolean": 1, "array": {}, "object": []}
    tried = 0
    for operation in OPERATIONS:
        for name, field in (operation.reads or {}).items():
            kinds = _types(field_schema.values(field)) if field.kind != "unsupported" else []
            if len(kinds) != 1 or (field.reader is None and field.kind == "effective"):
                continue
            assert (refused(operation, name, wrong[kinds[0]]) or "").startswith(name), (operation.path, name)
            tried += 1
    assert tried > 300


def test_unsupported_parameters_take_what_asks_for_nothing_and_no_more() -> None:
    for operation in OPERATIONS:
        for name, field in (operation.reads or {}).items():
            if field.kind != "unsupported" or operation.reads is None:
                continue
            validator = jsonschema.Draft202012Validator(field_schema.of_field(field, name))
            for value in (*field.neutral, None):
                validator.validate(value)
            assert not validator.is_valid("certainly not")


def test_the_document_is_about_the_models_that_are_served() -> None:
    found = openapi.document((MODEL, TOOLS, EMBEDDING), "1")
    schema = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]["model"]["enum"]) == {
        *(name for model in (MODEL, TOOLS, EMBEDDING) for name in (model.id, *model.aliases)),
    }
    assert schema["properties"]["max_tokens"]["maximum"] == MODEL.max_output_tokens
    nobody = openapi.document((), "1")["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert "tiny" not in json.dumps(nobody)

"""The API as an OpenAPI 3.1 document, made from the tables that check requests and the shapes of answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ocserve.api import field_schema
from ocserve.api.fields import Field, Schema
from ocserve.api.operation import SSE, Operation
from ocserve.api.operations import OPERATIONS
from ocserve.api.response_schemas import SCHEMAS, ref
from ocserve.modelcard import ServedModel

Document = dict[str, Any]
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
# What is refused, and why, wherever it may occur.
_REFUSALS: dict[str, str] = {
    "400": "The request itself is wrong; `param` names the field.",
    "401": "No key, or one that is not valid.",
    "403": "Not from here: a foreign origin, or a proxy without a key.",
    "404": "No such model, or nothing here.",
    "408": "The request did not arrive in time.",
    "409": "Not in the state that the server is in; `code` says why.",
    "413": "The request's body is too large.",
    "415": "The body is not `application/json`.",
    "421": "The Host header names another machine.",
    "422": "The `Idempotency-Key` was used for another request.",
    "429": "A limit is reached, or there is no room; `Retry-After` says when to come back. With `insufficient_quota` "
    "the key may not spend what the request can cost, and coming back is of no use.",
    "431": "The headers are too large.",
    "500": "A mistake of the server, or the engine failed.",
    "503": "No engine is ready, nothing is taken on, or what must be judged or recorded cannot be; `code` says which.",
}
_OF_BODIES = ("408", "413", "415", "422")
_OF_STATES = "409"
# Shapes of what is a page for browsers and JSON for whoever accepts that.
_PAGES = ("Pricing", "Privacy", "ContentPolicy", "Support", "Status")
_LIMITS = ("max_tokens", "max_completion_tokens")


def document(models: Iterable[ServedModel], version: str, billing: str = "") -> Document:
    """The whole document; of `models` come the names that requests may use and the bounds of answers.

    `billing` says what is charged.
    """
    served = tuple(models)
    paths: dict[str, dict[str, object]] = {}
    for operation in OPERATIONS:
        path = _PARAMETER.sub(r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, served)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ocserve",
            "version": version,
            "description": "Every parameter is effective (honoured, or refused by name), advisory (accepted, and named "
            "in the header `x-ocserve-ignored`), or unsupported (only values that ask for nothing are accepted). "
            "`x-ocserve-class` says which. Null is the same as absent. " + billing,
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(operation.tag for operation in OPERATIONS)],
        "security": [{"bearer": []}, {"x-api-key": []}, {"x-goog-api-key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                **{name: {"type": "apiKey", "in": "header", "name": name} for name in ("x-api-key", "x-goog-api-key")},
            },
        },
    }


def _operation(operation: Operation, models: tuple[ServedModel, ...]) -> dict[str, object]:
    found: dict[str, object] = {
        "operationId": _identifier(operation),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _responses(operation),
    }
    if operation.public:
        found["security"] = [{}]
    places = [_place(name, "path", _in_path(operation, models)) for name in _PARAMETER.findall(operation.path)]
    places += [
        _place(field.name, "query", _in_query(field, models))
        for field in operation.query
        if field.kind != "unsupported" or field.neutral
    ]
    if operation.method == "POST" and not operation.public:
        places.append(_place("Idempotency-Key", "header", {"type": "string", "pattern": "^[!-~]{1,255}$"}))
    if places:
        found["parameters"] = places
    if operation.reads is not None:
        schema = field_schema.of_table(operation.reads, _narrower(operation.reads, models))
        body = {"schema": schema, **({"example": operation.example} if operation.example is not None else {})}
        found["requestBody"] = {"required": True, "content": {"application/json": body}}
    return found


def _place(name: str, where: str, schema: Schema) -> dict[str, object]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _in_path(operation: Operation, models: tuple[ServedModel, ...]) -> Schema:
    """What a path may name: a model, or something that only its client knows."""
    if models and "/models/" in operation.path:
        return {"type": "string", "enum": _names(models)}
    return {"type": "string", "minLength": 1}


def _in_query(field: Field, models: tuple[ServedModel, ...]) -> Schema:
    schema = field_schema.in_text(field)
    return {**schema, "enum": _names(models)} if field.name == "model" and models else schema


def _names(models: Iterable[ServedModel]) -> list[str]:
    """Everything that the models answer to."""
    return list(dict.fromkeys(name for model in models for name in (model.id, *model.aliases)))


def _identifier(operation: Operation) -> str:
    words = re.findall(r"[A-Za-z0-9]+", _PARAMETER.sub(r"by_\1", operation.path))
    return "_".join([operation.method.lower(), *words])


def _narrower(declared: Mapping[str, Field], models: tuple[ServedModel, ...]) -> dict[str, Schema]:
    """What the served models leave of a parameter's values."""
    if not models:
        return {}
    found: dict[str, Schema] = {}
    if "model" in declared:
        found["model"] = {"type": "string", "enum": _names(models)}
    most = max(model.max_output_tokens for model in models)
    for name in _LIMITS:
        field = declared.get(name)
        if field is not None and field.name == name:
            found[name] = {**field_schema.values(field), "maximum": most}
    return found


def _record(media_type: str, record: Schema, last: str | None) -> Schema:
    """One record of a stream: a line, or an event with JSON in `data`, or with `last` if that ends the stream.

    OpenAPI before 3.2 has no word for the parts of a stream; what reads such a document takes the schema for one's.
    """
    if media_type != SSE:
        return record
    data: Schema = {"type": "string", "contentMediaType": "application/json", "contentSchema": record}
    if last is not None:
        data = {"anyOf": [{"const": last}, data]}
    return {"type": "object", "properties": {"data": data, "event": {"type": "string"}}, "required": ["data"]}


def _may_be(status: str, operation: Operation) -> bool:
    """Whether an operation can be refused so."""
    if status == _OF_STATES:
        return operation.path.startswith("/admin/")
    return operation.method in ("POST", "PUT") or status not in _OF_BODIES


def _responses(operation: Operation) -> dict[str, object]:
    answered = {"schema": ref(operation.answer)}
    bodies: dict[str, object] = {operation.media_type: answered}
    if operation.media_type != "application/json":
        bodies = {operation.media_type: {"schema": {"type": "string"}}}
        if operation.answer in _PAGES:
            bodies["application/json"] = answered
    if operation.streamed is not None:
        media_type, record = operation.streamed
        bodies[media_type] = {"schema": _record(media_type, ref(record), operation.last)}
    refusals = {
        status: {"description": reason, "content": {"application/json": {"schema": ref(operation.error)}}}
        for status, reason in _REFUSALS.items()
        if _may_be(status, operation)
    }
    answer: dict[str, object] = {"description": "The answer.", "content": bodies}
    if operation.links:
        going_on = {"parameters": {"id": "$response.body#/id"}}
        answer["links"] = {name: {"operationId": name, **going_on} for name in operation.links}
    return {str(operation.status): answer, **refusals}

"""OpenAI's `response_format`: from JSON to the vocabulary's constraint, with the exact path of whatever is wrong.

The schema itself is only looked at for its JSON type; what it says is for the engine's grammar compiler to judge.
"""

from __future__ import annotations

import json
import re

from ocserve.api import fields
from ocserve.api.fields import Field, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import JsonConstraint

_PATH = "response_format"
_TYPES = ("text", "json_object", "json_schema")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_DESCRIPTION = 64 * 1024


def _schema(value: object, where: str) -> object:
    return value if isinstance(value, bool) else fields.mapping(value, where)


FORMAT = {
    field.name: field
    for field in (
        Field("type", "effective", fields.string(64)),
        Field("json_schema", "effective", fields.pairs(8)),
    )
}
# The answer follows the schema with and without `strict`. OpenAI shows `name` and `description` to the model; here the
# prompt is what the messages say, so `description` is reported as ignored.
JSON_SCHEMA = {
    field.name: field
    for field in (
        Field("name", "effective", fields.string(64, empty=False)),
        Field("schema", "effective", _schema),
        Field("strict", "effective", fields.boolean()),
        Field("description", "advisory", fields.string(_MAX_DESCRIPTION)),
    )
}


def constraint(
    value: dict[str, object] | None, *, refuse_unknown: bool
) -> tuple[JsonConstraint | None, tuple[str, ...]]:
    """What the answer must be, None for text, and the paths of what was ignored."""
    if value is None:
        return None, ()
    form = fields.read(value, FORMAT, refuse_unknown=refuse_unknown, path=_PATH)
    kind = form.get("type", str)
    if kind is None:
        raise fields.missing(f"{_PATH}.type")
    if kind not in _TYPES:
        where = f"{_PATH}.type"
        raise InvalidRequest(f"Invalid '{where}': supported are {', '.join(map(repr, _TYPES))}.", param=where)
    where = f"{_PATH}.json_schema"
    given = form.get("json_schema", dict)
    if kind != "json_schema":
        if given is not None:
            raise InvalidRequest(f"'{where}' is only allowed where '{_PATH}.type' is 'json_schema'.", param=where)
        return (None if kind == "text" else JsonConstraint()), form.ignored
    if given is None:
        raise fields.missing(where)
    body = fields.read(given, JSON_SCHEMA, refuse_unknown=refuse_unknown, path=where)
    return _of_schema(body, where), (*form.ignored, *body.ignored)


def _of_schema(body: Values, where: str) -> JsonConstraint:
    name = body.get("name", str)
    if name is None:
        raise fields.missing(f"{where}.name")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"Invalid '{where}.name': expected 1 to 64 letters, digits, underscores and dashes.", param=f"{where}.name"
        )
    # OpenAI lets the schema be absent; what remains is "a JSON object".
    schema = body.get("schema", object)
    return JsonConstraint(schema=None if schema is None else json.dumps(schema, ensure_ascii=False))

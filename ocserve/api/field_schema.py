"""Tables of parameters as JSON Schema: what a request may be, said by what checks it."""

from __future__ import annotations

from collections.abc import Mapping

from ocserve.api.fields import Field, Reader, Schema
from ocserve.api.glossary import MEANINGS, SAMPLING


def of_table(declared: Mapping[str, Field], overrides: Mapping[str, Schema] | None = None, *, path: str = "") -> Schema:
    """An object with these parameters, which stand in `path`; `overrides` are narrower schemas of some of them.

    Each stands there once, by its own name: two spellings of one parameter exclude each other.
    """
    properties = {
        name: of_field(field, path + name, (overrides or {}).get(name))
        for name, field in declared.items()
        if name == field.name
    }
    for name, field in declared.items():
        if name != field.name:
            properties[field.name].setdefault("x-ocserve-spellings", []).append(name)
    required = [name for name in properties if declared[name].required]
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": required} if required else found


def of_field(field: Field, path: str, narrower: Schema | None = None) -> Schema:
    """One parameter: its values, its class and its meaning. `path` is its name behind those of the objects it is in."""
    schema = narrower or (_neutral(field) if field.kind == "unsupported" or field.neutral else values(field, path))
    if not field.required:
        schema = nullable(schema)
    meaning = MEANINGS.get(path.removeprefix(SAMPLING)) or MEANINGS.get(field.name if "." not in path else "")
    return {**schema, "x-ocserve-class": field.kind, **({"description": meaning} if meaning else {})}


def in_text(field: Field) -> Schema:
    """One parameter of a query, which cannot be null."""
    return _neutral(field) if field.neutral else values(field)


def nullable(schema: Schema) -> Schema:
    """The schema of the same values and null, which is what an absent parameter may be written as."""
    if not schema or schema.get("type") == "null":
        return schema
    if "enum" in schema:
        kinds = {"type": [schema["type"], "null"]} if "type" in schema else {}
        return {**schema, **kinds, "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    if set(schema) == {"anyOf"}:
        return {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {"anyOf": [schema, {"type": "null"}]}


def _neutral(field: Field) -> Schema:
    return {"enum": list(field.neutral)} if field.neutral else {"type": "null"}


def values(field: Field, path: str = "") -> Schema:
    """The values that a parameter may have, null aside."""
    schema = {**(field.reader.schema if isinstance(field.reader, Reader) else {}), **(field.shape or {})}
    if field.of is None:
        return schema
    inner = of_table(field.of, path=f"{path}.")
    if schema.get("type") == "array":
        return {**schema, "items": inner}
    return {**schema, **inner}

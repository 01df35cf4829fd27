"""What the references of a JSON Schema refer to: by JSON pointer, anchor or identifier, within the document only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urljoin

_DRAFT = re.compile(r"^https?://json-schema\.org/(?:draft/)?(draft-0[3467]|2019-09|2020-12)/schema#?$")
SIBLINGS_IGNORED = frozenset({"draft-03", "draft-04", "draft-06", "draft-07"})
_SCHEMAS = (
    "items",
    "additionalItems",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
)
_LISTS = ("items", "prefixItems", "allOf", "anyOf", "oneOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")


def draft(dialect: object) -> str:
    """The draft that a `$schema` names; the newest for any other."""
    known = _DRAFT.match(dialect) if isinstance(dialect, str) else None
    return "2020-12" if known is None else known[1]


def targets(schema: object, draft: str) -> dict[int, object]:
    """The schema that each `$ref` means, by the identity of the object that it is in; none for another document's."""
    return _Document(schema, draft).targets


class _Document:
    def __init__(self, schema: object, draft: str) -> None:
        self._identifier = "id" if draft in ("draft-03", "draft-04") else "$id"
        self._old = draft in SIBLINGS_IGNORED
        self._resources: dict[str, object] = {"": schema}
        self._anchors: dict[tuple[str, str], object] = {}
        self._bases: dict[int, str] = {}  # of all objects that were looked at
        self._references: list[dict[str, Any]] = []
        self.targets: dict[int, object] = {}
        self._look(schema, "")
        while self._references:
            place = self._references.pop()
            found = self._found(self._bases[id(place)], place["$ref"])
            if found is not None:
                self.targets[id(place)] = found[0]
                self._look(*found)

    def _look(self, schema: object, base: str) -> None:
        """Note the identifiers and references of a schema and of all within it."""
        waiting = [(schema, base)]
        while waiting:
            part, base = waiting.pop()
            if not isinstance(part, dict) or id(part) in self._bases:
                continue
            refers = isinstance(part.get("$ref"), str)
            name = part.get(self._identifier)
            if isinstance(name, str) and not (self._old and refers):
                base = self._named(part, base, name)
            if isinstance(anchor := part.get("$anchor"), str):
                self._anchors[base, anchor] = part
            self._bases[id(part)] = base
            if refers:
                self._references.append(part)
            waiting += ((inner, base) for inner in _inner(part))

    def _named(self, part: object, base: str, name: str) -> str:
        """The base within a part that has an identifier."""
        document, _, fragment = name.partition("#")
        if document:
            base = _joined(base, document)
            self._resources[base] = part
        if fragment:
            self._anchors[base, fragment] = part
        return base

    def _found(self, base: str, reference: str) -> tuple[object, str] | None:
        """What a reference means, and the base there."""
        document, _, fragment = reference.partition("#")
        if document:
            base = _joined(base, document)
        fragment = unquote(fragment)
        if base not in self._resources:
            return None
        if fragment and not fragment.startswith("/"):
            anchored = self._anchors.get((base, fragment))
            return None if anchored is None else (anchored, base)
        place = self._resources[base]
        for name in (each.replace("~1", "/").replace("~0", "~") for each in fragment.split("/")[1:]):
            if isinstance(place, dict) and name in place:
                place = place[name]
            elif isinstance(place, list) and name.isdecimal() and int(name) < len(place):
                place = place[int(name)]
            else:
                return None
            base = self._bases.get(id(place), base)
        return place, base


def _inner(schema: dict[str, Any]) -> Iterator[object]:
    for keyword in _SCHEMAS:
        yield schema.get(keyword)
    for keyword in _LISTS:
        if isinstance(inner := schema.get(keyword), list):
            yield from inner
    for keyword in _MAPS:
        if isinstance(inner := schema.get(keyword), dict):
            yield from inner.values()


def _joined(base: str, reference: str) -> str:
    try:
        return urljoin(base, reference)
    except ValueError:
        return reference

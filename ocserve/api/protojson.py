"""JSON as protocol buffers have it: every name in camelCase or snake_case, words of an enumeration in any case."""

from __future__ import annotations

import re

from ocserve.api import fields
from ocserve.api.fields import Field, Reader
from ocserve.errors import InvalidRequest

_CAPITAL = re.compile(r"(?<=[a-z0-9])([A-Z])")


def table(*declared: Field) -> dict[str, Field]:
    """Parameters by both of their spellings; a field's own name is the one in camelCase."""
    return {spelling: field for field in declared for spelling in (field.name, snake(field.name))}


def snake(name: str) -> str:
    """`name` in snake_case."""
    return _CAPITAL.sub(lambda found: f"_{found[1].lower()}", name)


def enum(*words: str) -> Reader[str]:
    """One of a few words, which are written in capitals here and may be sent otherwise."""
    text = fields.string(64)

    def reader(value: object, where: str) -> str:
        word = text(value, where).upper()
        if word not in words:
            raise InvalidRequest(f"Invalid '{where}': supported are {', '.join(map(repr, words))}.", param=where)
        return word

    return Reader(reader, {"type": "string", "enum": list(words)})


def whole(low: int, high: int) -> Reader[int]:
    """An integer within bounds that may be written as a decimal, as clients do whose type for it is one."""
    within = fields.integer(low, high)

    def reader(value: object, where: str) -> int:
        return within(int(value) if isinstance(value, float) and value.is_integer() else value, where)

    return Reader(reader, within.schema)

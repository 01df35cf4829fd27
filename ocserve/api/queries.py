"""What may stand behind the `?` of a path: each dialect's parameters, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl

from ocserve.api import fields
from ocserve.api.fields import Field, Reader, Values
from ocserve.errors import InvalidRequest

_WORD = fields.string(64)
_MAX_KEY = 512


def digits(low: int, high: int) -> Reader[int]:
    """An integer within bounds, written in decimal digits."""
    number = fields.integer(low, high)

    def reader(value: object, where: str) -> int:
        if not isinstance(value, str) or not value.isascii() or not value.isdigit() or len(value) > 9:
            raise InvalidRequest(f"Invalid '{where}': expected an integer.", param=where, code="invalid_type")
        return number(int(value), where)

    return Reader(reader, number.schema)


# Azure's clients of OpenAI's interface say on every path which revision of it they speak.
OPENAI: tuple[Field, ...] = (Field("api-version", "advisory", _WORD),)
ANTHROPIC: tuple[Field, ...] = (Field("beta", "advisory", _WORD),)
# Google's clients may send the key here; `alt` of what is not streamed can only be JSON.
KEY = "key"
GOOGLE: tuple[Field, ...] = (
    Field(KEY, "effective", fields.string(_MAX_KEY)),
    Field("alt", "unsupported", fields.word("sse", "json"), neutral=("json",)),
    Field("prettyPrint", "advisory", _WORD),
)
GOOGLE_STREAM: tuple[Field, ...] = (
    *(field for field in GOOGLE if field.name != "alt"),
    Field("alt", "effective", fields.word("sse", "json")),
)
# Listings are one page, which has all the models.
ANTHROPIC_LISTING: tuple[Field, ...] = (*ANTHROPIC, Field("limit", "advisory", digits(1, 1000)))
GOOGLE_LISTING: tuple[Field, ...] = (*GOOGLE, Field("pageSize", "advisory", digits(0, 10**6)))


def read(query: bytes, declared: Mapping[str, Field], *, refuse_unknown: bool) -> Values:
    """The parameters of a query; only one without effect may be given twice."""
    found: dict[str, object] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        field = declared.get(name)
        if name in found and field is not None and field.kind != "advisory":
            raise InvalidRequest(f"'{name}' is given twice.", param=name, code="duplicate_key")
        found[name] = value
    return fields.read(found, declared, refuse_unknown=refuse_unknown)


def key(query: bytes, declared: Mapping[str, Field]) -> list[str]:
    """The credentials in a query, of a path that takes one there."""
    return sent_keys(query) if KEY in declared else []


def sent_keys(query: bytes) -> list[str]:
    """The same of any path, whether it takes one there or not."""
    return [value for name, value in parse_qsl(query.decode("latin-1")) if name == KEY]

"""A JSON Schema as its compiler takes it: what forbids nothing left out, loosely held formats held by a pattern.

What is written under the result is valid under the schema as the client sent it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Keywords whose value is a schema, a list of schemas, or has schemas by name.
_SCHEMAS = frozenset({"items", "additionalItems", "additionalProperties"})
_LISTS = frozenset({"items", "prefixItems", "allOf", "anyOf", "oneOf"})
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
# All that any draft defines; of another name a schema says nothing (2020-12 validation, 7.2.3).
_FORMATS = frozenset(
    {
        *("color", "date", "date-time", "duration", "email", "host-name", "hostname", "idn-email", "idn-hostname"),
        *("ip-address", "ipv4", "ipv6", "iri", "iri-reference", "json-pointer", "phone", "regex"),
        *("relative-json-pointer", "style", "time", "uri", "uri-reference", "uri-template", "utc-millisec", "uuid"),
    }
)
_SIBLINGS_IGNORED = re.compile(r"^https?://json-schema\.org/draft-0[3467]/schema#?$")


@dataclass(frozen=True, slots=True)
class _Guard:
    """What strings of a format have to match beside it."""

    pattern: str
    max_length: int | None = None


# Of RFC 3339, without what only a calendar can tell: the year 0, which few calendars have, days that a month lacks,
# leap seconds, which are no end of any minute.
_YEAR = r"([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY = rf"({_YEAR}-(0[13-9]|1[0-2]|02-([01][0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
_NO_LEAP_SECOND = r":[0-5][0-9](\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
# A label of a host's name that is no A-label (RFC 5890), of which only punycode could tell whether it is valid.
_LABEL = r"([^xX.][^.]*|[xX](|[^nN.][^.]*|[nN](|[^-.][^.]*|-(|[^-.][^.]*))))"
_HOST = _Guard(rf"^({_LABEL}\.)*{_LABEL}\.?$", 253)
_GUARDS = {
    "date": _Guard(f"^{_DAY}"),
    "date-time": _Guard(f"^{_DAY}.*{_NO_LEAP_SECOND}"),
    "time": _Guard(_NO_LEAP_SECOND),
    "hostname": _HOST,
}
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_NO_SPACE = r"[^\s\x{FEFF}]"  # ECMAScript's: the byte order mark is space to it


class Unsupported(Exception):
    """What the compiler would take and not hold to, or could not say what is wrong with."""


def simplified(schema: dict[str, object]) -> dict[str, object]:
    """The schema, of any draft, as it can be compiled; raises `Unsupported`."""
    dialect = schema.get("$schema")
    bare = isinstance(dialect, str) and _SIBLINGS_IGNORED.match(dialect) is not None
    return _object(schema, bare=bare)


def _simplified(keyword: str, schema: object, *, bare: bool) -> object:
    if isinstance(schema, dict):
        return _object(schema, bare=bare)
    if isinstance(schema, bool):
        return schema
    raise Unsupported(f"what '{keyword}' holds is no schema.")


def _object(schema: dict[str, object], *, bare: bool) -> dict[str, object]:
    """`bare`: beside a `$ref` an `$id` means nothing, as up to draft 7."""
    found: dict[str, object] = {}
    for keyword, value in schema.items():
        if _forbids_nothing(keyword, value, schema) or (bare and keyword == "$id" and "$ref" in schema):
            continue
        if keyword in _MAPS and isinstance(value, dict):
            found[keyword] = {
                _name(keyword, name): _simplified(keyword, each, bare=bare) for name, each in value.items()
            }
        elif keyword in _LISTS and isinstance(value, list):
            found[keyword] = [_simplified(keyword, each, bare=bare) for each in value]
        elif keyword in _SCHEMAS:
            found[keyword] = _simplified(keyword, value, bare=bare)
        else:
            found[keyword] = _value(keyword, value)
    _guard(found)
    _check_least_properties(found)
    return found


def _name(keyword: str, name: str) -> str:
    return _pattern(name) if keyword == "patternProperties" else name


def _value(keyword: str, value: object) -> object:
    if keyword in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    if keyword == "pattern" and isinstance(value, str):
        return _pattern(value)
    return value


def _pattern(pattern: str) -> str:
    return _ESCAPED.sub(lambda found: _NO_SPACE if found[0] == r"\S" else found[0], pattern)


def _guard(schema: dict[str, object]) -> None:
    form = schema.get("format")
    guard = _GUARDS.get(form) if isinstance(form, str) else None
    if guard is None:
        return
    beside = schema.get("allOf")
    if "pattern" not in schema:
        schema["pattern"] = guard.pattern
    elif beside is None or isinstance(beside, list):
        schema["allOf"] = [*(beside or []), {"pattern": guard.pattern}]
    if guard.max_length is not None:
        longest = schema.get("maxLength")
        if longest is None or (isinstance(longest, int) and longest > guard.max_length):
            schema["maxLength"] = guard.max_length


def _check_least_properties(schema: dict[str, object]) -> None:
    """The compiler counts a name that comes twice as two properties; whoever reads the answer has one of them."""
    least, named = schema.get("minProperties"), schema.get("properties")
    if isinstance(least, int) and least - (len(named) if isinstance(named, dict) else 0) > 1:
        free = schema.get("additionalProperties") is not False or schema.get("patternProperties")
        if free:
            raise Unsupported("'minProperties' is supported up to one more than there are names in 'properties'.")


def _forbids_nothing(keyword: str, value: object, schema: dict[str, object]) -> bool:
    match keyword:
        case "format":
            return isinstance(value, str) and value not in _FORMATS
        case "propertyNames":
            return value in (True, {}, {"type": "string"})
        case "uniqueItems":
            return value is False or schema.get("maxItems") in (0, 1)
        case "if":
            return "then" not in schema and "else" not in schema
        case "then" | "else":
            return "if" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
        case "dependencies" | "dependentRequired" | "dependentSchemas":
            return value == {}
        case "unevaluatedProperties" | "unevaluatedItems":
            return value in (True, {})
    return keyword == "not" and value is False

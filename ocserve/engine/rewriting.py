"""A JSON Schema as its compiler takes it: what forbids nothing left out, loosely held formats held by a pattern.

What is written under the result is valid under the schema as the client sent it.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

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
_DATA = frozenset({"const", "enum"})
_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")  # of an array in a JSON pointer
# Targets that lie where no keyword holds schemas; references times the resources that they may be relative to.
_MOST_REWRITTEN = 1000
_MOST_LOOKED_AT = 10_000
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
_PIECES = re.compile(r"\\.|\[\^?|.", re.DOTALL)
# ECMAScript's: the byte order mark is space to it, the next-line control is not.
_SPACES = {r"\s": r"[\s\x{FEFF}--\x{85}]", r"\S": r"[[^\s\x{FEFF}]\x{85}]"}


class Unsupported(Exception):
    """What the compiler would take and not hold to, or could not say what is wrong with."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One rewriting of a whole schema.

    `bare`: beside a `$ref` an `$id` means nothing, as up to draft 7. `pointers` are the JSON pointers of references,
    `resources` what they may be relative to: each as it was, which shares nothing with what it becomes.
    """

    bare: bool
    pointers: dict[tuple[str, ...], None] = field(default_factory=dict)
    resources: list[tuple[dict[str, object], dict[str, object]]] = field(default_factory=list)


def simplified(schema: dict[str, object]) -> dict[str, object]:
    """The schema, of any draft, as it can be compiled; raises `Unsupported`."""
    dialect = schema.get("$schema")
    rewriting = _Pass(isinstance(dialect, str) and _SIBLINGS_IGNORED.match(dialect) is not None)
    found = _object(schema, rewriting)
    rewriting.resources.append((schema, found))
    _rewrite_targets(rewriting)
    return found


def _rewrite_targets(rewriting: _Pass) -> None:
    """Rewrite what is referred to and lies where no keyword holds schemas, and what that refers to, each once."""
    looked: set[tuple[int, tuple[str, ...]]] = set()
    rewritten = 0
    while True:
        pairs = [
            (index, pointer)
            for index in range(len(rewriting.resources))
            for pointer in sorted(rewriting.pointers, key=len)
            if (index, pointer) not in looked
        ]
        if not pairs:
            return
        for index, pointer in pairs:
            looked.add((index, pointer))
            if _rewrite_target(*rewriting.resources[index], pointer, rewriting):
                rewritten += 1  # with all that is under it, where other targets may lie
                looked -= {each for each in looked if each[0] == index and _is_under(each[1], pointer)}
            if rewritten > _MOST_REWRITTEN or len(looked) > _MOST_LOOKED_AT:
                raise Unsupported("there are too many '$ref'.")


def _is_under(pointer: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return len(pointer) > len(other) and pointer[: len(other)] == other


def _rewrite_target(
    schema: dict[str, object], found: dict[str, object], pointer: tuple[str, ...], rewriting: _Pass
) -> bool:
    """Rewrite the target of a pointer into `schema` (RFC 6901); False if it was rewritten before or is not there."""
    original: object = schema
    place: object = found
    holds: str | None = "schema"  # what is at this place; None: nothing that a keyword says is a schema
    for depth, name in enumerate(pointer, 1):
        if isinstance(original, list) and isinstance(place, list) and _INDEX.fullmatch(name):
            if int(name) >= min(len(original), len(place)):
                return False
            inner, target = original[int(name)], place[int(name)]
        elif isinstance(original, dict) and isinstance(place, dict) and name in original and name in place:
            inner, target = original[name], place[name]
        else:
            return False
        if holds != "names" and name in _DATA:
            raise Unsupported("a '$ref' into 'const' or 'enum' is not supported.")
        holds = _held(holds, name, inner)
        if depth == len(pointer) and holds is None:
            rewritten = _simplified("$ref", inner, rewriting)
            if isinstance(place, list):
                place[int(name)] = rewritten
            else:
                place[name] = rewritten
            return True
        original, place = inner, target
    return False


def _held(holds: str | None, name: str, value: object) -> str | None:
    """What is under `name` of a place that `holds` a schema, schemas by name or in a list, or None of these."""
    if holds in ("names", "list"):
        return "schema"
    if holds == "schema":
        if name in _MAPS and isinstance(value, dict):
            return "names"
        if name in _LISTS and isinstance(value, list):
            return "list"
        if name in _SCHEMAS:
            return "schema"
    return None


def _pointer(reference: str) -> tuple[str, ...]:
    """The names in the JSON pointer of a reference; none if it has no pointer."""
    path = unquote(reference.partition("#")[2])
    return tuple(name.replace("~1", "/").replace("~0", "~") for name in path.split("/")[1:])


def _simplified(keyword: str, schema: object, rewriting: _Pass) -> object:
    if isinstance(schema, dict):
        return _object(schema, rewriting)
    if isinstance(schema, bool):
        return schema
    raise Unsupported(f"what '{keyword}' holds is no schema.")


def _object(schema: dict[str, object], rewriting: _Pass) -> dict[str, object]:
    found: dict[str, object] = {}
    if isinstance(reference := schema.get("$ref"), str) and (pointer := _pointer(reference)):
        rewriting.pointers[pointer] = None
    if isinstance(schema.get("$id", schema.get("id")), str):
        rewriting.resources.append((schema, found))
    for keyword, value in schema.items():
        if _forbids_nothing(keyword, value, schema) or (rewriting.bare and keyword == "$id" and "$ref" in schema):
            continue
        if keyword in _MAPS and isinstance(value, dict):
            found[keyword] = {
                _name(keyword, name): _simplified(keyword, each, rewriting) for name, each in value.items()
            }
        elif keyword in _LISTS and isinstance(value, list):
            found[keyword] = [_simplified(keyword, each, rewriting) for each in value]
        elif keyword in _SCHEMAS:
            found[keyword] = _simplified(keyword, value, rewriting)
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
    return copy.deepcopy(value)


def _pattern(pattern: str) -> str:
    """As the compiler reads it: in a class it would take brackets and doubled signs for operations on sets."""
    pieces: list[str] = []
    within = False
    for found in _PIECES.finditer(pattern):
        piece = _SPACES.get(found[0], found[0])
        if not within:
            within = piece.startswith("[") and piece == found[0]
        elif piece == "]":
            within = False
        elif found[0][0] in "[&~" or (piece == "-" and pieces[-1] == "-"):
            piece = f"\\{piece}"
        pieces.append(piece)
    return "".join(pieces)


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

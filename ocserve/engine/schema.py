"""What a JSON Schema may be before the grammar compiler sees it, and how its refusals are worded.

The compiler has fuel for almost all of its work; what it has none for is bounded here. Messages name keywords of JSON
Schema, which are ours, and never a name or a value of the schema, which are the client's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction

from ocserve.errors import InvalidRequest

# Where the schema of a response stands in a request; a tool's is elsewhere.
FIELD = "response_format.json_schema.schema"
MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
MAX_MULTIPLE = 10_000  # the automaton for "divisible by n" has n states, and building it consumes no fuel
MAX_JOINED_PATTERNS = 3  # whether several patterns have a string in common is searched for, about a second at worst

# The grammar's own options travel in this key; from a client it would switch our limits and our strictness off.
OPTIONS = "x-guidance"
_QUOTED = re.compile(r'"([^"]*)"')
# Of drafts 4 to 2020-12, what the compiler does not implement.
_UNSUPPORTED = frozenset(
    {
        *("$dynamicAnchor", "$dynamicRef", "$recursiveRef", "contains", "dependencies", "dependentRequired"),
        *("dependentSchemas", "else", "if", "maxContains", "minContains", "not", "propertyNames", "then"),
        *("unevaluatedItems", "unevaluatedProperties", "uniqueItems"),
    }
)
# Keywords whose value is a schema or a list of them, and those whose value has schemas by name.
_SCHEMAS = frozenset({"items", "prefixItems", "additionalItems", "additionalProperties", "allOf", "anyOf", "oneOf"})
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_NO_LEAP_SECOND = r":[0-5][0-9](\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
# How the compiler's words begin or what they hold, and the keyword that they are about.
_BLAMED = (
    ("regex parse error", "pattern"),
    ("patternProperty", "patternProperties"),
    ("oneOf constraints", "oneOf"),
    ("Unknown format", "format"),
    ("Invalid type", "type"),
    ("Pointer ", "$ref"),
    ("Resource ", "$ref"),
)
_TOO_COMPLEX = ("fuel", "too large", "too complex", "limit", "Unable to determine")


def checked(text: str, field: str = FIELD) -> str:
    """`text` as the schema to compile; raises `InvalidRequest` for what is no schema or beyond the bounds.

    `field` is the schema's place in the request.
    """
    try:
        return _checked(text)
    except _Refusal as refusal:
        raise _invalid(str(refusal), field) from None


def _checked(text: str) -> str:
    if len(text.encode()) > MAX_BYTES:
        raise _Refusal(f"the schema is larger than {MAX_BYTES} bytes.")
    try:
        schema = json.loads(text)
        json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError):
        raise _Refusal("the schema is not JSON.") from None
    if isinstance(schema, bool):
        return "{}" if schema else '{"enum":[]}'
    if not isinstance(schema, dict):
        raise _Refusal("a JSON Schema is an object or a boolean.")
    multiples = []
    joined_patterns = 0
    for keyword, value, joined in _entries(schema):
        if keyword == OPTIONS:
            raise _Refusal(f"the keyword '{OPTIONS}' is not supported.")
        if keyword == "multipleOf" and isinstance(value, int | float) and math.isfinite(value) and value > 0:
            multiples.append(Fraction(str(value)))
        joined_patterns += joined and keyword == "pattern"
    if joined_patterns > MAX_JOINED_PATTERNS:
        raise _Refusal(f"more than {MAX_JOINED_PATTERNS} 'pattern' under 'allOf' or beside '$ref' are not supported.")
    if _joint_multiple(multiples) > MAX_MULTIPLE:
        raise _Refusal(f"the least common multiple of all 'multipleOf' must not be above {MAX_MULTIPLE} units.")
    return json.dumps(_simplified(schema), ensure_ascii=False)


def _simplified(schema: object) -> object:
    """The schema as it can be compiled.

    Keywords that forbid nothing as they stand are left out: the compiler refuses them by their name. Times are without
    leap seconds, which it would write at any minute.
    """
    if not isinstance(schema, dict):
        return schema
    found: dict[str, object] = {}
    for keyword, value in schema.items():
        if _forbids_nothing(keyword, value, schema):
            continue
        if keyword in _MAPS and isinstance(value, dict):
            found[keyword] = {name: _simplified(each) for name, each in value.items()}
        elif keyword in _SCHEMAS and isinstance(value, list):
            found[keyword] = [_simplified(each) for each in value]
        else:
            found[keyword] = _simplified(value) if keyword in _SCHEMAS else value
    if schema.get("format") in ("date-time", "time"):
        found.setdefault("pattern", _NO_LEAP_SECOND)
    return found


def _forbids_nothing(keyword: str, value: object, schema: dict[str, object]) -> bool:
    match keyword:
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


def refusal(error: str, field: str = FIELD) -> InvalidRequest:
    """The compiler's refusal in our words. `error` is its message, of which nothing is repeated but known keywords."""
    return _invalid(_reason(error), field)


def is_too_complex(error: str) -> bool:
    """Whether the compiler gave up at one of its limits."""
    return any(words in error for words in _TOO_COMPLEX)


def _reason(error: str) -> str:
    named = sorted(_UNSUPPORTED & set(_QUOTED.findall(error))) if error.startswith("Unimplemented keys") else []
    if named:
        return f"not supported: {', '.join(repr(keyword) for keyword in named)}."
    if error.startswith("Unsatisfiable schema"):
        return "no value satisfies the schema."
    for words, keyword in _BLAMED:
        if error.startswith(words):
            return f"this use of '{keyword}' is not supported."
    if is_too_complex(error):
        return "the schema is too complex."
    return "the schema cannot be turned into a grammar."


class _Refusal(Exception):
    """The schema is beyond the bounds, and why."""


def _invalid(message: str, field: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{field}': {message}", param=field, code="invalid_json_schema")


def _entries(schema: object) -> Iterator[tuple[str, object, bool]]:
    """Every key with its value, at whatever depth, and whether it holds jointly with other schemas.

    Data that looks like a keyword counts too: better refused.
    """
    pending = [(schema, 1, False)]
    while pending:
        value, depth, joined = pending.pop()
        if not isinstance(value, dict | list):
            continue
        if depth > MAX_DEPTH:
            raise _Refusal(f"the schema is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(value, list):
            pending.extend((item, depth + 1, joined) for item in value)
            continue
        joined = joined or "$ref" in value
        for keyword, item in value.items():
            yield keyword, item, joined
            pending.append((item, depth + 1, joined or keyword == "allOf"))


def _joint_multiple(multiples: list[Fraction]) -> int:
    """The least common multiple, counted in units of the finest decimal among them."""
    unit = math.lcm(*(fraction.denominator for fraction in multiples))
    return math.lcm(*(int(fraction * unit) for fraction in multiples))

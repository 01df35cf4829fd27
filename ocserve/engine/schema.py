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

FIELD = "response_format.json_schema.schema"
MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
MAX_MULTIPLE = 10_000  # the automaton for "divisible by n" has n states, and building it consumes no fuel
MAX_JOINED_PATTERNS = 3  # whether several patterns have a string in common is searched for, about a second at worst

# The grammar's own options travel in this key; from a client it would switch our limits and our strictness off.
_OPTIONS = "x-guidance"
_QUOTED = re.compile(r'"([^"]*)"')
# Of drafts 4 to 2020-12, what the compiler does not implement.
_UNSUPPORTED = frozenset(
    {
        *("$dynamicAnchor", "$dynamicRef", "$recursiveRef", "contains", "dependencies", "dependentRequired"),
        *("dependentSchemas", "else", "if", "maxContains", "minContains", "not", "propertyNames", "then"),
        *("unevaluatedItems", "unevaluatedProperties", "uniqueItems"),
    }
)
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


def checked(text: str) -> str:
    """`text` as the schema to compile; raises `InvalidRequest` for what is no schema or beyond the bounds."""
    if len(text.encode()) > MAX_BYTES:
        raise _refused(f"the schema is larger than {MAX_BYTES} bytes.")
    try:
        schema = json.loads(text)
        canonical = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise _refused("the schema is not JSON.") from None
    if isinstance(schema, bool):
        return "{}" if schema else '{"enum":[]}'
    if not isinstance(schema, dict):
        raise _refused("a JSON Schema is an object or a boolean.")
    multiples = []
    joined_patterns = 0
    for keyword, value, joined in _entries(schema):
        if keyword == _OPTIONS:
            raise _refused(f"the keyword '{_OPTIONS}' is not supported.")
        if keyword == "multipleOf" and isinstance(value, int | float) and math.isfinite(value) and value > 0:
            multiples.append(Fraction(str(value)))
        joined_patterns += joined and keyword == "pattern"
    if joined_patterns > MAX_JOINED_PATTERNS:
        raise _refused(f"more than {MAX_JOINED_PATTERNS} 'pattern' under 'allOf' or beside '$ref' are not supported.")
    if _joint_multiple(multiples) > MAX_MULTIPLE:
        raise _refused(f"the least common multiple of all 'multipleOf' must not be above {MAX_MULTIPLE} units.")
    return canonical


def refusal(error: str) -> InvalidRequest:
    """The compiler's refusal in our words. `error` is its message, of which nothing is repeated but known keywords."""
    named = sorted(_UNSUPPORTED & set(_QUOTED.findall(error))) if error.startswith("Unimplemented keys") else []
    if named:
        return _refused(f"not supported: {', '.join(repr(keyword) for keyword in named)}.")
    if error.startswith("Unsatisfiable schema"):
        return _refused("no value satisfies the schema.")
    for words, keyword in _BLAMED:
        if error.startswith(words):
            return _refused(f"this use of '{keyword}' is not supported.")
    if any(words in error for words in _TOO_COMPLEX):
        return _refused("the schema is too complex.")
    return _refused("the schema cannot be turned into a grammar.")


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{FIELD}': {message}", param=FIELD, code="invalid_json_schema")


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
            raise _refused(f"the schema is nested deeper than {MAX_DEPTH} levels.")
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

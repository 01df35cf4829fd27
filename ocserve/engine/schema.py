"""What a JSON Schema may be before the grammar compiler sees it, and how its refusals are worded.

The compiler has fuel for almost all of its work; what it has none for is bounded here. Messages name keywords of JSON
Schema, which are ours, and never a name or a value of the schema, which are the client's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from ocserve.engine.rewriting import Unsupported, simplified
from ocserve.errors import InvalidRequest

# Where the schema of a response stands in a request; a tool's is elsewhere.
FIELD = "response_format.json_schema.schema"
MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
MAX_MULTIPLES = 10_000  # the automaton for "divisible by n" has n states, and building it consumes no fuel
MAX_JOINED_PATTERNS = 3  # whether several patterns have a string in common is searched for, about a second at worst

# The grammar's own options travel in this key; from a client it would switch our limits and our strictness off.
OPTIONS = "x-guidance"
_QUOTED = re.compile(r"""["']([^"']*)["']""")
# Of drafts 4 to 2020-12, what the compiler does not implement.
_UNSUPPORTED = frozenset(
    {
        *("$dynamicAnchor", "$dynamicRef", "$recursiveRef", "contains", "dependencies", "dependentRequired"),
        *("dependentSchemas", "else", "if", "maxContains", "minContains", "not", "propertyNames", "then"),
        *("unevaluatedItems", "unevaluatedProperties", "uniqueItems"),
    }
)
# How the compiler's words begin, and the keywords that they are about.
_BLAMED = (
    ("regex parse error", "'pattern' or 'patternProperties'"),
    ("lookarounds not supported", "'pattern' or 'patternProperties'"),
    ("patternProperty", "'patternProperties'"),
    ("oneOf constraints", "'oneOf'"),
    ("Unknown format", "'format'"),
    ("Invalid type", "'type'"),
    ("Pointer ", "'$ref'"),
    ("Anchor ", "'$ref'"),
    ("Resource ", "'$ref' or '$schema'"),
    ("circular references", "'$ref'"),
    ("min/maxProperties", "'minProperties' or 'maxProperties'"),
    ("Failed to generate regex for", "'minimum', 'maximum', 'exclusiveMinimum' or 'exclusiveMaximum'"),
)
# Keywords that the compiler begins with, or quotes, where it has nothing better to say.
_NAMEABLE = frozenset(
    {
        *("type", "enum", "const", "properties", "patternProperties", "additionalProperties", "required", "items"),
        *("prefixItems", "additionalItems", "minItems", "maxItems", "minLength", "maxLength", "minProperties"),
        *("maxProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern"),
        *("format", "allOf", "anyOf", "oneOf", "$ref", "$defs", "definitions", "$id", "$anchor", "$schema"),
    }
)
_TOO_COMPLEX = ("fuel", "too large", "too complex", "limit", "Unable to determine")


@dataclass(frozen=True, slots=True)
class Checked:
    """A schema to compile. `multiples` is how many states its `multipleOf` take, which bounds all that is compiled."""

    text: str
    multiples: int


def checked(text: str, field: str = FIELD) -> Checked:
    """`text` as the schema to compile; raises `InvalidRequest` for what is no schema or beyond the bounds.

    `field` is the schema's place in the request.
    """
    try:
        return _checked(text)
    except _Refusal as refusal:
        raise _invalid(str(refusal), field) from None


def _checked(text: str) -> Checked:
    if len(text.encode()) > MAX_BYTES:
        raise _Refusal(f"the schema is larger than {MAX_BYTES} bytes.")
    try:
        schema = json.loads(text)
        json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError):
        raise _Refusal("the schema is not JSON.") from None
    if isinstance(schema, bool):
        return Checked("{}" if schema else '{"enum":[]}', 0)
    if not isinstance(schema, dict):
        raise _Refusal("a JSON Schema is an object or a boolean.")
    multiples: list[tuple[Decimal, bool]] = []
    joined_patterns = 0
    for keyword, value, joined in _entries(schema):
        if keyword == OPTIONS:
            raise _Refusal(f"the keyword '{OPTIONS}' is not supported.")
        if keyword == "multipleOf" and _is_positive(value):
            multiples.append((Decimal(str(value)), joined))
        joined_patterns += joined and keyword == "pattern"
    if joined_patterns > MAX_JOINED_PATTERNS:
        raise _Refusal(f"more than {MAX_JOINED_PATTERNS} 'pattern' under 'allOf' or beside '$ref' are not supported.")
    states = _states(multiples)
    if states > MAX_MULTIPLES:
        raise _Refusal(f"all 'multipleOf' together, or their least common multiple, are above {MAX_MULTIPLES} units.")
    try:
        return Checked(json.dumps(simplified(schema), ensure_ascii=False), states)
    except Unsupported as error:
        raise _Refusal(str(error)) from None


def refusal(error: str, field: str = FIELD) -> InvalidRequest:
    """The compiler's refusal in our words. `error` is its message, of which nothing is repeated but known keywords."""
    return _invalid(_reason(error), field)


def is_too_complex(error: str) -> bool:
    """Whether the compiler gave up at one of its limits."""
    return any(words in error for words in _TOO_COMPLEX)


def _reason(error: str) -> str:
    lacking = sorted(_UNSUPPORTED & set(_QUOTED.findall(error))) if error.startswith("Unimplemented keys") else []
    if lacking:
        return f"not supported: {', '.join(repr(keyword) for keyword in lacking)}."
    if error.startswith("Unsatisfiable schema"):
        return "no value satisfies the schema."
    for words, keywords in _BLAMED:
        if error.startswith(words):
            return f"this use of {keywords} is not supported."
    if is_too_complex(error):
        return "the schema is too complex."
    named = [word for word in (error.partition(" ")[0], *_QUOTED.findall(error)) if word in _NAMEABLE]
    if named:
        return f"this use of '{named[0]}' is not supported."
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
        beside = "multipleOf" in value or "pattern" in value
        for keyword, item in value.items():
            yield keyword, item, joined
            under = keyword == "allOf" or (beside and keyword in ("anyOf", "oneOf"))
            pending.append((item, depth + 1, joined or under))


def _is_positive(value: object) -> bool:
    """Whether this is a number of which there are multiples; of anything else the compiler knows what is wrong."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _states(multiples: list[tuple[Decimal, bool]]) -> int:
    """Of the automata of all these: each counts in units of its last decimal place.

    Where some may hold jointly with others, one automaton may be of all of them.
    """
    places = [max(0, -int(multiple.as_tuple().exponent)) for multiple, _ in multiples]
    if not any(joined for _, joined in multiples):
        return sum(int(multiple.scaleb(own)) for (multiple, _), own in zip(multiples, places, strict=True))
    return math.lcm(*(int(multiple.scaleb(max(places))) for multiple, _ in multiples))

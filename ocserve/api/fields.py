"""Parameters as data: what each is, what it may be, and what is done with it.

A dialect declares its parameters in one table of `Field`s; `read` checks a request against it and is the only place
that decides what happens to a parameter. The tests make their cases from the same tables. Messages carry parameter
names, bounds and numbers, never text that a client sent.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import msgspec

from ocserve.api.json_body import NAME
from ocserve.errors import InvalidRequest

Value = TypeVar("Value")
Made = TypeVar("Made", covariant=True)
Word = TypeVar("Word", bound=str)
Schema = dict[str, Any]
ParameterClass = Literal["effective", "advisory", "unsupported"]

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_BIASES = 1024
MAX_TOKEN_ID = 2**24  # the largest vocabularies known have 262,144 entries; the engine checks against its own
_INT64 = 2**63
# The decimal digits of what is below MAX_TOKEN_ID = 16777216.
_ID_DIGITS = (
    r"^(0|[1-9]\d{0,6}|1[0-5]\d{6}|16[0-6]\d{5}|167[0-6]\d{4}|1677[0-6]\d{3}|16777[01]\d{2}|1677720\d|1677721[0-5])$"
)
_JSON_TYPES = {
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    str: "a string",
    list: "an array",
    dict: "an object",
}


@dataclass(frozen=True, slots=True)
class Reader(Generic[Made]):
    """Checks a value and makes ours of it; `schema` says in JSON Schema which values pass, for the API reference."""

    check: Callable[[object, str], Made]
    schema: Schema

    def __call__(self, value: object, where: str) -> Made:
        return self.check(value, where)


@dataclass(frozen=True, slots=True)
class Field:
    """One parameter.

    effective: `reader` makes its value, which the engine honours. advisory: checked, accepted, reported as ignored.
    unsupported: only a value in `neutral` (one that asks for nothing) is accepted; `reader` checks the type first.
    A `required` one may be neither absent nor null. Without a reader the dialect checks the value itself; `shape` is
    then its JSON Schema. `of` is the table of an object's own parameters, or of those of each object in an array.
    """

    name: str
    kind: ParameterClass
    reader: Callable[[object, str], object] | None = None
    neutral: tuple[object, ...] = ()
    required: bool = False
    shape: Schema | None = None
    of: Mapping[str, Field] | None = None


def table(*declared: Field) -> dict[str, Field]:
    """Parameters by name, as `read` takes them."""
    return {field.name: field for field in declared}


class Values:
    """The parameters of one request after `read`: absent ones and nulls are not in it.

    `ignored` are paths of those without effect, unknown ones as the client wrote them: any text.
    """

    def __init__(self, values: dict[str, Any], ignored: tuple[str, ...]) -> None:
        self._values = values
        self.ignored = ignored

    def get(self, name: str, kind: type[Value]) -> Value | None:
        """The value of `name`, if the request has one."""
        value = self._values.get(name)
        assert value is None or isinstance(value, kind)
        return value

    def made(self, name: str, reader: Reader[Made]) -> Made | None:
        """What `reader`, the field's own, made of the value of `name`."""
        value: Made | None = self._values.get(name)
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._values


def read(source: dict[str, object], declared: Mapping[str, Field], *, refuse_unknown: bool, path: str = "") -> Values:
    """Check every parameter of `source`. `path` prefixes names inside an object.

    A table may have one field under several spellings; its value is found under the field's own name.
    """
    values: dict[str, Any] = {}
    ignored: list[str] = []
    seen: set[str] = set()
    for name, value in source.items():
        field = declared.get(name)
        where = f"{path}.{name}" if path else name
        if field is None:
            if refuse_unknown:
                raise unknown(name, path, declared)
            ignored.append(where)
            continue
        if value is None:
            continue
        if field.name in seen:
            raise InvalidRequest(f"'{where}' is given under two spellings.", param=where, code="duplicate_key")
        seen.add(field.name)
        made = field.reader(value, where) if field.reader else value
        if field.kind == "unsupported" or field.neutral:
            _require_neutral(value, field, where)
        if field.kind == "advisory":
            ignored.append(where)
        elif field.kind == "effective":
            values[field.name] = made
    for spelling, needed in declared.items():
        if needed.required and spelling == needed.name and needed.name not in seen:
            raise missing(f"{path}.{needed.name}" if path else needed.name)
    return Values(values, tuple(ignored))


def _require_neutral(value: object, field: Field, where: str) -> None:
    if any(type(value) is type(neutral) and value == neutral for neutral in field.neutral):
        return
    accepted = " or ".join(msgspec.json.encode(neutral).decode() for neutral in (*field.neutral, None))
    raise InvalidRequest(
        f"'{where}' is not supported yet by this server. Accepted: {accepted}.",
        param=where,
        code="unsupported_parameter",
    )


def unknown(name: str, path: str, known: Iterable[str]) -> InvalidRequest:
    """The refusal of a parameter that no table has, with the nearest known name."""
    if not NAME.fullmatch(name):
        return InvalidRequest(
            "The request has a parameter whose name is not known.", param=path or None, code="unknown_parameter"
        )
    where = f"{path}.{name}" if path else name
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return InvalidRequest(f"Unknown parameter: '{where}'.{hint}", param=where, code="unknown_parameter")


def missing(where: str) -> InvalidRequest:
    """The refusal of a request without a required parameter."""
    return InvalidRequest(f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")


def unsupported(where: str, what: str) -> InvalidRequest:
    """The refusal of something that is understood and not offered."""
    return InvalidRequest(f"'{where}': {what}", param=where, code="unsupported_parameter")


def wrong_type(where: str, expected: str, value: object) -> InvalidRequest:
    """The refusal of a value of another JSON type."""
    got = _JSON_TYPES.get(type(value), "null")
    return InvalidRequest(
        f"Invalid type for '{where}': expected {expected}, but got {got} instead.", param=where, code="invalid_type"
    )


def _out_of_range(kind: str, where: str, value: float, sign: str, bound: float) -> InvalidRequest:
    side, code = ("above maximum", "above_max_value") if "<" in sign else ("below minimum", "below_min_value")
    return InvalidRequest(
        f"Invalid '{where}': {kind} {side} value. Expected a value {sign} {bound}, but got {value} instead.",
        param=where,
        code=f"{kind}_{code}",
    )


def number(low: float, high: float, *, above_low: bool = False) -> Reader[float]:
    """A decimal within bounds; `above_low` leaves the lower bound itself out."""

    def reader(value: object, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(where, "a decimal", value)
        if not math.isfinite(value):
            raise InvalidRequest(f"Invalid '{where}': the number is out of range.", param=where)
        if value > high:
            raise _out_of_range("decimal", where, value, "<=", high)
        if value < low or (above_low and value == low):
            raise _out_of_range("decimal", where, value, ">" if above_low else ">=", low)
        return float(value)

    least = "exclusiveMinimum" if above_low else "minimum"
    return Reader(reader, {"type": "number", least: low, "maximum": high})


def integer(low: int, high: int) -> Reader[int]:
    """An integer within bounds; neither a boolean nor a decimal is one."""

    def reader(value: object, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(where, "an integer", value)
        if value > high:
            raise _out_of_range("integer", where, value, "<=", high)
        if value < low:
            raise _out_of_range("integer", where, value, ">=", low)
        return value

    return Reader(reader, {"type": "integer", "minimum": low, "maximum": high})


def int64() -> Reader[int]:
    """Any signed 64-bit integer."""
    return integer(-_INT64, _INT64 - 1)


def boolean() -> Reader[bool]:
    """True or false."""

    def reader(value: object, where: str) -> bool:
        if not isinstance(value, bool):
            raise wrong_type(where, "a boolean", value)
        return value

    return Reader(reader, {"type": "boolean"})


def string(most: int, *, empty: bool = True) -> Reader[str]:
    """A string of so many characters at most: what JSON Schema means by `maxLength` (JSON Schema validation 6.3.1)."""

    def reader(value: object, where: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(where, "a string", value)
        if not value and not empty:
            raise InvalidRequest(f"Invalid '{where}': empty string.", param=where, code="empty_string")
        if len(value) > most:
            raise InvalidRequest(
                f"Invalid '{where}': string too long. Expected at most {most} characters, but got {len(value)}.",
                param=where,
                code="string_above_max_length",
            )
        return value

    least = {} if empty else {"minLength": 1}
    return Reader(reader, {"type": "string", **least, "maxLength": most})


def word(*words: Word) -> Reader[Word]:
    """One of a few strings."""

    def reader(value: object, where: str) -> Word:
        if not isinstance(value, str):
            raise wrong_type(where, "a string", value)
        for known in words:
            if known == value:
                return known
        raise InvalidRequest(f"Invalid '{where}': supported are {', '.join(map(repr, words))}.", param=where)

    return Reader(reader, {"type": "string", "enum": list(words)})


def array(value: object, where: str, low: int, high: int) -> list[object]:
    """`value` as an array of `low` to `high` elements."""
    if not isinstance(value, list):
        raise wrong_type(where, "an array", value)
    if len(value) < low or len(value) > high:
        short = len(value) < low
        size, bound = ("short", f"at least {low}") if short else ("long", f"at most {high}")
        raise InvalidRequest(
            f"Invalid '{where}': array too {size}. Expected {bound} elements, but got {len(value)} instead.",
            param=where,
            code=f"array_{'below_min' if short else 'above_max'}_length",
        )
    return value


TOKEN_ID = integer(0, MAX_TOKEN_ID - 1)


def lists_of_ids(most: int) -> Schema:
    """One to `most` token ids, as JSON Schema."""
    return {"type": "array", "items": TOKEN_ID.schema, "minItems": 1, "maxItems": most}


def token_ids(values: list[object], where: str) -> tuple[int, ...]:
    """`values` as token ids; the engine checks them against its own vocabulary."""
    # One comprehension for the common case: a prompt of 100,000 ids is read in milliseconds.
    ids = tuple(value for value in values if type(value) is int and 0 <= value < MAX_TOKEN_ID)
    if len(ids) == len(values):
        return ids
    return tuple(TOKEN_ID(value, f"{where}[{index}]") for index, value in enumerate(values))


def mapping(value: object, where: str) -> dict[str, object]:
    """`value` as an object."""
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    return value


def items(most: int, *, least: int = 0) -> Reader[list[object]]:
    """An array whose elements are not looked at."""

    def reader(value: object, where: str) -> list[object]:
        return array(value, where, least, most)

    return Reader(reader, {"type": "array", **({"minItems": least} if least else {}), "maxItems": most})


def pairs(max_pairs: int) -> Reader[dict[str, object]]:
    """An object whose values are not looked at."""

    def reader(value: object, where: str) -> dict[str, object]:
        found = mapping(value, where)
        if len(found) > max_pairs:
            raise InvalidRequest(
                f"Invalid '{where}': too many properties. Expected at most {max_pairs}, but got {len(found)} instead.",
                param=where,
                code="object_above_max_properties",
            )
        return found

    return Reader(reader, {"type": "object", "maxProperties": max_pairs})


def strings(max_items: int, most: int) -> Reader[tuple[str, ...]]:
    """An array of strings that are not empty, as a tuple."""
    one = string(most, empty=False)

    def reader(value: object, where: str) -> tuple[str, ...]:
        given = array(value, where, 0, max_items)
        return tuple(one(item, f"{where}[{index}]") for index, item in enumerate(given))

    return Reader(reader, {"type": "array", "items": one.schema, "maxItems": max_items})


def stop_strings() -> Reader[tuple[str, ...]]:
    """One string or up to four, as a tuple."""
    one = string(MAX_STOP_LENGTH, empty=False)

    def reader(value: object, where: str) -> tuple[str, ...]:
        if isinstance(value, str):
            return (one(value, where),)
        if not isinstance(value, list):
            raise wrong_type(where, "a string or an array of strings", value)
        return tuple(one(item, f"{where}[{index}]") for index, item in enumerate(array(value, where, 0, MAX_STOPS)))

    several = {"type": "array", "items": one.schema, "maxItems": MAX_STOPS}
    return Reader(reader, {"anyOf": [one.schema, several]})


def logit_biases() -> Reader[dict[int, float]]:
    """Token id to bias."""
    bias = number(-100, 100)

    def reader(value: object, where: str) -> dict[int, float]:
        found: dict[int, float] = {}
        for key, item in pairs(MAX_BIASES)(value, where).items():
            # The usual spelling only: int() takes " 5", "+5", "5_0" and other scripts' digits, and "05" beside "5".
            canonical = key.isascii() and key.isdigit() and len(key) <= 8 and str(int(key)) == key
            if not (canonical and int(key) < MAX_TOKEN_ID):
                raise InvalidRequest(
                    f"Invalid key in '{where}': keys are token ids.", param=where, code="invalid_token_id"
                )
            found[int(key)] = bias(item, f"{where}.{key}")
        return found

    ids = {"pattern": _ID_DIGITS}
    schema = {"propertyNames": ids, "additionalProperties": bias.schema, "maxProperties": MAX_BIASES}
    return Reader(reader, {"type": "object", **schema})

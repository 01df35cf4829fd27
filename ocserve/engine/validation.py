"""Whether a finished object satisfies the JSON Schema that its request gave: apart from the grammar that held it to it.

Nothing here knows the compiler, its rewriting of schemas or its masks: the text of an answer is read by Python's own
JSON parser and held against the client's schema, for the keywords that the compiler takes (drafts 4 to 2020-12). A pair
of a schema and a value is decided once, so that the work is at most their product, also where `$ref` makes a chain of
few schemas exponentially many; it is counted, and can be done in slices, without recursion.

What cannot be checked apart from the mask, and is left to it:

* Patterns are ECMAScript's. They are matched by RE2, in linear time, never by `re`. A pattern that RE2 does not know
  (long names of Unicode properties, more than 1000 repetitions, more than 1 MiB) is not matched. `.` is any character
  but a line feed, as in the mask.
* What a `$ref` to a document other than the schema itself says; none is ever fetched.

Formats are asserted, as far as their syntax goes. Numbers of the answer are exact decimals; fractions in the schema are
the doubles that every parser reads them as. Where an object has a name twice, both values have to be valid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from itertools import islice
from typing import Any

from ocserve.engine.formats import FORMATS, pattern
from ocserve.engine.referring import SIBLINGS_IGNORED, draft, targets

_ANY_OBJECT = '{"type":"object"}'
_FARTHEST = 10**17  # an exponent that stands for all beyond, which Decimal does not have
_LIST_ITEMS = frozenset({"draft-03", "draft-04", "draft-06", "draft-07", "2019-09"})  # before `prefixItems`
_EARLY_PATTERNS = 64  # compiled with the schema, and not only when they are first matched
_MATCHED = 2000  # bytes of text times instructions of a pattern that take about as long as a step
_PARSED = 100  # characters of text that do

# Whether a value satisfies a schema is asked by yielding both; an int is work that is about to be done, in steps.
Question = tuple[object, object]
Steps = Generator[Question | int, Any, bool]


class Unchecked(Exception):
    """The text is JSON that cannot be read within our bounds: whether it is valid is not known."""


class Validator:
    """A schema to hold texts against. It may be used from any thread."""

    def __init__(self, schema: str) -> None:
        """`schema` is JSON text that was compiled before: an object or a boolean."""
        self.schema = json.loads(schema, parse_float=_double, parse_int=Decimal)
        dialect = self.schema.get("$schema") if isinstance(self.schema, dict) else None
        self.draft = draft(dialect)
        self.targets = targets(self.schema, self.draft)
        self.prefix_items = self.draft not in _LIST_ITEMS
        for written in islice(_patterns(self.schema), _EARLY_PATTERNS):
            pattern(written)  # takes up to some milliseconds, once


@lru_cache(maxsize=32)
def validator(schema: str | None) -> Validator:
    """What holds texts against a schema, JSON text; None: any object. As few are kept as there are grammars."""
    return Validator(_ANY_OBJECT if schema is None else schema)


class Check:
    """One text against one schema, step by step. `spent` counts the steps."""

    def __init__(self, validator: Validator, text: str) -> None:
        self._validator = validator
        self._text = text
        self._known: dict[tuple[int, int], bool | None] = {}  # by the identities of schema and value; None: under way
        self._circles = 0
        self._value: object = None  # lives as long as its identities are used
        self._stack: list[tuple[Steps, tuple[int, int], int]] = [(self._whole(), (0, 0), 0)]
        self._sent: bool | None = None
        self.spent = 0

    def run(self, steps: int) -> bool | None:
        """Go on for about so many steps (some 5 µs each); None where that was not enough. Raises `Unchecked`."""
        limit, sent, stack, known = self.spent + steps, self._sent, self._stack, self._known
        while self.spent < limit:
            turn, place, circles = stack[-1]
            self.spent += 1
            try:
                wanted = turn.send(sent)
            except StopIteration as end:
                stack.pop()
                sent = bool(end.value)
                if not stack:
                    return sent
                if sent or circles == self._circles:
                    known[place] = sent
                else:
                    del known[place]  # a question put within itself was denied, which says nothing of any other way
                continue
            sent = None
            if isinstance(wanted, int):
                self.spent += wanted
                continue
            schema, value = wanted
            place = id(schema), id(value)
            if not isinstance(schema, dict):
                sent = schema is not False
            elif place not in known:
                known[place] = None
                stack.append((self._holds(schema, value), place, self._circles))
            elif (sent := known[place]) is None:
                sent = False  # what holds only if it holds does not: as a grammar derives it
                self._circles += 1
        self._sent = sent
        return None

    def _whole(self) -> Steps:
        yield len(self._text) // _PARSED
        try:
            self._value = json.loads(
                self._text, object_pairs_hook=_object, parse_float=_number, parse_int=_number, parse_constant=_no_number
            )
        except RecursionError:
            raise Unchecked from None
        except ValueError:
            return False
        return bool((yield self._validator.schema, self._value))

    def _holds(self, schema: dict[str, Any], value: object) -> Steps:
        if "$ref" in schema:
            target = self._validator.targets.get(id(schema), True)
            if not (yield target, value):
                return False
            if self._validator.draft in SIBLINGS_IGNORED:
                return True
        if not _has_type(schema.get("type"), value):
            return False
        if "const" in schema and not _same(value, schema["const"]):
            return False
        if "enum" in schema:
            yield len(schema["enum"]) // 20
            if not any(_same(value, each) for each in schema["enum"]):
                return False
        match value:
            case Decimal():
                valid = _number_holds(schema, value)
            case str():
                valid = yield from self._string(schema, value)
            case list():
                valid = yield from self._array(schema, value)
            case dict():
                valid = yield from self._properties(schema, value)
            case _:
                valid = True
        return valid and (yield from self._combined(schema, value))

    def _combined(self, schema: dict[str, Any], value: object) -> Steps:
        for each in schema.get("allOf", ()):
            if not (yield each, value):
                return False
        if "anyOf" in schema:
            for each in schema["anyOf"]:
                if (yield each, value):
                    break
            else:
                return False
        if "oneOf" in schema:
            count = 0
            for each in schema["oneOf"]:
                count += yield each, value
            return count == 1
        return True

    def _string(self, schema: dict[str, Any], value: str) -> Steps:
        if not _within(len(value), schema, "minLength", "maxLength"):
            return False
        if "pattern" in schema and not (yield from _matches(schema["pattern"], value)):
            return False
        holds = FORMATS.get(schema.get("format", ""))
        if holds is not None:
            yield len(value) // _PARSED
            return holds(value)
        return True

    def _array(self, schema: dict[str, Any], value: list[object]) -> Steps:
        if not _within(len(value), schema, "minItems", "maxItems"):
            return False
        items = schema.get("items", True)
        if isinstance(items, list):
            first, rest = items, schema.get("additionalItems", True)
        else:
            first, rest = schema.get("prefixItems", []) if self._validator.prefix_items else [], items
        for index, each in enumerate(value if rest is not True else value[: len(first)]):
            if not (yield first[index] if index < len(first) else rest, each):
                return False
        return True

    def _properties(self, schema: dict[str, Any], value: dict[str, object]) -> Steps:
        required = schema.get("required", ())
        yield len(required) // 20
        if not _within(len(value), schema, "minProperties", "maxProperties") or not all(n in value for n in required):
            return False
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        others = schema.get("additionalProperties", True)
        if not named and not patterns and others is True:
            return True
        for name, each in _members(value):
            listed = name in named
            if listed and not (yield named[name], each):
                return False
            for wanted, inner in patterns.items():
                if (yield from _matches(wanted, name)):
                    listed = True
                    if not (yield inner, each):
                        return False
            if not listed and not (yield others, each):
                return False
        return True


def _matches(written: str, value: str) -> Steps:
    """Whether a pattern is found anywhere in a text; so it is where the pattern is not RE2's."""
    expression = pattern(written)
    if expression is None:
        return True
    data = value.encode("utf-8", "replace")
    yield len(data) * expression.programsize // _MATCHED
    return expression.search(data) is not None


# --- values ---------------------------------------------------------------------------------------------------------


class _Repeating(dict[str, object]):
    """An object of which a name came more than once."""

    pairs: list[tuple[str, object]]


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = _Repeating(found)
    repeating.pairs = pairs
    return repeating


def _members(value: dict[str, object]) -> Iterable[tuple[str, object]]:
    return value.pairs if isinstance(value, _Repeating) else value.items()


def _patterns(schema: object) -> Iterator[str]:
    """Whatever is, or looks like, a pattern in a schema."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if isinstance(written := part.get("pattern"), str):
                yield written
            if isinstance(named := part.get("patternProperties"), dict):
                yield from named
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _double(text: str) -> Decimal:
    return Decimal(repr(float(text)))


def _number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        digits, _, exponent = text.lower().partition("e")
        return Decimal(f"{digits}e{'-' if exponent.startswith('-') else ''}{_FARTHEST}")


def _no_number(text: str) -> object:
    raise ValueError("no JSON")


def _has_type(wanted: object, value: object) -> bool:
    if wanted is None:
        return True
    names: Iterator[object] = iter(wanted if isinstance(wanted, list) else [wanted])
    return any(_TYPES[name](value) for name in names if isinstance(name, str))


_TYPES: dict[str, Callable[[object], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, Decimal) and value == value.to_integral_value(),
    "number": lambda value: isinstance(value, Decimal),
}


def _same(value: object, wanted: object) -> bool:
    """JSON Schema's equality: of numbers by value, of objects in any order. As deep as a schema may be."""
    if isinstance(wanted, dict):
        return (
            isinstance(value, dict)
            and value.keys() == wanted.keys()
            and all(_same(value[name], each) for name, each in wanted.items())
        )
    if isinstance(wanted, list):
        return isinstance(value, list) and len(value) == len(wanted) and all(map(_same, value, wanted))
    return type(value) is type(wanted) and value == wanted


def _within(count: int, schema: dict[str, Any], least: str, most: str) -> bool:
    return bool(schema.get(least, 0) <= count <= schema.get(most, math.inf))


def _number_holds(schema: dict[str, Any], value: Decimal) -> bool:
    least, most = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    above, below = least if above is True else above, most if below is True else below  # as draft 4 has them
    return (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (not isinstance(above, Decimal) or value > above)
        and (not isinstance(below, Decimal) or value < below)
        and ("multipleOf" not in schema or _is_multiple(value, schema["multipleOf"]))
    )


def _is_multiple(value: Decimal, of: Decimal) -> bool:
    """Exact, whatever the exponents."""
    (count, shift), (unit, unit_shift) = _integral(value), _integral(of)
    shift -= unit_shift
    if count == 0:
        return True
    if shift >= 0:
        return count * pow(10, shift, unit) % unit == 0
    return -shift <= count.bit_length() and count % (unit * 10**-shift) == 0


def _integral(value: Decimal) -> tuple[int, int]:
    """Value = integer * 10 ** exponent, without the sign."""
    _, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    return int(Decimal((0, digits, 0))), exponent

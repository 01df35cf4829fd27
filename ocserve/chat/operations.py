"""The operations that a chat template may use on plain data, each paid for before it is done.

Only what templates of real models need; whatever else Jinja and Python offer on strings, numbers and containers stays
out of reach. No operation here makes a value whose size was not checked against the `Budget` first.
"""

from __future__ import annotations

import html
import json
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from ocserve.chat.budget import Budget, is_scalar

Operation = Callable[..., Any]

# Methods a template may reach, by exact type. `append` and `pop` change only what the rendering itself made.
# fmt: off
METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset({
        "capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii", "isdecimal",
        "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition",
        "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
        "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    }),
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"append", "pop", "copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
# fmt: on

_MAX_INT_BITS = 8192
_MAX_PADDING = 1000
_MAX_INDENT = 64
_MAX_NUMBER_CHARS = 64
_MAX_TIME_FORMAT_CHARS = 64
# One character can become ten when it is escaped, and the pieces exist beside the whole.
_ESCAPED_GROWTH = 12
# A short str object with its slot in a list.
_PIECE_BYTES = 64

_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")
_NUMBER = re.compile(r"\d+")
_TIME_PADDING = re.compile(r"%[^a-zA-Z%]")

_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}


def binary(budget: Budget, symbol: str, left: Any, right: Any) -> Any:
    """`left symbol right`, refused where the result's size is out of proportion."""
    budget.tick()
    if isinstance(left, str) and symbol == "%":
        return _percent_format(budget, left, right)
    if symbol == "*":
        for sequence, factor in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(factor, int):
                budget.charge(sys.getsizeof(sequence) * max(0, factor))
    elif symbol == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        budget.charge(sys.getsizeof(left) + sys.getsizeof(right))
    for number in (left, right):
        if isinstance(number, int) and number.bit_length() > _MAX_INT_BITS:
            raise OverflowError("number too large")
    if (
        symbol == "**"
        and isinstance(left, int)
        and isinstance(right, int)
        and left.bit_length() * abs(right) > _MAX_INT_BITS
    ):
        raise OverflowError("power too large")
    return _ARITHMETIC[symbol](left, right)


def _percent_format(budget: Budget, template: str, values: Any) -> str:
    size = budget.charge_text(values)
    fields = template.count("%")
    budget.need(sys.getsizeof(template) + fields * (_ESCAPED_GROWTH * size + _MAX_PADDING))
    for field in _PERCENT_FIELD.finditer(template):
        for number in field.groups():
            if number == "*" or (number and int(number[:9]) > _MAX_PADDING):
                raise ValueError("padding too wide")
    result: str = template % values
    budget.charge_value(result)
    return result


def check_format(spec: str) -> None:
    """Refuse a format specification that pads beyond reason."""
    if len(spec) > _MAX_INDENT or any(int(number) > _MAX_PADDING for number in _NUMBER.findall(spec)):
        raise ValueError("padding too wide")


def text(budget: Budget, value: object) -> str:
    """The text form of plain data, as Jinja writes it."""
    if isinstance(value, str):
        budget.charge_text(value)
        return value
    check_written(budget, value)
    result = str(value)
    budget.charge_value(result)
    return result


def check_written(budget: Budget, value: object) -> None:
    """Ask for the memory that writing a container takes: its strings are quoted and escaped."""
    budget.need(_ESCAPED_GROWTH * budget.charge_text(value))


def operand(budget: Budget, value: object) -> object:
    """A value about to be compared or hashed; containers are counted in full, shared parts each time."""
    if is_scalar(value):
        budget.tick()
    elif isinstance(value, list | tuple | dict):
        budget.charge_text(value)
    return value


def call_string(budget: Budget, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of a string's `METHODS`."""
    size = sys.getsizeof(owner)
    budget.tick(1 + size // 4096)
    if name == "join":
        return join(budget, args[0], owner)
    if name == "replace":
        return replace(budget, owner, *args, **kwargs)
    if name in ("split", "rsplit"):
        separator = args[0] if args else kwargs.get("sep")
        count = owner.count(separator) if isinstance(separator, str) and separator else len(owner) // 2
        budget.need(size + _PIECE_BYTES * (count + 1))
    elif name == "splitlines":
        budget.need(size + _PIECE_BYTES * len(owner))
    else:
        # Changing case can triple a string: one ligature becomes three letters.
        budget.need(3 * size)
    result = getattr(owner, name)(*args, **kwargs)
    budget.charge_value(result)
    return result


def call_container(budget: Budget, owner: Any, name: str, args: tuple[Any, ...]) -> Any:
    """One of the `METHODS` of a list, tuple or dict."""
    budget.tick()
    if name == "append" and not all(map(is_scalar, args)):
        # Containers inside appended lists could multiply without ever being written down.
        raise TypeError("only strings and numbers can be appended")
    if name in ("get", "pop") and args and not is_scalar(args[0]):
        raise TypeError("keys are strings or numbers")
    if name in ("count", "index"):
        operand(budget, owner)
        for value in args:
            operand(budget, value)
    if name in ("append", "copy"):
        budget.charge(sys.getsizeof(owner) if name == "copy" else 16)
    return getattr(owner, name)(*args)


def join(budget: Budget, values: Iterable[object], separator: object = "") -> str:
    """The texts of the values with a separator between them."""
    glue = text(budget, separator)
    pieces: list[str] = []
    for value in values:
        pieces.append(text(budget, value))
        budget.charge(sys.getsizeof(glue))
    return glue.join(pieces)


def replace(budget: Budget, value: object, old: object, new: object, count: int | None = None) -> str:
    """`str.replace`."""
    source, before, after = text(budget, value), text(budget, old), text(budget, new)
    found = source.count(before) if count is None or count < 0 else min(count, source.count(before))
    budget.charge(sys.getsizeof(source) + found * sys.getsizeof(after))
    return source.replace(before, after, -1 if count is None else count)


def _indent(budget: Budget, value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * min(width, _MAX_INDENT + 1)
    if len(margin) > _MAX_INDENT:
        raise ValueError("indent too wide")
    source = text(budget, value) + "\n"
    budget.need(_PIECE_BYTES * len(source))
    lines = source.splitlines()
    budget.charge(sys.getsizeof(source) + len(lines) * sys.getsizeof(margin))
    indented = [margin + line if (line or blank) and (index or first) else line for index, line in enumerate(lines)]
    return "\n".join(indented)


def _tojson(
    budget: Budget,
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > _MAX_INDENT:
        raise ValueError("indent too wide")
    if separators is not None and len("".join(separators)) > _MAX_INDENT:
        raise ValueError("separators too long")
    check_written(budget, value)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    pieces: list[str] = []
    for piece in encoder.iterencode(value):
        budget.charge(2 * sys.getsizeof(piece))
        pieces.append(piece)
    return "".join(pieces)


def _escape(budget: Budget, value: object) -> str:
    source = text(budget, value)
    budget.need(5 * sys.getsizeof(source))
    result = html.escape(source).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
    budget.charge_value(result)
    return result


def _as_list(budget: Budget, value: Iterable[object]) -> list[object]:
    made: list[object] = []
    for item in value:
        budget.charge(_PIECE_BYTES)
        made.append(item)
    return made


def _reverse(budget: Budget, value: Any) -> object:
    if isinstance(value, str):
        return slice_of(budget, value, None, None, -1)
    return _as_list(budget, value)[::-1]


def slice_of(budget: Budget, value: Any, start: Any, stop: Any, step: Any) -> Any:
    """`value[start:stop:step]` of a string, list or tuple."""
    if not isinstance(value, str | list | tuple | range):
        raise TypeError("this value cannot be sliced")
    part = value[start:stop:step]
    budget.charge_value(part)
    return part


def _to_int(budget: Budget, value: Any, default: int = 0, base: int = 10) -> int:
    budget.tick()
    try:
        if isinstance(value, str):
            if len(value) > _MAX_NUMBER_CHARS:
                return default
            return int(value, base)
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _to_float(budget: Budget, value: Any, default: float = 0.0) -> float:
    budget.tick()
    try:
        if isinstance(value, str) and len(value) > _MAX_NUMBER_CHARS:
            return default
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _round(budget: Budget, value: float, precision: int = 0) -> float:
    budget.tick()
    if not -20 <= precision <= 20:
        raise ValueError("precision out of range")
    return round(float(value), precision)


def _total(budget: Budget, values: Iterable[Any], start: Any = 0) -> Any:
    total = start
    for value in values:
        total = binary(budget, "+", total, value)
    return total


def _items(budget: Budget, value: Any) -> list[tuple[object, object]]:
    if isinstance(value, budget.textless):
        return []
    if not isinstance(value, Mapping):
        raise TypeError("only a mapping has items")
    budget.charge(_PIECE_BYTES * len(value))
    return list(value.items())


def _dictsort(
    budget: Budget, value: Mapping[Any, Any], case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[tuple[Any, Any]]:
    position = {"key": 0, "value": 1}[by]
    operand(budget, dict(value))

    def order(item: tuple[Any, Any]) -> Any:
        field = item[position]
        return field.lower() if isinstance(field, str) and not case_sensitive else field

    return sorted(value.items(), key=order, reverse=reverse)


def _of_text(name: str) -> Operation:
    def run(budget: Budget, value: object, *args: object) -> Any:
        return call_string(budget, text(budget, value), name, args, {})

    return run


def _length(budget: Budget, value: Any) -> int:
    budget.tick()
    return len(value)


def _same(budget: Budget, value: object) -> object:
    """`safe`: nothing is escaped in a prompt, so everything is safe already."""
    return text(budget, value)


FILTERS: Mapping[str, Operation] = {
    "abs": lambda budget, value: abs(value),
    "capitalize": _of_text("capitalize"),
    "count": _length,
    "dictsort": _dictsort,
    "e": _escape,
    "escape": _escape,
    "float": _to_float,
    "format": lambda budget, value, *args, **kwargs: _percent_format(budget, text(budget, value), kwargs or args),
    "indent": _indent,
    "int": _to_int,
    "items": _items,
    "join": join,
    "length": _length,
    "list": _as_list,
    "lower": _of_text("lower"),
    "replace": replace,
    "reverse": _reverse,
    "round": _round,
    "safe": _same,
    "string": text,
    "sum": _total,
    "title": _of_text("title"),
    "tojson": _tojson,
    "trim": _of_text("strip"),
    "upper": _of_text("upper"),
}


def bounded_range(budget: Budget, *bounds: int) -> range:
    """`range`, of at most 100,000 numbers."""
    budget.tick()
    numbers = range(*bounds)
    if len(numbers) > 100_000:
        raise OverflowError("range too long")
    return numbers


def local_time(budget: Budget, form: str) -> str:
    """`strftime_now`: the machine's local time. Padding in a format (`%999999d`) is refused: it is memory."""
    budget.tick()
    if len(form) > _MAX_TIME_FORMAT_CHARS or _TIME_PADDING.search(form):
        raise ValueError("time format too long")
    return datetime.now().strftime(form)


def make_dict(budget: Budget, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(...)`."""
    made: dict[Any, Any] = dict(*args, **kwargs)
    budget.charge_value(made)
    return made


def key(value: object) -> object:
    """A value about to be used as a key: hashing a nested tuple could take for ever."""
    if not is_scalar(value):
        raise TypeError("keys are strings or numbers")
    return value


def comparable(budget: Budget, value: Any) -> Any:
    """The operand of a filter or test that compares: an iterator is made a list, to be counted."""
    if not (is_scalar(value) or isinstance(value, (list, tuple, dict, *budget.textless))):
        value = _as_list(budget, value)
    return operand(budget, value)


def _ticked(budget: Budget, value: object) -> object:
    budget.tick()
    return value


def _made(budget: Budget, value: object) -> object:
    budget.charge_value(value)
    return value


# What the rewritten syntax tree calls. A template that calls them by name gains nothing.
HOOKS: Mapping[str, Operation] = {
    "_tick": _ticked,
    "_made": _made,
    "_operand": operand,
    "_slice": slice_of,
    "_key": lambda budget, value: key(value),
}

TESTS: Mapping[str, Operation] = {
    "odd": lambda budget, value: binary(budget, "%", value, 2) == 1,
    "even": lambda budget, value: binary(budget, "%", value, 2) == 0,
    "divisibleby": lambda budget, value, number: binary(budget, "%", value, number) == 0,
    "lower": lambda budget, value: isinstance(value, str) and value.islower(),
    "upper": lambda budget, value: isinstance(value, str) and value.isupper(),
}

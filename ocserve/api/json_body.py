"""JSON of requests and answers. Requests are read strictly: what a lenient decoder would let pass is refused here.

Refused are invalid UTF-8, a byte-order mark, NaN and Infinity, duplicate keys, lone surrogates and integers of absurd
length. The nesting depth is known from a scan of the bytes before any decoder sees them. Knows nothing of fields.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate

import msgspec

from ocserve.errors import InvalidRequest

# A decoder's cost follows the number of values, not the number of bytes: 4 MiB of `[],` would block the loop for 0.4 s.
# A chat of 2,048 messages has about 12,000 strings.
MAX_STRINGS = 200_000
MAX_BRACKETS = 100_000
# Larger than any 64-bit number; CPython refuses 4,300 digits on its own, which is late and a bare ValueError.
_MAX_DIGITS = 32

# Possessive, so that an unterminated string cannot make the scan backtrack.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = [0] * 256
for _opening in b"[{":
    _STEP[_opening] = 1
for _closing in b"]}":
    _STEP[_closing] = -1
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")


def check_shape(body: bytes, max_depth: int) -> None:
    """Raise for a body whose nesting or number of values is beyond reason; costs a few milliseconds per MiB."""
    if body.count(b'"') - body.count(b'\\"') > 2 * MAX_STRINGS:
        raise InvalidRequest(f"The JSON body has more than {MAX_STRINGS} strings.", code="invalid_json")
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    if max(accumulate(map(_STEP.__getitem__, brackets[: MAX_BRACKETS + 1])), default=0) > max_depth:
        raise InvalidRequest(f"The JSON body is nested deeper than {max_depth} levels.", code="invalid_json")
    if len(brackets) > MAX_BRACKETS:
        raise InvalidRequest(
            f"The JSON body has more than {MAX_BRACKETS // 2} arrays and objects.", code="invalid_json"
        )


def decode(body: bytes) -> dict[str, object]:
    """The object that `body` holds; anything else raises `InvalidRequest`."""
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"We could not parse the JSON body of your request: invalid UTF-8 at byte {error.start}.",
            code="invalid_json",
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"We could not parse the JSON body of your request: {error.msg} at character {error.pos}.",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise InvalidRequest("The JSON body is nested too deeply.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The JSON body of your request must be an object.", code="invalid_json")
    if _SURROGATE_ESCAPE.search(body):
        _refuse_surrogates(value, "")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                shown = name if NAME.fullmatch(name) else None
                raise InvalidRequest(
                    "The JSON body of your request names a key twice in one object.", param=shown, code="duplicate_key"
                )
            seen.add(name)
    return value


def _constant(name: str) -> object:
    raise InvalidRequest(f"{name} is not a JSON number.", code="invalid_json")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise InvalidRequest(f"The JSON body has an integer of {len(digits)} digits.", code="invalid_json")
    return int(digits)


def _refuse_surrogates(value: object, path: str) -> None:
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidRequest(
                "A string contains an unpaired surrogate, which is not a character.",
                param=path if NAME.fullmatch(path) else None,
            )
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _refuse_surrogates(item, f"{path}[{number}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_surrogates(name, path)
            _refuse_surrogates(item, f"{path}.{name}" if path else name)


def dumps(value: object) -> bytes:
    """JSON as it goes out: compact, UTF-8."""
    return msgspec.json.encode(value)

"""What strings of a format and of a pattern are, for the validation of finished objects."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType

import re2

_OPTIONS = re2.Options()
_OPTIONS.max_mem = 1 << 20
_OPTIONS.log_errors = False  # it would write the client's pattern

_CLOCK = r"T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S)"
_DURATION = rf"P(\d+W|(\d+Y(\d+M(\d+D)?)?|\d+M(\d+D)?|\d+D)({_CLOCK})?|{_CLOCK})"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_HEX = r"[0-9a-fA-F]"
# RFC 3986: what a host, a user and a path are of.
_HOST = rf"[A-Za-z0-9._~!$&'()*+,;=-]|%{_HEX}{_HEX}"
_USER, _PATH = rf"({_HOST}|:)", rf"({_HOST}|[:@])"
_AUTHORITY = rf"({_USER}*@)?(\[(?P<address>[0-9a-fA-F:.]+|[vV]{_HEX}+\.{_USER}+)\]|({_HOST})*)(:\d*)?"
_TAIL = rf"(\?({_PATH}|[/?])*)?(#({_PATH}|[/?])*)?"
_URI = rf"[A-Za-z][A-Za-z0-9+.-]*:(//{_AUTHORITY}(/{_PATH}*)*|/?({_PATH}+(/{_PATH}*)*)?){_TAIL}"


def _fitting(form: str) -> Callable[[str], re2._Match | None]:
    expression = re2.compile(form, _OPTIONS)
    return lambda text: expression.fullmatch(text) if text.isascii() else None


_time, _duration, _uri = map(_fitting, (_TIME, _DURATION, _URI))
_date = _fitting(r"\d{4}-\d{2}-\d{2}")
_uuid = _fitting(rf"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}")
_host = _fitting(rf"{_LABEL}(\.{_LABEL})*")
_email = _fitting(rf"{_ATOM}(\.{_ATOM})*@({_LABEL}(\.{_LABEL})*|\[{_OCTET}(\.{_OCTET}){{3}}\])")


def _is_date(text: str) -> bool:
    try:
        return _date(text) is not None and bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def _is_date_time(text: str) -> bool:
    return text[10:11] in ("T", "t") and _is_date(text[:10]) and _time(text[11:]) is not None


def _is_hostname(text: str) -> bool:
    return len(text) <= 253 and _host(text) is not None and not any(each[2:4] == "--" for each in text.split("."))


def _is_ipv4(text: str) -> bool:
    try:
        return text.isascii() and bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False


def _is_ipv6(text: str) -> bool:
    try:
        return text.isascii() and "%" not in text and bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def _is_uri(text: str) -> bool:
    found = _uri(text)
    if found is None:
        return False
    address = found["address"]
    return address is None or address[:1] in "vV" or _is_ipv6(address)


# Those that answers can be held to; leap seconds and host names with A-labels (punycode) are never written.
FORMATS: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "date": _is_date,
        "date-time": _is_date_time,
        "duration": lambda text: _duration(text) is not None,
        "email": lambda text: _email(text) is not None,
        "hostname": _is_hostname,
        "ipv4": _is_ipv4,
        "ipv6": _is_ipv6,
        "time": lambda text: _time(text) is not None,
        "uri": _is_uri,
        "uuid": lambda text: _uuid(text) is not None,
    }
)

_PIECES = re.compile(r"\\u\{?([0-9a-fA-F]+)\}?|\\[pP]\{([\w=]+)\}|\\(.)|\[\^?|\]|.", re.DOTALL)
# General categories by their long names; RE2 knows the short ones, and scripts.
_CATEGORIES = {
    "Letter": "L",
    "Lowercase_Letter": "Ll",
    "Uppercase_Letter": "Lu",
    "Titlecase_Letter": "Lt",
    "Modifier_Letter": "Lm",
    "Other_Letter": "Lo",
    "Mark": "M",
    "Number": "N",
    "Decimal_Number": "Nd",
    "digit": "Nd",
    "Letter_Number": "Nl",
    "Punctuation": "P",
    "Symbol": "S",
    "Separator": "Z",
    "Space_Separator": "Zs",
}
# ECMAScript's white space, and all else; RE2's `\s` is ASCII's, without the vertical tab.
_SPACE = r"\t-\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_NO_SPACE = (
    r"\x00-\x08\x0e-\x1f!-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027}\x{202a}-\x{202e}"
    r"\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{fefe}\x{ff00}-\x{10ffff}"
)


@lru_cache(maxsize=128)
def pattern(written: str) -> re2._Regexp | None:
    """An ECMAScript pattern for RE2, on bytes of UTF-8; None if RE2 has no such pattern or it is too large."""
    try:
        return re2.compile(_translated(written).encode(), _OPTIONS)
    except (re2.error, UnicodeEncodeError):
        return None


def _translated(written: str) -> str:
    pieces: list[str] = []
    within = False  # a class, where an opening bracket is a character
    for piece in _PIECES.finditer(written):
        text, code, named, escaped = piece[0], piece[1], piece[2], piece[3]
        if code is not None:
            text = rf"\x{{{code}}}"
        elif named is not None:
            name = named.rpartition("=")[2]
            text = rf"{text[:2]}{{{_CATEGORIES.get(name, name)}}}"
        elif escaped == "s":
            text = _SPACE if within else f"[{_SPACE}]"
        elif escaped == "S":
            text = _NO_SPACE if within else f"[{_NO_SPACE}]"
        elif escaped == "_":
            text = "_"
        elif within and text.startswith("["):
            text = "\\" + text
        elif text.startswith("[") or text == "]":
            within = text != "]"
        pieces.append(text)
    return "".join(pieces)

"""What a server or its operator publishes, by kind: where it is looked for, and what it says in words.

A page is the operator's own if its address was named, else what lies at ocserve's paths. It may be JSON, whose leaves
are then its words, or HTML.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

PATHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "privacy": ("/privacy",),
        "retention": ("/privacy",),
        "pricing": ("/pricing",),
        "status": ("/status",),
        "terms": ("/support",),
        "security": ("/privacy",),
        "support": ("/support", "/privacy"),
        "policy": ("/policy",),
        "limits": ("/limits",),
        "reference": ("/docs", "/reference"),
    }
)
ACCEPT: Mapping[str, str] = MappingProxyType({"accept": "application/json, */*;q=0.5"})
_SHOWN = 160


@dataclass(frozen=True, slots=True)
class Page:
    """One published page. `json` is None for one that is not JSON; `words` has a line for each leaf of JSON."""

    address: str
    json: Any
    words: str

    @staticmethod
    def of(address: str, text: str) -> Page:
        """The page of what was sent."""
        try:
            content = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeEncodeError):
            bare = re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", " ", text)
            return Page(address, None, " ".join(html.unescape(bare).split()))
        return Page(address, content, "\n".join(_leaves(content, "")))

    def quote(self, *patterns: str) -> str | None:
        """What it says where the patterns match, of each a few words; None unless all do."""
        found = [re.search(pattern, self.words, re.IGNORECASE) for pattern in patterns]
        if not all(found):
            return None
        quotes = []
        for start in sorted({match.start() for match in found if match is not None}):
            begin = max(self.words.rfind("\n", 0, start), start - _SHOWN // 2 - 1) + 1
            quotes.append(self.words[begin : begin + _SHOWN].split("\n")[0].strip())
        return " … ".join(dict.fromkeys(quotes))


def _leaves(value: Any, name: str) -> Iterator[str]:
    """A line for each value that says something. What is null or empty is not said."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and not all(isinstance(each, str | int | float) for each in value):
        for inner in value:
            yield from _leaves(inner, name)
    elif value not in (None, "", []):
        told = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield f"{name}: {' '.join(told.split())}"

"""Structs that may first be decoded in several threads at once.

msgspec works out what a Struct's fields are when the first text is decoded into it, and is not safe there: a second
thread that comes meanwhile finds half of it and the process ends with SIGSEGV (0.22). Who is imported is alone, so that
the fields of whatever comes from a file, a child process or another server are worked out at the import.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

_Kind = TypeVar("_Kind", bound=type[msgspec.Struct])


def resolved(kind: _Kind) -> _Kind:
    """Decorates a Struct, so that any thread may decode into it, and into what it is made of."""
    msgspec.json.Decoder(kind)
    return kind

"""What a probe finds: a text on success, `Fault` where the server is wrong, `Unproven` where no request can tell.

Exception
├── Fault        the server does not do what the item asks
│   └── Refused  it answered with an error status
├── Unsaid       nothing that is published says it, so the operator has to
└── Unproven     this server, or this run, gives no way to find out
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Status = Literal["pass", "fail", "operator", "not_provable"]

_LONGEST = 400


class Fault(Exception):
    """The server fails; the text says how."""


class Unsaid(Exception):
    """Nothing published says it; the text says what was looked for. An item that a request has to prove fails."""


class Unproven(Exception):
    """Neither pass nor failure; the text says why."""


class Refused(Fault):
    """An error status where an answer was due. `error` is its error object, empty if it sent none."""

    def __init__(self, what: str, status: int, error: dict[str, Any], headers: dict[str, str]) -> None:
        named = [f"{key} {clean(error[key], 60)}" for key in ("code", "param") if error.get(key) is not None]
        super().__init__(", ".join([f"{what} was refused: status {status}", *named]))
        self.status = status
        self.error = error
        self.headers = headers


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What one probe found. `requests` are ids of requests it sent, `at` when it ended, UTC; `took_s` seconds."""

    probe: str
    status: Status
    evidence: str
    requests: tuple[str, ...] = ()
    at: str
    took_s: float


def clean(value: object, longest: int = _LONGEST) -> str:
    """Text from a server as it may be printed: no control characters, not endless."""
    text = "".join(character if character.isprintable() else "�" for character in str(value))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def expect(condition: object, otherwise: str) -> None:
    """Raise `Fault(otherwise)` unless `condition` holds."""
    if not condition:
        raise Fault(otherwise)

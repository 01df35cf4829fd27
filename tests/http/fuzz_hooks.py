"""What schemathesis is told of this server: loaded by it as hooks, in its own process."""

from __future__ import annotations

import re
import uuid
from typing import Any

import schemathesis

_KEY = re.compile(r"[!-~]{1,255}")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """JSON Schema calls 16.0 an integer, this server and most others do not: such numbers are sent as 16."""
    return _whole(body)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """An Idempotency-Key names one request: each gets its own, or nearly all would be refused as misuse of one."""
    given = (case.headers or {}).get("Idempotency-Key")
    if isinstance(given, str) and _KEY.fullmatch(given):
        case.headers["Idempotency-Key"] = uuid.uuid4().hex


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return value

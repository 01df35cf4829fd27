"""Whole JSON answers as ASGI messages. The one place that turns an error into a status, headers and a body."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from starlette.types import Send

from ocserve.errors import ErrorInfo, InsufficientQuota

Header = tuple[bytes, bytes]

_LONGEST_WAIT_S = 120  # nothing is promised for later: a client that obeyed a longer wait would find no place kept


async def json(send: Send, status: int, body: bytes, headers: Sequence[Header] = ()) -> None:
    """Send `body`, which is JSON already."""
    await whole(send, status, "application/json", body, headers)


async def whole(send: Send, status: int, media_type: str, body: bytes, headers: Sequence[Header] = ()) -> None:
    """Send `body`, which is of `media_type`."""
    lines = [(b"content-type", media_type.encode()), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


async def empty(send: Send, headers: Sequence[Header] = ()) -> None:
    """Send 204, which has no body."""
    await send({"type": "http.response.start", "status": 204, "headers": list(headers)})
    await send({"type": "http.response.body"})


async def error(send: Send, info: ErrorInfo, render: Callable[[ErrorInfo], bytes]) -> None:
    """Send `info` in the shape that `render` gives it."""
    await json(send, info.status, render(info), error_headers(info))


def error_headers(info: ErrorInfo) -> list[Header]:
    """What an error says in headers. Clients obey `Retry-After` in whole seconds; `retry-after-ms` is finer."""
    headers: list[Header] = []
    if info.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if info.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(info.retry_after_s))))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(info.retry_after_s * 1000)))
    if _is_final(info):  # the usual SDKs would try again by themselves, some of them after days
        headers.append((b"x-should-retry", b"false"))
    return headers


def _is_final(info: ErrorInfo) -> bool:
    """Whether a client had better tell its user than wait: no waiting helps, or nobody waits so long."""
    return info.code == InsufficientQuota.code or (info.retry_after_s or 0) > _LONGEST_WAIT_S

"""Refuses requests whose framing or target two parsers could read differently (request smuggling), and huge headers.

The parser bounds headers while they are incomplete; what arrived complete in one read is measured here.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.errors import HeadersTooLarge, InvalidRequest
from ocserve.http.connection import MAX_HEADER_BYTES
from ocserve.http.exchange import header_values


class Framing:
    """Exactly one way to tell where the body ends, and a target that is a path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise HeadersTooLarge(f"The request headers exceed {MAX_HEADER_BYTES} bytes.")
        lengths = header_values(scope, b"content-length")
        if len(lengths) > 1 or (lengths and header_values(scope, b"transfer-encoding")):
            raise InvalidRequest(
                "The request states its length in two ways.", param="content-length", code="invalid_framing"
            )
        if not scope["path"].startswith("/"):
            raise InvalidRequest("The request target must be a path.", code="invalid_target")
        await self._app(scope, receive, send)

"""Refuses requests whose framing or target two parsers could read differently (request smuggling)."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.errors import InvalidRequest
from ocserve.http.exchange import header_values


class Framing:
    """Exactly one way to tell where the body ends, and a target that is a path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lengths = header_values(scope, b"content-length")
        if len(lengths) > 1 or (lengths and header_values(scope, b"transfer-encoding")):
            raise InvalidRequest(
                "The request states its length in two ways.", param="content-length", code="invalid_framing"
            )
        if not scope["path"].startswith("/"):
            raise InvalidRequest("The request target must be a path.", code="invalid_target")
        await self._app(scope, receive, send)

"""Gathers the body of a POST or PUT and refuses JSON that is nested too deeply, before any decoder sees it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.api import json_body
from ocserve.http.exchange import ClientGone, Exchange


class JsonDepth:
    """Leaves the whole body in the exchange; what can still be received is only the client's going."""

    def __init__(self, app: ASGIApp, max_depth: int) -> None:
        self._app = app
        self._max_depth = max_depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("POST", "PUT"):
            exchange = Exchange.of(scope)
            body = bytearray()
            while not exchange.body_complete:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
            exchange.body = bytes(body)
            json_body.check_shape(exchange.body, self._max_depth)
        await self._app(scope, receive, send)

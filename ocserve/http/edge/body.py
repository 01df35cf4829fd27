"""The body's limits: so many bytes, within so many seconds."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ocserve.errors import PayloadTooLarge, RequestTimeout
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange, header_values


class BodyLimits:
    """Counts what arrives and stops reading at the limit, whatever Content-Length said."""

    def __init__(self, app: ASGIApp, edge: Edge) -> None:
        self._app = app
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for value in header_values(scope, b"content-length"):
            if len(value) > 18 or int(value) > self._edge.now.most_body_bytes:
                raise self._too_large()
        deadline = asyncio.get_running_loop().time() + self._edge.now.body_timeout_s
        exchange = Exchange.of(scope)
        size = 0

        async def limited() -> Message:
            nonlocal size
            if exchange.body_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(
                    f"The request body did not arrive within {self._edge.now.body_timeout_s:g} s."
                ) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self._edge.now.most_body_bytes:
                    raise self._too_large()
                exchange.body_complete = not message.get("more_body", False)
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The request body exceeds the limit of {self._edge.now.most_body_bytes} bytes.")

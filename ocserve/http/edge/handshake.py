"""A WebSocket's opening handshake, as the request that it also is: every guard sees it, and refuses it over HTTP."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ocserve.http.route_table import SOCKET, RouteTable


class Handshake:
    """Gives a handshake the method of the routes that are sockets. Where there is none it is answered as a GET."""

    def __init__(self, app: ASGIApp, table: RouteTable) -> None:
        self._app = app
        self._table = table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self._app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"].startswith("http."):  # no upgrade: ASGI has other words for an answer here
                message = {"body": b"", **message, "type": f"websocket.{message['type']}"}
            await send(message)

        offered = self._table.match(SOCKET, scope["path"]).route is not None
        await self._app({**scope, "type": "http", "method": SOCKET if offered else "GET"}, receive, answer)
